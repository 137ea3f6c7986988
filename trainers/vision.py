"""What trainers of image models share: mixed labels, a moving average of weights, a frozen teacher."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_callback import TrainerControl, TrainerState

from hf_effml.utils.augmentation import MixupCollator
from hf_effml.utils.files import write_safetensors
from hf_effml.utils.image_data import aligned
from hf_effml.utils.model_kinds import check_task
from hf_effml.utils.sources.class_labels import check_same_classes
from hf_effml.vim.classification_loss import problem_type_of
from hf_effml.vim.configuration_vim import PROBLEM_TYPES

from .arguments import EffMLTrainingArguments
from .base import EffMLTrainer


AVERAGE_NAME = "weight_average.safetensors"


@dataclass
class VisionTrainingArguments(EffMLTrainingArguments):
    """How to train an image model; what is not said here is as in [`~transformers.TrainingArguments`].

    Args:
        ema_decay (`float`, *optional*):
            Keeps a moving average of the weights with this decay, 0.99996 in the Vim and R-MeeTo papers. The average
            is what evaluations see and what the model holds after training.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine_with_min_lr"`):
            A cosine over all steps.
        min_learning_rate (`float`, *optional*, defaults to 1e-5):
            Where that cosine ends; other schedules do not look at it.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Images are made from columns that no model takes, so none are removed.
        dataloader_pin_memory (`bool`, *optional*):
            Whether batches lie in pinned memory. Defaults to whether there is an accelerator.
        ddp_find_unused_parameters (`bool`, *optional*, defaults to `False`):
            Every parameter takes part in every step; searching for others costs time.
    """

    ema_decay: float | None = field(
        default=None, metadata={"help": "Evaluate and keep a moving average of the weights with this decay."}
    )
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Course of the learning rate."})
    min_learning_rate: float = field(default=1e-5, metadata={"help": "Where the cosine ends."})
    lr_scheduler_kwargs: dict | str | None = field(default=None, metadata={"help": "Options of that course."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Remove columns the model does not take."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available, metadata={"help": "Keep batches in pinned memory."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DDP search for parameters without a gradient."}
    )

    def __post_init__(self) -> None:
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be between 0 and 1; got {self.ema_decay}. Leave it out for none.")
        super().__post_init__()


class VisionTrainer(EffMLTrainer):
    """[`~transformers.Trainer`] for image models. Subclasses say which.

    Unless `compute_metrics` says otherwise, accuracy is measured; of several labels at once `f1` and the share of
    images with all labels right, of a regression `mse` and `mae`. A [`MixupCollator`] mixes training batches only. A
    data set with a method `set_epoch` is told the epoch. Images of [`load_image_data`] get the class numbers that the
    model has for the names of their classes.
    """

    loss_is_scaled_for_ga = False
    data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any):
        self._averaging = _AverageCallback()
        super().__init__(*args, **kwargs)
        for name in ("train_dataset", "eval_dataset"):
            setattr(self, name, self._with_own_classes(getattr(self, name)))
        problem = problem_type_of(self.model.config)
        if "compute_metrics" not in kwargs:
            self.compute_metrics: Any = METRICS[problem]
        own = self.args
        if isinstance(own, VisionTrainingArguments) and own.lr_scheduler_type == "cosine_with_min_lr":
            own.lr_scheduler_kwargs = own.lr_scheduler_kwargs or {"min_lr": own.min_learning_rate}
        # The loss is the mean of a batch, also where the model's `forward` takes further keywords.
        self.model_accepts_loss_kwargs = False
        mixes = isinstance(self.data_collator, MixupCollator)
        if problem != "single_label_classification" and (mixes or self.args.label_smoothing_factor):
            raise ValueError(
                f"{'A `MixupCollator`' if mixes else '`label_smoothing_factor`'} is for images of one class each; the "
                f"`problem_type` of the model is {problem!r}. Leave it out."
            )
        if self.args.label_smoothing_factor and mixes:
            raise ValueError(
                f"`label_smoothing_factor` must be 0 with a `MixupCollator`, which smooths labels itself; got "
                f"{self.args.label_smoothing_factor}. Pass `label_smoothing` to the collator."
            )
        self.add_callback(_EpochCallback(self.train_dataset))
        self.add_callback(self._averaging)

    @property
    def _average(self) -> "WeightAverage | None":
        return self._averaging.average

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Makes the batches of an evaluation; they are never mixed."""
        with self._without_mixup():
            return super().get_eval_dataloader(self._with_own_classes(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Makes the batches of a prediction; they are never mixed."""
        with self._without_mixup():
            return super().get_test_dataloader(self._with_own_classes(test_dataset))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains the model.

        Arguments and result are those of [`EffMLTrainer.train`].
        """
        resume_from_checkpoint = self.find_checkpoint(resume_from_checkpoint)
        decay = getattr(self.args, "ema_decay", None)
        if decay is not None:
            average = self._averaging.average = WeightAverage(self.model, decay)
            if resume_from_checkpoint:
                average.load(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates or predicts, during training with the averaged weights if there are any."""
        if self._average is None:
            return super().evaluation_loop(*args, **kwargs)
        with self._average.swapped_in(self.model):
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model and, during training, the moving average beside it.

        Args:
            output_dir (`str`, *optional*):
                Folder to write. Defaults to `args.output_dir`.
        """
        super().save_model(output_dir, _internal_call)
        if self._average is not None and self.args.should_save:
            self._average.save(output_dir or self.args.output_dir)

    def _with_own_classes(self, dataset: Any) -> Any:
        config = getattr(self.model, "config", None)
        return dataset if config is None else aligned(dataset, config)

    @contextmanager
    def _without_mixup(self) -> Iterator[None]:
        collator = self.data_collator
        if isinstance(collator, MixupCollator):
            self.data_collator = default_data_collator
        try:
            yield
        finally:
            self.data_collator = collator


@dataclass
class TaughtTrainingArguments(VisionTrainingArguments):
    """How to train an image model beside a frozen teacher.

    Args:
        teacher (`str`, *optional*, defaults to `"self"`):
            `"self"` is a frozen copy of the model as it comes, without what the method adds. Otherwise the folder or
            Hub id of an image classifier with the same classes, or `"none"`.
    """

    teacher: str = field(default="self", metadata={"help": '"self", the folder or Hub id of a teacher, or "none".'})


class TaughtTrainer(VisionTrainer):
    """A [`VisionTrainer`] of models that learn from labels and from a frozen teacher. Subclasses say which.

    Of several labels at once and of a regression, as `problem_type` of the model says, both losses are those of it.

    Evaluations report the cross-entropy alone. The teacher takes no part in saving, nor in the synchronisation of
    processes.

    Args:
        model (`nn.Module`):
            The model, PEFT around it or not.
        args ([`TaughtTrainingArguments`]):
            How to train; of the subclass's own class.
        teacher (`nn.Module`, *optional*):
            A loaded teacher, instead of the one that `args.teacher` names. It is frozen and put in evaluation mode.
        kwargs (`dict`, *optional*):
            As for [`~transformers.Trainer`].
    """

    _arguments: type[TaughtTrainingArguments] = TaughtTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TaughtTrainingArguments | None = None,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, self._arguments):
            raise TypeError(f"`args` must be `{self._arguments.__name__}`; got a `{type(args).__name__}`.")
        super().__init__(model, args, **kwargs)
        self._student = self._find_student()
        self.teacher = self._make_teacher(teacher)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Computes the mean loss of a batch; in evaluation mode it is the cross-entropy.

        Args:
            model (`nn.Module`):
                The model in training, maybe wrapped.
            inputs (`dict`):
                A batch.
            return_outputs (`bool`, *optional*, defaults to `False`):
                Also return what the model put out.
            num_items_in_batch (`int`, *optional*):
                Not needed: the loss is a mean.

        Returns:
            `Tensor`: the loss, or a tuple of it and the outputs.
        """
        compute = self._training_loss if model.training else self._classification_loss
        loss, outputs = compute(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def _classification_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        return super().compute_loss(model, inputs, return_outputs=True)

    def _training_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """The method's loss of a batch, and what the model put out."""
        raise NotImplementedError

    def _find_student(self) -> nn.Module:
        """What of the model a teacher is made from; raises `ValueError` if it is none for the method."""
        raise NotImplementedError

    def _check_teacher(self, teacher: nn.Module) -> None:
        """Raises `ValueError` if it cannot teach this model."""
        raise NotImplementedError

    def _make_plain(self, teacher: nn.Module) -> None:
        """Takes out of a copy of the student what the method added."""
        raise NotImplementedError

    def _make_teacher(self, teacher: nn.Module | None) -> nn.Module | None:
        if teacher is self.model:
            raise ValueError('The teacher is frozen and cannot be the model itself. Set `teacher="self"` in `args`.')
        if teacher is None:
            if self.args.teacher == "none":
                return None
            if self.args.teacher == "self":
                teacher = copy.deepcopy(self._student)
                self._make_plain(teacher)
            else:
                check_task(self.args.teacher, "AutoModelForImageClassification")
                teacher = AutoModelForImageClassification.from_pretrained(self.args.teacher)
        self._check_teacher(teacher)
        check_same_classes("Model and teacher", self._student.config, teacher.config)
        theirs, ours = problem_type_of(teacher.config), problem_type_of(self.model.config)
        if theirs != ours:
            raise ValueError(
                f"Teacher and model must agree in `problem_type`; got {theirs!r} and {ours!r}. Take the model that "
                'this one was made from, or `teacher="self"` in `args`.'
            )
        return teacher.to(self.args.device).eval().requires_grad_(False)


class WeightAverage:
    """Exponential moving average of a model's weights.

    Args:
        model (`nn.Module`):
            The model; the average starts from its weights.
        decay (`float`):
            Share of the old average that an update keeps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._update = get_ema_multi_avg_fn(decay)
        self.weights = {name: tensor.detach().clone() for name, tensor in self._of(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average a little towards the model's weights."""
        self._update(list(self.weights.values()), list(self._of(model).values()), None)

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Lends the averaged weights to the model for a block of code."""
        own = {name: tensor.detach().clone() for name, tensor in self._of(model).items()}
        self.copy_to(model)
        try:
            yield
        finally:
            _copy(own, self._of(model))

    def copy_to(self, model: nn.Module) -> None:
        """Gives the model the averaged weights for good."""
        _copy(self.weights, self._of(model))

    def save(self, folder: str | Path) -> None:
        """Writes the average into a checkpoint."""
        write_safetensors(Path(folder) / AVERAGE_NAME, self.weights)

    def load(self, folder: str | Path) -> None:
        """Reads the average of a checkpoint."""
        path = Path(folder) / AVERAGE_NAME
        if not path.exists():
            raise FileNotFoundError(
                f"`{folder}` holds no `{AVERAGE_NAME}`: it was trained without `ema_decay`. Leave `ema_decay` out or "
                "start anew."
            )
        weights = load_file(path)
        missing = sorted(self.weights.keys() - weights.keys())
        if missing:
            raise ValueError(
                f"`{path}` has no `{missing[0]}`: it is the average of another model, or of an earlier version. Start "
                "anew."
            )
        _copy(weights, self.weights)

    @staticmethod
    def _of(model: nn.Module) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Measures the share of images whose highest score is that of their class.

    Args:
        prediction (`EvalPrediction`):
            Scores and class numbers.

    Returns:
        `dict[str, float]`: the accuracy.
    """
    return {"accuracy": float((_scores(prediction).argmax(-1) == prediction.label_ids).mean())}


def label_f1(prediction: EvalPrediction) -> dict[str, float]:
    """Measures how well several labels at once are told: those whose score is above 0 count as given.

    Args:
        prediction (`EvalPrediction`):
            Scores and labels of shape `(images, num_labels)`.

    Returns:
        `dict[str, float]`: `f1` over all labels of all images, and `exact_match`, the share of images with all right.
    """
    given, true = _scores(prediction) > 0, prediction.label_ids > 0.5
    both = (given & true).sum()
    f1 = 2 * both / max(given.sum() + true.sum(), 1)
    return {"f1": float(f1), "exact_match": float((given == true).all(-1).mean())}


def distances(prediction: EvalPrediction) -> dict[str, float]:
    """Measures how far the outputs of a regression are from the numbers wanted.

    Args:
        prediction (`EvalPrediction`):
            Outputs and numbers.

    Returns:
        `dict[str, float]`: the mean squared distance `mse` and the mean absolute one `mae`.
    """
    outputs = _scores(prediction)
    off = outputs - prediction.label_ids.reshape(outputs.shape)
    return {"mse": float((off**2).mean()), "mae": float(abs(off).mean())}


METRICS = dict(zip(PROBLEM_TYPES, (accuracy, label_f1, distances), strict=True))


def _scores(prediction: EvalPrediction) -> Any:
    return prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


class _EpochCallback(TrainerCallback):
    """Tells the training data which epoch it is; accelerate does so in single-process runs only."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int(state.epoch or 0))


class _AverageCallback(TrainerCallback):
    """Keeps the moving average up to date during training and hands it to the model at the end."""

    def __init__(self) -> None:
        self.average: WeightAverage | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.average is not None:
            self.average.update(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.average is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.average.load(state.best_model_checkpoint)
        self.average.copy_to(kwargs["model"])
        self.average = None
