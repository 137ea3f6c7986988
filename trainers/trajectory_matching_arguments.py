"""How to distil by matching trajectories: the arguments that all methods share, and what they must not be."""

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from hf_effml.distillation.evaluation.protocols import get_protocol
from hf_effml.distillation.matching import MatchingSettings

from .arguments import EffMLTrainingArguments


__all__ = ["TrajectoryMatchingTrainingArguments"]


@dataclass
class TrajectoryMatchingTrainingArguments(EffMLTrainingArguments):
    """How to distil; what is not said here is as in [`~transformers.TrainingArguments`].

    A step matches `per_device_train_batch_size` segments of experts' trajectories on every process. The papers match
    one.

    Args:
        syn_steps (`int`, *optional*, defaults to 80):
            Steps that the student takes on the synthetic images, "N" in the papers.
        batch_syn (`int`, *optional*):
            Synthetic images in each of them; all if unset.
        expert_epochs (`int`, *optional*, defaults to 2):
            Epochs of the expert that those steps are to equal, "M".
        min_start_epoch (`int`, *optional*, defaults to 0):
            First epoch of the experts that a segment starts at, "T-".
        max_start_epoch (`int`, *optional*, defaults to 20):
            Segments start before this epoch, "T+".
        initial_max_start_epoch (`int`, *optional*):
            Where `max_start_epoch` stands at the first step, "T"; it grows evenly over `expansion_steps`.
        expansion_steps (`int`, *optional*, defaults to 1000):
            Steps of that growth.
        mask (`"none"`, `"depth"` or `"loss"`, *optional*, defaults to `"none"`):
            Which parameters the loss leaves out.
        drop_ratio (`float`, *optional*, defaults to 0.0):
            Share of the parameters that it leaves out.
        gradient_mode (`"exact"` or `"first_order"`, *optional*, defaults to `"exact"`):
            `"first_order"` is TESLA's approximation.
        loss_threshold (`float`, *optional*, defaults to 1.0):
            Segments with a larger loss contribute nothing; a step without any other changes nothing.
        lr_img, lr_y, lr_lr (`float`, *optional*, default to 100, 2 and 1e-5):
            Learning rates of images, soft labels and the students' step size.
        momentum_img, momentum_y, momentum_lr (`float`, *optional*, default to 0.5, 0.9 and 0.5):
            Their momenta.
        min_lr (`float`, *optional*, defaults to 1e-6):
            The students' step size is kept at least that large.
        max_bad_steps (`int`, *optional*, defaults to 10):
            Training ends with an error after so many steps in a row whose loss is not finite.
        compile (`bool`, *optional*, defaults to `False`):
            Compile the derivatives of the student: a minute or two at the start, faster steps from then on.
        picture_steps (`int`, *optional*, defaults to 0):
            Steps from one picture of the images to the next, in `output_dir/pictures`; 0 draws none.
        eval_protocol (`str`, *optional*, defaults to `"tm-short"`):
            How an evaluation trains a fresh student on the set: `"tm"`, `"tm-short"` or `"hard"`.
        eval_epochs (`int`, *optional*):
            Epochs of that training, in place of the protocol's.
        eval_seeds (`int`, *optional*, defaults to 1):
            Students that an evaluation trains and averages over.
        allow_preprocessing_mismatch (`bool`, *optional*, defaults to `False`):
            Go on, with a warning, where the set's images were preprocessed in another way than those of the experts.
    """

    rarely_changed: ClassVar[tuple[str, ...]] = (
        "picture_steps",
        "expansion_steps",
        "gradient_mode",
        "lr_lr",
        "momentum_img",
        "momentum_y",
        "momentum_lr",
        "min_lr",
        "max_bad_steps",
        "eval_protocol",
        "eval_epochs",
        "eval_seeds",
        "allow_preprocessing_mismatch",
    )

    syn_steps: int = field(default=80, metadata={"help": "Steps that the student takes on the synthetic images."})
    batch_syn: int | None = field(default=None, metadata={"help": "Synthetic images in each of them; all if unset."})
    expert_epochs: int = field(default=2, metadata={"help": "Epochs of the expert that those steps are to equal."})
    min_start_epoch: int = field(default=0, metadata={"help": "First epoch of the experts that is matched."})
    max_start_epoch: int = field(default=20, metadata={"help": "Segments start before this epoch."})
    initial_max_start_epoch: int | None = field(
        default=None, metadata={"help": "Where max_start_epoch stands at the first step; it grows from there."}
    )
    expansion_steps: int = field(default=1000, metadata={"help": "Steps of that growth."})
    mask: str = field(default="none", metadata={"help": "Parameters to leave out: none, depth (PAD) or loss (EDF)."})
    drop_ratio: float = field(default=0.0, metadata={"help": "Share of the parameters that the loss leaves out."})
    gradient_mode: str = field(default="exact", metadata={"help": "exact, or first_order: TESLA's approximation."})
    loss_threshold: float = field(default=1.0, metadata={"help": "Segments with a larger loss contribute nothing."})
    lr_img: float = field(default=100.0, metadata={"help": "Learning rate of the images."})
    lr_y: float = field(default=2.0, metadata={"help": "Learning rate of the soft labels."})
    lr_lr: float = field(default=1e-5, metadata={"help": "Learning rate of the students' step size."})
    momentum_img: float = field(default=0.5, metadata={"help": "Momentum of the images."})
    momentum_y: float = field(default=0.9, metadata={"help": "Momentum of the soft labels."})
    momentum_lr: float = field(default=0.5, metadata={"help": "Momentum of the students' step size."})
    min_lr: float = field(default=1e-6, metadata={"help": "Least step size of the students."})
    max_bad_steps: int = field(default=10, metadata={"help": "Stop after so many steps in a row without a loss."})
    compile: bool = field(default=False, metadata={"help": "Compile the student's derivatives."})
    picture_steps: int = field(default=0, metadata={"help": "Draw the images every so many steps; 0 for never."})
    eval_protocol: str = field(default="tm-short", metadata={"help": "How evaluations train a student."})
    eval_epochs: int | None = field(default=None, metadata={"help": "Epochs of that, in place of the protocol's."})
    eval_seeds: int = field(default=1, metadata={"help": "Students that an evaluation averages over."})

    allow_preprocessing_mismatch: bool = field(
        default=False, metadata={"help": "Go on where the experts' images were preprocessed in another way."}
    )

    # What the algorithm prescribes or a set as a model needs; anything else is refused below.
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Segments per step and process."})
    max_steps: int = field(default=10_000, metadata={"help": "Number of steps."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Must stay 0: gradients are not clipped."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Must stay constant."})
    train_sampling_strategy: str = field(default="sequential", metadata={"help": "Must stay sequential."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false."})
    logging_steps: float = field(default=50, metadata={"help": "Steps from one line of the log to the next."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available, metadata={"help": "Keep segments in pinned memory."}
    )

    def __post_init__(self) -> None:
        for name, needed, why in _PRESCRIBED:
            value = getattr(self, name)
            value = getattr(value, "value", value)
            if value != needed:
                raise ValueError(f"`{name}` must stay {needed!r} for trajectory matching; got {value!r}. {why}")
        if self.max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1; got {self.max_steps}. There are no epochs here.")
        for name in ("lr_img", "lr_y", "lr_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0; got {getattr(self, name)}.")
        if not self.min_lr > 0:
            raise ValueError(f"`min_lr` must be positive; got {self.min_lr}. Students go backwards otherwise.")
        for name in ("momentum_img", "momentum_y", "momentum_lr"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be from 0 to below 1; got {getattr(self, name)}.")
        for name in ("expansion_steps", "max_bad_steps", "eval_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {getattr(self, name)}.")
        self._check_starts()
        self.matching()
        self.protocol()
        if self.load_best_model_at_end and self.metric_for_best_model is None:  # type: ignore[has-type]
            # Evaluations give no loss, which is what the base class looks at.
            self.metric_for_best_model = "accuracy"
        # Without an accelerator processes only know of each other when they are told to compute on CPUs.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()

    def _check_starts(self) -> None:
        if not 0 <= self.min_start_epoch < self.max_start_epoch:
            raise ValueError(
                f"`min_start_epoch` must be from 0 to below `max_start_epoch`, {self.max_start_epoch}; got "
                f"{self.min_start_epoch}."
            )
        first = self.initial_max_start_epoch
        if first is not None and not self.min_start_epoch < first <= self.max_start_epoch:
            raise ValueError(
                f"`initial_max_start_epoch` must be above `min_start_epoch`, {self.min_start_epoch}, and at most "
                f"`max_start_epoch`, {self.max_start_epoch}; got {first}."
            )

    def matching(self, **others: Any) -> MatchingSettings:
        """Makes the settings of the matching loss.

        Args:
            others (`dict`, *optional*):
                Fields of [`~hf_effml.distillation.matching.MatchingSettings`] that are no arguments.

        Returns:
            [`~hf_effml.distillation.matching.MatchingSettings`]

        Raises:
            ValueError: If a value is impossible.
        """
        names = ("syn_steps", "batch_syn", "mask", "gradient_mode", "loss_threshold")
        # A method may leave the ratio open until it sees the set.
        others["drop_ratio"] = self.drop_ratio or 0.0
        return MatchingSettings(**{name: getattr(self, name) for name in names}, **others)

    def protocol(self) -> Any:
        """How evaluations train a student.

        Returns:
            [`~hf_effml.distillation.evaluation.protocols.EvaluationProtocol`]
        """
        return get_protocol(self.eval_protocol, **({"epochs": self.eval_epochs} if self.eval_epochs else {}))

    def last_start_epoch(self, step: int) -> int:
        """Segments of a step start before this epoch of the experts.

        Args:
            step (`int`):
                Number of the step, from 0.

        Returns:
            `int`: the epoch.
        """
        if self.initial_max_start_epoch is None:
            return self.max_start_epoch
        growth = (self.max_start_epoch - self.initial_max_start_epoch) * step / self.expansion_steps
        return min(self.max_start_epoch, self.initial_max_start_epoch + int(growth))


_PRESCRIBED = (
    ("max_grad_norm", 0, "Clipped gradients give other images."),
    ("lr_scheduler_type", "constant", "A falling learning rate gives other images; set `lr_img`, `lr_y` and `lr_lr`."),
    ("learning_rate", 5e-5, "Set `lr_img`, `lr_y` and `lr_lr`; nothing reads this one."),
    ("weight_decay", 0, "Images and labels do not decay."),
    ("fp16", False, "Half precision has no range for second derivatives; `bf16` is possible, float32 is safer."),
    ("train_sampling_strategy", "sequential", "Segments are drawn from `seed` and the number of the step alone."),
    ("remove_unused_columns", False, "Segments are no columns of the model."),
    ("ignore_data_skip", False, "A run that goes on would match the first segments again."),
    ("torch_compile", False, "Use `compile`, which compiles the derivatives of the student."),
)
