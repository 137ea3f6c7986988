"""The gradient of a key's gate is what keeping, or losing, that key does to attention."""

import pytest
import torch

from helpers import assert_close
from hf_effml.token_router.gate_gradients import key_gate_gradient


def attention(query, keys, values, weight):
    """Softmax attention whose keys count as often as `weight` says, the obvious way."""
    keys, values = (part.repeat_interleave(query.shape[1] // keys.shape[1], 1) for part in (keys, values))
    likely = (query @ keys.transpose(-1, -2)).exp() * weight[:, None]
    output = likely @ values / likely.sum(-1, keepdim=True)
    return output.transpose(1, 2).flatten(2)


@pytest.fixture(params=[4, 2])
def case(request):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 9, 8, generator=generator, dtype=torch.float64)
    keys, values = (torch.randn(2, request.param, 9, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    keep = torch.rand(2, 9, generator=generator) > 0.5
    keep[:, 0], keep[:, 4] = True, False
    causal = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, -1, -1)
    upstream = torch.randn(2, 9, 32, generator=generator, dtype=torch.float64)
    # A skipped token sees itself.
    return query, keys, values, causal, (causal & keep.unsqueeze(1)) | torch.eye(9, dtype=torch.bool), keep, upstream


def gradient(query, keys, values, causal, kept, keep, upstream):
    gate = keep.double().requires_grad_()
    zeros = key_gate_gradient(query, keys, values, causal, kept, gate)
    assert zeros.shape == upstream.shape and not zeros.any()
    (zeros * upstream).sum().backward()
    return gate.grad


def test_skipped_keys_get_what_bringing_them_back_does(case):
    query, keys, values, causal, kept, keep, upstream = case
    found = gradient(*case)
    before = attention(query, keys, values, kept.double())
    for column in range(9):
        with_it = kept.clone()
        with_it[:, :, column] = causal[:, :, column]
        change = ((attention(query, keys, values, with_it.double()) - before) * upstream).sum((1, 2))
        skipped = ~keep[:, column]
        # In its own row a skipped token is there already, and fades instead.
        own = torch.zeros(9, 9, dtype=torch.float64)
        own[column, column] = 1
        weight = kept.double().requires_grad_()
        row = (attention(query, keys, values, weight) * upstream).sum()
        fading = (torch.autograd.grad(row, weight)[0] * own).sum((1, 2))
        assert_close(found[skipped, column], (change + fading)[skipped], 1e-5)


def test_kept_keys_get_the_slope_at_which_they_fade(case):
    query, keys, values, causal, kept, keep, upstream = case
    weight = kept.double().requires_grad_()
    (attention(query, keys, values, weight) * upstream).sum().backward()
    slopes = (weight.grad * causal).sum(1)
    assert_close(gradient(*case)[keep], slopes[keep], 1e-5)


def test_half_precision_is_finite():
    shape = (1, 2, 5, 4)
    query, keys, values = (100 * torch.ones(shape, dtype=torch.float16) for _ in range(3))
    causal = torch.ones(1, 5, 5, dtype=torch.bool).tril()
    kept = causal & torch.tensor([True, False, True, False, True])
    kept |= torch.eye(5, dtype=torch.bool)
    gate = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]], requires_grad=True)
    key_gate_gradient(query, keys, values, causal, kept, gate).sum().backward()
    assert gate.grad.isfinite().all()
