"""Measures a distilled set: networks trained on it beside networks trained on random and on all real images.

Every network gets the same table: the set with its own labels and with hard ones, as many random real images with
labels of the same kind, all real images, and the scores of DD-Ranking. The numbers are those of the test images unless
--split says otherwise.

Example: `hf-effml evaluate distillation --set digits-pad --bank digits-experts --students convnet mlp`
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_effml.cli.parsing import parse_arguments, run_script


if TYPE_CHECKING:
    from hf_effml.distillation.bank.trajectories import TrajectoryBank
    from hf_effml.distillation.evaluation.report import EvaluationReport
    from hf_effml.distillation.real_images import RealImageData
    from hf_effml.hub import CardResult


@dataclass
class EvaluateArguments:
    """What to measure, and how."""

    set: str = field(metadata={"help": "Folder or Hub id of the distilled set."})
    bank: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the experts, which label random images; as the set says."},
    )
    students: list[str] = field(
        default_factory=list,
        metadata={"help": "Networks: convnet, resnet18, mlp, timm:NAME, ... The one of the set if left out."},
    )
    protocol: str = field(default="tm", metadata={"help": "tm, tm-short, hard or kd."})
    epochs: int | None = field(default=None, metadata={"help": "Other epochs than those of the protocol."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One network for each of them."})
    draws: int = field(default=3, metadata={"help": "How often random real images are drawn."})
    baselines: bool = field(default=True, metadata={"help": "Whether to measure what the set is compared with."})
    full_epochs: int = field(
        default=100, metadata={"help": "Epochs on all real images; 0 leaves them out, and HLR and LRS with them."}
    )
    initial: str | None = field(default=None, metadata={"help": "The set before it was distilled, if it was kept."})
    data: str | None = field(
        default=None, metadata={"help": "digits, a folder or a data set of the Hub. That of the set if left out."}
    )
    split: Literal["test", "validation"] = field(
        default="test",
        metadata={"help": "Which images to measure on. Anything is chosen on validation, never on test."},
    )
    device: str | None = field(default=None, metadata={"help": "Where to train; a GPU if there is one."})
    output_dir: str = field(default="distillation-evaluation", metadata={"help": "Folder of the report and picture."})
    picture: bool = field(default=True, metadata={"help": "Whether to draw the accuracies as bars; needs matplotlib."})
    add_to_card: bool = field(default=False, metadata={"help": "Put the results on the card in the set's folder."})

    def __post_init__(self) -> None:
        if self.add_to_card and not any(Path(self.set, name).is_file() for name in ("distillation.json", "README.md")):
            raise ValueError(f"`--add_to_card` needs the set in a folder of this machine; `{self.set}` is none.")


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(EvaluateArguments, argv=argv, program=__file__, description=__doc__)
    import torch

    from hf_effml.distillation.evaluation.measure import cross_architecture
    from hf_effml.distillation.evaluation.protocols import get_protocol
    from hf_effml.distillation.evaluation.report import comparison_rows
    from hf_effml.distillation.publishing.sets import load_distilled
    from hf_effml.utils.benchmark import describe_run, markdown_table, write_report
    from hf_effml.utils.imports import usable

    protocol = get_protocol(args.protocol, **({} if args.epochs is None else {"epochs": args.epochs}))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    training_set, info, processor = load_distilled(args.set)
    bank = _load_bank(args, info.get("bank"))
    data = load_data(args, info, processor, bank)
    reports = cross_architecture(
        training_set,
        args.students or [_own_student(info, bank)],
        (data.validation or data.test) if args.split == "validation" else data.test,
        protocol=protocol,
        seeds=args.seeds,
        real=data.train,
        bank=bank,
        initial=None if args.initial is None else load_distilled(args.initial)[0],
        full_epochs=args.full_epochs,
        draws=args.draws,
        baselines=args.baselines,
        split=args.split,
        device=device,
    )
    tables = [f"## {report.student}\n\n{markdown_table(report.rows())}" for report in reports]
    if len(reports) > 1 or reports[0].scores:
        tables.append(f"## Networks and scores\n\n{markdown_table(comparison_rows(reports))}")
    tables.append(notes(reports, data.name))
    run = describe_run(seed=args.seeds[0], rounds=len(args.seeds), device=device)
    results = {"set": args.set, "data": data.name, "run": run, "reports": [report.to_dict() for report in reports]}
    print("\n\n".join(tables))
    report = write_report(args.output_dir, "evaluation", results, tables)
    print(f"\nWrote {report}")
    if args.picture and usable("matplotlib"):
        print(f"Drew {draw(report.with_suffix('.png'), reports, data.name)}")
    if args.add_to_card:
        print(f"Renewed {_add_to_card(args.set, reports, data.name)}")
    return results


def load_data(
    args: EvaluateArguments, info: Mapping[str, Any], processor: Any, bank: "TrajectoryBank | None"
) -> "RealImageData":
    """Loads real images, preprocessed as the distilled ones.

    Args:
        args (`EvaluateArguments`):
            The program's arguments.
        info (`Mapping`):
            What is known of the set.
        processor ([`ZCAImageProcessor`], *optional*):
            What lies beside it.
        bank ([`TrajectoryBank`], *optional*):
            The experts.

    Returns:
        [`RealImageData`]

    Raises:
        ValueError: If nothing says which data or how images were preprocessed, or validation images are wanted that
            may be among those that the set was made of.
    """
    from hf_effml.distillation.real_images import reload_real_images

    source = info.get("dataset") or {}
    processor = processor or (bank.image_processor if bank is not None else None)
    if processor is None:
        raise ValueError(
            f"`{args.set}` does not say how its images were preprocessed. Give its experts with `--bank`: they know."
        )
    if bank is not None:
        bank.check_preprocessing(processor.fingerprint)
    data = reload_real_images(source.get("arguments"), processor, args.data)
    if args.split == "validation":
        _check_validation(data, source.get("fingerprint"))
    return data


def notes(reports: "Sequence[EvaluationReport]", data: str) -> str:
    """Says what has to be known to read the tables.

    Args:
        reports (`Sequence[EvaluationReport]`):
            What was measured.
        data (`str`):
            Name of the data.

    Returns:
        `str`: a few lines.
    """
    first = reports[0]
    rules = first.protocol
    lines = [
        f"{first.images} images for {first.classes} classes, accuracy on {first.test_images} {first.split} images of "
        f"{data} at the end of training. Protocol `{rules.name}`: {rules.epochs} epochs, learning rate "
        f"{rules.learning_rate:.3g}, {len(first.seeds)} seed(s), {first.draws} draw(s) of random images."
    ]
    if first.scores:
        lines.append(
            "HLR: accuracy of all real images less that of the distilled ones, both with hard labels; less is better. "
            "IOR: gain on random real images under the same protocol. LRS and ARS: from 0 to 1, more is better."
        )
    return "\n\n".join([*lines, *dict.fromkeys(note for report in reports for note in report.notes)])


def draw(path: Path, reports: "Sequence[EvaluationReport]", data: str) -> Path:
    """Draws the accuracies of every network as bars.

    Args:
        path (`Path`):
            PNG file to write.
        reports (`Sequence[EvaluationReport]`):
            What was measured.
        data (`str`):
            Name of the data.

    Returns:
        `Path`: the file.
    """
    from hf_effml.utils.plotting import plot_bars

    first = reports[0]
    per_class = first.images / first.classes
    how = f"protocol {first.protocol.name}, {len(first.seeds)} seed(s), {first.draws} draw(s) of random images"
    plot_bars(
        {report.student: report.bars() for report in reports},
        path,
        title=f"{data}, {per_class:.3g} distilled image{'' if per_class == 1 else 's'} per class",
        label=f"{first.split} accuracy (%)",
        note=f"{how}; mean and standard deviation",
    )
    return path


def card_results(reports: "Sequence[EvaluationReport]") -> "list[CardResult]":
    """Makes the rows of a card.

    Args:
        reports (`Sequence[EvaluationReport]`):
            What was measured.

    Returns:
        `list[CardResult]`: the rows.
    """
    from hf_effml.hub import CardResult

    return [CardResult(*row) for report in reports for row in report.card_results()]


def _load_bank(args: EvaluateArguments, recorded: str | None) -> "TrajectoryBank | None":
    """The bank asked for, or the one that the set names if it can be found."""
    from hf_effml.distillation.bank.trajectories import TrajectoryBank

    if args.bank is not None:
        return TrajectoryBank.from_pretrained(args.bank)
    if recorded is None or not args.baselines:
        return None
    # A folder is recorded by its name alone: it may be here or beside the set.
    near = next((path for path in (Path(recorded), Path(args.set).parent / recorded) if path.is_dir()), None)
    try:
        if near is not None or "/" in recorded:
            return TrajectoryBank.from_pretrained(near or recorded)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
    print(f"The set names the bank `{recorded}`, which is not here. Say where it is with `--bank`.", file=sys.stderr)
    return None


def _own_student(info: Mapping[str, Any], bank: "TrajectoryBank | None") -> Any:
    if info.get("student"):
        return info["student"]
    if bank is not None:
        return bank.student_config
    raise ValueError(
        "The set does not say with which network it was made. Name one, for example `--students convnet`."
    )


def _check_validation(data: "RealImageData", fingerprint: str | None) -> None:
    if data.validation is None:
        raise ValueError(f"`{data.name}` was used without validation images. Measure with `--split test`.")
    if data.train.fingerprint != fingerprint:
        raise ValueError(
            f"The training images of `{data.name}` are not those that the set was made of, which may have seen the "
            "validation images. Measure with `--split test`."
        )


def _add_to_card(folder: str, reports: "Sequence[EvaluationReport]", data: str) -> Path:
    from hf_effml.distillation.card import add_evaluations
    from hf_effml.hub import add_results

    if Path(folder, "distillation.json").is_file():
        return add_evaluations(folder, [report.to_dict() for report in reports])
    return add_results(folder, card_results(reports), f"{data}, {reports[0].split} images")


if __name__ == "__main__":
    sys.exit(run_script(main))
