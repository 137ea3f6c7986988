"""Distils a data set by plain trajectory matching, DATM or MTT: what PAD and EDF are compared with.

Example: `hf-effml train datm --recipe smoke --output_dir datm-smoke`
"""

import sys

from hf_effml import TrajectoryMatchingTrainer, TrajectoryMatchingTrainingArguments
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.scripts._distillation import SetArguments, distil, load_bank, show_cost


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    script, args = parse_arguments(
        SetArguments,
        TrajectoryMatchingTrainingArguments,
        argv=argv,
        program=__file__,
        description=__doc__,
    )
    bank = load_bank(script, args)
    if script.dry_run:
        return show_cost(script, args, bank)
    return distil(TrajectoryMatchingTrainer, script, args, bank)


if __name__ == "__main__":
    sys.exit(run_script(main))
