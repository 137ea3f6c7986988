"""Measures what DyVM gains and costs: whole models beside the dense Vim they are made from, and the choosing alone.

Images have the spectrum of photographs. The gates are set so that every scan runs for the share of images asked for;
the shares that then really run are in the table. Selecting and masking are checked to agree first, and the model with
everything on to equal the Vim.

Example: `hf-effml bench dyvm --batch_sizes 1 8`
"""

import sys

from hf_effml.cli.parsing import parse_arguments, run_script


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    from hf_effml.vim.evaluation.bench_dyvm import DyVMBenchSettings, bench_dyvm

    (args,) = parse_arguments(DyVMBenchSettings, argv=argv, program=__file__, description=__doc__)
    report = bench_dyvm(args)
    print(report.as_markdown())
    print(f"\nWrote {report.save(args.output_dir)}")
    return report.as_dict()


if __name__ == "__main__":
    sys.exit(run_script(main))
