"""Trains expert networks on images and stores their trajectories, which data sets are distilled from.
Example: `hf-effml train expert --recipe smoke --output_dir expert-smoke`
"""

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.trainers.expert import ExpertTrainer, ExpertTrainingArguments


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from hf_effml.distillation.bank.trajectories import TrajectoryBank
    from hf_effml.distillation.pad import DataCurriculum
    from hf_effml.distillation.real_images import RealImageData


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


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    script, schedule, args = parse_arguments(
        ExpertDataArguments,
        CurriculumArguments,
        ExpertTrainingArguments,
        argv=argv,
        program=__file__,
        description=__doc__,
    )
    from hf_effml.distillation.real_images import load_real_images

    data = load_real_images(
        script.data,
        image_size=script.image_size,
        num_channels=script.num_channels,
        whiten=script.whiten,
        classes=script.classes,
        validation_share=script.validation_share,
        resize_mode=script.resize_mode,
        max_train=script.max_train,
        seed=args.seed,
    )
    config = network_config(script, data)
    curriculum, order = curriculum_and_order(schedule, args, data, config)
    trainer = ExpertTrainer(config, args, data, curriculum, order)
    bank = trainer.train()
    if trainer.state.is_main_process:
        _report(bank, data, args.output_dir)
    return {
        "output_dir": args.output_dir,
        "num_experts": len(bank),
        "epochs": bank.epochs,
        "num_parameters": bank.num_parameters,
        "train_accuracy": bank.mean_accuracy("train"),
        "validation_accuracy": bank.mean_accuracy("validation"),
    }


def network_config(script: ExpertDataArguments, data: "RealImageData") -> "PreTrainedConfig":
    """Makes the configuration of the networks.

    Args:
        script (`ExpertDataArguments`):
            Which network.
        data ([`RealImageData`]):
            What it classifies.

    Returns:
        `PreTrainedConfig`: the configuration.

    Raises:
        ValueError: If the network cannot be described by a configuration.
    """
    from transformers import PreTrainedConfig

    from hf_effml.distillation.evaluation.students import student_by_name

    channels, height, width = data.train.images.shape[1:]
    names = dict(enumerate(data.label_names))
    named = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    config = student_by_name(script.student, (height, width), channels, data.num_labels, **named)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"`--student {script.student}` has no configuration that a bank could store. Choose another network."
        )
    return config


def curriculum_and_order(
    schedule: CurriculumArguments, args: ExpertTrainingArguments, data: "RealImageData", config: "PreTrainedConfig"
) -> "tuple[DataCurriculum, list[Tensor]] | tuple[None, None]":
    """Makes the curriculum, and measures how hard images are unless a file says so.

    Args:
        schedule (`CurriculumArguments`):
            Which curriculum.
        args ([`ExpertTrainingArguments`]):
            How experts are trained.
        data ([`RealImageData`]):
            The images.
        config (`PreTrainedConfig`):
            The networks.

    Returns:
        `tuple`: the curriculum and the order of the images; two times `None` without one.

    Raises:
        ValueError: If the options contradict each other.
    """
    if not schedule.curriculum:
        if schedule.order_file is not None:
            raise ValueError("`--order_file` is the order of a curriculum. Add `--curriculum`.")
        return None, None
    from hf_effml.distillation.difficulty import easy_to_hard, read_order_file, score_difficulty
    from hf_effml.distillation.pad import DataCurriculum

    if len(schedule.remove) % 2 or any(not epoch.is_integer() for epoch in schedule.remove[::2]):
        raise ValueError(
            f"`--remove` must be pairs of an epoch and a share, as `40 0.1 60 0.2`; got {schedule.remove}."
        )
    steps = tuple(zip(map(int, schedule.remove[::2]), schedule.remove[1::2], strict=True))
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


def _report(bank: "TrajectoryBank", data: "RealImageData", folder: str) -> None:
    print(f"{len(bank)} experts of {bank.num_parameters:,} parameters on {data.name}. Mean accuracy:")
    parts = {split: bank.mean_accuracy(split) for split in ("train", "validation")}
    for epoch in sorted({*(list(parts["train"])[:1]), *(list(parts["train"])[-1:])}):
        measured = [f"{each[epoch]:.1%} of {split} images" for split, each in parts.items() if epoch in each]
        print(f"  after epoch {epoch}: {', '.join(measured)}")
    print(f"Wrote {folder}. To load it:")
    print(f'TrajectoryBank.from_pretrained("{folder}")')


if __name__ == "__main__":
    sys.exit(run_script(main))
