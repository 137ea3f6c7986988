"""What DyVM gains and costs: whole models beside the dense Vim they are made from, and the choosing alone."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from hf_effml.utils.benchmark import check_agreement, compare
from hf_effml.utils.report import Column, Report
from hf_effml.vim.configuration_vim import VimConfig
from hf_effml.vim.modeling_dyvm import DyVMForImageClassification
from hf_effml.vim.modeling_vim import VimForImageClassification

from .baselines import natural_images
from .bench_settings import BenchSettings, timing_columns
from .measure import amount_of_work


# Images to choose from and to set the gates on.
POOL = 16
DENSE, OFF, SELECT, MASK = "dense Vim", "DyVM, pruning off", "DyVM, select", "DyVM, mask"
FORWARD, CHOOSING = "forward", "choosing"


@dataclass
class DyVMBenchSettings(BenchSettings):
    """What to measure of dropping and skipping, and where."""

    token_keep_ratio: list[float] = field(
        default_factory=lambda: [1.0, 0.9, 0.7, 0.7], metadata={"help": "Shares that a stage keeps, one per setting."}
    )
    block_keep_ratio: list[float] = field(
        default_factory=lambda: [0.8, 0.8, 1.0, 0.8], metadata={"help": "Shares of the scans, one per setting."}
    )
    hidden_size: int = field(default=192, metadata={"help": "Width: 192 is Vim-tiny, 384 small, 768 base."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.token_keep_ratio) != len(self.block_keep_ratio):
            raise ValueError(
                f"`token_keep_ratio` and `block_keep_ratio` must be of one length, one pair per setting; got "
                f"{self.token_keep_ratio} and {self.block_keep_ratio}."
            )


def bench_dyvm(args: DyVMBenchSettings) -> Report:
    """Measures whole models, and what choosing tokens takes of them.

    Images have the spectrum of photographs. The gates are set so that every scan runs for the share of images asked
    for; the shares that then really run are in the table.

    Args:
        args ([`DyVMBenchSettings`]):
            What to measure.

    Returns:
        [`~hf_effml.utils.report.Report`]: with the parts `models` and `choosing`.

    Raises:
        RuntimeError: If selecting and masking differ, or the model with everything on and the Vim.
    """
    report = args.report("bench_dyvm", "hidden_size")
    columns = {name: Column(name.replace("_", " ")) for name in ("tokens_kept", "scans_run")}
    columns |= timing_columns("faster_than_dense", "work")
    models = report.add_part("models", columns, "Whole model")
    names = ("tokens_kept", f"{FORWARD}_ms", f"{CHOOSING}_ms", "share_of_forward")
    columns = {name: Column(name.replace("_", " ")) for name in names}
    steps = report.add_part("choosing", columns, "Choosing tokens")
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
    return report


def _vim(args: DyVMBenchSettings) -> VimForImageClassification:
    config = VimConfig(hidden_size=args.hidden_size)
    if args.quick:
        config = VimConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=4)
    return VimForImageClassification(config).eval().to(args.device)


def _dynamic(vim: VimForImageClassification, pool: Tensor, tokens: float, blocks: float) -> DyVMForImageClassification:
    """A DyVM whose untrained predictors and gates look at the image, every gate open for a share of the images."""
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


def _nearest(model: DyVMForImageClassification, pool: Tensor, batch: int, blocks: float) -> Tensor:
    """The images whose share of scans is nearest to the one asked for."""
    with torch.inference_mode():
        shares = model(pool).block_keep_ratio
    if shares is None:
        return pool[:batch]
    return pool[(shares - blocks).abs().argsort(stable=True)[:batch]]


def _bench_model(
    args: DyVMBenchSettings,
    vim: VimForImageClassification,
    model: DyVMForImageClassification,
    pixels: Tensor,
    asked: str,
    part: Report,
) -> None:
    off, masked = copy.deepcopy(model), copy.deepcopy(model)
    off.set_pruning(False)
    masked.config.inference_mode = "mask"

    def forward(which: VimForImageClassification) -> Tensor:
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
    args: DyVMBenchSettings, model: DyVMForImageClassification, pixels: Tensor, asked: str, part: Report
) -> None:
    """What scoring, choosing and gathering tokens takes of a forward pass: the same steps alone, on its own inputs."""
    inputs: list[tuple[Tensor, Tensor]] = []
    predictors = model.vim.score_predictors
    hooks = [predictor.register_forward_pre_hook(lambda _, given: inputs.append(given)) for predictor in predictors]
    with torch.inference_mode():
        kept = [indices.shape[1] for indices in model(pixels).kept_indices]
    for hook in hooks:
        hook.remove()

    def choose() -> list[Tensor]:
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


def _choose(predictor: Callable, given: tuple[Tensor, Tensor], kept: int) -> Tensor:
    ranks = predictor(*given)[..., 0].topk(kept, dim=1).indices.sort(dim=1).values
    stream = given[0]
    return stream.gather(1, ranks.unsqueeze(-1).expand(-1, -1, stream.shape[-1]))


__all__ = ["DyVMBenchSettings", "bench_dyvm"]
