"""Removed blocks and sub-blocks are models of their own that share weights; gates that save nothing change nothing."""

import copy
import itertools
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from helpers import texts, tiny_language_model
from hf_effml import (
    TokenRouterConfig,
    TokenRouterModel,
    apply_token_router,
    block_influence,
    block_pruner,
    remove_blocks,
    remove_sub_blocks,
    shortgpt_blocks,
)
from hf_effml.token_router.baselines import gate_multiply
from hf_effml.token_router.continuations import cross_entropy
from hf_effml.token_router.patching import copy_config, find_decoder, is_patched
from hf_effml.token_router.token_skip_layer import CACHE_ARGUMENT


FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe", "Gemma"]
SUB_BLOCKS = {
    "first attention": [("attention", 0)],
    "last attention": [("attention", 3)],
    "all attentions": [("attention", block) for block in range(4)],
    "first block": [("mlp", 0), ("attention", 0)],
    "mixed": [("attention", 0), ("mlp", 1), ("attention", 2), ("mlp", 2)],
    "nothing": [],
}


@contextmanager
def bypassed(model, blocks=(), sub_blocks=()):
    """The slow twin: everything is computed, and the outputs of removed parts are thrown away."""
    layers = model.model.layers
    handles = [layers[block].register_forward_hook(lambda _, args, output: args[0]) for block in blocks]
    for kind, block in sub_blocks:
        if kind == "mlp":
            handle = layers[block].mlp.register_forward_hook(lambda _, args, output: torch.zeros_like(output))
        else:
            handle = layers[block].self_attn.register_forward_hook(
                lambda _, args, output: (torch.zeros_like(output[0]), None)
            )
        handles.append(handle)
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def step_by_step(model, ids, mask, steps):
    """Greedy decoding without a cache."""
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


def snapshot(model):
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [(name, type(module), module.training) for name, module in model.named_modules()]
    indices = [block.self_attn.layer_idx for block in find_decoder(model).layers]
    return tensors, classes, indices, model.config.to_dict()


def assert_untouched(model, before, logits, ids, mask):
    tensors, *rest = snapshot(model)
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)
    assert rest == list(before[1:])
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, logits)


def assert_generates(smaller, reference, ids, mask):
    """Greedy, beams, drafts from the prompt, a prompt in parts: as decoding without a cache."""
    expected = step_by_step(reference, ids, mask, 8)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    for extra in ({}, {"use_cache": False}, {"prefill_chunk_size": 7}, {"cache_implementation": "static"}):
        if "cache_implementation" in extra:
            extra = extra | {"disable_compile": True}
        assert torch.equal(smaller.generate(ids, **options, **extra), expected), extra
    one = {"max_new_tokens": 8, "do_sample": False}
    unpadded = ids[-1:, -12:]
    expected = step_by_step(reference, unpadded, torch.ones_like(unpadded), 8)
    assert torch.equal(smaller.generate(unpadded, prompt_lookup_num_tokens=3, **one), expected)
    beams = [
        smaller.generate(ids, num_beams=3, max_new_tokens=5, do_sample=False, attention_mask=mask, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*beams)


# Whole blocks


def test_shortgpt_removes_the_blocks_of_least_influence():
    assert shortgpt_blocks([0.5, 0.1, 0.1, 0.7, 0.2], 3) == [1, 2, 4]
    assert shortgpt_blocks([0.5], 0) == []
    model = tiny_language_model()
    influence = block_influence(model, texts(4, 20)[0])
    (least,) = shortgpt_blocks(influence, 1)
    assert influence[least] == min(influence)
    with pytest.raises(ValueError, match="`count` must leave one of the 2 blocks at least; got 2"):
        shortgpt_blocks([0.1, 0.2], 2)
    with pytest.raises(ValueError, match="`count` must leave one of the 2 blocks at least; got -1"):
        shortgpt_blocks([0.1, 0.2], -1)
    with pytest.raises(ValueError, match=r"`influence` must hold finite numbers; got \[nan, 0.2\]"):
        shortgpt_blocks([float("nan"), 0.2], 1)


@pytest.mark.parametrize("blocks", [[0], [3], [2, 1], [1, 2, 3], []], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_removed_blocks(family, blocks, tmp_path):
    model = tiny_language_model(family)
    ids, mask = texts(3, 20, padding=(0, 6, 1))
    before = snapshot(model)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    smaller = remove_blocks(model, blocks)
    assert type(smaller) is type(model) and not smaller.training
    assert [block.self_attn.layer_idx for block in smaller.model.layers] == list(range(4 - len(blocks)))
    assert smaller.config.num_hidden_layers == 4 - len(blocks) and smaller.config is smaller.model.config
    with torch.no_grad(), bypassed(model, blocks):
        expected = model(ids, attention_mask=mask).logits
        assert torch.equal(smaller(ids, attention_mask=mask).logits, expected)
        assert_generates(smaller, model, ids, mask)
    output = smaller.generate(ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True)
    cache = output[CACHE_ARGUMENT]
    assert [layer.get_seq_length() for layer in cache.layers] == [23] * (4 - len(blocks))
    assert_untouched(model, before, logits, ids, mask)
    # The weights are the same tensors, in all but the removed blocks.
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in own for parameter in smaller.parameters())
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids, attention_mask=mask).logits, expected)


