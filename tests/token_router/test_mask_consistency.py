"""Given the same decisions, every way to run a routed model equals a slow dense one with masks."""

from itertools import product

import pytest
import torch
from transformers import DynamicCache

from helpers import assert_close, texts, tiny_language_model
from hf_effml import TokenSkipCacheLayer
from hf_effml.token_router.patching import copy_config
from hf_effml.token_router.token_skip_layer import CACHE_ARGUMENT
from routing_reference import PADDING, POLICIES, TOKENS, RaggedCase, routed, slow_run


FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Qwen3Moe", "Gemma"]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_kernel = pytest.mark.parametrize("kernel", ["sdpa", "eager"])


@pytest.mark.parametrize(
    "family, kernel, policy",
    [
        *product(FAMILIES[:3], ["sdpa", "eager"], POLICIES),
        *product(FAMILIES[3:], ["sdpa"], ["drop", "keep"]),
        *product(FAMILIES[3:], ["eager"], ["mlp"]),
    ],
)
def test_full_forward_prefill_and_chunks(family, kernel, policy):
    case = RaggedCase(routed(family, kernel), **POLICIES[policy])
    case.check(case.call(0, TOKENS))
    for edges in ([0, 24, *range(25, 33)], [0, 10, 23, 30, 32], [0, 1, 2, 32]):
        cache = DynamicCache(config=case.model.config)
        parts = [case.call(start, stop, cache) for start, stop in zip(edges, edges[1:], strict=False)]
        case.check(torch.cat(parts, 1))
        case.check_cache(cache)


@every_kernel
@pytest.mark.parametrize("policy", POLICIES)
def test_crop_and_redo(kernel, policy):
    """Also to a length that no block knows an entry of, and to nothing."""
    case = RaggedCase(routed(kernel=kernel), **POLICIES[policy])
    for start, lengths in ((20, (28, 24)), (32, (24, 1)), (5, (32, 0))):
        cache = DynamicCache(config=case.model.config)
        case.call(0, start, cache)
        for length in lengths:
            if start < TOKENS:
                case.call(start, TOKENS, cache)
            cache.crop(length - TOKENS)
            assert cache.get_seq_length() == length
            start = length
        case.check(case.call(start, TOKENS, cache), start)
        case.check_cache(cache)


@every_kernel
def test_crop_and_go_on_with_single_tokens(kernel):
    """Which everyone keeps, so that only what the crop has left has holes."""
    case = RaggedCase(routed(kernel=kernel))
    case.keep[..., 26:] = True
    case.slow = slow_run(case.model, case.ids, case.keep, case.real)
    cache = DynamicCache(config=case.model.config)
    case.call(0, TOKENS, cache)
    cache.crop(26 - TOKENS)
    steps = [case.call(column, column + 1, cache) for column in range(26, TOKENS)]
    case.check(torch.cat(steps, 1), 26)


@every_kernel
@pytest.mark.parametrize("policy", POLICIES)
def test_padding_anywhere(kernel, policy):
    """Masks with padding left, right and between, as the second turn of a padded conversation has it."""
    model = routed(kernel=kernel)
    mask = (torch.rand(len(PADDING), TOKENS, generator=torch.Generator().manual_seed(5)) < 0.7).long()
    mask[:, 20] = 1
    case = RaggedCase(model, mask, seed=1, **POLICIES[policy])
    case.check(case.call(0, TOKENS))
    cache = DynamicCache(config=model.config)
    case.check(torch.cat([case.call(start, start + 8, cache) for start in range(0, TOKENS, 8)], 1))
    case.check_cache(cache)


@pytest.mark.parametrize("policy", POLICIES)
def test_samples_alone(policy):
    case = RaggedCase(routed(), **POLICIES[policy])
    together = case.call(0, TOKENS)
    for sample, padding in enumerate(PADDING):
        with torch.no_grad():
            alone = case.model(
                case.ids[sample : sample + 1, padding:],
                keep_mask=case.keep[:, sample : sample + 1, padding:],
                token_router_config=case.config,
            ).logits
        assert_close(together[sample : sample + 1, padding:], alone, 1e-5)


@every_kernel
@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_a_dense_cache_goes_on_routed(kernel, policy):
    """A system prompt that a dense run has read, padded, is continued with skipping."""
    case = RaggedCase(routed(kernel=kernel), **POLICIES[policy])
    case.keep[..., :12] = case.real[:, :12]
    case.slow = slow_run(case.model, case.ids, case.keep, case.real, **case.policy)
    cache = DynamicCache(config=case.model.config)
    with torch.no_grad():
        dense = copy_config(case.config, target_sparsity=0.0)
        case.model(
            case.ids[:, :12], attention_mask=case.mask[:, :12], token_router_config=dense, **{CACHE_ARGUMENT: cache}
        )
    assert not any(isinstance(layer, TokenSkipCacheLayer) for layer in cache.layers)
    case.check(torch.cat([case.call(12, 20, cache), case.call(20, 32, cache)], 1), 12)
    case.check_cache(cache)


