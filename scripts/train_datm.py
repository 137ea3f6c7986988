"""Distils a data set by plain trajectory matching, DATM or MTT: what PAD and EDF are compared with.

Example: `hf-effml train datm --recipe smoke --output_dir datm-smoke`
"""

import sys

from hf_effml import TrajectoryMatchingTrainer, TrajectoryMatchingTrainingArguments
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.cli.recipes import read_recipes
from hf_effml.trainers.distillation import SetArguments, distil, estimate_run, load_bank


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    script, args = parse_arguments(
        SetArguments, TrajectoryMatchingTrainingArguments, argv=argv, program=__file__, description=__doc__
    )
    if script.dry_run:
        cost = estimate_run(script, args, read_recipes("expert"))
        print(cost.as_markdown())
        return cost.facts
    bank = load_bank(script, args, read_recipes("expert"))
    found = distil(TrajectoryMatchingTrainer, script, args, bank)
    if found.is_main_process:
        print(f"\n{found.as_text()}")
    return found.results()


if __name__ == "__main__":
    sys.exit(run_script(main))
