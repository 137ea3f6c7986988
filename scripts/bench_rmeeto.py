"""Measures what merging tokens costs and gains in R-MeeTo, beside a plain implementation and free removal.

A step of merging alone, then whole models: merging off, merging as the official code does it, ours with both ways of
matching, and tokens cut off for nothing, which bounds the gain. Both implementations are checked to agree first.

Example: `hf-effml bench rmeeto --batch_sizes 1 8 --r 3 11`
"""

import sys

from hf_effml.cli.parsing import parse_arguments, run_script


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    from hf_effml.vim.evaluation.bench_rmeeto import RMeeToBenchSettings, bench_rmeeto

    (args,) = parse_arguments(RMeeToBenchSettings, argv=argv, program=__file__, description=__doc__)
    report = bench_rmeeto(args)
    print(report.as_markdown())
    print(f"\nWrote {report.save(args.output_dir)}")
    return report.as_dict()


if __name__ == "__main__":
    sys.exit(run_script(main))
