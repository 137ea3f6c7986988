"""What routing refuses, and how it says so."""

import logging
import re

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from helpers import texts, tiny_language_model
from hf_effml import (
    TokenRouterConfig,
    TokenRouterLlamaConfig,
    TokenRouterLlamaForCausalLM,
    TokenRouterModel,
    apply_token_router,
    disable_routing,
    remove_token_router,
)
from hf_effml.token_router.patching import copy_config, is_patched, make_routing_report
from hf_effml.token_router.token_skip_layer import CACHE_ARGUMENT


IDS, MASK = texts(2, 20, (0, 6))


def routed(kernel="sdpa", **fields):
    fields = {"target_sparsity": 0.4, "min_tokens": 0} | fields
    return apply_token_router(tiny_language_model(attn_implementation=kernel), TokenRouterConfig(**fields))


def raises(message, error=ValueError):
    """Matches a message as it stands."""
    return pytest.raises(error, match=re.escape(message))


# Models


@pytest.mark.parametrize(
    "family, blocks",
    [
        ("GPT2", "no list of decoder blocks"),
        ("OPT", "blocks of class OPTDecoderLayer"),
        ("Gemma2", "blocks of class Gemma2DecoderLayer"),
        ("Phi3", "blocks of class Phi3DecoderLayer"),
        ("Mixtral", "blocks of class MixtralDecoderLayer"),
    ],
)
def test_unsupported_families(family, blocks):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9, "pad_token_id": 0}
    shape |= {
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "ffn_dim": 16,
        "word_embed_proj_dim": 16,
        "head_dim": 8,
    }
    name = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**shape))
    for patch in (apply_token_router, TokenRouterModel):
        with raises(f"Token routing does not support `{name}`, which has {blocks}; supported are Llama", TypeError):
            patch(model)
    assert not hasattr(model, "token_routing_hook")


def test_other_modules():
    with raises("does not support `Linear`, which has no list of decoder blocks", TypeError):
        apply_token_router(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "family, fields",
    [
        ("Mistral", {"sliding_window": 8}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("Qwen3Moe", {"use_sliding_window": True, "sliding_window": 8}),
    ],
)
def test_sliding_windows(family, fields):
    model = tiny_language_model(family, **fields)
    with raises(f"this `{family}ForCausalLM` has `sliding_window=8`. Load it with `sliding_window=None`"):
        apply_token_router(model)
    assert not is_patched(model.model)


def test_patching_twice():
    model = routed()
    with raises("has a token router already. Remove it with `remove_token_router(model)`, or replace", RuntimeError):
        apply_token_router(model, TokenRouterConfig())
    with raises("has a token router already. Remove it with `remove_token_router(model)`, or leave out", RuntimeError):
        TokenRouterModel(model, TokenRouterConfig())
    assert len(model.model._forward_pre_hooks) == 1
    remove_token_router(model)
    with raises("This model has no token router to remove.", RuntimeError):
        remove_token_router(model)


def test_a_failed_replacement_changes_nothing():
    model = routed()
    with torch.no_grad():
        before = model(IDS).logits
        with raises("made for a model of 7 blocks"):
            apply_token_router(model, TokenRouterConfig(num_hidden_layers=7), exist_ok=True)
        assert torch.equal(model(IDS).logits, before)


# Configurations


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"sparsity_schedule": [0, 0.1, 0.2, 0.1]},
            "a mean of 0.1000, but `target_sparsity` is 0.3; they may differ by",
        ),
        ({"sparsity_schedule": [0, 0.5, 0.5, 0.204]}, "a mean of 0.3010, but"),
        ({"sparsity_schedule": [0, 0.2, 0.0, 1.0]}, "shares of at least 0 and less than 1; got 1.0"),
        ({"sparsity_schedule": [0, 1.4, -0.1, 0.0]}, "shares of at least 0 and less than 1; got 1.4"),
        ({"sparsity_schedule": [0.3] * 4}, "skips tokens in blocks that `num_protected_first=1` and"),
        (
            {"sparsity_schedule": [0, 0.3, 0.6, 0.3], "num_protected_last": 2},
            "`num_protected_last=2` protect; got [0, 0.3, 0.6, 0.3]",
        ),
        ({"sparsity_schedule": [0, 0.6], "num_hidden_layers": 4}, "one share for each of the 4 blocks; got 2"),
        (
            {"target_sparsity": 0.8, "num_hidden_layers": 4},
            "of 0.8 cannot be reached with 1 of 4 blocks protected: the most is 0.95 * 3 / 4 = 0.7125",
        ),
        ({"target_sparsity": 1.0}, "at least 0 and less than 1; got 1.0. It is the share of tokens"),
        ({"target_sparsity": -0.1}, "at least 0 and less than 1; got -0.1"),
        ({"router_type": "static", "selection": "threshold"}, 'asks a learned router; got `router_type="static"`'),
        ({"router_type": "random", "selection": "threshold"}, 'asks a learned router; got `router_type="random"`'),
        ({"kv_policy": "keep", "skip_unit": "mlp"}, 'has no meaning with `skip_unit="mlp"`'),
        ({"num_protected_first": 0}, 'must be at least 1 for `router_type="one_pass"`'),
        ({"num_protected_first": 0, "router_type": "dynamic"}, 'must be at least 1 for `router_type="dynamic"`'),
        ({"router_type": "oracle"}, "expected one of ('static', 'dynamic', 'one_pass', 'random'), got oracle"),
        ({"kv_policy": "half"}, "expected one of ('drop', 'keep'), got half"),
        ({"score_window": 0}, "`score_window` must be at least 1; got 0"),
        ({"router_hidden_size": 1}, "`router_hidden_size` must be at least 2 and at most 1048576; got 1"),
        ({"min_tokens": -1}, "`min_tokens` must not be negative; got -1"),
        ({"always_keep_last": -1}, "`always_keep_last` must not be negative; got -1"),
        ({"num_protected_last": -1}, "`num_protected_last` must not be negative; got -1"),
        ({"decode_threshold": 1.5}, "`decode_threshold` must be between 0 and 1; got 1.5"),
        ({"target_sparsity": "0.3"}, "target_sparsity"),
    ],
)
def test_configurations(fields, message):
    with raises(message, StrictDataclassError):
        TokenRouterConfig(**fields)


