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
# Elements of one (steps, rows, states, channels) work buffer: about 3 MB in float32.
_CHUNK_ELEMENTS = 3 * 2**18
# log1p(y) = 2 atanh(s) with s = y / (2 + y); this is 2 atanh(s) / s in powers of s^2 on [0, 1/9], highest first,
# fitted at Chebyshev nodes: relative error 4e-9.
_ATANH = (0.28174657, 0.27961419, 0.40024854, 0.66666316, 2.0)


class ScanStream(NamedTuple):
    """The tensors of one scan: a batch of sequences that share one set of parameters and one direction.

    Args:
        x (`Tensor` of shape `(rows, length, channels)`):
            Input of the recurrence.
        dt (`Tensor` of shape `(rows, length, channels)`):
            Step sizes before bias and softplus.
        A (`Tensor` of shape `(channels, states)`):
            Decay rates, negative.
        B (`Tensor` of shape `(rows, length, states)`):
            Input projection.
        C (`Tensor` of shape `(rows, length, states)`):
            Output projection.
        D (`Tensor` of shape `(channels,)`):
            Skip weights.
        dt_bias (`Tensor` of shape `(channels,)`):
            Added to `dt` before the softplus.
        reverse (`bool`, *optional*, defaults to `False`):
            Scan from the last token to the first.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor
    reverse: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """All fields but `reverse`, in their order."""
        return [self.x, self.dt, self.A, self.B, self.C, self.D, self.dt_bias]


def selective_scan(*streams: ScanStream) -> tuple[Tensor, ...]:
    r"""Run the selective scan over one or more streams of equal length at once.

    With `dt = softplus(dt + dt_bias)` every channel and state follows `h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t`, and
    the output is `y_t = sum_n h_t[n] C_t[n] + D x_t` (Mamba, https://huggingface.co/papers/2312.00752).
    All arithmetic is in float32 (float64 if `x` is float64), whatever the inputs' types and autocast.

    The backend is chosen per call: `mamba_ssm` for CUDA tensors where it is installed and works, an unrolled loop
    while exporting or tracing, and otherwise a chunked scan in plain torch.

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
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return tuple(selective_scan_reference(stream) for stream in streams)
    if streams[0].x.is_cuda and _mamba_ssm_works():
        return tuple(_scan_with_mamba_ssm(stream) for stream in streams)
    return tuple(_scan_in_chunks(stream) for stream in streams)


def selective_scan_reference(stream: ScanStream) -> Tensor:
    """The same scan as one step after the other in differentiable torch calls, the twin of the fast paths in tests.

    Args:
        stream (`ScanStream`):
            What to scan.

    Returns:
        `Tensor`: The `(rows, length, channels)` output in the type of `x`.
    """
    dtype = _compute_dtype(stream.x)
    with torch.autocast(device_type=stream.x.device.type, enabled=False):
        x, dt, A, B, C, D, dt_bias = (tensor.to(dtype) for tensor in stream.tensors)
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
    """softplus(x) to float32 rounding; on a CPU up to four times as fast as `F.softplus`, by its input."""
    if x.is_cuda or x.dtype != torch.float32:
        return F.softplus(x)
    y = x.abs().mul_(-_LOG2E).exp2_()
    s = y.div_(y + 2)
    square = s * s
    series = square.mul(_ATANH[0])
    for coefficient in _ATANH[1:-1]:
        series.add_(coefficient).mul_(square)
    return series.add_(_ATANH[-1]).mul_(s).add_(x.clamp_min(0))


def _scan_in_chunks(stream: ScanStream) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.hf_effml.selective_scan(*stream)[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in stream.tensors):
        return _ChunkedScan.apply(*stream)
    return _scan_forward(stream, keep_states=False)[0]


def _without_autocast(stream: ScanStream) -> torch.autocast:
    return torch.autocast(device_type=stream.x.device.type, enabled=False)


def _chunk_length(rows: int, channels: int, states: int) -> int:
    return max(1, min(64, _CHUNK_ELEMENTS // max(rows * channels * states, 1)))


class _Chunks:
    """A stream cut into chunks of steps; `fill` computes the decays exp(dt A) and the hidden states of one of them.

    Tensors have their steps first, in sequence order; a reversed stream walks chunks and steps from the end.
    """

    def __init__(self, stream: ScanStream):
        x, dt, A, B, C, self.D, self.dt_bias = (tensor.to(_compute_dtype(stream.x)) for tensor in stream.tensors)
        self.x, self.raw_dt, self.B, self.C = (tensor.transpose(0, 1) for tensor in (x, dt, B, C))
        self.A = A.mT.contiguous()  # channels last keeps every broadcast contiguous
        # torch's exp goes through a library that is slow on some CPUs; exp2 is vectorised everywhere.
        self.scaled_A = self.A * _LOG2E
        self.order = slice(None, None, -1 if stream.reverse else 1)
        rows, length, channels = x.shape
        self.shape = (rows, len(self.A), channels)
        size = min(_chunk_length(rows, channels, len(self.A)), max(length, 1))
        starts = range(0, length, size)
        self.steps = [slice(start, min(start + size, length)) for start in starts][self.order]
        self.decay, self.states = self.buffer(size), self.buffer(size + 1)

    def buffer(self, steps: int) -> Tensor:
        return self.x.new_empty(steps, *self.shape)

    def fill(self, steps: slice, before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """From the state before the chunk: dt, dt x, decays, states, and the states one step earlier."""
        count = steps.stop - steps.start
        decay, both = self.decay[:count], self.states[: count + 1]
        earlier, states = (both[:-1], both[1:])[self.order]
        in_order = both.unbind(0)[self.order]
        in_order[0].copy_(before)
        dt = _softplus(self.raw_dt[steps] + self.dt_bias)
        dt_x = dt * self.x[steps]
        torch.mul(dt.unsqueeze(2), self.scaled_A, out=decay).exp2_()
        torch.mul(dt_x.unsqueeze(2), self.B[steps].unsqueeze(3), out=states)
        _recur(in_order, decay.unbind(0)[self.order])
        return dt, dt_x, decay, states, earlier


def _recur(values: tuple[Tensor, ...], factors: tuple[Tensor, ...]) -> None:
    """In place, one after the other: to every value but the first, add the value before it times its factor."""
    earlier, values, factors = values[:-1], values[1:], factors[: len(values) - 1]
    if values and values[0].is_cpu and _lists_run_in_order():
        # One call instead of a return to Python at every step, which is a fifth of the time at batch 1.
        torch._foreach_addcmul_(values, factors, earlier)
        return
    for value, factor, before in zip(values, factors, earlier, strict=True):
        value.addcmul_(factor, before)


@functools.cache
def _lists_run_in_order() -> bool:
    """Whether torch works through a list of tensors on a CPU in order. It always has, but does not promise it."""
    values = torch.ones(64, 4096)
    torch._foreach_addcmul_(values.unbind(0)[1:], values.clone().unbind(0)[1:], values.unbind(0)[:-1])
    return torch.equal(values[:, 0], torch.arange(1.0, 65.0)) and torch.equal(values, values[:, :1].expand(-1, 4096))


def _contract(vector: Tensor, matrix: Tensor) -> Tensor:
    """(steps, rows, j) times (steps, rows, j, k) -> (steps, rows, k); column vectors would be ten times slower."""
    product = torch.bmm(vector.flatten(0, 1).unsqueeze(1), matrix.flatten(0, 1))
    return product.view(*vector.shape[:2], matrix.shape[-1])


def _scan_forward(stream: ScanStream, keep_states: bool) -> tuple[Tensor, Tensor]:
    """The output, and the hidden states before each chunk (an empty tensor unless asked for)."""
    y = torch.empty_like(stream.x, memory_format=torch.contiguous_format)
    y_steps = y.transpose(0, 1)
    with _without_autocast(stream):
        chunks = _Chunks(stream)
        kept = chunks.buffer(len(chunks.steps) if keep_states else 0)
        state = chunks.x.new_zeros(chunks.shape)
        for index, steps in enumerate(chunks.steps):
            if keep_states:
                kept[index] = state
            _, _, _, states, _ = chunks.fill(steps, state)
            state = states[0 if stream.reverse else -1]
            read_out = _contract(chunks.C[steps], states)
            torch.addcmul(read_out, chunks.x[steps], chunks.D, out=y_steps[steps])
    return y, kept


def _scan_backward(stream: ScanStream, kept: Tensor, grad_output: Tensor) -> list[Tensor]:
    """Gradients for the tensors of a stream; decays and states are recomputed chunk by chunk."""
    with _without_autocast(stream):
        chunks = _Chunks(stream)
        grad_y = grad_output.to(chunks.x.dtype).transpose(0, 1)
        gradients = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in stream.tensors]
        grad_x, grad_dt, grad_B, grad_C = (gradients[place].transpose(0, 1) for place in (0, 1, 3, 4))
        grad_A, grad_D, grad_bias = (torch.zeros_like(tensor) for tensor in (chunks.A, chunks.D, chunks.dt_bias))
        buffer, carry = torch.empty_like(chunks.decay), chunks.x.new_zeros(chunks.shape)
        for index, steps in reversed(list(enumerate(chunks.steps))):
            dt, dt_x, decay, states, earlier = chunks.fill(steps, kept[index])
            x, grad_y_t = chunks.x[steps], grad_y[steps]
            adjoint = torch.mul(chunks.C[steps].unsqueeze(3), grad_y_t.unsqueeze(2), out=buffer[: len(decay)])
            last_to_first = adjoint.unbind(0)[chunks.order][::-1]
            factors = decay.unbind(0)[chunks.order][::-1]
            last_to_first[0].add_(carry)
            _recur(last_to_first, factors)
            torch.mul(last_to_first[-1], factors[-1], out=carry)
            grad_C[steps] = _contract(grad_y_t, states.mT)
            grad_B[steps] = _contract(dt_x, adjoint.mT)
            grad_dt_x = _contract(chunks.B[steps], adjoint)
            through_decay = adjoint.mul_(decay).mul_(earlier)
            grad_raw_dt = torch.mul(through_decay, chunks.A, out=decay).sum(2).addcmul_(grad_dt_x, x)
            grad_raw_dt.mul_(torch.sigmoid(chunks.raw_dt[steps] + chunks.dt_bias))
            grad_A += through_decay.mul_(dt.unsqueeze(2)).sum((0, 1))
            grad_D += (x * grad_y_t).sum((0, 1))
            grad_bias += grad_raw_dt.sum((0, 1))
            grad_dt[steps] = grad_raw_dt
            grad_x[steps] = grad_dt_x.mul_(dt).addcmul_(grad_y_t, chunks.D)
        for place, total in {2: grad_A.mT, 5: grad_D, 6: grad_bias}.items():
            gradients[place].copy_(total)
    return gradients


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *stream: Any) -> Tensor:
        y, kept = _scan_forward(ScanStream._make(stream), keep_states=True)
        *tensors, ctx.reverse = stream
        ctx.save_for_backward(kept, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kept, *tensors = ctx.saved_tensors
        return *_scan_backward(ScanStream._make([*tensors, ctx.reverse]), kept, grad_output), None


# The same two functions as an operator that `torch.compile` treats as one node instead of unrolling `length` steps.
@torch.library.custom_op("hf_effml::selective_scan", mutates_args=())
def _scan_op(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    return _scan_forward(ScanStream(x, dt, A, B, C, D, dt_bias, reverse), keep_states=True)


@_scan_op.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, length, channels = x.shape
    size = min(_chunk_length(rows, *A.shape), max(length, 1))
    kept = x.new_empty(-(-length // size), rows, A.shape[1], channels, dtype=_compute_dtype(x))
    return torch.empty_like(x, memory_format=torch.contiguous_format), kept


def _scan_op_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(output[1], *tensors)


def _scan_op_backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    kept, *tensors = ctx.saved_tensors
    return *torch.ops.hf_effml.selective_scan_backward(tensors, ctx.reverse, kept, grad_output), None


@torch.library.custom_op("hf_effml::selective_scan_backward", mutates_args=())
def _scan_backward_op(tensors: list[Tensor], reverse: bool, kept: Tensor, grad_output: Tensor) -> list[Tensor]:
    return _scan_backward(ScanStream._make([*tensors, reverse]), kept, grad_output)


@_scan_backward_op.register_fake
def _(tensors: list[Tensor], reverse: bool, kept: Tensor, grad_output: Tensor) -> list[Tensor]:
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
