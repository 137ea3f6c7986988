"""The selective scan: every backend against the slow twin, and the defects of the original that it must not have."""

import importlib.util
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import assert_close
from hf_effml import ScanStream, selective_scan, selective_scan_reference


# The function hides the module of the same name.
scan_module = importlib.import_module("hf_effml.vim.selective_scan")
FIELDS = ScanStream._fields[:-1]


def make_stream(rows=2, length=9, channels=6, states=4, reverse=False, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    tensors = {
        "x": normal(rows, length, channels),
        "dt": normal(rows, length, channels),
        "A": -normal(channels, states).exp(),
        "B": normal(rows, length, states),
        "C": normal(rows, length, states),
        "D": normal(channels),
        "dt_bias": normal(channels) - 1,
    }
    return ScanStream(**{name: tensor.requires_grad_() for name, tensor in tensors.items()}, reverse=reverse)


def two_directions(length, states, dtype=torch.float32):
    return [
        make_stream(3, length, states=states, dtype=dtype, seed=1),
        make_stream(2, length, states=states, dtype=dtype, seed=2, reverse=True),
    ]


def reference(*streams):
    return tuple(selective_scan_reference(stream) for stream in streams)


def custom_op(*streams):
    return tuple(torch.ops.hf_effml.selective_scan(*stream)[0] for stream in streams)


def run(scan, streams):
    """Outputs and all gradients of a scan, by name."""
    outputs = scan(*streams)
    generator = torch.Generator().manual_seed(9)
    cotangents = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    leaves = [tensor for stream in streams for tensor in stream[:-1]]
    gradients = torch.autograd.grad(sum((y * c).sum() for y, c in zip(outputs, cotangents, strict=True)), leaves)
    names = [f"{name} of stream {index}" for index in range(len(streams)) for name in FIELDS]
    return [y.detach() for y in outputs], dict(zip(names, gradients, strict=True))


def assert_same(scan, streams, forward=2e-5, backward=2e-4):
    (outputs, gradients), (wanted, wanted_gradients) = run(scan, streams), run(reference, streams)
    assert_close(outputs, wanted, forward)
    assert_close(gradients, wanted_gradients, backward)


@pytest.mark.parametrize("chunk", [None, 1, 5], ids=["default chunk", "chunks of 1", "chunks of 5"])
@pytest.mark.parametrize("states", [1, 4, 16])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 64, 197])
def test_backends_agree(length, states, chunk, monkeypatch):
    """Two streams of different size and direction at once, in chunks that do not divide the length."""
    streams = two_directions(length, states)
    if chunk is not None:
        rows = streams[0].x.shape[0]
        monkeypatch.setattr(scan_module, "_CHUNK_ELEMENTS", chunk * rows * streams[0].A.numel())
        assert scan_module._chunk_length(rows, *streams[0].A.shape) == chunk
    assert_same(selective_scan, streams)
    if chunk != 1:
        assert_same(custom_op, streams)


def test_one_definition_of_the_recurrence():
    """The twin itself, against numbers worked out by hand: softplus(0) = log 2, decay 2^-1 with A = -1."""
    log2 = torch.tensor(2.0).log()
    one = torch.ones(1, 3, 1)
    stream = ScanStream(one, 0 * one, -torch.ones(1, 1), one, one, torch.zeros(1), torch.zeros(1))
    wanted = (log2 * torch.tensor([1, 1.5, 1.75])).view(1, 3, 1)
    assert_close(selective_scan_reference(stream), wanted, 1e-6)
    assert_close(selective_scan_reference(stream._replace(reverse=True)), wanted.flip(1), 1e-6)


def test_reverse_is_flipping():
    stream = make_stream()
    flipped = stream._replace(**{name: getattr(stream, name).flip(1) for name in ("x", "dt", "B", "C")}, reverse=True)
    assert_close(selective_scan(flipped)[0].detach(), selective_scan(stream)[0].flip(1).detach(), 1e-6)


def test_gradcheck():
    streams = two_directions(5, 3, torch.float64)
    leaves = [tensor for stream in streams for tensor in stream[:-1]]

    def scan(*tensors):
        half = len(FIELDS)
        return selective_scan(ScanStream(*tensors[:half]), ScanStream(*tensors[half:], reverse=True))

    assert torch.autograd.gradcheck(scan, leaves)


def test_only_wanted_gradients():
    stream = make_stream()
    frozen = stream._replace(**{name: getattr(stream, name).detach() for name in FIELDS if name != "B"})
    (gradient,) = torch.autograd.grad(selective_scan(frozen)[0].sum(), [frozen.B])
    (wanted,) = torch.autograd.grad(selective_scan(stream)[0].sum(), [stream.B])
    assert_close(gradient, wanted)
    with torch.no_grad():
        assert not selective_scan(stream)[0].requires_grad


