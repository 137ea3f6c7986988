"""Measures what merging tokens costs and gains in R-MeeTo, beside a plain implementation and free removal.

A step of merging alone, then whole models: merging off, merging as the official code does it, ours with both ways of
matching, and tokens cut off for nothing, which bounds the gain. Both implementations are checked to agree first.

Example: `hf-effml bench rmeeto --batch_sizes 1 8 --r 3 11`
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_effml.cli.parsing import parse_arguments, run_script


if TYPE_CHECKING:
    from torch import Tensor

    from hf_effml.utils.benchmark import Timing
    from hf_effml.vim import VimForImageClassification
    from hf_effml.vim.modeling_rmeeto import MergeRun, TokenMerger
    from hf_effml.vim.vim_run import TokenReducer


@dataclass
class BenchArguments:
    """What to measure, and where."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Batch sizes of the models."})
    r: list[int] = field(
        default_factory=lambda: [0, 1, 3, 5, 11, 20], metadata={"help": "Tokens removed per merging block."}
    )
    hidden_size: int = field(default=192, metadata={"help": "Width: 192 is Vim-tiny, 384 small, 768 base."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    rounds: int = field(default=7, metadata={"help": "Interleaved rounds; medians of them are shown."})
    device: str = field(default="cpu", metadata={"help": "Where to run: cpu or cuda."})
    seed: int = field(default=0, metadata={"help": "Of weights and inputs."})
    output_dir: str = field(default="effml-bench", metadata={"help": "Folder for bench_rmeeto.json and .md."})
    quick: bool = field(default=False, metadata={"help": "Tiny sizes, to see it run; the numbers mean nothing."})


# Batch, channels, tokens, removed tokens of the step alone; those of rmeeto.md 5.2.
STEPS = [(1, 192, 197, 11), (8, 192, 197, 11), (8, 192, 98, 11), (8, 384, 197, 11), (64, 192, 197, 11)]
QUICK_STEPS = [(2, 16, 17, 3)]
OFF, NAIVE, OURS, LOCAL, FREE = "off", "as the official code", "ours", "ours, local matching", "free removal"


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(BenchArguments, argv=argv, program=__file__, description=__doc__)
    if min(*args.batch_sizes, args.threads, args.rounds) < 1 or min(args.r) < 0:
        raise ValueError("`batch_sizes`, `threads` and `rounds` must be at least 1, and `r` at least 0.")
    from hf_effml.utils.benchmark import describe_run, markdown_table, one_line, write_report

    run = describe_run(seed=args.seed, rounds=args.rounds, threads=args.threads, device=args.device)
    steps = [row for step in (QUICK_STEPS if args.quick else STEPS) for row in _bench_step(args, *step)]
    model = _model(args)
    models = [row for batch in args.batch_sizes for r in args.r for row in _bench_model(args, model, batch, r)]
    break_even = {str(batch): _break_even(models, batch) for batch in args.batch_sizes}
    results: dict[str, object] = {
        "run": run,
        "settings": {key: getattr(args, key) for key in ("hidden_size", "quick")},
        "steps": steps,
        "models": models,
        "break_even_r": break_even,
    }
    tables = [
        f"## One merging step\n\n{markdown_table(steps)}",
        f"## Whole model\n\n{markdown_table(models)}",
        "\n".join(f"Batch {batch}: merging pays from r = {r} on." for batch, r in break_even.items() if r is not None),
        one_line(run),
    ]
    print("\n\n".join(tables))
    print(f"\nWrote {write_report(args.output_dir, 'bench_rmeeto', results, tables)}")
    return results


def _bench_step(args: BenchArguments, batch: int, channels: int, tokens: int, r: int) -> list[dict[str, Any]]:
    """Matching and merging of a mixer's output and a residual stream, up to their sum."""
    import torch

    from hf_effml.utils.benchmark import compare
    from hf_effml.vim.token_reduction import bipartite_plan, local_plan, ordered_merge_reference

    generator = torch.Generator().manual_seed(args.seed)
    mixed, residual = torch.randn(2, batch, tokens, channels, generator=generator).to(args.device)
    size = torch.ones(batch, tokens, 1, device=args.device)
    middle = tokens // 2

    def naive() -> "tuple[Tensor, Tensor]":
        hidden, rest, total, _ = ordered_merge_reference(mixed, mixed, residual, size, middle, r)
        return hidden + rest, total

    def ours(plan: Callable) -> "tuple[Tensor, Tensor]":
        return plan(mixed, r, middle).merge(mixed + residual, size)

    functions: dict[str, Callable] = {
        NAIVE: naive,
        OURS: partial(ours, bipartite_plan),
        LOCAL: partial(ours, local_plan),
    }
    with torch.inference_mode():
        timings = compare(functions, [[NAIVE, OURS]], rounds=args.rounds, threads=args.threads)
    shape = {"batch": batch, "channels": channels, "tokens": tokens, "r": r}
    return [
        {**shape, "step": name, **timing.as_row(), "faster_by": round(timings[NAIVE].speedup(timing), 2)}
        for name, timing in timings.items()
    ]


def _model(args: BenchArguments) -> "VimForImageClassification":
    import torch

    from hf_effml.vim import VimConfig, VimForImageClassification

    torch.manual_seed(args.seed)
    config = VimConfig(hidden_size=args.hidden_size)
    if args.quick:
        config = VimConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=4)
    return VimForImageClassification(config).eval().to(args.device)


def _bench_model(args: BenchArguments, model: "VimForImageClassification", batch: int, r: int) -> list[dict[str, Any]]:
    import torch

    from hf_effml.utils.benchmark import compare
    from hf_effml.vim.complexity import count_multiply_adds

    generator = torch.Generator().manual_seed(args.seed)
    side = model.config.image_size
    pixels = torch.randn(batch, 3, side, side, generator=generator).to(args.device)
    variants = _variants(model, r)

    def forward(variant: "VimForImageClassification") -> "Tensor":
        return variant(pixels).logits

    functions = {name: partial(forward, variant) for name, variant in variants.items()}
    agree = [[NAIVE, OURS]] if r else [[OFF, OURS]]
    with torch.inference_mode():
        timings = compare(functions, agree, rounds=args.rounds, threads=args.threads, tolerance=1e-3)
    all_work = count_multiply_adds(variants[OFF].config)["total"]
    work = count_multiply_adds(variants[OURS].config)["total"]
    rows = []
    for name, timing in timings.items():
        row = {"batch": batch, "r": r, "merging": name, **timing.as_row()}
        row["faster_than_off"] = round(timings[OFF].speedup(timing), 3)
        row["gain_realised"] = _gain_realised(timings, name)
        row["work"] = f"{1 if name == OFF else work / all_work:.0%}"
        rows.append(row)
    return rows


def _gain_realised(timings: "dict[str, Timing]", name: str) -> float | None:
    """The share of the gain of free removal that is left after paying for the merging."""
    if name in (OFF, FREE) or FREE not in timings:
        return None
    bound = timings[OFF].speedup(timings[FREE]) - 1
    return round((timings[OFF].speedup(timings[name]) - 1) / bound, 3) if bound > 0 else None


def _break_even(rows: list[dict[str, Any]], batch: int) -> int | None:
    """The smallest measured r from which on merging is never slower than no merging."""
    paying = None
    ours = [row for row in rows if row["batch"] == batch and row["merging"] == OURS and row["r"] > 0]
    for row in sorted(ours, key=lambda row: -row["r"]):
        if row["faster_than_off"] < 1:
            break
        paying = row["r"]
    return paying


def _variants(model: "VimForImageClassification", r: int) -> "dict[str, VimForImageClassification]":
    from hf_effml.vim import RMeeToVimForImageClassification

    make = partial(RMeeToVimForImageClassification.from_vim, model)
    variants = {OFF: model, OURS: make(merge_r=r)}
    if r == 0:
        return variants
    variants |= {NAIVE: make(merge_r=r), LOCAL: make(merge_r=r, merge_matching="local"), FREE: make(merge_r=r)}
    for name, step in {NAIVE: _merge_naively, FREE: _cut_off}.items():
        vim: Any = variants[name].vim
        vim.token_reducer = _comparison_reducer(vim.token_reducer, step)
    return {name: variants[name] for name in (OFF, NAIVE, OURS, LOCAL, FREE)}


def _comparison_reducer(merger: "TokenMerger", reduce: Callable) -> "TokenReducer":
    """The schedule of `merger`, and another way to remove tokens."""
    from hf_effml.vim.modeling_rmeeto import MergeRun, TokenMerger

    class Run(MergeRun):
        def feature_for(self, block: int) -> str | None:
            return super().feature_for(block) if reduce is _merge_naively else None

        def reduce(self, block: int, stream: "Tensor", feature: "Tensor | None") -> "Tensor":
            r = self.removals[block]
            return reduce(self, stream, feature, r) if r else stream

    class Reducer(TokenMerger):
        def begin(self, stream: "Tensor", class_positions: tuple[int, ...]) -> Run:
            run = Run(self.config, stream, class_positions, self.removals(stream.shape[1]))
            run.sizes = stream.new_ones(*stream.shape[:2], 1)
            return run

    return Reducer(merger.config)


def _merge_naively(run: "MergeRun", stream: "Tensor", feature: "Tensor", r: int) -> "Tensor":
    from hf_effml.vim.token_reduction import ordered_merge_reference

    # The official code merges the mixer's output and the stream before the addition; our blocks have added already, so
    # the first result is for the time it takes, and the second one is the sum of the two.
    (position,) = run.class_positions
    _, merged, run.sizes, position = ordered_merge_reference(feature, feature, stream, run.sizes, position, r)
    run.class_positions = (position,)
    return merged


def _cut_off(run: "MergeRun", stream: "Tensor", feature: None, r: int) -> "Tensor":
    tokens = stream.shape[1]
    (position,) = run.class_positions
    run.class_positions = (position * (tokens - r) // tokens,)
    run.sizes = None if run.sizes is None else run.sizes[:, r:]
    return stream[:, : tokens - r]


if __name__ == "__main__":
    sys.exit(run_script(main))
