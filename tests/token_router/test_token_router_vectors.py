"""Known answers: factors, router and selection, the static rule, a block of three families, losses, a whole model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_effml import TokenRouter, TokenRouterConfig, apply_token_router, block_influence
from hf_effml.token_router.patching import disable_routing
from hf_effml.token_router.router_losses import (
    router_distillation_loss,
    router_guide_loss,
    router_hidden_state_loss,
    router_sparsity_loss,
)
from hf_effml.token_router.routing import (
    attention_scores_reference,
    kept_count,
    rank_scores,
    router_factors,
    select_budget,
    select_threshold,
    static_priority,
    update_table,
)
from hf_effml.token_router.token_skip_layer import CACHE_ARGUMENT


VECTORS = Path(__file__).parents[1] / "vectors" / "token_router"
MANIFEST = json.loads((VECTORS / "manifest.json").read_text())["files"]
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def settings_of(name):
    return MANIFEST[f"{name}.safetensors"]["settings"]


def tensors_of(name):
    """Tensors by name; the masks among them as such."""
    tensors = load_file(VECTORS / f"{name}.safetensors")
    return {key: value.bool() if value.dtype == torch.uint8 else value for key, value in tensors.items()}


def assert_close(actual, expected, name):
    settings = settings_of(name)
    torch.testing.assert_close(actual, expected, rtol=settings["rtol"], atol=settings["atol"])


def language_model(family, settings, implementation="sdpa", **fields):
    config_class, model_class = CLASSES[family]
    config = config_class(
        **settings["config"],
        **fields,
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
        rms_norm_eps=settings["rms_norm_eps"],
        attn_implementation=implementation,
    )
    return model_class(config).eval()


# Factors, router and selection


FACTORS = tensors_of("factors")
every_mode = pytest.mark.parametrize("mode", ["mean", "last", "window"])


@every_mode
def test_table_and_factors(mode):
    settings, real, took_part = settings_of("factors"), FACTORS["attention_mask"], FACTORS["took_part"]
    scores = attention_scores_reference(FACTORS["attn"], took_part, mode, settings["window"])
    table = update_table(FACTORS["table_prev"], scores, took_part)
    assert_close(table, FACTORS[f"{mode}.table_next"], "factors")
    factors = router_factors(table, real, [0.1, settings["sparsity"]])
    assert factors.shape == (2, *real.shape, 4)
    assert_close(factors[1], FACTORS[f"{mode}.factors"], "factors")
    assert (factors[0, ..., 3] == 0.1 * real).all()


@every_mode
def test_router_and_selection(mode):
    settings, real = settings_of("factors"), FACTORS["attention_mask"]
    router = TokenRouter()
    router.load_state_dict(
        {key.removeprefix("router."): value for key, value in FACTORS.items() if key.startswith("router.")}
    )
    logits = router(FACTORS[f"{mode}.factors"]).detach()
    assert_close(logits * real.unsqueeze(-1), FACTORS[f"{mode}.router_logits"], "factors")
    assert torch.equal(select_threshold(logits, real), FACTORS[f"{mode}.keep_argmax"])
    counts = torch.tensor([kept_count(tokens, settings["sparsity"]) for tokens in real.sum(-1).tolist()])
    assert torch.equal(select_budget(logits[..., 1] - logits[..., 0], real, counts), FACTORS[f"{mode}.keep_budget"])


def test_ties():
    table, expected = FACTORS["ties.table"], FACTORS["ties.factors"]
    real = torch.ones_like(table, dtype=torch.bool)
    assert_close(router_factors(table, real, [expected[0, 0, 3].item()])[0], expected, "factors")
    assert torch.equal(rank_scores(table, real), (expected[..., 2] * 5).round().long())
    assert len(table.unique()) < table.numel()


# The static router


@pytest.mark.parametrize("case", settings_of("static_router")["cases"], ids=lambda case: f"case{case['case']}")
def test_static_router(case):
    tensors = tensors_of("static_router")
    real, expected = (tensors[f"case{case['case']}.{name}"] for name in ("attention_mask", "keep"))
    sink = real & (real.cumsum(-1) == 1)
    kept = kept_count(case["n"], case["sparsity"])
    assert kept == case["kept"]
    assert torch.equal(select_budget(static_priority(real, sink), real, torch.tensor([kept])), expected)


# One block


@pytest.fixture(params=CLASSES)
def family(request):
    return request.param


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", ["drop", "keep", "dense"])
def test_block(family, policy, implementation):
    settings = settings_of("block")
    tensors = {
        key.removeprefix(f"{family}."): value
        for key, value in tensors_of("block").items()
        if key.startswith(f"{family}.")
    }
    model = language_model(family, settings[family], implementation)
    weights = {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}
    block = model.model.layers[0]
    block.load_state_dict(weights)
    config = TokenRouterConfig(
        router_type="static",
        target_sparsity=0.0,
        num_protected_first=0,
        kv_policy="drop" if policy == "dense" else policy,
    )
    apply_token_router(model, config)
    outputs = []
    block.register_forward_hook(lambda *args: outputs.append(args[-1]))
    given, real, keep = tensors["hidden_states"], tensors["attention_mask"], tensors["keep"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(
            inputs_embeds=given,
            attention_mask=real.long(),
            position_ids=tensors["position_ids"],
            keep_mask={0: real if policy == "dense" else keep},
            **{CACHE_ARGUMENT: cache},
        )
    (output,) = outputs
    skipped = ~(real if policy == "dense" else keep)
    copied = skipped & real if policy == "dense" else skipped
    assert torch.equal(output[copied], given[copied])
    # What a dense block makes of padding is its own affair.
    rows = real if policy == "dense" else torch.ones_like(real)
    assert_close(output[rows], tensors[f"out_{policy}"][rows], "block")
    if policy == "drop":
        layer = cache.layers[0]
        kept = tensors["kept_index"].tolist()
        assert sorted(kept) == kept
        entries = layer.positions >= 0
        assert [
            [sample, layer.positions[sample, entry].item()] for sample, entry in entries.nonzero().tolist()
        ] == kept
        assert_close(layer.keys.transpose(1, 2)[entries], tensors["kept_keys"], "block")
        assert_close(layer.values.transpose(1, 2)[entries], tensors["kept_values"], "block")


# Losses


LOSSES = tensors_of("losses")


def test_losses_of_the_router():
    logits, real = LOSSES["router_logits"], LOSSES["attention_mask"]
    required = LOSSES["required_sparsity"].tolist()
    assert_close(router_sparsity_loss(logits, real, required).view(1), LOSSES["L_s_hinge_hard"], "losses")
    two_sided = (LOSSES["required_sparsity"] - LOSSES["sparsity_hard"]).abs().sum()
    assert_close(router_sparsity_loss(logits, real, required, two_sided=True), two_sided, "losses")
    assert_close(router_guide_loss(logits, LOSSES["static_keep"], real).view(1), LOSSES["L_g_ce"], "losses")
    for block, required in enumerate(LOSSES["required_sparsity"].tolist()):
        missing = router_sparsity_loss(logits[[block]], real, [required], two_sided=True)
        assert_close(missing, (required - LOSSES["sparsity_hard"][block]).abs(), "losses")


@pytest.mark.parametrize("two_sided", [False, True])
def test_gradient_of_the_sparsity_loss(two_sided):
    """That of the soft share, which the vectors know, in those blocks where the hard one is punished."""
    required, real = LOSSES["required_sparsity"], LOSSES["attention_mask"]
    soft_logits, logits = (LOSSES["router_logits"].clone().requires_grad_() for _ in range(2))
    soft = (soft_logits.softmax(-1)[..., 0] * real).sum((1, 2)) / real.sum()
    assert_close(soft.detach(), LOSSES["sparsity_soft"], "losses")
    missing = required - soft
    assert_close(missing.detach().clamp(min=0).sum().view(1), LOSSES["L_s_hinge_soft"], "losses")
    assert_close(missing.detach().abs().sum().view(1), LOSSES["L_s_abs_soft"], "losses")
    too_little = required > LOSSES["sparsity_hard"]
    assert too_little.any() and not too_little.all()
    signs = torch.where(too_little, 1.0, -1.0 if two_sided else 0.0)
    (missing * signs).sum().backward()
    router_sparsity_loss(logits, real, required.tolist(), two_sided).backward()
    assert_close(logits.grad, soft_logits.grad, "losses")


def test_losses_of_the_outputs():
    real = LOSSES["attention_mask"]
    kl = router_distillation_loss(LOSSES["teacher_logits"], LOSSES["student_logits"], real)
    assert_close(kl.view(1), LOSSES["L_d_kl"], "losses")
    mse = router_hidden_state_loss(LOSSES["teacher_hidden"], LOSSES["student_hidden"], real)
    assert_close(mse.view(1), LOSSES["L_d_mse"], "losses")


# A whole model


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    settings = settings_of("model")
    model = language_model(settings["family"], settings, request.param)
    weights = {key.removeprefix("weight."): value for key, value in MODEL.items() if key.startswith("weight.")}
    model.load_state_dict(weights)
    return apply_token_router(model, TokenRouterConfig(router_type="static", target_sparsity=0.0))


MODEL = tensors_of("model")


def given(columns):
    """Arguments of a call for the columns of a slice; the mask reaches back to the first one."""
    return {
        "input_ids": MODEL["input_ids"][:, columns],
        "attention_mask": MODEL["attention_mask"][:, : columns.stop].long(),
        "position_ids": MODEL["position_ids"][:, columns],
        "keep_mask": {
            layer: MODEL["keep"][row][:, columns] for row, layer in enumerate(settings_of("model")["routed_layers"])
        },
    }


@torch.no_grad()
def test_full_forward(model):
    real, columns = MODEL["attention_mask"], slice(0, MODEL["input_ids"].shape[1])
    seen = []
    model.model.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    logits = model(**given(columns)).logits
    assert_close(logits[real], MODEL["logits_skip"][real], "model")
    assert_close(seen[0][real], MODEL["last_hidden_before_norm_skip"][real], "model")
    with disable_routing(model):
        logits = model(**{**given(columns), "keep_mask": None}).logits
    assert_close(logits[real], MODEL["logits_dense"][real], "model")


@torch.no_grad()
def test_prefill_and_single_steps(model):
    settings, real = settings_of("model"), MODEL["attention_mask"]
    prompt, cache = settings["prompt"], DynamicCache(config=model.config)
    logits = [model(**given(slice(0, prompt)), **{CACHE_ARGUMENT: cache}).logits]
    for row, layer in enumerate(settings["routed_layers"]):
        entries = cache.layers[layer].positions
        assert (entries >= 0).sum(-1).tolist() == settings["kept_entries_after_prefill"][row]
    for column in range(prompt, prompt + settings["new"]):
        logits.append(model(**given(slice(column, column + 1)), **{CACHE_ARGUMENT: cache}).logits)
    assert_close(torch.cat(logits, 1)[real], MODEL["logits_skip"][real], "model")


def test_block_influence(model):
    expected = settings_of("model")["block_influence"]
    batch = {"input_ids": MODEL["input_ids"], "attention_mask": MODEL["attention_mask"].long()}
    found = torch.tensor(block_influence(model, [batch]), dtype=torch.float32)
    assert_close(found, MODEL["block_influence"], "model")
    assert_close(found, torch.tensor(expected), "model")