def test_schedule_of_unknown_depth():
    with raises("`num_hidden_layers` must be known to spread `target_sparsity` over the blocks"):
        TokenRouterConfig().schedule  # noqa: B018


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_hidden_layers": 7}, "This router was made for a model of 7 blocks; this one has 4."),
        ({"sparsity_schedule": [0, 0.6], "target_sparsity": 0.3}, "one share for each of the 4 blocks; got 2"),
        ({"target_sparsity": 0.8}, "the most is 0.95 * 3 / 4 = 0.7125. Lower it, or protect fewer blocks."),
        ({"num_protected_first": 3, "num_protected_last": 1}, "with 4 of 4 blocks protected: the most is"),
    ],
)
def test_configurations_that_do_not_fit_the_model(fields, message):
    model = tiny_language_model()
    with raises(message):
        apply_token_router(model, TokenRouterConfig(**fields))
    assert not is_patched(model.model)


def test_full_checkpoints_check_their_router():
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}
    with raises("made for a model of 4 blocks; this one has 2"):
        TokenRouterLlamaForCausalLM(TokenRouterLlamaConfig(**shape, token_router={"num_hidden_layers": 4}))
    with raises("asks a learned router", StrictDataclassError):
        fields = {"router_type": "static", "selection": "threshold"}
        TokenRouterLlamaForCausalLM(TokenRouterLlamaConfig(**shape, token_router=fields))


def test_router_of_another_depth(tmp_path):
    TokenRouterModel(tiny_language_model(), TokenRouterConfig()).save_pretrained(tmp_path)
    with raises("This router was made for a model of 4 blocks; this one has 2. Load it on `its own base model`."):
        TokenRouterModel.from_pretrained(tiny_language_model(num_hidden_layers=2), tmp_path)
    with raises("does not say which model it belongs to. Give the base model first"):
        TokenRouterModel.from_pretrained(tmp_path)


