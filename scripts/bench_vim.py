"""Measures time and memory of Vision Mamba's scan and forward pass beside what they replace.

The baselines are a plain loop over the tokens, as mamba-ssm's reference has it; the same model with that loop; the
same weights in transformers' Mamba mixer, run in both directions; and DeiT-tiny as a yardstick of another kind.
Everything that computes the same is checked to agree first.

Example: `hf-effml bench vim --batch_sizes 1 8 --threads 1`
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from hf_effml.cli.parsing import parse_arguments, run_script


if TYPE_CHECKING:
    from torch import Tensor, nn

    from hf_effml.utils.report import Report
    from hf_effml.vim import ScanStream


@dataclass
class BenchArguments:
    """What to measure, and where."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Batch sizes of the model."})
    scan_batch_size: int = field(default=8, metadata={"help": "Batch size of the single scan."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    rounds: int = field(default=7, metadata={"help": "Interleaved rounds; medians of them are shown."})
    device: str = field(default="cpu", metadata={"help": "Where to run: cpu or cuda."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type of the model's computations, by autocast unless float32."}
    )
    seed: int = field(default=0, metadata={"help": "Of weights and inputs."})
    output_dir: str = field(default="effml-bench", metadata={"help": "Folder for bench_vim.json and bench_vim.md."})
    quick: bool = field(default=False, metadata={"help": "Tiny sizes, to see it run; the numbers mean nothing."})


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


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(BenchArguments, argv=argv, program=__file__, description=__doc__)
    if min(*args.batch_sizes, args.scan_batch_size, args.threads, args.rounds) < 1:
        raise ValueError("`batch_sizes`, `scan_batch_size`, `threads` and `rounds` must be at least 1.")
    from hf_effml.utils.benchmark import describe_run
    from hf_effml.utils.report import Report

    run = describe_run(seed=args.seed, rounds=args.rounds, threads=args.threads, device=args.device)
    settings = {key: getattr(args, key) for key in ("dtype", "scan_batch_size", "quick")}
    report = Report("bench_vim", facts={"run": run, "settings": settings})
    sizes = QUICK if args.quick else Sizes()
    scan = f"One scan, batch {args.scan_batch_size}, {sizes.tokens} tokens, {sizes.channels} channels"
    _bench_scan(args, sizes, report.add_part("scan", title=scan))
    _bench_scaling(args, sizes, report.add_part("scaling", title="Twice the tokens, forward and backward"))
    models = report.add_part("model", title=f"Forward pass, {sizes.layers} blocks, {sizes.image} pixels")
    for batch in args.batch_sizes:
        _bench_model(args, sizes, batch, models)
    print(report.as_markdown())
    print(f"\nWrote {report.save(args.output_dir)}")
    return report.as_dict()


def _scan_inputs(args: BenchArguments, batch: int, tokens: int, sizes: Sizes) -> "ScanStream":
    import torch

    from hf_effml.vim import ScanStream

    generator = torch.Generator().manual_seed(args.seed)

    def random(*shape: int) -> "Tensor":
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


def _forward(scan: Callable, stream: "ScanStream") -> "Tensor":
    import torch

    with torch.no_grad():
        return scan(stream)[0]


def _forward_backward(scan: Callable, stream: "ScanStream") -> "list[Tensor]":
    import torch

    y = scan(stream)[0]
    return [y, *torch.autograd.grad(y.square().mean(), list(stream[:7]))]


def _bench_scan(args: BenchArguments, sizes: Sizes, part: "Report") -> None:
    from hf_effml.utils.benchmark import compare, peak_memory
    from hf_effml.vim import selective_scan, selective_scan_reference
    from hf_effml.vim.evaluation.baselines import loop_scan

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


def _bench_scaling(args: BenchArguments, sizes: Sizes, part: "Report") -> None:
    from hf_effml.utils.benchmark import compare
    from hf_effml.vim import selective_scan

    functions = {}
    for tokens in sizes.lengths:
        stream = _scan_inputs(args, args.scan_batch_size, tokens, sizes)
        functions[str(tokens)] = partial(_forward_backward, selective_scan, stream)
    timings = compare(functions, [], rounds=args.rounds, threads=args.threads)
    short = timings[str(sizes.lengths[0])]
    for name, timing in timings.items():
        times = round(1 / short.speedup(timing), 2)
        part.add(f"{name} tokens", tokens=int(name), **timing.as_row(), times_the_first=times)


def _bench_model(args: BenchArguments, sizes: Sizes, batch: int, part: "Report") -> None:
    import torch

    from hf_effml.utils.benchmark import compare
    from hf_effml.vim import VimConfig, VimForImageClassification
    from hf_effml.vim.evaluation.baselines import deit_tiny, scan_replaced_by_loop, with_transformers_mixer

    torch.manual_seed(args.seed)
    config = VimConfig(
        image_size=sizes.image, patch_size=sizes.patch, hidden_size=sizes.hidden, num_hidden_layers=sizes.layers
    )
    ours = VimForImageClassification(config).eval().to(args.device)
    yardstick, deit = deit_tiny(config, args.device)
    pixels = torch.randn(batch, 3, sizes.image, sizes.image).to(args.device)
    dtype = getattr(torch, args.dtype)

    def forward(model: "nn.Module") -> "Tensor":
        with torch.inference_mode(), torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            output = model(pixels)
        return output if isinstance(output, torch.Tensor) else output.logits

    def forward_with_loop(model: "nn.Module") -> "Tensor":
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


if __name__ == "__main__":
    sys.exit(run_script(main))
