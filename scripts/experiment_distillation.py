"""Asks what distillation is worth beside real images, and whether PAD and EDF differ from plain matching at this size.

Example: `python scripts/experiment_distillation.py --recipe digits --output_dir experiments`
"""

import statistics
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
from hf_effml.utils.benchmark import describe_run, markdown_table, write_report


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
    (args,) = parse_arguments(
        ExperimentArguments,
        argv=argv,
        program=__file__,
        description=__doc__,
    )
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    for seed in args.seeds:
        for name, accuracies in _run_seed(args, seed):
            found.setdefault(name, []).extend(accuracies)
            # Written as it goes: what is done is not lost.
            results = [_row(*entry) for entry in found.items()]
            settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
            run = {"arguments": settings, "run": describe_run(seed=seed, rounds=1)}
            report = write_report(
                args.output_dir, args.name, run | {"rows": results}, [markdown_table(_shown(results))]
            )
    print(f"\n{report.read_text(encoding='utf-8')}\nWrote {report} and {report.with_suffix('.json').name}.")
    return {"rows": results}


def _run_seed(args: ExperimentArguments, seed: int) -> Iterator[tuple[str, list[float]]]:
    """Every way and the accuracies of its students, one after the other."""
    data = load_real_images(
        args.data,
        image_size=args.image_size,
        whiten=args.whiten,
        max_train=args.max_train,
        max_test=args.max_test,
        seed=seed,
    )
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
    settings = ExpertTrainingArguments(
        output_dir=str(folder),
        num_experts=args.num_experts,
        num_train_epochs=args.epochs,
        train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        eval_epochs=args.epochs,
        seed=seed,
    )
    if not curriculum:
        return ExpertTrainer(config, settings, data).train()
    scores = score_difficulty(
        data.train,
        config,
        n_runs=5,
        epoch=max(1, args.epochs // 2),
        seed=seed,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
    )
    # The paper's schedule of 100 epochs, as far as these go.
    first, last = max(1, round(0.2 * args.epochs)), max(2, round(0.6 * args.epochs))
    schedule = DataCurriculum(add_end_epoch=first, remove=((max(first, round(0.4 * args.epochs)), 0.1), (last, 0.2)))
    return ExpertTrainer(config, settings, data, schedule, easy_to_hard(scores, data.train.labels)).train()


def _distil(
    args: ExperimentArguments, method: str, data: RealImageData, bank: TrajectoryBank, seed: int
) -> DistilledDatasetModel:
    trainer_class, arguments_class, fields = METHODS[method]
    if method in ("PAD", "EDF"):
        fields = fields | {"drop_ratio": args.drop_ratio}
    settings = arguments_class(
        output_dir=str(Path(args.output_dir, f"{args.name}-run")),
        syn_steps=args.syn_steps,
        expert_epochs=args.expert_epochs,
        max_start_epoch=args.max_start_epoch,
        lr_img=args.lr_img,
        max_steps=args.max_steps,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        **fields,
    )
    trainer = trainer_class(distilled_from_real(data, bank, args.images_per_class, seed=seed), settings, bank=bank)
    trainer.train()
    name = method.lower().replace(", ", "-").replace(" ", "-")
    trainer.save_picture(Path(args.output_dir, f"{args.name}-{name}-{seed}.png"))
    return trainer.model


def _measure(
    args: ExperimentArguments,
    model: DistilledDatasetModel,
    data: RealImageData,
    bank: TrajectoryBank,
    baselines: bool = False,
) -> dict[str, list[float]]:
    """Accuracies on the test images of students trained on the set: its last iterate, without any selection."""
    report = evaluate_distilled(
        model,
        bank.student_config,
        data.test,
        protocol=get_protocol(args.protocol),
        seeds=range(args.test_seeds),
        real=data.train,
        bank=bank,
        full_epochs=0,
        baselines=baselines,
        disable_tqdm=True,
    )
    return {name: list(each.values) for name, each in report.accuracies.items()}


def _row(name: str, accuracies: list[float]) -> dict[str, Any]:
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    return {
        "trained_on": name,
        "accuracy": statistics.fmean(accuracies),
        "spread": spread,
        "students": len(accuracies),
        "accuracies": accuracies,
    }


def _shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for people: percentages, with the standard deviation over sets and students."""
    shown = []
    for row in rows:
        spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
        shown.append(
            {
                "trained on": row["trained_on"],
                "test accuracy": f"{100 * row['accuracy']:.1f}{spread}",
                "students": row["students"],
            }
        )
    return shown


if __name__ == "__main__":
    sys.exit(run_script(main))
