"""Checkpoints that carry a router: what every model class promises, for the three of them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import assert_close, existing_gradients, randomized, texts
from hf_effml import (
    TokenRouterConfig,
    TokenRouterLlamaConfig,
    TokenRouterLlamaForCausalLM,
    TokenRouterModel,
    TokenRouterQwen2Config,
    TokenRouterQwen2ForCausalLM,
    TokenRouterQwen3Config,
    TokenRouterQwen3ForCausalLM,
    disable_routing,
    remove_token_router,
)


CLASSES = {
    "token_router_llama": (TokenRouterLlamaConfig, TokenRouterLlamaForCausalLM),
    "token_router_qwen2": (TokenRouterQwen2Config, TokenRouterQwen2ForCausalLM),
    "token_router_qwen3": (TokenRouterQwen3Config, TokenRouterQwen3ForCausalLM),
}
every_class = pytest.mark.parametrize("kind", CLASSES)
IDS, MASK = texts(2, 20, (0, 6))


def config_of(kind, token_router=None, **fields):
    fields = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    } | fields
    fields |= {"head_dim": 12} if kind == "token_router_qwen3" else {}
    router = {"target_sparsity": 0.4, "min_tokens": 0, "router_type": "dynamic"} | (token_router or {})
    return CLASSES[kind][0](**fields, token_router=router)


def build(kind, seed=0, **fields):
    torch.manual_seed(seed)
    fields = {"initializer_range": 0.3} | fields
    return randomized(CLASSES[kind][1](config_of(kind, **fields)), seed)


@torch.no_grad()
def run(model, **more):
    return model(IDS, attention_mask=MASK, return_dict=False, use_cache=False, **more)


# Configurations


def test_router_config_round_trip(tmp_path):
    """All of its fields, with values that are not the defaults."""
    fields = {
        "router_type": "dynamic",
        "target_sparsity": 0.25,
        "sparsity_schedule": [0.0, 0.4, 0.1, 0.5],
        "num_protected_first": 1,
        "num_protected_last": 0,
        "selection": "threshold",
        "kv_policy": "keep",
        "skip_unit": "block",
        "decode_policy": "threshold",
        "decode_threshold": 0.25,
        "score_mode": "mean",
        "score_window": 7,
        "normalize_scores": True,
        "router_hidden_size": 8,
        "always_keep_first": 2,
        "always_keep_last": 3,
        "min_tokens": 5,
        "random_seed": 4,
        "base_model_name_or_path": "some/where",
        "base_model_revision": "main",
        "num_hidden_layers": 4,
    }
    config = TokenRouterConfig(**fields)
    config.save_pretrained(tmp_path)
    for again in (TokenRouterConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert {name: getattr(again, name) for name in fields} == fields
    defaults = TokenRouterConfig()
    left = {"num_protected_first", "num_protected_last", "skip_unit"}
    assert all(getattr(defaults, name) != value for name, value in fields.items() if name not in left)
    assert TokenRouterConfig(num_hidden_layers=4, target_sparsity=0.3).schedule == [0.0, 0.4, 0.4, 0.4]


@every_class
def test_no_router_fields_mean_the_default_router(kind):
    config = config_of(kind)
    config.token_router = None
    model = CLASSES[kind][1](config)
    found = model.model.token_routing_hook.config
    wanted = TokenRouterConfig(num_hidden_layers=4)
    assert (found.router_type, found.schedule, found.min_tokens) == ("one_pass", wanted.schedule, 64)


# Saving and loading


@every_class
def test_save_and_load_is_exact(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {name for name in names if "router" in name} == {
        f"model.token_router.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    }
    for loaded in (type(model).from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is type(model) and not loaded.training
        assert_close(loaded.state_dict(), model.state_dict())
        assert_close(run(loaded, output_hidden_states=True), run(model, output_hidden_states=True))
        assert torch.equal(loaded.routing_report.keep_masks, model.routing_report.keep_masks)
        assert loaded.routing_report.sparsity > 0.3
        assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
        assert loaded.config.token_router["target_sparsity"] == 0.4


@every_class
def test_a_changed_schedule_is_saved(kind, tmp_path):
    """What a schedule search has found lies in the configuration that the hook reads."""
    model = build(kind)
    router = model.model.token_routing_hook.config
    router.sparsity_schedule, router.router_type = [0.0, 0.8, 0.2, 0.6], "static"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_close(run(loaded), run(model))
    assert loaded.routing_report.kept_counts.tolist() == [[20, 14], [4, 3], [16, 12], [8, 6]]


@every_class
def test_a_missing_router_is_a_fresh_one(kind, tmp_path, poisoned_memory):
    """A base checkpoint of the family loads into the class; also one parameter of a router may be missing."""
    fresh = CLASSES[kind][1](config_of(kind)).eval()
    fresh.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    router = [name for name in weights if "token_router" in name]
    factors = torch.rand(50, 4)
    wanted = fresh.model.token_router(factors)
    for missing in (router, *([name] for name in router)):
        kept = {name: value for name, value in weights.items() if name not in missing}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, report = type(fresh).from_pretrained(tmp_path, output_loading_info=True)
        assert set(report["missing_keys"]) == set(missing)
        assert_close(loaded.model.token_router(factors), wanted, 1e-6, str(missing))
    made = AutoModelForCausalLM.from_config(config_of(kind))
    assert type(made) is type(fresh)
    assert_close(made.model.token_router(factors), wanted, 1e-6)


@every_class
def test_patch_can_be_removed_and_wrapped(kind):
    model = build(kind)
    routed = run(model)
    wrapper = TokenRouterModel(model)
    assert wrapper.config is model.model.token_routing_hook.config
    assert_close(run(wrapper), routed)
    with disable_routing(model):
        dense = run(model)
    assert not torch.equal(dense[0], routed[0])
    assert_close(run(remove_token_router(model)), dense)


# The forward pass


@every_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(kind, dtype, tmp_path):
    """Within 1 % of the range of the logits; the router stays in float32 and decides the same with static rules."""
    static = {"router_type": "static"}
    model = build(kind, initializer_range=0.1, token_router=static)
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=dtype)
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if "token_router" in name else dtype), name
    output, wanted = run(half)[0], run(model)[0]
    assert output.dtype == dtype
    allowed = 0.01 * (wanted.max() - wanted.min())
    assert ((output.float() - wanted) * MASK[..., None]).abs().max() <= allowed
    half.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert {name for name, value in saved.items() if value.dtype == torch.float32} == {
        name for name in saved if "token_router" in name
    }
    for router_type in ("one_pass", "dynamic"):
        half.model.token_routing_hook.config.router_type = router_type
        half.zero_grad()
        half.train()(IDS, attention_mask=MASK, labels=IDS).loss.backward()
        gradients = existing_gradients(half)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert any("token_router" in name for name in gradients)


@every_class
def test_autocast(kind):
    model = build(kind, initializer_range=0.1)
    wanted = run(model)[0]
    masks = model.routing_report.keep_masks
    with torch.autocast("cpu", torch.bfloat16):
        output = model(IDS, attention_mask=MASK, keep_mask=masks).logits
        model.train()(IDS, attention_mask=MASK, labels=IDS).loss.backward()
    allowed = 0.02 * (wanted.max() - wanted.min())
    assert ((output.detach().float() - wanted) * MASK[..., None]).abs().max() <= allowed
    assert all(gradient.isfinite().all() for gradient in existing_gradients(model).values())