@every_family
@every_kernel
def test_nothing_skipped_is_bit_equal(family, kernel):
    """Whether the schedule is zero, the masks are full, or the prompt is too short; so are the caches."""
    ids, mask = texts(4, 24, (0, 3, 0, 9))
    plain = tiny_language_model(family, attn_implementation=kernel)
    with torch.no_grad():
        wanted = plain(ids, attention_mask=mask, use_cache=True)
        step = plain(
            ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], 1), **{CACHE_ARGUMENT: wanted[CACHE_ARGUMENT]}
        )
    ways = (
        (routed(family, kernel, target_sparsity=0.0), {}),
        (routed(family, kernel, target_sparsity=0.0), {"keep_mask": mask.bool().expand(4, -1, -1)}),
        (routed(family, kernel, min_tokens=25), {}),
        (routed(family, kernel, target_sparsity=0.02), {}),
    )
    for model, more in ways:
        with torch.no_grad():
            found = model(ids, attention_mask=mask, use_cache=True, **more)
            longer = torch.cat([mask, mask[:, -1:]], 1)
            after = model(ids[:, :1], attention_mask=longer, **{CACHE_ARGUMENT: found[CACHE_ARGUMENT]})
        assert torch.equal(found.logits, wanted.logits)
        assert torch.equal(after.logits, step.logits)
        for layer, other in zip(found[CACHE_ARGUMENT].layers, wanted[CACHE_ARGUMENT].layers, strict=True):
            assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


def blocks_between(model):
    """Inputs and outputs of the blocks of the next forward passes."""
    seen = []
    for block in model.model.layers:
        block.register_forward_hook(lambda block, inputs, output: seen.append((inputs[0], output)))
    return seen


@every_family
@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_skipped_rows_are_the_input_rows(family, policy):
    case = RaggedCase(routed(family), **POLICIES[policy])
    seen = blocks_between(case.model)
    cache = DynamicCache(config=case.model.config)
    case.call(0, 20, cache)
    case.call(20, 32, cache)
    assert len(seen) == 8
    for call, columns in ((0, slice(0, 20)), (4, slice(20, 32))):
        for block, (before, after) in enumerate(seen[call : call + 4]):
            skipped = ~case.keep[block, :, columns] & case.real[:, columns]
            assert torch.equal(after[skipped], before[skipped])
            kept = case.keep[block, :, columns]
            assert (after[kept] != before[kept]).any(-1).all()


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", POLICIES)
def test_influence_of_a_skipped_token(kernel, policy):
    """Under `drop` no other row of the block feels it, under `keep` and with skipped MLPs the later ones do."""
    model = routed(kernel=kernel)
    config = copy_config(model.model.token_routing_hook.config, **POLICIES[policy])
    embedded = torch.randn(2, 16, 32)
    changed = embedded.clone()
    changed[0, 5] += 1
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[0, [5, 9]] = False
    seen = blocks_between(model)
    with torch.no_grad():
        for inputs in (embedded, changed):
            model(inputs_embeds=inputs, keep_mask={0: keep}, token_router_config=config)
    differs = (seen[0][1] != seen[4][1]).any(-1)
    wanted = torch.zeros(2, 16, dtype=torch.bool)
    wanted[0, 5] = True
    if policy != "drop":
        wanted[0, 6:] = True
    if policy == "keep":
        wanted[0, 9] = False
    assert torch.equal(differs, wanted)


@pytest.mark.parametrize("policy", POLICIES)
def test_bfloat16(policy):
    """Within 1 % of the range of the logits."""

    def case(dtype):
        model = routed(initializer_range=0.1).to(torch.bfloat16).to(dtype)
        return RaggedCase(model, **POLICIES[policy])

    half = case(torch.bfloat16)
    cache = DynamicCache(config=half.model.config)
    whole, parts = half.call(0, TOKENS), torch.cat([half.call(0, 20, cache), half.call(20, 32, cache)], 1)
    assert whole.dtype == parts.dtype == torch.bfloat16
    wanted = case(torch.float32).slow.logits
    for found in (whole, parts):
        assert (found.float() - wanted).abs().max() <= 0.01 * (wanted.max() - wanted.min())


def test_randomness_of_the_tests():
    """What the cases cover."""
    case = RaggedCase(routed())
    kept = case.keep.sum(-1)
    assert 0 in kept[1] and case.keep[2, :, -2:].sum() == 0 and len(kept[0].unique()) == 4
