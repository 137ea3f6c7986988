"""Gradients of the router: those of a soft reference, nobody else's, with and without checkpointing."""

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from helpers import assert_close, existing_gradients, texts, tiny_language_model
from hf_effml import TokenRouterConfig, TokenRouterModel, apply_token_router
from hf_effml.token_router.gate_gradients import key_gate_gradient
from hf_effml.token_router.patching import make_routing_report
from hf_effml.token_router.token_skip_layer import CACHE_ARGUMENT
from routing_reference import POLICIES


IDS, MASK = texts(3, 20, (0, 9, 4))
learned = pytest.mark.parametrize("router_type", ["one_pass", "dynamic"])
every_policy = pytest.mark.parametrize("policy", POLICIES)


def routed(family="Llama", kernel="sdpa", **fields):
    fields = {"target_sparsity": 0.4, "min_tokens": 0} | fields
    model = tiny_language_model(family, attn_implementation=kernel)
    model = apply_token_router(model, TokenRouterConfig(**fields)).train()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.model.token_router.parameters():
        # Small enough that no decision is so sure that it has no gradient.
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return model


def loss_of(logits):
    target = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    return ((logits - target).square() * MASK[..., None]).mean()


def assert_alike(found, wanted, tolerance):
    """Equal to within a share of the largest entry of each, as gradients are small."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        largest = gradient.abs().max()
        assert largest > 0, name
        assert (found[name] - gradient).abs().max() <= tolerance * largest, name


def router_gradients(model):
    return {name: value for name, value in existing_gradients(model).items() if "token_router" in name}


@pytest.mark.parametrize(
    "family, kernel",
    [("Llama", "sdpa"), ("Llama", "eager"), ("Qwen3", "sdpa"), ("Qwen3Moe", "sdpa"), ("Gemma", "eager")],
)
@every_policy
def test_training_computes_what_evaluation_computes(family, kernel, policy):
    """Densely, with gates, it comes to the same outputs and the same decisions, also of continued prompts."""
    continued = (torch.arange(20) >= 15).expand(3, -1)
    for router_type, selection, generated in (
        ("one_pass", "budget", None),
        ("one_pass", "threshold", continued),
        ("dynamic", "budget", continued),
        ("dynamic", "threshold", None),
    ):
        model = routed(family, kernel, router_type=router_type, selection=selection, **POLICIES[policy])
        given = {"attention_mask": MASK, "generated": generated}
        soft = model(IDS, **given).logits
        soft_keep = make_routing_report(model).keep_masks
        hard = model.eval()(IDS, **given).logits
        hard_keep = make_routing_report(model).keep_masks
        assert torch.equal(soft_keep, hard_keep)
        assert (~hard_keep & MASK.bool()).any()
        assert soft.requires_grad
        assert_close(soft.detach() * MASK[..., None], hard.detach() * MASK[..., None], 1e-5)


def heads(states, module):
    return states.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)


def soft_reference(model, keep, policy):
    """Blocks with the gate `keep + p - p.detach()`, written with the eager attention of the family."""
    decoder, logits = model.model, model.model.token_routing_hook.latest.logits
    hidden = decoder.embed_tokens(IDS)
    cos, sin = rotary = decoder.rotary_emb(hidden, torch.arange(20).unsqueeze(0))
    real, own = MASK.bool(), torch.eye(20, dtype=torch.bool)
    causal = (real[:, None] & own.new_ones(20, 20).tril()) | own
    for index, block in enumerate(decoder.layers):
        likely = logits[index].softmax(-1)[..., 1] if index in logits else keep[index].float()
        gate = (keep[index] + likely - likely.detach()) * real
        visible = (keep[index][:, None] & causal) | own if policy == "drop" else causal
        mask = torch.zeros(3, 1, 20, 20).masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
        module, given = block.self_attn, block.input_layernorm(hidden)
        attended, _ = module(hidden_states=given, position_embeddings=rotary, attention_mask=mask)
        if policy == "drop" and index in logits:
            query, key, value = (heads(part(given), module) for part in (module.q_proj, module.k_proj, module.v_proj))
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            worth = key_gate_gradient(query * module.scaling, key, value, causal, visible, gate)
            attended = attended + worth @ module.o_proj.weight.detach().T
        after = hidden + attended
        base = after if policy == "mlp" else hidden
        after = after + block.mlp(block.post_attention_layernorm(after))
        hidden = base + gate.unsqueeze(-1) * (after - base)
    return model.lm_head(decoder.norm(hidden))


@learned
@every_policy
def test_gradients_are_those_of_the_reference(router_type, policy):
    model = routed(kernel="eager", router_type=router_type, **POLICIES[policy])
    loss_of(model(IDS, attention_mask=MASK).logits).backward()
    found = existing_gradients(model)
    model.zero_grad()
    model(IDS, attention_mask=MASK)
    # The reference takes logits of the router, in a graph of their own, and everything else from plain layers.
    keep = make_routing_report(model).keep_masks
    loss_of(soft_reference(model, keep, policy)).backward()
    assert len(router_gradients(model)) == 4
    assert_alike(found, existing_gradients(model), 1e-4)


@every_policy
def test_weights_learn_alike_where_tokens_really_skip(policy):
    """As with LoRA under fixed decisions: skipping computes the gradients that gates compute."""
    model = routed(**POLICIES[policy])
    loss_of(model(IDS, attention_mask=MASK).logits).backward()
    soft = {name: value for name, value in existing_gradients(model).items() if "token_router" not in name}
    model.zero_grad()
    loss_of(model.eval()(IDS, attention_mask=MASK).logits).backward()
    assert not router_gradients(model), "decisions have no gradient"
    assert_alike(existing_gradients(model), soft, 1e-4)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@every_policy
def test_gradients_behind_a_cache_are_finite(kernel, policy):
    """A ragged chunk has fillers, which nothing but themselves can see."""
    model = routed(kernel=kernel, **POLICIES[policy]).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :10], attention_mask=MASK[:, :10], **{CACHE_ARGUMENT: cache})
    keep = torch.rand(4, 3, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    logits = model(IDS[:, 10:], attention_mask=MASK, keep_mask=keep, **{CACHE_ARGUMENT: cache}).logits
    logits.square().mean().backward()
    gradients = existing_gradients(model)
    assert len(gradients) > 30 and all(gradient.isfinite().all() for gradient in gradients.values())


@learned
def test_only_the_router_learns(router_type):
    model = routed(router_type=router_type)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("token_router" in name)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model(IDS, attention_mask=MASK).logits).backward()
        optimizer.step()
    assert len(existing_gradients(model)) == 4
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != ("token_router" in name), name


@learned
@every_policy
@pytest.mark.parametrize("frozen, wrapped", [(True, True), (True, False), (False, False)])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_checkpointing(router_type, policy, frozen, wrapped):
    model = routed(router_type=router_type, **POLICIES[policy])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or "token_router" in name)
    model = TokenRouterModel(model).train() if wrapped else model
    calls, results = [], []
    decoder = model.model.model if wrapped else model.model
    decoder.layers[1].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        loss_of(model(IDS, attention_mask=MASK).logits).backward()
        results.append(existing_gradients(model))
    assert len(calls) == 3, "with checkpointing a block runs twice"
    assert len(results[0]) == 4 if frozen else len(results[0]) > 30
    assert_alike(results[1], results[0], 1e-6)


def test_without_gradients_training_mode_skips_for_real():
    """Evaluation inside training, and a teacher that forgets `eval()`."""
    model = routed()
    rows = []
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[1]))
    with torch.no_grad():
        model(IDS, attention_mask=MASK)
    model.requires_grad_(False)
    model(IDS, attention_mask=MASK)
    model.requires_grad_(True)
    model(IDS, attention_mask=MASK)
    assert rows == [10, 10, 20]


def test_training_uses_no_cache():
    """None is made, an empty one stays empty, and a filled one is refused, as training looks at whole texts."""
    model, cache = routed(), DynamicCache()
    assert CACHE_ARGUMENT not in model(IDS, attention_mask=MASK)
    model(IDS, attention_mask=MASK, use_cache=True, **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(IDS, attention_mask=MASK, **{CACHE_ARGUMENT: cache})
    with pytest.raises(ValueError, match="trained on whole texts; got a cache of 20 columns"):
        model(IDS, attention_mask=MASK.repeat(1, 2), **{CACHE_ARGUMENT: cache})


@learned
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_reentrant_checkpointing_is_refused(router_type):
    """It runs the blocks without gradients first, and the router would get none, or a part of it."""
    model = routed(router_type=router_type)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match="reentrant gradient checkpointing cuts it off"):
        model(IDS, attention_mask=MASK)
