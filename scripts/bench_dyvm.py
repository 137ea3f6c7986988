"""Measures what DyVM gains and costs: whole models beside the dense Vim they are made from, and the choosing alone.

Images have the spectrum of photographs. The gates are set so that every scan runs for the share of images asked for;
the shares that then really run are in the table. Selecting and masking are checked to agree first, and the model with
everything on to equal the Vim.

Example: `hf-effml bench dyvm --batch_sizes 1 8`
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from hf_effml.cli.parsing import parse_arguments, run_script


if TYPE_CHECKING:
    from torch import Tensor

    from hf_effml.utils.report import Report
    from hf_effml.vim import DyVMForImageClassification, VimForImageClassification


@dataclass
class BenchArguments:
    """What to measure, and where."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Batch sizes."})
    token_keep_ratio: list[float] = field(
        default_factory=lambda: [1.0, 0.9, 0.7, 0.7], metadata={"help": "Shares that a stage keeps, one per setting."}
    )
    block_keep_ratio: list[float] = field(
        default_factory=lambda: [0.8, 0.8, 1.0, 0.8], metadata={"help": "Shares of the scans, one per setting."}
    )
    hidden_size: int = field(default=192, metadata={"help": "Width: 192 is Vim-tiny, 384 small, 768 base."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    rounds: int = field(default=7, metadata={"help": "Interleaved rounds; medians of them are shown."})
    device: str = field(default="cpu", metadata={"help": "Where to run: cpu or cuda."})
    seed: int = field(default=0, metadata={"help": "Of weights and images."})
    output_dir: str = field(default="effml-bench", metadata={"help": "Folder for bench_dyvm.json and .md."})
    quick: bool = field(default=False, metadata={"help": "Tiny sizes, to see it run; the numbers mean nothing."})

    def __post_init__(self) -> None:
        if min(*self.batch_sizes, self.threads, self.rounds) < 1:
            raise ValueError("`batch_sizes`, `threads` and `rounds` must be at least 1.")
        if len(self.token_keep_ratio) != len(self.block_keep_ratio):
            raise ValueError(
                f"`token_keep_ratio` and `block_keep_ratio` must be of one length, one pair per setting; got "
                f"{self.token_keep_ratio} and {self.block_keep_ratio}."
            )


# Images to choose from and to set the gates on.
POOL = 16
DENSE, OFF, SELECT, MASK = "dense Vim", "DyVM, pruning off", "DyVM, select", "DyVM, mask"
FORWARD, CHOOSING = "forward", "choosing"


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(BenchArguments, argv=argv, program=__file__, description=__doc__)
    import torch

    from hf_effml.utils.benchmark import describe_run
    from hf_effml.utils.report import Report
    from hf_effml.vim.evaluation.baselines import natural_images

    run = describe_run(seed=args.seed, rounds=args.rounds, threads=args.threads, device=args.device)
    settings = {key: getattr(args, key) for key in ("hidden_size", "quick")}
    report = Report("bench_dyvm", facts={"run": run, "settings": settings})
    models, steps = (
        report.add_part("models", title="Whole model"),
        report.add_part("choosing", title="Choosing tokens"),
    )
    torch.manual_seed(args.seed)
    vim = _vim(args)
    pool = natural_images(max(POOL, *args.batch_sizes), vim.config.image_size, args.seed).to(args.device)
    for tokens, blocks in zip(args.token_keep_ratio, args.block_keep_ratio, strict=True):
        model = _dynamic(vim, pool, tokens, blocks)
        for batch in args.batch_sizes:
            pixels = _nearest(model, pool, batch, blocks)
            _bench_model(args, vim, model, pixels, f"{tokens:g} / {blocks:g}", models)
            if tokens < 1:
                _bench_choice(args, model, pixels, f"{tokens:g} / {blocks:g}", steps)
    print(report.as_markdown())
    print(f"\nWrote {report.save(args.output_dir)}")
    return report.as_dict()


def _vim(args: BenchArguments) -> "VimForImageClassification":
    from hf_effml.vim import VimConfig, VimForImageClassification

    config = VimConfig(hidden_size=args.hidden_size)
    if args.quick:
        config = VimConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=4)
    return VimForImageClassification(config).eval().to(args.device)


def _dynamic(
    vim: "VimForImageClassification", pool: "Tensor", tokens: float, blocks: float
) -> "DyVMForImageClassification":
    """A DyVM whose untrained predictors and gates look at the image, every gate open for a share of the images."""
    import torch

    from hf_effml.vim import DyVMForImageClassification

    model = DyVMForImageClassification.from_vim(
        vim,
        token_keep_ratio=tokens,
        block_keep_ratio=blocks,
        enable_token_pruning=tokens < 1,
        enable_block_selection=blocks < 1,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "score_predictors" in name and name.endswith("out_conv.4.bias"):
                parameter.fill_(0.1)  # Anything but the zero of a fresh predictor.
            if name.endswith("block_head.weight"):
                parameter.normal_()
    if blocks < 1:
        # Only the first block's class token has not seen the image yet: its gates are the same for all.
        model.calibrate_block_gates([pool], per="direction")
    return model


def _nearest(model: "DyVMForImageClassification", pool: "Tensor", batch: int, blocks: float) -> "Tensor":
    """The images whose share of scans is nearest to the one asked for."""
    import torch

    with torch.inference_mode():
        shares = model(pool).block_keep_ratio
    if shares is None:
        return pool[:batch]
    return pool[(shares - blocks).abs().argsort(stable=True)[:batch]]


def _bench_model(
    args: BenchArguments,
    vim: "VimForImageClassification",
    model: "DyVMForImageClassification",
    pixels: "Tensor",
    asked: str,
    part: "Report",
) -> None:
    import torch

    from hf_effml.utils.benchmark import check_agreement, compare
    from hf_effml.vim.evaluation.measure import amount_of_work

    off, masked = copy.deepcopy(model), copy.deepcopy(model)
    off.set_pruning(False)
    masked.config.inference_mode = "mask"

    def forward(which: "VimForImageClassification") -> "Tensor":
        return which(pixels).logits

    variants = {DENSE: vim, SELECT: model, MASK: masked}
    functions: dict[str, Callable] = {name: partial(forward, variant) for name, variant in variants.items()}
    with torch.inference_mode():
        check_agreement({DENSE: forward(vim), OFF: forward(off)}, tolerance=0.0)
        timings = compare(functions, [[SELECT, MASK]], rounds=args.rounds, threads=args.threads, tolerance=1e-3)
        output = model(pixels)
    scans = 1.0 if output.block_keep_ratio is None else output.block_keep_ratio.mean().item()
    kept = model.config.tokens_kept_at_default_size
    shares = {SELECT: scans}  # The other models run all scans.
    work = {name: amount_of_work(variant, shares.get(name, 1.0))[0]["total"] for name, variant in variants.items()}
    for name, timing in timings.items():
        part.add(
            f"batch {len(pixels)}, {asked}, {name}",
            batch=len(pixels),
            asked=asked,
            model=name,
            tokens_kept=" ".join(map(str, kept)) if name != DENSE and kept else "all",
            scans_run=round(shares.get(name, 1.0), 3),
            **timing.as_row(),
            faster_than_dense=round(timings[DENSE].speedup(timing), 3),
            work=f"{work[name] / work[DENSE]:.0%}",
        )


def _bench_choice(
    args: BenchArguments, model: "DyVMForImageClassification", pixels: "Tensor", asked: str, part: "Report"
) -> None:
    """What scoring, choosing and gathering tokens takes of a forward pass: the same steps alone, on its own inputs."""
    import torch

    from hf_effml.utils.benchmark import compare

    inputs: list[tuple[Tensor, Tensor]] = []
    predictors = model.vim.score_predictors
    hooks = [predictor.register_forward_pre_hook(lambda _, given: inputs.append(given)) for predictor in predictors]
    with torch.inference_mode():
        kept = [indices.shape[1] for indices in model(pixels).kept_indices]
    for hook in hooks:
        hook.remove()

    def choose() -> "list[Tensor]":
        return [_choose(*stage) for stage in zip(predictors, inputs, kept, strict=True)]

    functions: dict[str, Callable] = {FORWARD: lambda: model(pixels).logits, CHOOSING: choose}
    with torch.inference_mode():
        timings = compare(functions, [], rounds=args.rounds, threads=args.threads)
    part.add(
        f"batch {len(pixels)}, {asked}",
        batch=len(pixels),
        tokens_kept=" ".join(map(str, kept)),
        **{f"{name}_ms": round(timing.median, 3) for name, timing in timings.items()},
        share_of_forward=f"{1 / timings[FORWARD].speedup(timings[CHOOSING]):.1%}",
    )


def _choose(predictor: Callable, given: "tuple[Tensor, Tensor]", kept: int) -> "Tensor":
    ranks = predictor(*given)[..., 0].topk(kept, dim=1).indices.sort(dim=1).values
    stream = given[0]
    return stream.gather(1, ranks.unsqueeze(-1).expand(-1, -1, stream.shape[-1]))


if __name__ == "__main__":
    sys.exit(run_script(main))