def test_router_of_another_base_model(tmp_path, caplog):
    """A warning, once, and none for its own base."""
    logger = logging.getLogger("transformers")
    package = logging.getLogger("hf_effml")
    for folder, seed in (("first", 0), ("other", 1)):
        tiny_language_model(seed=seed).save_pretrained(tmp_path / folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    TokenRouterModel(base, TokenRouterConfig()).save_pretrained(tmp_path / "router")
    for each in (logger, package):
        each.addHandler(caplog.handler)
    try:
        TokenRouterModel.from_pretrained(tmp_path / "router")
        assert "trained on" not in caplog.text
        TokenRouterModel.from_pretrained(tmp_path / "other", tmp_path / "router")
    finally:
        for each in (logger, package):
            each.removeHandler(caplog.handler)
    messages = {
        record.getMessage() for record in caplog.records if "This router was trained on" in record.getMessage()
    }
    (message,) = messages
    assert f"trained on `{tmp_path / 'first'}` and is applied to `{tmp_path / 'other'}`" in message


def test_changes_of_a_configuration_are_checked():
    config = routed().model.token_routing_hook.config
    with raises("a mean of 0.1000, but `target_sparsity` is 0.4"):
        copy_config(config, sparsity_schedule=[0, 0.1, 0.2, 0.1])


# Inputs


@pytest.mark.parametrize(
    "mask, shape",
    [(torch.zeros(2, 1, 20, 20), "(2, 1, 20, 20)"), (torch.ones(2, 20, 20), "(2, 20, 20)"), ({}, "dict")],
    ids=["4D", "3D", "dictionary"],
)
def test_masks_of_another_shape(mask, shape):
    with raises(f"shape (batch, tokens) with routing; got {shape}. Packed sequences are not supported with routing"):
        routed()(IDS, attention_mask=mask)


def test_masks_of_another_length():
    with raises("must cover the 0 columns of the cache and the 20 new ones of 2 samples; got (2, 12)"):
        routed()(IDS, attention_mask=MASK[:, :12])


@pytest.mark.parametrize("cached", [False, True])
def test_packed_sequences(cached):
    """A dense model tells the texts apart by their positions; routed blocks would not."""
    model = routed()
    positions = torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1)
    more = {CACHE_ARGUMENT: DynamicCache()} if cached else {}
    with raises("Packed sequences are not supported with routing: `position_ids` restart"):
        model(IDS, position_ids=positions, **more)
    boundaries = torch.tensor([0, 12, 20])
    with raises("or `cu_seq_lens` were given. Pad the texts and pass an `attention_mask`."):
        model(IDS, cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries)
    with disable_routing(model), torch.no_grad():
        model(IDS, position_ids=positions)


def test_attention_outputs():
    message = "`output_attentions` is not supported with routing: blocks attend to different tokens. Use"
    model = routed("eager")
    with raises(message):
        model(IDS, output_attentions=True)
    with disable_routing(model), torch.no_grad():
        assert len(model(IDS, output_attentions=True).attentions) == 4
    model.config.output_attentions = True
    with raises(message):
        model(IDS)


def test_flex_attention():
    model = routed()
    model.config._attn_implementation = "flex_attention"
    with raises(
        'supports the attention implementations "sdpa", "eager" and flash attention; got "flex_attention". Call'
    ):
        model(IDS)


@pytest.mark.parametrize(
    "masks, found",
    [
        (torch.ones(3, 2, 20), "(3, 2, 20)"),
        (torch.ones(5, 2, 20), "(5, 2, 20)"),
        (torch.ones(4, 2, 7), "(4, 2, 7)"),
        (torch.ones(4, 1, 20), "(4, 1, 20)"),
        ({4: torch.ones(2, 20)}, "{4: (2, 20)}"),
        ({-1: torch.ones(2, 20)}, "{-1: (2, 20)}"),
        ({1: torch.ones(2, 20), 2: torch.ones(20)}, "{1: (2, 20), 2: (20,)}"),
    ],
)
def test_decisions_of_another_shape(masks, found):
    where = "must have the shape (4, 2, 20), or map some of the 4 blocks to masks of shape (2, 20)"
    with raises(f"`keep_mask` {where}; got {found}."):
        routed()(IDS, keep_mask=masks)


def test_no_decisions_to_replay():
    """Every block is dense."""
    with torch.no_grad():
        assert torch.equal(routed()(IDS, keep_mask={}).logits, tiny_language_model()(IDS).logits)


def test_generated_tokens_of_another_shape():
    with raises("`generated` must have the shape (2, 20); got (2, 7)."):
        routed()(IDS, generated=torch.ones(2, 7, dtype=torch.bool))


def test_report_of_nothing():
    for model in (tiny_language_model(), routed()):
        with raises("Nothing has been routed yet. Run the model on a prompt first.", RuntimeError):
            make_routing_report(model)


# Caches