def test_removed_blocks_keep_what_their_neighbours_are(tmp_path):
    """Layer types, and which MLPs are experts, belong to blocks and not to numbers."""
    ids, mask = texts(2, 20)
    windows = tiny_language_model("Qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2)
    experts = tiny_language_model("Qwen3Moe", mlp_only_layers=[1], decoder_sparse_step=1)
    assert windows.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    for model, blocks in itertools.product((windows, experts), ([0], [1, 2], [2])):
        smaller = remove_blocks(model, blocks)
        with torch.no_grad(), bypassed(model, blocks):
            expected = model(ids).logits
            assert_generates(smaller, model, ids, mask)
        smaller.save_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(smaller(ids).logits, expected)
            assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, expected)


def wrapped(model):
    return TokenRouterModel(model, TokenRouterConfig(target_sparsity=0.5, min_tokens=0))


def full_checkpoint(model):
    return wrapped(model).to_full_checkpoint()


@pytest.mark.parametrize("make", [apply_token_router, wrapped, full_checkpoint])
@pytest.mark.parametrize("remove", [remove_blocks, remove_sub_blocks])
def test_the_smaller_of_a_patched_model_is_a_plain_one(make, remove, tmp_path):
    gone = [1, 2] if remove is remove_blocks else [("attention", 1), ("mlp", 2)]
    ids, mask = texts(2, 80)
    expected = remove(tiny_language_model(), gone)(ids).logits
    model = make(tiny_language_model())
    before, logits = snapshot(model), model(ids, attention_mask=mask).logits.detach()
    smaller = remove(model, gone)
    assert type(smaller) is LlamaForCausalLM and type(smaller.config).__name__ == "LlamaConfig"
    assert smaller.model.config is smaller.config
    assert not is_patched(smaller.model) and not any("router" in name for name, _ in smaller.named_modules())
    assert not smaller.model._forward_pre_hooks
    assert torch.equal(smaller(ids).logits, expected)
    assert_untouched(model, before, logits, ids, mask)
    if remove is remove_blocks:
        smaller.save_pretrained(tmp_path)
        assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)


def test_training_the_smaller_model_trains_the_shared_weights_alone():
    model = tiny_language_model()
    smaller = remove_blocks(model, [1]).train()
    assert not model.training
    smaller(texts(2, 10)[0], labels=texts(2, 10)[0]).loss.backward()
    blocks = [{one.grad is not None for one in block.parameters()} for block in model.model.layers]
    assert blocks == [{True}, {False}, {True}, {True}]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([4], "`blocks` must name blocks from 0 to 3; got 4"),
        ([-1], "`blocks` must name blocks from 0 to 3; got -1"),
        (["1"], "`blocks` must name blocks from 0 to 3; got '1'"),
        ([1, 1], r"`blocks` must name nothing twice; got \[1, 1\]"),
        ([3, 1, 2, 0], "`blocks` must leave one of the 4 blocks at least; got all of them"),
    ],
)
def test_errors_of_removing_blocks(blocks, message):
    with pytest.raises(ValueError, match=message):
        remove_blocks(tiny_language_model(), blocks)


