"""The selective scan of Mamba: one public function that picks a backend per call, and its slow, obvious twin.

The torch path is a chunked scan in one custom autograd function: ordinary tensor calls, nothing to build, linear in
the sequence length.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.utils import logging


try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as _mamba_ssm_scan
except (ImportError, OSError, RuntimeError):  # absent, or present and broken: the torch path serves
    _mamba_ssm_scan = None


logger = logging.get_logger(__name__)

_LOG2E = math.log2(math.e)
# Elements of one (chunk, rows, state, channels) work buffer: about 3 MB in float32, which stays in a core's caches.
_CHUNK_ELEMENTS = 3 * 2**18
# log1p(y) = 2 atanh(s) with s = y / (2 + y); this is 2 atanh(s) / s in powers of s^2 on [0, 1/9], highest first,
# fitted at Chebyshev nodes: relative error 4e-9.
_ATANH = (0.28174657, 0.27961419, 0.40024854, 0.66666316, 2.0)


class ScanStream(NamedTuple):
    """
    The tensors of one scan: a batch of sequences that share one set of parameters and one direction.

    Args:
        x (`Tensor` of shape `(rows, length, channels)`): Input of the recurrence.
        dt (`Tensor` of shape `(rows, length, channels)`): Step sizes before bias and softplus.
        A (`Tensor` of shape `(channels, states)`): Decay rates, negative.
        B (`Tensor` of shape `(rows, length, states)`): Input projection.
        C (`Tensor` of shape `(rows, length, states)`): Output projection.
        D (`Tensor` of shape `(channels,)`): Skip weights.
        dt_bias (`Tensor` of shape `(channels,)`): Added to `dt` before the softplus.
        reverse (`bool`, *optional*, defaults to `False`): Scan from the last token to the first.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor
    reverse: bool = False


_TENSORS = len(ScanStream._fields) - 1


def selective_scan(*streams: ScanStream) -> tuple[Tensor, ...]:
    r"""
    Run the selective scan over one or more streams of equal length at once.

    With `dt = softplus(dt + dt_bias)` every channel and state follows `h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t`, and
    the output is `y_t = sum_n h_t[n] C_t[n] + D x_t` (vim.md 2.3; Mamba, https://huggingface.co/papers/2312.00752).
    All arithmetic is in float32 (float64 if `x` is float64), whatever the inputs' types and autocast.

    The backend is chosen per call: `mamba_ssm` for CUDA tensors where it is installed and works, an unrolled loop
    while exporting, and otherwise a chunked scan in plain torch whose directions share every step.

    Args:
        streams (`ScanStream`):
            What to scan; all streams need the same length, channels and states, their rows may differ.

    Returns:
        `tuple[Tensor, ...]`: One `(rows, length, channels)` output per stream, in the type of its `x`.

    Raises:
        ValueError: If there is no stream, or lengths, channels or states differ between streams.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.vim import ScanStream, selective_scan
    >>> x, dt = torch.ones(2, 5, 4), torch.zeros(2, 5, 4)
    >>> B = C = torch.ones(2, 5, 3)
    >>> (y,) = selective_scan(ScanStream(x, dt, -torch.ones(4, 3), B, C, torch.zeros(4), torch.zeros(4)))
    >>> y.shape
    torch.Size([2, 5, 4])

    ```
    """
    _check(streams)
    if torch.compiler.is_exporting():
        return tuple(selective_scan_reference(stream) for stream in streams)
    if streams[0].x.is_cuda and _mamba_ssm_works():
        return tuple(_scan_with_mamba_ssm(stream) for stream in streams)
    tensors = [tensor for stream in streams for tensor in stream[:_TENSORS]]
    reverse = [stream.reverse for stream in streams]
    if torch.compiler.is_compiling():
        return tuple(torch.ops.hf_effml.selective_scan(tensors, reverse)[0])
    return _ChunkedScan.apply(reverse, *tensors)


def selective_scan_reference(stream: ScanStream) -> Tensor:
    """
    The same scan as one step after the other, in differentiable torch calls: the twin the fast paths are tested
    against.

    Args:
        stream (`ScanStream`): What to scan.

    Returns:
        `Tensor`: The `(rows, length, channels)` output in the type of `x`.
    """
    dtype = _compute_dtype(stream.x)
    with torch.autocast(device_type=stream.x.device.type, enabled=False):
        x, dt, A, B, C, D, dt_bias = (tensor.to(dtype) for tensor in stream[:_TENSORS])
        dt = F.softplus(dt + dt_bias)
        state = x.new_zeros(x.shape[0], *A.shape)
        outputs = []
        steps = zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True)
        for x_t, dt_t, B_t, C_t in reversed(list(steps)) if stream.reverse else steps:
            decay = torch.exp(dt_t.unsqueeze(-1) * A)
            state = decay * state + (dt_t * x_t).unsqueeze(-1) * B_t.unsqueeze(1)
            outputs.append((state * C_t.unsqueeze(1)).sum(-1) + D * x_t)
        if stream.reverse:
            outputs.reverse()
        return torch.stack(outputs, dim=1).to(stream.x.dtype)


