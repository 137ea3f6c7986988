"""Trains expert networks and stores what their parameters were after every epoch, as distillation matches them."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from importlib.metadata import version
from typing import Any, Literal

import torch
from accelerate import PartialState
from huggingface_hub import CommitInfo
from torch import Tensor
from torch.optim import SGD
from transformers import PreTrainedConfig
from transformers.utils import logging

from hf_effml.distillation.bank.experts import ExpertRun, describe_data, some_images, trainable_config
from hf_effml.distillation.bank.files import write_expert
from hf_effml.distillation.bank.folder import BankFolder
from hf_effml.distillation.bank.trajectories import TrajectoryBank
from hf_effml.distillation.differentiable_augmentation import AugmentationSettings
from hf_effml.distillation.evaluation.training import accuracy
from hf_effml.distillation.flat_student import build_student, seed_from
from hf_effml.distillation.gsam import GSAM
from hf_effml.distillation.pad import DataCurriculum
from hf_effml.distillation.real_images import RealImageData, RealImages
from hf_effml.hub import write_card
from hf_effml.utils.processes import explaining_lost_processes
from hf_effml.utils.sources.class_labels import check_same_classes


__all__ = ["ExpertTrainer", "ExpertTrainingArguments"]

logger = logging.get_logger(__name__)

_MOST_MEASURED = 1000
# What a configuration says about where it came from and not about the network.
_ABOUT_THE_FILE = ("transformers_version", "_name_or_path")


@dataclass
class ExpertTrainingArguments:
    """How experts are trained, and what is kept of them.

    The defaults are those of MTT and FTD (https://huggingface.co/papers/2211.11004); DATM, PAD and EDF train for 100
    epochs.

    Args:
        output_dir (`str`, *optional*, defaults to `"expert-bank"`):
            Folder of the bank. A bank that is there already, made with the same settings, is continued.
        num_experts (`int`, *optional*, defaults to 100):
            Networks to train. A finished bank grows when this does.
        num_train_epochs (`int`, *optional*, defaults to 50):
            Epochs of each. What is matched ends at `max_start_epoch + expert_epochs`; later ones only serve for soft
            labels.
        train_batch_size (`int`, *optional*, defaults to 256):
            Images of a step.
        learning_rate (`float`, *optional*, defaults to 0.01):
            Constant learning rate of SGD.
        momentum (`float`, *optional*, defaults to 0.0):
            Momentum of SGD. Synthetic steps have none and imitate one that has badly.
        weight_decay (`float`, *optional*, defaults to 0.0):
            Weight decay of SGD.
        gsam (`bool`, *optional*, defaults to `True`):
            Whether to train by [`GSAM`], at twice the time of a step, instead of by plain SGD as MTT does.
        gsam_rho (`float`, *optional*, defaults to 0.01):
            See [`GSAM`].
        gsam_alpha (`float`, *optional*, defaults to 0.3):
            See [`GSAM`].
        augmentation (`str`, *optional*, defaults to `"color_crop_cutout_flip_scale_rotate"`):
            Operations, one of which is drawn for a batch; see [`AugmentationSettings`]. `"none"` for none.
        crop_ratio (`float`, *optional*, defaults to 0.125):
            Largest shift of `crop` as a share of the image.
        save_epochs (`list[str]` or `list[int]`, *optional*):
            Epochs to keep, as numbers or ranges such as `"0-22"`; all by default. 0 is before training. Matching needs
            those up to `max_start_epoch + expert_epochs`, soft labels the last one.
        save_dtype (`str`, *optional*, defaults to `"float32"`):
            `"float32"`, `"bfloat16"` or `"float16"`. Half precision makes a bank half as large, and its steps inexact.
        eval_epochs (`int`, *optional*, defaults to 1):
            Epochs from one measurement of the accuracy to the next, besides before and after training; 0 for none. It
            is that of at most 1000 training images and 1000 validation images.
        checkpoint_epochs (`int`, *optional*, defaults to 10):
            Epochs from one state that can be continued to the next; 0 for none. Finished experts are always kept.
        seed (`int`, *optional*, defaults to 0):
            Seed of weights, batches, augmentation and dropout.
        device (`str`, *optional*):
            Where to train. Defaults to the accelerator of the process, or the CPU.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to delete the bank in `output_dir` first, instead of continuing it.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to show no progress bar.

    Raises:
        ValueError: If a value is out of range.
    """

    output_dir: str = field(default="expert-bank", metadata={"help": "Folder of the bank."})
    num_experts: int = field(default=100, metadata={"help": "Networks to train; more vary what is matched."})
    num_train_epochs: int = field(default=50, metadata={"help": "Epochs of each."})
    train_batch_size: int = field(default=256, metadata={"help": "Images of a step."})
    learning_rate: float = field(default=0.01, metadata={"help": "Constant learning rate of SGD."})
    momentum: float = field(
        default=0.0, metadata={"help": "Momentum of SGD; synthetic steps, which have none, imitate it badly."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of SGD."})
    gsam: bool = field(default=True, metadata={"help": "Seek flat minima (GSAM), at twice the time of a step."})
    gsam_rho: float = field(default=0.01, metadata={"help": "How far away GSAM takes its second gradient."})
    gsam_alpha: float = field(default=0.3, metadata={"help": "How much GSAM takes away of what is orthogonal to it."})
    augmentation: str = field(
        default="color_crop_cutout_flip_scale_rotate",
        metadata={"help": "Operations to draw from; none for none."},
    )
    crop_ratio: float = field(default=0.125, metadata={"help": "Largest shift of `crop`, as a share of the image."})
    save_epochs: list[str] | None = field(
        default=None, metadata={"help": "Epochs to keep, such as `0-22 50`; all if left out. 0 is before training."}
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Type on the disk."},
    )
    eval_epochs: int = field(default=1, metadata={"help": "Epochs from one measurement to the next; 0 for none."})
    checkpoint_epochs: int = field(
        default=10, metadata={"help": "Epochs from one state to go on from to the next; 0 for none."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, batches and augmentation."})
    device: str | None = field(
        default=None, metadata={"help": "Where to train, such as cpu or cuda; the best there is."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the bank in output_dir first, instead of going on with it."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress bar."})

    def __post_init__(self) -> None:
        least = {
            "num_experts": 1,
            "num_train_epochs": 1,
            "train_batch_size": 1,
            "eval_epochs": 0,
            "checkpoint_epochs": 0,
            "momentum": 0,
            "weight_decay": 0,
            "gsam_rho": 0,
            "gsam_alpha": 0,
        }
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"`{name}` must be at least {value}; got {getattr(self, name)}.")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive; got {self.learning_rate}.")
        if self.save_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"`save_dtype` must be float32, bfloat16 or float16; got {self.save_dtype!r}.")
        kept = self.kept_epochs
        if not kept or kept[0] < 0 or kept[-1] > self.num_train_epochs:
            raise ValueError(
                f"`save_epochs` must be from 0 to `num_train_epochs` {self.num_train_epochs}; got {self.save_epochs}."
            )
        self.augmentation_settings  # noqa: B018  (its errors belong here)

    @property
    def kept_epochs(self) -> list[int]:
        """The epochs whose parameters are stored, ascending."""
        if self.save_epochs is None:
            return list(range(self.num_train_epochs + 1))
        return sorted({epoch for part in self.save_epochs for epoch in _epochs(str(part))})

    @property
    def augmentation_settings(self) -> AugmentationSettings:
        """What images are changed by."""
        return AugmentationSettings(self.augmentation, crop_ratio=self.crop_ratio)


class ExpertTrainer:
    """Trains the experts of a bank of trajectories (https://huggingface.co/papers/2203.11932).

    Experts have nothing to do with each other. Started in several processes, by `torchrun` or `accelerate launch`,
    each process trains some of them and writes their files, into a folder that all of them see. The bank is that of
    one process, to the last bit if they compute alike. Training that was cut off goes on where it was.

    Args:
        student_config (`PreTrainedConfig` or `Mapping`):
            Configuration of the networks: a [`ConvNetConfig`], or that of any image classifier of transformers or
            timm.
        args ([`ExpertTrainingArguments`]):
            How to train.
        data ([`RealImageData`]):
            What to train on.
        curriculum ([`DataCurriculum`], *optional*):
            Which images an epoch shows, by their difficulty (https://huggingface.co/papers/2408.03360). All by
            default.
        order (`Sequence[Tensor]`, *optional*):
            For every class the positions of its images, easy ones first; the curriculum needs it. See
            [`~hf_effml.distillation.difficulty.easy_to_hard`].

    Raises:
        ValueError: If the parts do not fit together.

    Example:

    ```python
    >>> from hf_effml import ConvNetConfig
    >>> from hf_effml.distillation.real_images import load_real_images
    >>> from hf_effml.trainers.expert import ExpertTrainer, ExpertTrainingArguments

    >>> data = load_real_images("digits")
    >>> config = ConvNetConfig(image_size=8, num_channels=1, depth=2, hidden_size=8, num_labels=10)
    >>> args = ExpertTrainingArguments("digits-bank", num_experts=2, num_train_epochs=3, disable_tqdm=True)
    >>> bank = ExpertTrainer(config, args, data).train()
    >>> len(bank), bank.epochs
    (2, [0, 1, 2, 3])
    ```
    """

    def __init__(
        self,
        student_config: PreTrainedConfig | Mapping[str, Any],
        args: ExpertTrainingArguments,
        data: RealImageData,
        curriculum: DataCurriculum | None = None,
        order: Sequence[Tensor] | None = None,
    ):
        if (curriculum is None) != (order is None):
            raise ValueError(
                "A `curriculum` needs an `order` of the images by difficulty, and an `order` a `curriculum`; only one "
                "of them is given."
            )
        if curriculum is not None and order is not None:
            curriculum.validate(order, args.num_train_epochs, data.train.labels)
        self.args, self.data, self.curriculum, self.order = args, data, curriculum, order
        self.config = trainable_config(student_config, data.train)
        check_same_classes("`student_config` and `data`", self.config, data.label_names)
        self.state = _processes(args.device)
        self.device = _device(args.device, self.state)
        self.folder = BankFolder(args.output_dir, self._describe())

    def train(self, resume: bool = True) -> TrajectoryBank:
        """Trains the experts that are not there yet.

        Args:
            resume (`bool`, *optional*, defaults to `True`):
                Whether to go on with a bank that is in the folder already; `False` refuses to.

        Returns:
            [`TrajectoryBank`]: the bank.

        Raises:
            ValueError: If the folder holds a bank that was made with other settings; the message names them.
            RuntimeError: If an expert's loss is not finite any more, or another process has ended.
        """
        overwrite = self.args.overwrite_output_dir
        pending = self.folder.missing_experts(resume, overwrite)
        # Every process has looked before one of them writes, and starts when that is done.
        self._meet()
        if self.state.is_main_process:
            self.folder.prepare(overwrite)
            self.data.processor.save_pretrained(self.args.output_dir)
        self._meet()
        shares = [pending[process :: self.state.num_processes] for process in range(self.state.num_processes)]
        with self.folder.at_work(self.state.process_index):
            # Whoever looks for the others finds all of them at work.
            self._meet()
            try:
                self._train_all(shares[self.state.process_index])
            except KeyboardInterrupt as error:
                error.add_note(f"The same command goes on with the experts in `{self.args.output_dir}`.")
                raise
            self.folder.finish(shares)
        if self.state.is_main_process:
            write_card(self.args.output_dir)
        return TrajectoryBank.from_pretrained(self.args.output_dir)

    def _meet(self) -> None:
        with explaining_lost_processes("for all to start"):
            self.state.wait_for_everyone()

    def _train_all(self, mine: Sequence[int]) -> None:
        train = self.data.train.to(self.device)
        parts = {name: images.to(self.device) for name, images in self._evaluated().items()}
        bar = logging.tqdm(
            total=len(mine) * self.args.num_train_epochs,
            desc=f"{len(mine)} experts",
            unit="epoch",
            disable=self.args.disable_tqdm or not (self.state.is_main_process and mine),
        )
        with bar:
            for number in mine:
                self._train_one(number, train, parts, bar)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Uploads the bank with its card.

        Args:
            repo_id (`str`):
                Data set repository on the Hub.
            kwargs:
                See [`TrajectoryBank.push_to_hub`].

        Returns:
            `huggingface_hub.CommitInfo`: the commit.
        """
        return TrajectoryBank.from_pretrained(self.args.output_dir).push_to_hub(repo_id, **kwargs)

    def _describe(self) -> dict[str, Any]:
        """What becomes `bank.json`."""
        args, data = self.args, self.data
        training = {
            "optimizer": "gsam" if args.gsam else "sgd",
            "learning_rate": args.learning_rate,
            "momentum": args.momentum,
            "weight_decay": args.weight_decay,
            "batch_size": args.train_batch_size,
            "epochs": args.num_train_epochs,
        }
        if args.gsam:
            training |= {"gsam_rho": args.gsam_rho, "gsam_alpha": args.gsam_alpha}
        parameters = build_student(self.config).named_parameters()
        return {
            "num_experts": args.num_experts,
            "student": {key: value for key, value in self.config.to_dict().items() if key not in _ABOUT_THE_FILE},
            "parameters": [{"name": name, "shape": list(value.shape)} for name, value in parameters],
            "epochs": args.kept_epochs,
            "dtype": args.save_dtype,
            "seed": args.seed,
            "dataset": describe_data(data),
            "preprocessing": data.processor.fingerprint,
            "training": training,
            "augmentation": asdict(args.augmentation_settings) if args.augmentation_settings.operations else None,
            "curriculum": self._describe_curriculum(),
            "measured_images": {name: len(images) for name, images in self._evaluated().items()},
            "versions": {name: version(name) for name in ("torch", "transformers", "hf-effml")},
        }

    def _describe_curriculum(self) -> dict[str, Any] | None:
        if self.curriculum is None or self.order is None:
            return None
        digest = blake2b(digest_size=8)
        for row in self.order:
            digest.update(torch.as_tensor(row).cpu().numpy().tobytes() + b"|")
        return {**self.curriculum.to_dict(), "order": digest.hexdigest()}

    def _evaluated(self) -> dict[str, RealImages]:
        """The images that accuracy is measured on, the same for all experts."""
        splits = {"train": self.data.train, "validation": self.data.validation} if self.args.eval_epochs else {}
        return {
            name: some_images(images, _MOST_MEASURED, seed_from(self.args.seed, "evaluated", name))
            for name, images in splits.items()
            if images is not None and len(images)
        }

    def _train_one(self, number: int, train: RealImages, parts: dict[str, RealImages], bar: Any) -> None:
        args, unfinished = self.args, self.folder.unfinished(number)
        run = self._new_run(number)
        if unfinished.exists():
            run.load(unfinished)
            bar.update(run.epoch)
        else:
            run.record(**self._accuracies(run, parts))
        while run.epoch < args.num_train_epochs:
            loss = run.train_epoch(train, self._shown(run.epoch))
            if not math.isfinite(loss):
                raise RuntimeError(
                    f"The loss of expert {number} is {loss} in epoch {run.epoch}. Lower `learning_rate`, now "
                    f"{args.learning_rate}."
                )
            measured = {"loss": loss, **self._accuracies(run, parts)}
            run.record(**measured)
            if args.checkpoint_epochs and run.epoch % args.checkpoint_epochs == 0:
                run.save(unfinished, self.folder.settings)
            bar.set_postfix(expert=number, **{k: f"{v:.3f}" for k, v in measured.items()}, refresh=False)
            bar.update()
        trajectory = torch.stack(run.trajectory).to(getattr(torch, args.save_dtype))
        write_expert(self.args.output_dir, number, trajectory, self.folder.metadata, run.history)
        unfinished.unlink(missing_ok=True)

    def _new_run(self, number: int) -> ExpertRun:
        args, seed = self.args, seed_from(self.args.seed, "expert", number)
        module = build_student(self.config, seed_from(seed, "weights")).to(self.device)
        sgd: dict[str, Any] = {"lr": args.learning_rate, "momentum": args.momentum, "weight_decay": args.weight_decay}
        if args.gsam:
            optimizer = GSAM(module.parameters(), rho=args.gsam_rho, alpha=args.gsam_alpha, module=module, **sgd)
        else:
            optimizer = SGD(module.parameters(), **sgd)
        return ExpertRun(module, optimizer, args.augmentation_settings, args.train_batch_size, args.kept_epochs, seed)

    def _shown(self, epoch: int) -> Tensor:
        if self.curriculum is None or self.order is None:
            return torch.arange(len(self.data.train))
        return self.curriculum.indices(self.order, epoch)

    def _accuracies(self, run: ExpertRun, parts: dict[str, RealImages]) -> dict[str, float]:
        if not parts or (run.epoch % self.args.eval_epochs and run.epoch != self.args.num_train_epochs):
            return {}
        batch = self.args.train_batch_size
        return {f"{name}_accuracy": accuracy(run.module, images, batch) for name, images in parts.items()}


def _epochs(text: str) -> range:
    """The epochs that `3` or `0-22` stands for."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if match is None:
        raise ValueError(f"`save_epochs` must be epochs or ranges of them, such as `0-22 50`; got `{text}`.")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _processes(device: str | None) -> PartialState:
    """The processes that share the work; on CPUs they only know of each other when they are told to compute there."""
    cpu = not torch.accelerator.is_available() if device is None else torch.device(device).type == "cpu"
    state = PartialState(cpu=cpu)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > state.num_processes:
        raise ValueError(
            f"{started} processes were started, and on `{state.device}` each would train all experts into one folder. "
            "Start one process, or add `--device cpu`."
        )
    return state


def _device(name: str | None, state: PartialState) -> torch.device:
    """The device asked for; where each process has its own of that kind, that one."""
    device = state.device if name is None else torch.device(name)
    return state.device if device.index is None and device.type == state.device.type else device
