"""The cache of blocks that skip: what it holds, and that changing it equals changing the inputs."""

import copy
import io

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from helpers import assert_close, texts
from hf_effml import TokenSkipCacheLayer
from hf_effml.token_router.token_skip_layer import CACHE_ARGUMENT
from routing_reference import POLICIES, TOKENS, RaggedCase, routed, slow_run


def filled(columns=20, **policy):
    case = RaggedCase(routed(), **policy)
    cache = DynamicCache(config=case.model.config)
    case.call(0, columns, cache)
    return case, cache


def stored_bytes(cache):
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bytes(dtype):
    """Two tensors per block of `kept * key-value heads * head size` numbers; nobody else pays for skipped tokens."""
    ids, _ = texts(3, 20)
    schedule = [0.0, 0.5, 0.75, 0.15]
    model = routed("Qwen3", sparsity_schedule=schedule, target_sparsity=0.35).to(dtype)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: cache})
    kept = [20, 10, 5, 17]
    itemsize = torch.empty((), dtype=dtype).element_size()
    assert [layer.keys.shape for layer in cache.layers] == [(3, 2, tokens, 12) for tokens in kept]
    assert stored_bytes(cache) == 2 * 3 * sum(kept) * 2 * 12 * itemsize
    assert cache.get_seq_length() == 20


def test_ragged_batches_store_as_much_as_their_longest_sample():
    case, cache = filled()
    for block, layer in enumerate(cache.layers[:3]):
        kept = case.keep[block, :, :20].sum(-1)
        assert layer.num_entries == layer.keys.shape[2] == kept.max()
        assert torch.equal((layer.positions >= 0).sum(-1), kept)
        for sample in range(4):
            columns = case.keep[block, sample, :20].nonzero().squeeze(1)
            assert torch.equal(layer.positions[sample][layer.positions[sample] >= 0], columns)


def test_a_block_that_nobody_enters_stores_nothing():
    case = RaggedCase(routed())
    case.keep[1] = False
    cache = DynamicCache(config=case.model.config)
    case.call(0, 20, cache)
    layer = cache.layers[1]
    assert (layer.num_entries, layer.get_seq_length(), layer.keys) == (0, 20, None)
    assert layer.get_mask_sizes(3) == (23, 0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "change, samples",
    [
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
        (lambda cache: cache.reorder_cache(torch.tensor([3, 3, 0, 1])), [3, 3, 0, 1]),
    ],
    ids=["select", "select one", "repeat", "reorder"],
)
def test_samples_change_like_those_of_the_inputs(policy, change, samples):
    case, cache = filled(**POLICIES[policy])
    change(cache)
    logits = torch.cat([case.call(20, 25, cache, samples), case.call(25, 26, cache, samples)], 1)
    case.check(logits, 20, samples)


@pytest.mark.parametrize("policy", POLICIES)
def test_crop_equals_a_shorter_input(policy):
    case, cache = filled(**POLICIES[policy])
    cache.crop(-7)
    shorter = DynamicCache(config=case.model.config)
    case.call(0, 13, shorter)
    for layer, other in zip(cache.layers, shorter.layers, strict=True):
        assert layer.get_seq_length() == other.get_seq_length() == 13
        entries = case.real[:, :13]
        if isinstance(layer, TokenSkipCacheLayer):
            assert torch.equal(layer.positions, other.positions)
            entries = layer.positions >= 0
        for name in ("keys", "values"):
            found, wanted = (getattr(one, name).transpose(1, 2)[entries] for one in (layer, other))
            assert_close(found, wanted, 1e-5)


def test_crop_by_length_and_by_too_much():
    layer = TokenSkipCacheLayer()
    layer.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), positions=torch.tensor([[1, 4]]), columns=6)
    for length, left in ((9, 6), (6, 6), (5, 5), (4, 4)):
        layer.crop(length)
        assert layer.get_seq_length() == left
    assert layer.positions.tolist() == [[1]] and layer.keys.shape == (1, 1, 1, 4)
    layer.crop(-9)
    assert (layer.get_seq_length(), layer.num_entries) == (0, 0)


def test_reset():
    case = RaggedCase(routed())
    # A dense block's layer does not survive this in older versions of Transformers.
    case.keep[3] = case.keep[0]
    case.slow = slow_run(case.model, case.ids, case.keep, case.real)
    cache = DynamicCache(config=case.model.config)
    case.call(0, 20, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert all(layer.keys is None and layer.num_entries == 0 for layer in cache.layers)
    case.check(torch.cat([case.call(0, 20, cache), case.call(20, TOKENS, cache)], 1))


def test_copies_and_files():
    """Deep copies go on independently of one another, and so does what `torch.save` writes."""
    case, cache = filled()
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    for again in (copy.deepcopy(cache), torch.load(file, weights_only=False), cache):
        case.check(case.call(20, TOKENS, again), 20)
        case.check_cache(again)


def test_from_dense():
    dense = DynamicLayer()
    assert TokenSkipCacheLayer.from_dense(dense).num_entries == 0
    keys, values = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4)
    dense.update(keys, values)
    full = TokenSkipCacheLayer.from_dense(dense)
    assert torch.equal(full.keys, keys) and torch.equal(full.values, values)
    assert full.positions.tolist() == [[0, 1, 2]] * 2 and not full.has_holes
    padded = TokenSkipCacheLayer.from_dense(dense, torch.tensor([[True] * 3, [False, True, True]]))
    assert padded.positions.tolist() == [[0, 1, 2], [-1, 1, 2]] and padded.has_holes
    assert padded.get_seq_length() == 3


class NoStream:
    """In the place of a CUDA stream."""

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def wait_stream(self, other):
        pass


@pytest.mark.parametrize("policy", POLICIES)
def test_offloaded_layers_are_back_when_they_are_needed(policy, monkeypatch):
    """Also that after a block which everyone skips, and whose own layer therefore nobody asks for."""
    update = DynamicLayer.update

    def update_at_home(layer, *args, **kwargs):
        assert not getattr(layer, "away", False)
        return update(layer, *args, **kwargs)

    monkeypatch.setattr(DynamicLayer, "update", update_at_home)
    monkeypatch.setattr(CacheLayerMixin, "offload", lambda layer: setattr(layer, "away", True))
    monkeypatch.setattr(CacheLayerMixin, "prefetch", lambda layer: setattr(layer, "away", False))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    case = RaggedCase(routed(), **POLICIES[policy])
    cache = DynamicCache(config=case.model.config)
    cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, True, NoStream()
    edges = [0, 20, *range(24, TOKENS + 1)]
    case.check(torch.cat([case.call(start, stop, cache) for start, stop in zip(edges, edges[1:], strict=False)], 1))
    assert sum(layer.away for layer in cache.layers) == 3


def test_dense_runs_cannot_go_on():
    layer = TokenSkipCacheLayer()
    with pytest.raises(ValueError, match="filled by a model that skips tokens"):
        layer.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    assert layer.get_seq_length() == 0