def _check(streams: tuple[ScanStream, ...]) -> None:
    if not streams:
        raise ValueError("`selective_scan` needs at least one stream; got none.")
    shapes = [(*stream.x.shape[1:], stream.A.shape[1]) for stream in streams]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"All streams need one (length, channels, states); got {shapes}. Scan them in separate calls."
        )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _softplus(x: Tensor) -> Tensor:
    """softplus(x) to float32 rounding; on a CPU six times as fast as `F.softplus`, whose log1p is slow."""
    if x.is_cuda or x.dtype != torch.float32:
        return F.softplus(x)
    y = x.abs().mul_(-_LOG2E).exp2_()
    s = y.div_(y + 2)
    square = s * s
    series = square.mul(_ATANH[0])
    for coefficient in _ATANH[1:-1]:
        series.add_(coefficient).mul_(square)
    return series.add_(_ATANH[-1]).mul_(s).add_(x.clamp_min(0))


class _Merged(NamedTuple):
    """All streams as one batch of rows, steps first: reversed streams are flipped, parameters repeated per row."""

    x: Tensor  # (length, rows, channels)
    raw_dt: Tensor  # (length, rows, channels), with bias, before the softplus
    A: Tensor  # (rows, states, channels): channels last keeps every broadcast contiguous
    B: Tensor  # (length, rows, states)
    C: Tensor  # (length, rows, states)
    D: Tensor  # (rows, channels)


def _merge(reverse: list[bool], tensors: list[Tensor]) -> _Merged:
    streams = [
        ScanStream(*tensors[i * _TENSORS : (i + 1) * _TENSORS], backwards) for i, backwards in enumerate(reverse)
    ]
    dtype = _compute_dtype(streams[0].x)

    def per_row(name: str) -> Tensor:
        parameters = [getattr(stream, name).to(dtype) for stream in streams]
        rows = [stream.x.shape[0] for stream in streams]
        return torch.cat([p.expand(n, *p.shape) for p, n in zip(parameters, rows, strict=True)])

    x, dt, B, C = (_steps_first([getattr(s, name) for s in streams], reverse, dtype) for name in ("x", "dt", "B", "C"))
    return _Merged(x, dt.add_(per_row("dt_bias")), per_row("A").mT.contiguous(), B, C, per_row("D"))


def _steps_first(tensors: list[Tensor], reverse: list[bool], dtype: torch.dtype) -> Tensor:
    """One (rows, length, *) tensor per stream -> (length, all rows, *) in scan order; always a new tensor."""
    length, width = tensors[0].shape[1:]
    merged = tensors[0].new_empty(length, sum(tensor.shape[0] for tensor in tensors), width, dtype=dtype)
    parts = merged.split([tensor.shape[0] for tensor in tensors], dim=1)
    for part, tensor, backwards in zip(parts, tensors, reverse, strict=True):
        part.copy_((tensor.flip(1) if backwards else tensor).transpose(0, 1))
    return merged


def _rows_first(merged: Tensor, reverse: list[bool], like: list[Tensor]) -> list[Tensor]:
    """The inverse of `_steps_first`: one contiguous tensor per stream, shaped and typed as in `like`."""
    parts = merged.split([tensor.shape[0] for tensor in like], dim=1)
    return [
        (part.flip(0) if backwards else part).transpose(0, 1).to(tensor.dtype).contiguous()
        for part, tensor, backwards in zip(parts, like, reverse, strict=True)
    ]