def filled(model):
    options = {"attention_mask": MASK, "max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(IDS, **options)[CACHE_ARGUMENT]


def test_a_routed_cache_and_a_dense_run():
    message = (
        "This cache was filled by a model that skips tokens, so its blocks hold different tokens, and a dense run"
    )
    model = routed()
    cache = filled(model)
    mask = torch.cat([MASK, torch.ones(2, 2)], 1)
    with raises(message), disable_routing(model):
        model(IDS[:, :1], attention_mask=mask, **{CACHE_ARGUMENT: cache})
    cache = filled(model)
    remove_token_router(model)
    with raises(message):
        model(IDS[:, :1], attention_mask=mask, **{CACHE_ARGUMENT: cache})


@pytest.mark.parametrize("policy", [{"kv_policy": "keep"}, {"skip_unit": "mlp"}])
def test_a_dense_cache_of_a_routed_run(policy):
    """All keys are there, so a dense run may go on."""
    model = routed(**policy)
    cache = filled(model)
    with disable_routing(model), torch.no_grad():
        mask = torch.cat([MASK, torch.ones(2, 2)], 1)
        assert model(IDS[:, :1], attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits.isfinite().all()


@pytest.mark.parametrize("more", [{}, {"keep_mask": torch.ones(4, 1, 1)}])
def test_caches_of_another_batch_size(more):
    model = routed()
    with raises("The cache holds 2 samples, the inputs 1. Start with a new cache, or select samples with"):
        model(IDS[:1, :1], **{CACHE_ARGUMENT: filled(model)}, **more)


def test_static_caches():
    message = "needs a `DynamicCache`, whose blocks can hold different numbers of tokens; got a `StaticCache`. Pass"
    model = routed()
    with raises(message):
        model(IDS, attention_mask=MASK, **{CACHE_ARGUMENT: StaticCache(config=model.config, max_cache_len=40)})
    with raises(message):
        model.generate(IDS, attention_mask=MASK, max_new_tokens=2, cache_implementation="static")


def test_other_caches():
    """Quantized ones among them, which need a package of their own to be made."""
    model = routed()
    quantized = type("QuantizedCache", (DynamicCache,), {})()
    with raises('got a `QuantizedCache`. Pass `cache_implementation="dynamic"` to `generate`.'):
        model(IDS, attention_mask=MASK, **{CACHE_ARGUMENT: quantized})
    cache = DynamicCache(config=model.config)
    cache.layers[2] = type("QuantoQuantizedLayer", (DynamicLayer,), {})()
    with raises("cannot skip tokens in a `QuantoQuantizedLayer`, which block 2 has as its cache; supported is"):
        model(IDS, attention_mask=MASK, **{CACHE_ARGUMENT: cache})


# Not errors


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize(
    "fields",
    [
        {"router_type": "static"},
        {"router_type": "random"},
        {"router_type": "one_pass"},
        {"router_type": "dynamic"},
        {"router_type": "one_pass", "selection": "threshold"},
        {"router_type": "dynamic", "selection": "threshold"},
        {"router_type": "dynamic", "kv_policy": "keep"},
        {"router_type": "dynamic", "skip_unit": "mlp"},
    ],
    ids=lambda fields: "-".join(fields.values()),
)
def test_broken_hidden_states_break_nothing_else(fields, value):
    """The first sample is lost, the second one is what it is without it."""
    model = routed(**fields)
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = value
        ids = IDS.clone()
        ids[ids == 60] = 59
        wanted = model(ids, attention_mask=MASK).logits[1, 6:]
        ids[0, 5] = 60
        found = model(ids, attention_mask=MASK).logits
    assert found[0].isnan().any()
    torch.testing.assert_close(found[1, 6:], wanted)
    if fields.get("selection") != "threshold":
        assert make_routing_report(model).kept_counts.tolist() == [[20, 14], *[[10, 7]] * 3]
    model.generate(ids, attention_mask=MASK, max_new_tokens=3, do_sample=False)
    model.train()(ids, attention_mask=MASK)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("router_type", ["static", "one_pass", "dynamic"])
def test_samples_without_any_token(kernel, router_type):
    model = routed(kernel, router_type=router_type)
    mask = MASK * torch.tensor([[1], [0]])
    with torch.no_grad():
        wanted = model(IDS[:1]).logits
        torch.testing.assert_close(model(IDS, attention_mask=mask).logits[:1], wanted, rtol=1e-5, atol=1e-5)
        model(IDS, attention_mask=torch.zeros_like(MASK))


@pytest.mark.parametrize("router_type", ["static", "random", "one_pass", "dynamic"])
def test_single_tokens(router_type):
    with torch.no_grad():
        found = routed(router_type=router_type)(IDS[:, :1]).logits
        torch.testing.assert_close(found, tiny_language_model()(IDS[:, :1]).logits)
