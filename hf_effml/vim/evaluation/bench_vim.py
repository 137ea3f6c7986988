"""Time and memory of Vision Mamba's scan and forward pass beside what they replace."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from hf_effml.utils.benchmark import compare, peak_memory
from hf_effml.utils.report import Report
from hf_effml.vim.configuration_vim import VimConfig
from hf_effml.vim.modeling_vim import VimForImageClassification
from hf_effml.vim.selective_scan import ScanStream, selective_scan, selective_scan_reference

from .baselines import deit_tiny, loop_scan, scan_replaced_by_loop, with_transformers_mixer
from .bench_settings import BenchSettings, timing_columns


@dataclass
class VimBenchSettings(BenchSettings):
    """What to measure of a Vim, and where."""

    scan_batch_size: int = field(default=8, metadata={"help": "Batch size of the single scan."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type of the model's computations, by autocast unless float32."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scan_batch_size < 1:
            raise ValueError(f"`scan_batch_size` must be at least 1; got {self.scan_batch_size}.")


@dataclass
class Sizes:
    """Sizes of everything measured; the defaults are Vim-tiny's at 224 pixels."""

    tokens: int = 197
    channels: int = 384
    states: int = 16
    lengths: tuple[int, int] = (200, 400)
    hidden: int = 192
    layers: int = 24
    image: int = 224
    patch: int = 16


QUICK = Sizes(tokens=9, channels=8, states=4, lengths=(8, 16), hidden=16, layers=2, image=32, patch=8)


def bench_vim(args: VimBenchSettings) -> Report:
    """Measures the scan alone, its growth with the tokens, and whole models.

    The baselines are a plain loop over the tokens, as mamba-ssm's reference has it; the same model with that loop; the
    same weights in transformers' Mamba mixer, run in both directions; and DeiT-tiny as a yardstick of another kind.

    Args:
        args ([`VimBenchSettings`]):
            What to measure.

    Returns:
        [`~hf_effml.utils.report.Report`]: with the parts `scan`, `scaling` and `model`.

    Raises:
        RuntimeError: If outputs that should be the same differ.
    """
    report, sizes = args.report("bench_vim", "dtype", "scan_batch_size"), QUICK if args.quick else Sizes()
    scan = f"One scan, batch {args.scan_batch_size}, {sizes.tokens} tokens, {sizes.channels} channels"
    columns = timing_columns("ours_is_faster_by", "peak_MiB", "ours_needs")
    _bench_scan(args, sizes, report.add_part("scan", columns, scan))
    scaling = report.add_part("scaling", timing_columns("times_the_first"), "Twice the tokens, forward and backward")
    _bench_scaling(args, sizes, scaling)
    columns = timing_columns("ms_per_image", "ours_is_faster_by")
    models = report.add_part("model", columns, f"Forward pass, {sizes.layers} blocks, {sizes.image} pixels")
    for batch in args.batch_sizes:
        _bench_model(args, sizes, batch, models)
    return report


def _scan_inputs(args: VimBenchSettings, batch: int, tokens: int, sizes: Sizes) -> ScanStream:
    generator = torch.Generator().manual_seed(args.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(args.device).requires_grad_()

    channels, states = sizes.channels, sizes.states
    A = -torch.arange(1.0, states + 1, device=args.device).expand(channels, -1).clone()
    return ScanStream(
        x=random(batch, tokens, channels),
        dt=random(batch, tokens, channels),
        A=A.requires_grad_(),
        B=random(batch, tokens, states),
        C=random(batch, tokens, states),
        D=random(channels),
        # Steps of a hundredth to a tenth, as in a trained model.
        dt_bias=(random(channels).detach() - 4).requires_grad_(),
    )


def _forward(scan: Callable, stream: ScanStream) -> Tensor:
    with torch.no_grad():
        return scan(stream)[0]


def _forward_backward(scan: Callable, stream: ScanStream) -> list[Tensor]:
    y = scan(stream)[0]
    return [y, *torch.autograd.grad(y.square().mean(), list(stream[:7]))]


def _bench_scan(args: VimBenchSettings, sizes: Sizes, part: Report) -> None:
    scans: dict[str, Callable] = {
        "loop with indexing": loop_scan,
        "loop with unbind": lambda stream: (selective_scan_reference(stream),),
        "ours": selective_scan,
    }
    stream = _scan_inputs(args, args.scan_batch_size, sizes.tokens, sizes)
    for what, function in {"forward": _forward, "forward + backward": _forward_backward}.items():
        functions = {name: partial(function, scan, stream) for name, scan in scans.items()}
        timings = compare(functions, [list(scans)], rounds=args.rounds, threads=args.threads, tolerance=2e-4)
        memory = {name: peak_memory(function, args.device) / 2**20 for name, function in functions.items()}
        for name, timing in timings.items():
            part.add(
                f"{what}, {name}",
                what=what,
                scan=name,
                **timing.as_row(),
                ours_is_faster_by=round(timing.speedup(timings["ours"]), 2),
                peak_MiB=round(memory[name], 2),
                ours_needs=f"{memory['ours'] / memory[name]:.0%}",
            )


def _bench_scaling(args: VimBenchSettings, sizes: Sizes, part: Report) -> None:
    functions = {}
    for tokens in sizes.lengths:
        stream = _scan_inputs(args, args.scan_batch_size, tokens, sizes)
        functions[str(tokens)] = partial(_forward_backward, selective_scan, stream)
    timings = compare(functions, [], rounds=args.rounds, threads=args.threads)
    short = timings[str(sizes.lengths[0])]
    for name, timing in timings.items():
        times = round(1 / short.speedup(timing), 2)
        part.add(f"{name} tokens", tokens=int(name), **timing.as_row(), times_the_first=times)


def _bench_model(args: VimBenchSettings, sizes: Sizes, batch: int, part: Report) -> None:
    torch.manual_seed(args.seed)
    config = VimConfig(
        image_size=sizes.image, patch_size=sizes.patch, hidden_size=sizes.hidden, num_hidden_layers=sizes.layers
    )
    ours = VimForImageClassification(config).eval().to(args.device)
    yardstick, deit = deit_tiny(config, args.device)
    pixels = torch.randn(batch, 3, sizes.image, sizes.image).to(args.device)
    dtype = getattr(torch, args.dtype)

    def forward(model: nn.Module) -> Tensor:
        with torch.inference_mode(), torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            output = model(pixels)
        return output if isinstance(output, torch.Tensor) else output.logits

    def forward_with_loop(model: nn.Module) -> Tensor:
        with scan_replaced_by_loop():
            return forward(model)

    functions = {
        "Vim, loop with indexing": partial(forward_with_loop, ours),
        "Vim, transformers' Mamba mixer twice": partial(forward, with_transformers_mixer(ours)),
        "Vim, ours": partial(forward, ours),
        deit: partial(forward, yardstick),
    }
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    same = [name for name in functions if name != deit]
    timings = compare(functions, [same], rounds=args.rounds, threads=args.threads, tolerance=tolerance)
    for name, timing in timings.items():
        part.add(
            f"batch {batch}, {name}",
            batch=batch,
            model=name,
            **timing.as_row(),
            ms_per_image=round(timing.median / batch, 2),
            ours_is_faster_by=round(timing.speedup(timings["Vim, ours"]), 2),
        )


__all__ = ["VimBenchSettings", "bench_vim"]
