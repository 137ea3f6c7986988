"""Measures time and memory of Vision Mamba's scan and forward pass beside what they replace.

The baselines are a plain loop over the tokens, as mamba-ssm's reference has it; the same model with that loop; the
same weights in transformers' Mamba mixer, run in both directions; and DeiT-tiny as a yardstick of another kind.
Everything that computes the same is checked to agree first.

Example: `hf-effml bench vim --batch_sizes 1 8 --threads 1`
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from hf_effml.cli.parsing import parse_arguments, run_script


if TYPE_CHECKING:
    from torch import Tensor, nn

    from hf_effml.vim import ScanStream, VimForImageClassification
    from hf_effml.vim.vim_blocks import VimMixer


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
    from hf_effml.utils.benchmark import describe_run, markdown_table, one_line, write_report

    run = describe_run(seed=args.seed, rounds=args.rounds, threads=args.threads, device=args.device)
    sizes = QUICK if args.quick else Sizes()
    scans = _bench_scan(args, sizes)
    scaling = _bench_scaling(args, sizes)
    models = [row for batch in args.batch_sizes for row in _bench_model(args, sizes, batch)]
    results: dict[str, object] = {
        "run": run,
        "settings": {key: getattr(args, key) for key in ("dtype", "scan_batch_size", "quick")},
        "scan": scans,
        "scaling": scaling,
        "model": models,
    }
    tables = [
        f"## One scan, batch {args.scan_batch_size}, {sizes.tokens} tokens, {sizes.channels} channels\n\n"
        + markdown_table(scans),
        f"## Twice the tokens, forward and backward\n\n{markdown_table(scaling)}",
        f"## Forward pass, {sizes.layers} blocks, {sizes.image} pixels\n\n{markdown_table(models)}",
        one_line(run),
    ]
    print("\n\n".join(tables))
    print(f"\nWrote {write_report(args.output_dir, 'bench_vim', results, tables)}")
    return results


def loop_scan(*streams: "ScanStream") -> "tuple[Tensor, ...]":
    """The scan as mamba-ssm's reference computes it: everything materialised, then a loop that indexes the tokens.

    Args:
        streams (`ScanStream`): As for [`selective_scan`].

    Returns:
        `tuple[Tensor, ...]`: One output per stream.
    """
    return tuple(_loop_scan(stream) for stream in streams)


def _loop_scan(stream: "ScanStream") -> "Tensor":
    import torch
    from torch.nn import functional as F

    # As the original: (batch, channels, tokens), and a backward direction is a flipped sequence.
    x, dt, B, C = (
        (tensor.flip(1) if stream.reverse else tensor).mT for tensor in (stream.x, stream.dt, stream.B, stream.C)
    )
    with torch.autocast(x.device.type, enabled=False):
        u, B, C = x.float(), B.float(), C.float()
        dt = F.softplus(dt.float() + stream.dt_bias[:, None].float())
        decay = torch.exp(torch.einsum("bdl,dn->bdln", dt, stream.A))
        update = torch.einsum("bdl,bnl,bdl->bdln", dt, B, u)
        state, outputs = torch.zeros_like(decay[:, :, 0]), []
        for index in range(u.shape[2]):
            state = decay[:, :, index] * state + update[:, :, index]
            outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, index]))
        y = (torch.stack(outputs, dim=2) + u * stream.D[:, None]).to(x.dtype).mT
    return y.flip(1) if stream.reverse else y


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


def _bench_scan(args: BenchArguments, sizes: Sizes) -> list[dict[str, Any]]:
    from hf_effml.utils.benchmark import compare, peak_memory
    from hf_effml.vim import selective_scan, selective_scan_reference

    scans: dict[str, Callable] = {
        "loop with indexing": loop_scan,
        "loop with unbind": lambda stream: (selective_scan_reference(stream),),
        "ours": selective_scan,
    }
    stream = _scan_inputs(args, args.scan_batch_size, sizes.tokens, sizes)
    rows = []
    for what, function in {"forward": _forward, "forward + backward": _forward_backward}.items():
        functions = {name: partial(function, scan, stream) for name, scan in scans.items()}
        timings = compare(functions, [list(scans)], rounds=args.rounds, threads=args.threads, tolerance=2e-4)
        memory = {name: peak_memory(function, args.device) / 2**20 for name, function in functions.items()}
        for name, timing in timings.items():
            row = {"what": what, "scan": name, **timing.as_row()}
            row["ours_is_faster_by"] = round(timing.speedup(timings["ours"]), 2)
            row["peak_MiB"] = round(memory[name], 2)
            row["ours_needs"] = f"{memory['ours'] / memory[name]:.0%}"
            rows.append(row)
    return rows


def _bench_scaling(args: BenchArguments, sizes: Sizes) -> list[dict[str, Any]]:
    from hf_effml.utils.benchmark import compare
    from hf_effml.vim import selective_scan

    functions = {}
    for tokens in sizes.lengths:
        stream = _scan_inputs(args, args.scan_batch_size, tokens, sizes)
        functions[str(tokens)] = partial(_forward_backward, selective_scan, stream)
    timings = compare(functions, [], rounds=args.rounds, threads=args.threads)
    short = timings[str(sizes.lengths[0])]
    return [
        {"tokens": int(name), **timing.as_row(), "times_the_first": round(1 / short.speedup(timing), 2)}
        for name, timing in timings.items()
    ]


def _bench_model(args: BenchArguments, sizes: Sizes, batch: int) -> list[dict[str, Any]]:
    import torch

    from hf_effml.utils.benchmark import compare
    from hf_effml.vim import VimConfig, VimForImageClassification

    torch.manual_seed(args.seed)
    config = VimConfig(
        image_size=sizes.image, patch_size=sizes.patch, hidden_size=sizes.hidden, num_hidden_layers=sizes.layers
    )
    ours = VimForImageClassification(config).eval().to(args.device)
    yardstick, deit = _deit(args, sizes)
    pixels = torch.randn(batch, 3, sizes.image, sizes.image).to(args.device)
    dtype = getattr(torch, args.dtype)

    def forward(model: "nn.Module") -> "Tensor":
        with torch.inference_mode(), torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            output = model(pixels)
        return output if isinstance(output, torch.Tensor) else output.logits

    def forward_with_loop(model: "nn.Module") -> "Tensor":
        with _scan_replaced_by_loop():
            return forward(model)

    functions = {
        "Vim, loop with indexing": partial(forward_with_loop, ours),
        "Vim, transformers' Mamba mixer twice": partial(forward, _with_transformers_mixer(ours)),
        "Vim, ours": partial(forward, ours),
        deit: partial(forward, yardstick),
    }
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    same = [name for name in functions if name != deit]
    timings = compare(functions, [same], rounds=args.rounds, threads=args.threads, tolerance=tolerance)
    return [
        {
            "batch": batch,
            "model": name,
            **timing.as_row(),
            "ms_per_image": round(timing.median / batch, 2),
            "ours_is_faster_by": round(timing.speedup(timings["Vim, ours"]), 2),
        }
        for name, timing in timings.items()
    ]


@contextmanager
def _scan_replaced_by_loop() -> Iterator[None]:
    from hf_effml.vim import vim_blocks

    original = vim_blocks.selective_scan
    vim_blocks.selective_scan = loop_scan
    try:
        yield
    finally:
        vim_blocks.selective_scan = original


def _with_transformers_mixer(model: "VimForImageClassification") -> "VimForImageClassification":
    """The same weights in what transformers offers: its mixer once forwards and once on the flipped tokens."""
    from torch import nn
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = model.config
    mamba = MambaConfig(
        hidden_size=config.hidden_size,
        state_size=config.state_size,
        conv_kernel=config.conv_kernel,
        expand=config.expand,
        time_step_rank=config.time_step_rank,
        num_hidden_layers=1,
    )

    def one_direction(mixer: "VimMixer", mark: str) -> MambaMixer:
        state = mixer.state_dict()
        twin = MambaMixer(mamba, layer_idx=0).eval()
        # The official names end in `_b` for the backward direction, but for `A_b_log`.
        own = {
            name: name if name.startswith(("in_proj", "out_proj")) else _official_name(name, mark)
            for name in twin.state_dict()
        }
        twin.load_state_dict({name: state[official] for name, official in own.items()})
        return twin

    class TwoDirections(nn.Module):
        def __init__(self, mixer: "VimMixer"):
            super().__init__()
            self.forwards, self.backwards = one_direction(mixer, ""), one_direction(mixer, "_b")
            self.factor = 0.5 if mixer.divide_output else 1.0

        def forward(self, hidden_states: "Tensor", *unused: Any, **options: Any) -> "tuple[Tensor, None]":
            both = self.forwards(hidden_states) + self.backwards(hidden_states.flip(1)).flip(1)
            return both * self.factor, None

    twin = deepcopy(model)
    for layer in twin.vim.layers:
        layer.mixer = TwoDirections(layer.mixer).to(model.device)
    return twin


def _official_name(name: str, mark: str) -> str:
    if name == "A_log":
        return f"A{mark}_log"
    module, dot, parameter = name.partition(".")
    return f"{module}{mark}{dot}{parameter}"


def _deit(args: BenchArguments, sizes: Sizes) -> "tuple[nn.Module, str]":
    """DeiT-tiny with random weights: timm's, or transformers' where timm is absent."""
    from hf_effml.utils.imports import usable

    if usable("timm") and not args.quick:
        import timm

        return timm.create_model("deit_tiny_patch16_224").eval().to(args.device), "DeiT-tiny (timm)"
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=sizes.image,
        patch_size=sizes.patch,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers // 2,
        num_attention_heads=max(1, sizes.hidden // 64),
        intermediate_size=4 * sizes.hidden,
    )
    return ViTForImageClassification(config).eval().to(args.device), "DeiT-tiny (transformers)"


if __name__ == "__main__":
    sys.exit(run_script(main))
