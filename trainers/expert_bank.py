"""A bank of experts from plain settings: the images, the network and the curriculum by name, then the training."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedConfig

from hf_effml.distillation.bank.trajectories import TrajectoryBank
from hf_effml.distillation.difficulty import easy_to_hard, read_order_file, score_difficulty
from hf_effml.distillation.evaluation.students import student_by_name
from hf_effml.distillation.pad import DataCurriculum
from hf_effml.distillation.real_images import RealImageData, load_real_images

from .expert import ExpertTrainer, ExpertTrainingArguments


__all__ = ["CurriculumArguments", "ExpertDataArguments", "make_bank_trainer", "train_bank"]


@dataclass
class ExpertDataArguments:
    """What to train, and on what."""

    data: str = field(default="digits", metadata={"help": "digits, a folder, or the id of a data set on the Hub."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the images; as they are if left out."})
    num_channels: int | None = field(
        default=None, metadata={"help": "3 for colours, 1 for grey; 1 for digits and else 3 if left out."}
    )
    resize_mode: Literal["crop", "squash"] = field(default="crop", metadata={"help": "How images become squares."})
    whiten: bool = field(default=True, metadata={"help": "ZCA whitening; otherwise mean and standard deviation."})
    classes: list[int] | None = field(
        default=None, metadata={"help": "Numbers of the classes to keep; all if left out."}
    )
    validation_share: float = field(default=0.1, metadata={"help": "Share of the training images to measure on."})
    max_train: int | None = field(default=None, metadata={"help": "Most training images, validation included."})
    student: str = field(
        default="convnet",
        metadata={"help": "convnet, convnet-d2-w16, resnet18, timm:NAME, folder or Hub id."},
    )


@dataclass
class CurriculumArguments:
    """Which images an epoch shows (PAD); all of them without --curriculum."""

    curriculum: bool = field(default=False, metadata={"help": "Show easy images first and drop the easiest later."})
    initial_ratio: float = field(default=0.75, metadata={"help": "Share of every class that epoch 0 shows."})
    add_end_epoch: int = field(default=20, metadata={"help": "Epoch from which all images are shown."})
    remove: list[float] = field(
        default_factory=lambda: [40, 0.1, 60, 0.2],
        metadata={"help": "Epochs, each with the share of easy images dropped after it."},
    )
    difficulty: Literal["el2n", "grand", "loss", "entropy", "least_confidence", "margin"] = field(
        default="el2n", metadata={"help": "Difficulty."}
    )
    order_file: str | None = field(
        default=None, metadata={"help": "File of an order, easy to hard, to use instead of measuring difficulty."}
    )


def make_bank_trainer(
    images: ExpertDataArguments, schedule: CurriculumArguments, args: ExpertTrainingArguments
) -> ExpertTrainer:
    """Loads the images, measures their difficulty if need be, and makes the trainer.

    Args:
        images (`ExpertDataArguments`):
            Which images and which network.
        schedule (`CurriculumArguments`):
            Which curriculum, if any.
        args ([`ExpertTrainingArguments`]):
            How to train.

    Returns:
        [`ExpertTrainer`]

    Raises:
        ValueError: If the network cannot be stored, or options contradict each other.
    """
    options = {each.name: getattr(images, each.name) for each in fields(images)}
    student, name = options.pop("student"), options.pop("data")
    data = load_real_images(name, seed=args.seed, **options)
    config = _network_config(student, data)
    curriculum, order = _curriculum_and_order(schedule, args, data, config)
    return ExpertTrainer(config, args, data, curriculum, order)


def train_bank(settings: Mapping[str, Any], output_dir: str) -> TrajectoryBank:
    """Trains the experts of a recipe; what an earlier run has left is continued.

    Args:
        settings (`Mapping`):
            Fields of `ExpertDataArguments`, `CurriculumArguments` and [`ExpertTrainingArguments`], as a recipe of
            `hf-effml train expert` has them.
        output_dir (`str`):
            Folder of the bank, in place of the recipe's.

    Returns:
        [`TrajectoryBank`]
    """

    def taken(kind: type) -> dict[str, Any]:
        return {each.name: settings[each.name] for each in fields(kind) if each.name in settings}

    images, schedule = taken(ExpertDataArguments), taken(CurriculumArguments)
    args = ExpertTrainingArguments(**taken(ExpertTrainingArguments) | {"output_dir": output_dir})
    return make_bank_trainer(ExpertDataArguments(**images), CurriculumArguments(**schedule), args).train()


def _network_config(student: str, data: RealImageData) -> PreTrainedConfig:
    channels, height, width = data.train.images.shape[1:]
    names = dict(enumerate(data.label_names))
    named = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    config = student_by_name(student, (height, width), channels, data.num_labels, **named)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"`--student {student}` has no configuration that a bank could store. Choose another network."
        )
    return config


def _curriculum_and_order(
    schedule: CurriculumArguments, args: ExpertTrainingArguments, data: RealImageData, config: PreTrainedConfig
) -> tuple[DataCurriculum, list[Tensor]] | tuple[None, None]:
    if not schedule.curriculum:
        if schedule.order_file is not None:
            raise ValueError("`--order_file` is the order of a curriculum. Add `--curriculum`.")
        return None, None
    if len(schedule.remove) % 2 or any(not float(epoch).is_integer() for epoch in schedule.remove[::2]):
        raise ValueError(
            f"`--remove` must be pairs of an epoch and a share, as `40 0.1 60 0.2`; got {schedule.remove}."
        )
    steps = tuple(zip(map(int, schedule.remove[::2]), map(float, schedule.remove[1::2]), strict=True))
    curriculum = DataCurriculum(schedule.initial_ratio, schedule.add_end_epoch, steps)
    if schedule.order_file is not None:
        return curriculum, read_order_file(schedule.order_file, data.train.labels)
    scores = score_difficulty(
        data.train,
        config,
        schedule.difficulty,
        seed=args.seed,
        learning_rate=args.learning_rate,
        batch_size=args.train_batch_size,
        augmentation=args.augmentation_settings,
        device=args.device,
    )
    return curriculum, easy_to_hard(scores, data.train.labels, data.num_labels)
