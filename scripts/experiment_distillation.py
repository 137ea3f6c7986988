"""Asks what distillation is worth beside real images, and whether PAD and EDF differ from plain matching at this size.

Example: `python scripts/experiment_distillation.py --recipe digits --output_dir experiments`
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_effml import (
    DataCurriculum,
    DistilledDatasetModel,
    EDFTrainer,
    EDFTrainingArguments,
    ExpertTrainer,
    ExpertTrainingArguments,
    PADTrainer,
    PADTrainingArguments,
    RealImageData,
    TrajectoryBank,
    TrajectoryMatchingTrainer,
    TrajectoryMatchingTrainingArguments,
    distilled_from_real,
    evaluate_distilled,
    load_real_images,
    score_difficulty,
)
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.distillation.difficulty import easy_to_hard
from hf_effml.distillation.evaluation.protocols import get_protocol
from hf_effml.distillation.evaluation.students import student_by_name
from hf_effml.utils.benchmark import describe_run
from hf_effml.utils.report import Column, Report


BASELINES = {
    "random_hard": "random real images, hard labels",
    "random": "random real images, soft labels of experts",
    "distilled": "where distillation starts: real images that experts know, soft labels",
}


@dataclass
class ExperimentArguments:
    """The data, the experts and the distillation; every seed has experts of its own."""

    output_dir: str = field(default="experiments", metadata={"help": "Folder for the table and the numbers."})
    name: str = field(default="distillation_digits", metadata={"help": "Name of the files."})
    data: str = field(default="digits", metadata={"help": "digits, a folder, or the id of a data set on the Hub."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the images; as they are if left out."})
    whiten: bool = field(default=False, metadata={"help": "ZCA whitening; otherwise mean and standard deviation."})
    max_train: int | None = field(default=None, metadata={"help": "Most training images, validation included."})
    max_test: int | None = field(default=None, metadata={"help": "Most test images."})
    student: str = field(default="convnet-d2-w16", metadata={"help": "Experts and students."})
    methods: list[str] = field(
        default_factory=lambda: ["DATM", "DATM, first order", "PAD", "EDF"], metadata={"help": "What to compare."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of everything."})
    num_experts: int = field(default=8, metadata={"help": "Experts of a bank."})
    epochs: int = field(default=10, metadata={"help": "Their epochs."})
    batch_size: int = field(default=32, metadata={"help": "Their batches."})
    learning_rate: float = field(default=0.02, metadata={"help": "Their learning rate."})
    images_per_class: int = field(default=1, metadata={"help": "Synthetic images of every class."})
    syn_steps: int = field(default=20, metadata={"help": "Steps of students on the synthetic images."})
    expert_epochs: int = field(default=2, metadata={"help": "Epochs of the experts that those are to equal."})
    max_start_epoch: int = field(default=4, metadata={"help": "Segments start before this epoch."})
    lr_img: float = field(default=200.0, metadata={"help": "Learning rate of the images."})
    max_steps: int = field(default=400, metadata={"help": "Steps of distillation."})
    drop_ratio: float = field(default=0.25, metadata={"help": "Share of parameters that PAD and EDF leave out."})
    protocol: str = field(default="tm", metadata={"help": "How students are trained for the test."})
    test_seeds: int = field(default=3, metadata={"help": "Students per set."})

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(f"`methods` may hold {', '.join(METHODS)}; got {', '.join(unknown)}.")


METHODS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "DATM": (TrajectoryMatchingTrainer, TrajectoryMatchingTrainingArguments, {}),
    "DATM, first order": (
        TrajectoryMatchingTrainer,
        TrajectoryMatchingTrainingArguments,
        {"gradient_mode": "first_order"},
    ),
    "PAD": (PADTrainer, PADTrainingArguments, {}),
    "EDF": (EDFTrainer, EDFTrainingArguments, {"cam_interval": 50}),
}


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(ExperimentArguments, argv=argv, program=__file__, description=__doc__)
    torch.set_num_threads(1)
    report = Report(args.name, {"accuracy": Column("test accuracy", ".1%"), "students": Column("students")})
    report.facts["arguments"] = {name: value for name, value in vars(args).items() if name != "output_dir"}
    for seed in args.seeds:
        report.facts["run"] = describe_run(seed=seed)
        for name, accuracies in _run_seed(args, seed):
            accuracies = [*report.rows.get(name, {}).get("accuracy", ()), *accuracies]
            report.add(name, accuracy=accuracies, students=len(accuracies))
            # Written as it goes: what is done is not lost.
            written = report.save(args.output_dir)
    print(f"\n{report.as_markdown()}\n\nWrote {written} and {written.with_suffix('.json').name}.")
    return report.as_dict()


def _run_seed(args: ExperimentArguments, seed: int) -> Iterator[tuple[str, list[float]]]:
    """Every way and the accuracies of its students, one after the other."""
    sizes = {name: getattr(args, name) for name in ("image_size", "whiten", "max_train", "max_test")}
    data = load_real_images(args.data, seed=seed, **sizes)
    bank = _train_bank(args, data, seed, curriculum=False)
    initial = distilled_from_real(data, bank, args.images_per_class, seed=seed)
    measured = _measure(args, initial, data, bank, baselines=True)
    for name, text in BASELINES.items():
        yield text, measured[name]
    for method in args.methods:
        # PAD's experts see other images, and a set starts from what its own experts know.
        own = _train_bank(args, data, seed, curriculum=True) if method == "PAD" else bank
        yield method, _measure(args, _distil(args, method, data, own, seed), data, own)["distilled"]


def _train_bank(args: ExperimentArguments, data: RealImageData, seed: int, curriculum: bool) -> TrajectoryBank:
    channels, *size = data.train.images.shape[1:]
    config = student_by_name(args.student, (size[0], size[1]), channels, data.num_labels)
    folder = Path(args.output_dir, f"{args.name}-bank-{seed}{'-curriculum' if curriculum else ''}")
    rates: dict[str, Any] = {"learning_rate": args.learning_rate, "seed": seed}
    settings = ExpertTrainingArguments(
        str(folder), args.num_experts, args.epochs, args.batch_size, eval_epochs=args.epochs, **rates
    )
    if not curriculum:
        return ExpertTrainer(config, settings, data).train()
    half = max(1, args.epochs // 2)
    scores = score_difficulty(data.train, config, n_runs=5, epoch=half, batch_size=args.batch_size, **rates)
    # The paper's schedule of 100 epochs, as far as these go.
    first, last = max(1, round(0.2 * args.epochs)), max(2, round(0.6 * args.epochs))
    schedule = DataCurriculum(add_end_epoch=first, remove=((max(first, round(0.4 * args.epochs)), 0.1), (last, 0.2)))
    return ExpertTrainer(config, settings, data, schedule, easy_to_hard(scores, data.train.labels)).train()


def _distil(
    args: ExperimentArguments, method: str, data: RealImageData, bank: TrajectoryBank, seed: int
) -> DistilledDatasetModel:
    trainer_class, arguments_class, fields = METHODS[method]
    fields = fields | ({"drop_ratio": args.drop_ratio} if method in ("PAD", "EDF") else {})
    taken = ("syn_steps", "expert_epochs", "max_start_epoch", "lr_img", "max_steps")
    fields |= {name: getattr(args, name) for name in taken}
    fields |= {"seed": seed, "use_cpu": True, "save_strategy": "no", "report_to": "none"}
    settings = arguments_class(output_dir=str(Path(args.output_dir, f"{args.name}-run")), **fields)
    trainer = trainer_class(distilled_from_real(data, bank, args.images_per_class, seed=seed), settings, bank=bank)
    trainer.train()
    name = method.lower().replace(", ", "-").replace(" ", "-")
    trainer.save_picture(Path(args.output_dir, f"{args.name}-{name}-{seed}.png"))
    return trainer.model


def _measure(
    args: ExperimentArguments, model: DistilledDatasetModel, data: RealImageData, bank: TrajectoryBank, **options: bool
) -> dict[str, list[float]]:
    """Accuracies on the test images of students trained on the set: its last iterate, without any selection."""
    how: dict[str, Any] = {"protocol": get_protocol(args.protocol), "seeds": range(args.test_seeds), "full_epochs": 0}
    how |= {"real": data.train, "bank": bank, "disable_tqdm": True, "baselines": False, **options}
    report = evaluate_distilled(model, bank.student_config, data.test, **how)
    return {name: list(each.values) for name, each in report.accuracies.items()}


if __name__ == "__main__":
    sys.exit(run_script(main))
