"""What merging tokens costs and gains in R-MeeTo, beside a plain implementation and free removal."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_effml.utils.benchmark import Timing, compare
from hf_effml.utils.report import Report
from hf_effml.vim.configuration_vim import VimConfig
from hf_effml.vim.modeling_rmeeto import RMeeToVimForImageClassification
from hf_effml.vim.modeling_vim import VimForImageClassification
from hf_effml.vim.token_reduction import bipartite_plan, local_plan

from .baselines import FreeRemover, NaiveMerger, ordered_merge_reference
from .bench_settings import BenchSettings, timing_columns
from .complexity import count_multiply_adds


# Batch, channels, tokens, removed tokens of the step alone.
STEPS = [(1, 192, 197, 11), (8, 192, 197, 11), (8, 192, 98, 11), (8, 384, 197, 11), (64, 192, 197, 11)]
QUICK_STEPS = [(2, 16, 17, 3)]
OFF, NAIVE, OURS, LOCAL, FREE = "off", "as the official code", "ours", "ours, local matching", "free removal"


@dataclass
class RMeeToBenchSettings(BenchSettings):
    """What to measure of merging, and where."""

    r: list[int] = field(
        default_factory=lambda: [0, 1, 3, 5, 11, 20], metadata={"help": "Tokens removed per merging block."}
    )
    hidden_size: int = field(default=192, metadata={"help": "Width: 192 is Vim-tiny, 384 small, 768 base."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.r) < 0:
            raise ValueError(f"`r` must be at least 0; got {self.r}.")


def bench_rmeeto(args: RMeeToBenchSettings) -> Report:
    """Measures a step of merging alone, then whole models.

    They are: merging off, merging as the official code does it, ours with both ways of matching, and tokens cut off
    for nothing, which bounds the gain.

    Args:
        args ([`RMeeToBenchSettings`]):
            What to measure.

    Returns:
        [`~hf_effml.utils.report.Report`]: with the parts `steps` and `models`, and from which `r` on merging pays.

    Raises:
        RuntimeError: If outputs that should be the same differ.
    """
    report = args.report("bench_rmeeto", "hidden_size")
    steps = report.add_part("steps", timing_columns("faster_by"), "One merging step")
    for step in QUICK_STEPS if args.quick else STEPS:
        _bench_step(args, steps, *step)
    columns = timing_columns("faster_than_off", "gain_realised", "work")
    model, models = _model(args), report.add_part("models", columns, "Whole model")
    for batch in args.batch_sizes:
        for r in args.r:
            _bench_model(args, models, model, batch, r)
    break_even = {str(batch): _break_even([*models.rows.values()], batch) for batch in args.batch_sizes}
    report.facts["break_even_r"] = break_even
    report.notes = [
        f"Batch {batch}: merging pays from r = {r} on." for batch, r in break_even.items() if r is not None
    ]
    return report


def _bench_step(args: RMeeToBenchSettings, part: Report, batch: int, channels: int, tokens: int, r: int) -> None:
    """Matching and merging of a mixer's output and a residual stream, up to their sum."""
    generator = torch.Generator().manual_seed(args.seed)
    mixed, residual = torch.randn(2, batch, tokens, channels, generator=generator).to(args.device)
    size = torch.ones(batch, tokens, 1, device=args.device)
    middle = tokens // 2

    def naive() -> tuple[Tensor, Tensor]:
        hidden, rest, total, _ = ordered_merge_reference(mixed, mixed, residual, size, middle, r)
        return hidden + rest, total

    def ours(plan: Callable) -> tuple[Tensor, Tensor]:
        return plan(mixed, r, middle).merge(mixed + residual, size)

    functions: dict[str, Callable] = {
        NAIVE: naive,
        OURS: partial(ours, bipartite_plan),
        LOCAL: partial(ours, local_plan),
    }
    with torch.inference_mode():
        timings = compare(functions, [[NAIVE, OURS]], rounds=args.rounds, threads=args.threads)
    shape = {"batch": batch, "channels": channels, "tokens": tokens, "r": r}
    for name, timing in timings.items():
        faster = round(timings[NAIVE].speedup(timing), 2)
        part.add(f"{batch} x {tokens} x {channels}, {name}", **shape, step=name, **timing.as_row(), faster_by=faster)


def _model(args: RMeeToBenchSettings) -> VimForImageClassification:
    torch.manual_seed(args.seed)
    config = VimConfig(hidden_size=args.hidden_size)
    if args.quick:
        config = VimConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=4)
    return VimForImageClassification(config).eval().to(args.device)


def _bench_model(
    args: RMeeToBenchSettings, part: Report, model: VimForImageClassification, batch: int, r: int
) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    side = model.config.image_size
    pixels = torch.randn(batch, 3, side, side, generator=generator).to(args.device)
    variants = _variants(model, r)

    def forward(variant: VimForImageClassification) -> Tensor:
        return variant(pixels).logits

    functions = {name: partial(forward, variant) for name, variant in variants.items()}
    agree = [[NAIVE, OURS]] if r else [[OFF, OURS]]
    with torch.inference_mode():
        timings = compare(functions, agree, rounds=args.rounds, threads=args.threads, tolerance=1e-3)
    all_work = count_multiply_adds(variants[OFF].config)["total"]
    work = count_multiply_adds(variants[OURS].config)["total"]
    for name, timing in timings.items():
        part.add(
            f"batch {batch}, r = {r}, {name}",
            batch=batch,
            r=r,
            merging=name,
            **timing.as_row(),
            faster_than_off=round(timings[OFF].speedup(timing), 3),
            gain_realised=_gain_realised(timings, name),
            work=f"{1 if name == OFF else work / all_work:.0%}",
        )


def _gain_realised(timings: dict[str, Timing], name: str) -> float | None:
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


def _variants(model: VimForImageClassification, r: int) -> dict[str, VimForImageClassification]:
    make = partial(RMeeToVimForImageClassification.from_vim, model)
    variants = {OFF: model, OURS: make(merge_r=r)}
    if r == 0:
        return variants
    variants |= {NAIVE: make(merge_r=r), LOCAL: make(merge_r=r, merge_matching="local"), FREE: make(merge_r=r)}
    for name, merger in {NAIVE: NaiveMerger, FREE: FreeRemover}.items():
        variants[name].vim.token_reducer = merger(variants[name].config)
    return {name: variants[name] for name in (OFF, NAIVE, OURS, LOCAL, FREE)}


__all__ = ["RMeeToBenchSettings", "bench_rmeeto"]