def _chunk_length(rows: int, channels: int, states: int) -> int:
    return max(1, min(64, _CHUNK_ELEMENTS // max(rows * channels * states, 1)))


class _Chunks:
    """Work buffers of the scan; `fill` computes the decays exp(dt A) and the hidden states of one chunk."""

    def __init__(self, merged: _Merged):
        self.length, rows, channels = merged.x.shape
        self.size = _chunk_length(rows, channels, merged.A.shape[1])
        self.starts = range(0, self.length, self.size)
        self.dt = _softplus(merged.raw_dt)
        self.dt_x, self.B = self.dt * merged.x, merged.B.unsqueeze(3)
        # exp2 with a scaled A: torch's exp goes through a library that is slow on some CPUs, exp2 is vectorised
        # everywhere.
        self.A = merged.A * _LOG2E
        self.decay = self.buffer()
        self.states = self.A.new_zeros(
            min(self.size, self.length) + 1, *self.A.shape
        )  # [0]: the state before the chunk

    def buffer(self) -> Tensor:
        return self.A.new_empty(min(self.size, self.length), *self.A.shape)

    def steps(self, index: int) -> slice:
        return slice(self.starts[index], min(self.starts[index] + self.size, self.length))

    def fill(self, steps: slice) -> tuple[Tensor, Tensor]:
        count = steps.stop - steps.start
        decay, states = self.decay[:count], self.states[: count + 1]
        torch.mul(self.dt[steps].unsqueeze(2), self.A, out=decay).exp2_()
        torch.mul(self.dt_x[steps].unsqueeze(2), self.B[steps], out=states[1:])
        state, *later = states.unbind(0)
        for decay_t, state_t in zip(decay.unbind(0), later, strict=True):
            state = state_t.addcmul_(decay_t, state)
        return decay, states


def _contract(vector: Tensor, matrix: Tensor) -> Tensor:
    """(steps, rows, j) times (steps, rows, j, k) -> (steps, rows, k); column vectors would be ten times slower."""
    product = torch.bmm(vector.flatten(0, 1).unsqueeze(1), matrix.flatten(0, 1))
    return product.view(*vector.shape[:2], matrix.shape[-1])


def _scan_forward(reverse: list[bool], tensors: list[Tensor], keep_states: bool) -> tuple[list[Tensor], Tensor]:
    """All streams' outputs, and the hidden states before each chunk (an empty tensor unless asked for)."""
    merged = _merge(reverse, tensors)
    chunks = _Chunks(merged)
    kept = merged.A.new_empty(len(chunks.starts) if keep_states else 0, *merged.A.shape)
    y = merged.x * merged.D
    for index in range(len(chunks.starts)):
        steps = chunks.steps(index)
        if keep_states:
            kept[index] = chunks.states[0]
        _, states = chunks.fill(steps)
        y[steps] += _contract(merged.C[steps], states[1:])
        chunks.states[0] = states[-1]
    return _rows_first(y, reverse, tensors[::_TENSORS]), kept


def _scan_backward(
    reverse: list[bool], tensors: list[Tensor], kept: Tensor, grad_outputs: list[Tensor]
) -> list[Tensor]:
    """Gradients for every tensor of every stream (vim.md 2.5); decays and states are recomputed chunk by chunk."""
    merged = _merge(reverse, tensors)
    chunks = _Chunks(merged)
    grad_y = _steps_first(grad_outputs, reverse, merged.x.dtype)
    grad_dt_x, grad_dt, grad_B, grad_C = (torch.empty_like(t) for t in (merged.x, merged.x, merged.B, merged.C))
    grad_A, carry = torch.zeros_like(merged.A), torch.zeros_like(merged.A)
    buffer = chunks.buffer()
    for index in reversed(range(len(chunks.starts))):
        steps = chunks.steps(index)
        chunks.states[0] = kept[index]
        decay, states = chunks.fill(steps)
        adjoint = buffer[: len(decay)]
        torch.mul(merged.C[steps].unsqueeze(3), grad_y[steps].unsqueeze(2), out=adjoint)
        later = None
        for adjoint_t, decay_t in zip(reversed(adjoint.unbind(0)), reversed(decay.unbind(0)), strict=True):
            adjoint_t.add_(carry) if later is None else adjoint_t.addcmul_(*later)
            later = (decay_t, adjoint_t)
        torch.mul(*later, out=carry)
        grad_C[steps] = _contract(grad_y[steps], states[1:].mT)
        grad_B[steps] = _contract(chunks.dt_x[steps], adjoint.mT)
        grad_dt_x[steps] = _contract(merged.B[steps], adjoint)
        through_decay = adjoint.mul_(decay).mul_(states[:-1])
        grad_dt[steps] = torch.mul(through_decay, merged.A, out=decay).sum(2)
        grad_A += through_decay.mul_(chunks.dt[steps].unsqueeze(2)).sum(0)

    grad_dt.addcmul_(grad_dt_x, merged.x).mul_(torch.sigmoid(merged.raw_dt))
    grad_x = grad_dt_x.mul_(chunks.dt).addcmul_(grad_y, merged.D)
    per_row = {2: grad_A, 5: merged.x.mul_(grad_y).sum(0), 6: grad_dt.sum(0)}
    per_step = {0: grad_x, 1: grad_dt, 3: grad_B, 4: grad_C}
    return _split_gradients(per_row, per_step, reverse, tensors)


def _split_gradients(
    per_row: dict[int, Tensor], per_step: dict[int, Tensor], reverse: list[bool], tensors: list[Tensor]
) -> list[Tensor]:
    """Merged gradients, keyed by the place of their tensor in `ScanStream` -> one per tensor of every stream."""
    gradients = list(tensors)
    rows = [tensor.shape[0] for tensor in tensors[::_TENSORS]]
    for place, merged in per_step.items():
        gradients[place::_TENSORS] = _rows_first(merged, reverse, tensors[place::_TENSORS])
    for place, merged in per_row.items():
        sums = (part.sum(0) for part in merged.split(rows))
        gradients[place::_TENSORS] = [
            (total.mT if total.dim() == 2 else total).to(tensor.dtype).contiguous()
            for total, tensor in zip(sums, tensors[place::_TENSORS], strict=True)
        ]
    return gradients


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reverse: list[bool], *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device_type=tensors[0].device.type, enabled=False):
            outputs, kept = _scan_forward(reverse, list(tensors), keep_states=any(ctx.needs_input_grad))
        ctx.reverse = reverse
        ctx.save_for_backward(kept, *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        kept, *tensors = ctx.saved_tensors
        with torch.autocast(device_type=kept.device.type, enabled=False):
            return None, *_scan_backward(ctx.reverse, tensors, kept, list(grad_outputs))


# The same two functions as an operator that `torch.compile` treats as one node instead of unrolling `length` steps.
@torch.library.custom_op("hf_effml::selective_scan", mutates_args=())
def _scan_op(tensors: list[Tensor], reverse: list[bool]) -> tuple[list[Tensor], Tensor]:
    with torch.autocast(device_type=tensors[0].device.type, enabled=False):
        return _scan_forward(reverse, tensors, keep_states=True)


@_scan_op.register_fake
def _(tensors: list[Tensor], reverse: list[bool]) -> tuple[list[Tensor], Tensor]:
    outputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[::_TENSORS]]
    rows, length = sum(x.shape[0] for x in outputs), outputs[0].shape[1]
    channels, states = tensors[2].shape
    chunk = _chunk_length(rows, channels, states)
    kept = tensors[0].new_empty(-(-length // chunk), rows, states, channels, dtype=_compute_dtype(tensors[0]))
    return outputs, kept


def _scan_op_context(ctx: Any, inputs: tuple, output: tuple[list[Tensor], Tensor]) -> None:
    tensors, ctx.reverse = inputs
    ctx.save_for_backward(output[1], *tensors)


def _scan_op_backward(ctx: Any, grad_outputs: list[Tensor], _: Tensor) -> tuple[list[Tensor], None]:
    kept, *tensors = ctx.saved_tensors
    grads = torch.ops.hf_effml.selective_scan_backward(tensors, ctx.reverse, kept, list(grad_outputs))
    return list(grads), None


@torch.library.custom_op("hf_effml::selective_scan_backward", mutates_args=())
def _scan_backward_op(
    tensors: list[Tensor], reverse: list[bool], kept: Tensor, grad_outputs: list[Tensor]
) -> list[Tensor]:
    with torch.autocast(device_type=kept.device.type, enabled=False):
        return _scan_backward(reverse, tensors, kept, grad_outputs)


@_scan_backward_op.register_fake
def _(tensors: list[Tensor], reverse: list[bool], kept: Tensor, grad_outputs: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


_scan_op.register_autograd(_scan_op_backward, setup_context=_scan_op_context)


@functools.cache
def _mamba_ssm_works() -> bool:
    """Whether mamba-ssm's kernel runs here; importing it proves little, so it is tried once on a tiny input."""
    if _mamba_ssm_scan is None:
        logger.info("mamba-ssm is not usable; CUDA tensors take the torch path of the selective scan.")
        return False
    x, state = torch.ones(1, 4, 8, device="cuda"), torch.ones(1, 4, 8, device="cuda")
    try:
        _mamba_ssm_scan(x, x, -torch.ones(4, 4, device="cuda"), state, state, delta_softplus=True)
    except (ImportError, OSError, RuntimeError, TypeError) as error:
        logger.warning(f"mamba-ssm is installed but its scan fails here ({error}); using the torch path instead.")
        return False
    return True


def _scan_with_mamba_ssm(stream: ScanStream) -> Tensor:
    def channels_first(tensor: Tensor) -> Tensor:
        return (tensor.flip(1) if stream.reverse else tensor).transpose(1, 2).contiguous()

    x, dt, B, C = (channels_first(tensor) for tensor in (stream.x, stream.dt, stream.B, stream.C))
    y = _mamba_ssm_scan(
        x, dt, stream.A.float(), B, C, stream.D.float(), delta_bias=stream.dt_bias.float(), delta_softplus=True
    ).transpose(1, 2)
    return y.flip(1) if stream.reverse else y
