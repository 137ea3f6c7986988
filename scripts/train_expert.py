"""Trains expert networks on images and stores their trajectories, which data sets are distilled from.

Example: `hf-effml train expert --recipe smoke --output_dir expert-smoke`
"""

import sys

from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.trainers.expert import ExpertTrainingArguments
from hf_effml.trainers.expert_bank import CurriculumArguments, ExpertDataArguments, make_bank_trainer
from hf_effml.utils.report import Column, Report


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    images, schedule, args = parse_arguments(
        ExpertDataArguments,
        CurriculumArguments,
        ExpertTrainingArguments,
        argv=argv,
        program=__file__,
        description=__doc__,
    )
    trainer = make_bank_trainer(images, schedule, args)
    bank = trainer.train()
    measured = {split: bank.mean_accuracy(split) for split in ("train", "validation")}
    if trainer.state.is_main_process:
        report = Report("experts", {split: Column(f"{split} accuracy", ".1%") for split in measured})
        for epoch in sorted({*list(measured["train"])[:1], *list(measured["train"])[-1:]}):
            report.add(f"after epoch {epoch}", **{split: found.get(epoch) for split, found in measured.items()})
        print(f"{len(bank)} experts of {bank.num_parameters:,} parameters on {trainer.data.name}:")
        print(report.as_text())
        print(f'Wrote {args.output_dir}. To load it:\nTrajectoryBank.from_pretrained("{args.output_dir}")')
    return {
        "output_dir": args.output_dir,
        "num_experts": len(bank),
        "epochs": bank.epochs,
        "num_parameters": bank.num_parameters,
        **{f"{split}_accuracy": found for split, found in measured.items()},
    }


if __name__ == "__main__":
    sys.exit(run_script(main))