def test_strided_inputs():
    stream = make_stream()
    strided = stream._replace(
        **{
            name: getattr(stream, name).detach().mT.contiguous().mT.requires_grad_()
            for name in ("x", "dt", "B", "C", "A")
        }
    )
    assert not strided.x.is_contiguous()
    assert_close(run(selective_scan, [strided]), run(selective_scan, [stream]), 1e-6)
    assert selective_scan(strided)[0].is_contiguous()


@pytest.mark.parametrize(
    "shape", [{"rows": 0}, {"channels": 1, "states": 1, "length": 1, "rows": 1}], ids=["no rows", "one of each"]
)
def test_degenerate_shapes(shape):
    stream = make_stream(**shape)
    assert_same(selective_scan, [stream])
    assert_same(selective_scan, [stream._replace(reverse=True), make_stream(**{**shape, "rows": 3})])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(dtype):
    """All arithmetic is in float32: only the result is rounded."""
    low = make_stream(length=64)
    low = low._replace(**{name: getattr(low, name).detach().to(dtype).requires_grad_() for name in FIELDS})
    exact = low._replace(**{name: getattr(low, name).detach().float().requires_grad_() for name in FIELDS})
    rounding = 2 * torch.finfo(dtype).eps
    for scan in (selective_scan, reference):
        (output,), gradients = run(scan, [low])
        assert output.dtype == dtype
        (wanted,), wanted_gradients = run(reference, [exact])
        assert_close(output.float(), wanted, rounding)
        for name, gradient in gradients.items():
            assert gradient.dtype == dtype
            assert_close(gradient.float(), wanted_gradients[name], 2 * rounding, name)


def test_mixed_types():
    """Half-precision activations with float32 parameters, as a half-precision Vim runs it."""
    stream = make_stream()
    low = stream._replace(
        **{name: getattr(stream, name).detach().bfloat16().requires_grad_() for name in ("x", "dt", "B", "C")}
    )
    (output,), gradients = run(selective_scan, [low])
    assert output.dtype == torch.bfloat16
    assert {name.split()[0]: g.dtype for name, g in gradients.items()} == {
        name: getattr(low, name).dtype for name in FIELDS
    }


def test_autocast_changes_nothing():
    stream = make_stream(length=20)
    plain = run(selective_scan, [stream])
    with torch.autocast("cpu", torch.bfloat16):
        for scan in (selective_scan, reference, custom_op):
            assert_close(run(scan, [stream]), run(scan, [stream]))
        assert_close(run(selective_scan, [stream]), plain)


