"""Distils a data set with PAD: experts on data of fitting difficulty, and a loss on deep layers only.

Example: `hf-effml train pad --recipe smoke --output_dir pad-smoke`
"""

import sys

from hf_effml import PADTrainer, PADTrainingArguments
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.cli.recipes import read_recipes
from hf_effml.trainers.distillation import SetArguments, distil, estimate_run, load_bank


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    script, args = parse_arguments(
        SetArguments, PADTrainingArguments, argv=argv, program=__file__, description=__doc__
    )
    if script.dry_run:
        cost = estimate_run(script, args, read_recipes("expert"))
        print(cost.as_markdown())
        return cost.facts
    bank = load_bank(script, args, read_recipes("expert"))
    found = distil(PADTrainer, script, args, bank)
    if found.is_main_process:
        print(f"\n{found.as_text()}")
    return found.results()


if __name__ == "__main__":
    sys.exit(run_script(main))