def test_removing_needs_a_language_model():
    with pytest.raises(TypeError, match="Token routing does not support `Linear`"):
        remove_blocks(torch.nn.Linear(2, 2), [0])
    inside = torch.nn.Sequential(tiny_language_model())
    with pytest.raises(TypeError, match="`model` must be a `PreTrainedModel` .*; got a `Sequential`. Adapters"):
        remove_sub_blocks(inside, [("mlp", 0)])


# Attentions and MLPs


@pytest.mark.parametrize("sub_blocks", SUB_BLOCKS.values(), ids=SUB_BLOCKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_removed_sub_blocks(family, sub_blocks):
    model = tiny_language_model(family)
    ids, mask = texts(3, 20, padding=(0, 6, 1))
    before = snapshot(model)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    smaller = remove_sub_blocks(model, sub_blocks)
    with torch.no_grad(), bypassed(model, sub_blocks=sub_blocks):
        assert torch.equal(smaller(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
        assert_generates(smaller, model, ids, mask)
    output = smaller.generate(ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True)
    layers = output[CACHE_ARGUMENT].layers
    assert [layer.get_seq_length() for layer in layers] == [23] * 4
    assert output[CACHE_ARGUMENT].get_seq_length() == 23
    without = [layer.keys.shape[1] * layer.keys.shape[3] == 1 for layer in layers]
    assert without == [("attention", block) in sub_blocks for block in range(4)]
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in own for parameter in smaller.parameters())
    assert_untouched(model, before, logits, ids, mask)


def test_removed_attentions_among_sliding_windows():
    model = tiny_language_model("Qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2)
    ids, mask = texts(3, 20, padding=(0, 6, 1))
    for block in range(4):
        smaller = remove_sub_blocks(model, [("attention", block)])
        expected = [
            smaller.generate(ids, attention_mask=mask, max_new_tokens=9, use_cache=use) for use in (True, False)
        ]
        assert torch.equal(*expected)


def test_a_conversation_goes_on_without_the_first_attention():
    smaller = remove_sub_blocks(tiny_language_model(), [("attention", 0)])
    ids, mask = texts(2, 18)
    first = smaller.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, texts(2, 4, seed=1)[0]], dim=1)
    cache = {CACHE_ARGUMENT: first[CACHE_ARGUMENT]}
    second = smaller.generate(longer, max_new_tokens=5, do_sample=False, **cache)
    assert torch.equal(second, step_by_step(smaller, longer, torch.ones_like(longer), 5))


@pytest.mark.parametrize(
    ("sub_blocks", "message"),
    [
        ([("attention", 4)], "`sub_blocks` must name blocks from 0 to 3; got 4"),
        ([("mlp", -1)], "`sub_blocks` must name blocks from 0 to 3; got -1"),
        ([("mha", 1)], r"`sub_blocks` must hold pairs such as \(\"attention\", 0\) or .*; got \('mha', 1\)"),
        ([3], r"`sub_blocks` must hold pairs such as .*; got 3"),
        ([("mlp", 1), ("attention", 1), ("mlp", 1)], "`sub_blocks` must name nothing twice"),
    ],
)
def test_errors_of_removing_sub_blocks(sub_blocks, message):
    with pytest.raises(ValueError, match=message):
        remove_sub_blocks(tiny_language_model(), sub_blocks)


# Choosing


@torch.no_grad()
def perplexity(model, windows):
    return cross_entropy(model(windows).logits[:, :-1], windows[:, 1:]).mean().exp().item()


@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
def test_block_pruner_is_greedy(family):
    model, windows = tiny_language_model(family).train(), texts(5, 16)[0]
    before = snapshot(model)
    chosen = block_pruner(model, windows, 3, batch_size=2)
    after = snapshot(model)
    assert before[1:] == after[1:] and all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    model.eval()
    parts = [(kind, block) for block in range(4) for kind in ("attention", "mlp")]
    gone = []
    for _ in range(3):
        left = [part for part in parts if part not in gone]
        gone.append(min(left, key=lambda part: perplexity(remove_sub_blocks(model, [*gone, part]), windows)))
    assert chosen == gone
    assert block_pruner(model, windows, 2) == gone[:2]


def test_block_pruner_takes_everything_and_takes_nan_for_the_worst():
    model, windows = tiny_language_model(num_hidden_layers=2), texts(2, 8)[0]
    assert sorted(block_pruner(model, windows, 4)) == [("attention", 0), ("attention", 1), ("mlp", 0), ("mlp", 1)]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    assert block_pruner(model, windows, 1) == [("mlp", 1)]
    apply_token_router(model, TokenRouterConfig(target_sparsity=0.4, min_tokens=0))
    assert block_pruner(model, windows, 1) == [("mlp", 1)] and is_patched(model.model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "`count` must be from 1 to 8, two for each block; got 0"),
        ({"count": 9}, "`count` must be from 1 to 8, two for each block; got 9"),
        ({"windows": torch.ones(3, 1).long()}, r"`windows` must have the shape .* two tokens at least; got \(3, 1\)"),
        ({"windows": torch.ones(3).long()}, r"`windows` must have the shape .*; got \(3,\)"),
        ({"windows": torch.ones(0, 3).long()}, r"`windows` must have the shape .*; got \(0, 3\)"),
        ({"batch_size": 0}, "`batch_size` must be at least 1; got 0"),
    ],
)
def test_errors_of_block_pruner(arguments, message):
    with pytest.raises(ValueError, match=message):
        block_pruner(tiny_language_model(), **({"windows": texts(2, 8)[0], "count": 1} | arguments))


