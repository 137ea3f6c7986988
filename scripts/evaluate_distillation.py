"""Measures a distilled set: networks trained on it beside networks trained on random and on all real images.

Every network gets the same table: the set with its own labels and with hard ones, as many random real images with
labels of the same kind, all real images, and the scores of DD-Ranking. The numbers are those of the test images unless
--split says otherwise.

Example: `hf-effml evaluate distillation --set digits-pad --bank digits-experts --students convnet mlp`
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hf_effml.cli.parsing import parse_arguments, run_script


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

    from hf_effml.distillation.bank.trajectories import TrajectoryBank
    from hf_effml.distillation.card import add_to_card
    from hf_effml.distillation.evaluation.measure import cross_architecture
    from hf_effml.distillation.evaluation.protocols import get_protocol
    from hf_effml.distillation.evaluation.report import draw_accuracies, evaluation_report
    from hf_effml.distillation.publishing.origin import find_bank, find_images, find_student, images_to_measure_on
    from hf_effml.distillation.publishing.sets import load_distilled
    from hf_effml.utils.benchmark import describe_run
    from hf_effml.utils.imports import usable

    protocol = get_protocol(args.protocol, **({} if args.epochs is None else {"epochs": args.epochs}))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = load_distilled(args.set)
    bank = None if args.bank is None else TrajectoryBank.from_pretrained(args.bank)
    if bank is None and args.baselines:
        bank = find_bank(found.info, args.set)
    data = find_images(found, bank, args.data, args.set)
    reports = cross_architecture(
        found.training_set,
        args.students or [find_student(found.info, bank)],
        images_to_measure_on(data, args.split, found.info),
        protocol=protocol,
        seeds=args.seeds,
        real=data.train,
        bank=bank,
        initial=None if args.initial is None else load_distilled(args.initial).training_set,
        full_epochs=args.full_epochs,
        draws=args.draws,
        baselines=args.baselines,
        split=args.split,
        device=device,
    )
    run = describe_run(seed=args.seeds[0], device=device)
    report = evaluation_report(reports, data.name, {"set": args.set, "data": data.name, "run": run})
    print(report.as_markdown())
    written = report.save(args.output_dir)
    print(f"\nWrote {written}")
    if args.picture and usable("matplotlib"):
        print(f"Drew {draw_accuracies(reports, written.with_suffix('.png'), data.name)}")
    if args.add_to_card:
        print(f"Renewed {add_to_card(args.set, reports, data.name)}")
    return report.as_dict()


if __name__ == "__main__":
    sys.exit(run_script(main))