@pytest.mark.parametrize("scan", [selective_scan, reference], ids=["fast", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_extreme_inputs_stay_finite(scan, dtype):
    stream = make_stream(length=40)
    large = {name: (1e3 * getattr(stream, name).detach().tanh()).to(dtype).requires_grad_() for name in ("x", "dt")}
    (output,), gradients = run(scan, [stream._replace(**large)])
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_softplus():
    x = torch.cat([torch.linspace(-80, 80, 20001), torch.tensor([-1e3, -0.0, 0.0, 1e3, 1e30])])
    wanted = F.softplus(x.double())
    error = (scan_module._softplus(x.clone()).double() - wanted).abs()
    # Below zero softplus is almost exp(x), whose relative error grows with the rounding of x itself.
    assert (error <= 2e-7 * (1 + x.clamp(-100, 0).abs()) * wanted + 1e-37).all()


# Compilers


def test_compile_keeps_the_scan_as_one_node():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    streams = two_directions(64, 4)
    compiled = torch.compile(selective_scan, backend=backend, fullgraph=True)
    assert_close(compiled(*streams), selective_scan(*streams), 1e-6)
    assert len(list(graphs[0].graph.nodes)) < 60
    assert "hf_effml.selective_scan" in graphs[0].code


def test_compile_gradients():
    torch.compiler.reset()
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    assert_same(compiled, two_directions(9, 4))
    torch.compiler.reset()


def test_operator_registration():
    """Schema, shapes of fake tensors, and gradients under tracing, as torch checks them."""
    streams = two_directions(9, 4)
    for stream in streams:
        torch.library.opcheck(torch.ops.hf_effml.selective_scan.default, tuple(stream))


def test_export_unrolls():
    """An exported program holds plain torch operations only, so that it runs where this package is not."""

    class Scan(torch.nn.Module):
        def forward(self, *tensors):
            return selective_scan(ScanStream(*tensors), ScanStream(*tensors, reverse=True))

    stream = ScanStream(*(tensor.detach() for tensor in make_stream(length=7)[:-1]))
    program = torch.export.export(Scan(), stream[:-1])
    assert "hf_effml" not in program.graph_module.code
    assert_close(program.module()(*stream[:-1]), selective_scan(stream, stream._replace(reverse=True)), 2e-5)


def test_a_second_copy_of_the_file():
    """`trust_remote_code` loads a copy beside the installed file; both must go on working."""
    spec = importlib.util.spec_from_file_location("copied_selective_scan", scan_module.__file__)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    stream = make_stream()
    for module in (copied, scan_module):
        torch.compiler.reset()
        own = module.ScanStream(*stream)
        compiled = torch.compile(module.selective_scan, backend="aot_eager", fullgraph=True)
        assert_same(compiled, [own])
    torch.compiler.reset()


# Cost


class Cost(TorchDispatchMode):
    """Counts operations, elements written, and the peak of memory held by tensors made inside."""

    def __init__(self):
        super().__init__()
        self.operations = self.elements = self.held = self.peak = 0
        self.storages = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
                self.elements += 0 if tensor._is_view() else tensor.numel()
        return outputs

    def _hold(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.storages:
            self.storages.add(storage)
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size):
        self.held -= size


def indexing_loop(stream):
    """The scan as mamba_ssm's reference and transformers write it: full tensors, indexed step by step."""
    dt = F.softplus(stream.dt + stream.dt_bias)
    decay = torch.exp(dt.unsqueeze(-1) * stream.A)
    increment = (dt * stream.x).unsqueeze(-1) * stream.B.unsqueeze(2)
    state, outputs = torch.zeros_like(decay[:, 0]), []
    for step in range(stream.x.shape[1]):
        state = decay[:, step] * state + increment[:, step]
        outputs.append((state * stream.C[:, step].unsqueeze(1)).sum(-1))
    return (torch.stack(outputs, 1) + stream.D * stream.x,)


def cost(scan, stream):
    with Cost() as counter:
        run(scan, [stream])
    return counter


def test_cost_is_linear_in_the_length():
    """The original's backward writes a tensor of full size per step."""

    def growth(scan, quantity):
        costs = [getattr(cost(scan, make_stream(1, length, states=4)), quantity) for length in (100, 200, 400)]
        return (costs[2] - costs[1]) / (costs[1] - costs[0])

    assert_close(run(indexing_loop, [make_stream(1, 30)]), run(reference, [make_stream(1, 30)]), 2e-5)
    assert growth(indexing_loop, "elements") > 3.5
    for scan in (selective_scan, reference):
        assert growth(scan, "operations") < 2.1
        assert growth(scan, "elements") < 2.1


def test_peak_memory():
    stream = make_stream(8, 100, 384, 16)
    fast, slow = cost(selective_scan, stream).peak, cost(indexing_loop, stream).peak
    assert fast < slow / 4, f"{fast / 2**20:.0f} MiB against {slow / 2**20:.0f} MiB"


def test_no_states_are_kept_without_gradients(monkeypatch):
    monkeypatch.setattr(scan_module, "_CHUNK_ELEMENTS", 1)
    stream = make_stream(2, 200, 64, 16)
    with torch.no_grad(), Cost() as inference:
        selective_scan(stream)
    with Cost() as training:
        selective_scan(stream)
    one_state_per_step = 4 * 200 * 2 * stream.A.numel()
    assert inference.peak < training.peak - 0.9 * one_state_per_step


# Dispatch and errors


def test_mamba_ssm_layout(monkeypatch):
    """The kernel wants channels before time, float32 parameters and its own bias; a function stands in for it."""

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert delta_softplus and all(t.stride(-1) == 1 for t in (u, delta, B, C))
        assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
        return indexing_loop(ScanStream(u.mT, delta.mT, A, B.mT, C.mT, D, delta_bias))[0].mT

    monkeypatch.setattr(scan_module, "_mamba_ssm_scan", selective_scan_fn)
    for stream in two_directions(9, 4):
        assert_same(lambda stream: (scan_module._scan_with_mamba_ssm(stream),), [stream])


def test_errors_name_the_shapes():
    with pytest.raises(ValueError, match="at least one stream"):
        selective_scan()
    with pytest.raises(ValueError, match=r"\(9, 6, 4\), \(8, 6, 4\)"):
        selective_scan(make_stream(length=9), make_stream(length=8))


@pytest.mark.gpu
def test_cuda_equals_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    streams = two_directions(197, 16)
    on_device = [
        ScanStream(*(tensor.detach().cuda().requires_grad_() for tensor in stream[:-1]), reverse=stream.reverse)
        for stream in streams
    ]
    wanted_outputs, wanted = run(reference, streams)
    outputs = selective_scan(*on_device)
    assert_close([y.detach().cpu() for y in outputs], wanted_outputs, 2e-5)
    generator = torch.Generator().manual_seed(9)
    loss = sum((y * torch.randn(y.shape, generator=generator).cuda()).sum() for y in outputs)
    gradients = torch.autograd.grad(loss, [tensor for stream in on_device for tensor in stream[:-1]])
    assert_close([gradient.cpu() for gradient in gradients], list(wanted.values()), 2e-4)


def test_steps_run_in_order_with_and_without_lists(monkeypatch):
    assert scan_module._lists_run_in_order()
    stream = make_stream(2, 30)
    with torch.no_grad():
        in_lists = selective_scan(stream)[0]
        monkeypatch.setattr(scan_module, "_lists_run_in_order", lambda: False)
        assert torch.equal(selective_scan(stream)[0], in_lists)