# Gates that save nothing


@pytest.mark.parametrize("fields", [{}, {"kv_policy": "keep"}, {"skip_unit": "mlp"}], ids=str)
@pytest.mark.parametrize("router_type", ["static", "random", "one_pass", "dynamic"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_multiplying_by_gates_gives_what_skipping_gives(implementation, router_type, fields):
    config = TokenRouterConfig(target_sparsity=0.4, router_type=router_type, min_tokens=0, score_window=4, **fields)
    model = TokenRouterModel(tiny_language_model(), config)
    model.model.set_attn_implementation(implementation)
    with torch.no_grad():
        model.token_router.fc2.weight.add_(torch.randn(2, 64))
    ids, mask = texts(3, 20, padding=(0, 6, 1))
    computed = []
    handle = model.decoder.layers[2].mlp.register_forward_hook(lambda _, args, output: computed.append(args[0].shape))
    for given in (None, mask):
        real = torch.ones_like(mask).bool() if given is None else mask.bool()
        with torch.no_grad():
            expected = model(ids, attention_mask=given, use_cache=False).logits
            masks = model.routing_report.keep_masks
            replay = {"keep_mask": masks} if router_type == "dynamic" else {}
            with gate_multiply(model):
                gated = model(ids, attention_mask=given, **replay).logits
            assert torch.equal(model.routing_report.keep_masks, masks)
            assert torch.equal(model(ids, attention_mask=given).logits, expected)
        torch.testing.assert_close(gated[real], expected[real], atol=2e-5, rtol=1e-4)
    handle.remove()
    assert {shape[1] for shape in computed[1::3]} == {20} and max(shape[1] for shape in computed[0::3]) < 20


def test_gates_that_are_all_open_change_nothing():
    model = apply_token_router(tiny_language_model(), TokenRouterConfig(target_sparsity=0.4, min_tokens=64))
    ids, _ = texts(2, 20)
    with torch.no_grad(), gate_multiply(model):
        gated = model(ids).logits
    torch.testing.assert_close(gated, tiny_language_model()(ids).logits.detach(), atol=2e-5, rtol=1e-4)


def test_gates_need_a_router_and_no_cache():
    with (
        pytest.raises(RuntimeError, match="no token router whose decisions could be multiplied"),
        gate_multiply(tiny_language_model()),
    ):
        pass
    model = apply_token_router(tiny_language_model(), TokenRouterConfig(target_sparsity=0.4, min_tokens=0))
    hooks = copy.copy(model.model._forward_pre_hooks)
    with gate_multiply(model), pytest.raises(ValueError, match=f"`{CACHE_ARGUMENT}` cannot be used inside"):
        model.generate(texts(1, 20)[0], max_new_tokens=2)
    dynamic = copy_config(model.model.token_routing_hook.config, router_type="dynamic")
    with gate_multiply(model), pytest.raises(ValueError, match='`router_type="dynamic"` needs .* and replay: `keep'):
        model(texts(1, 20)[0], token_router_config=dynamic)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.model._forward_pre_hooks == hooks
