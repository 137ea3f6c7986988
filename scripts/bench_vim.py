"""Measures time and memory of Vision Mamba's scan and forward pass beside what they replace.

The baselines are a plain loop over the tokens, as mamba-ssm's reference has it; the same model with that loop; the
same weights in transformers' Mamba mixer, run in both directions; and DeiT-tiny as a yardstick of another kind.
Everything that computes the same is checked to agree first.

Example: `hf-effml bench vim --batch_sizes 1 8 --threads 1`
"""

import sys

from hf_effml.cli.parsing import parse_arguments, run_script


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    from hf_effml.vim.evaluation.bench_vim import VimBenchSettings, bench_vim

    (args,) = parse_arguments(VimBenchSettings, argv=argv, program=__file__, description=__doc__)
    report = bench_vim(args)
    print(report.as_markdown())
    print(f"\nWrote {report.save(args.output_dir)}")
    return report.as_dict()


if __name__ == "__main__":
    sys.exit(run_script(main))
