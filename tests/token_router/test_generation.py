"""`generate` in all its modes, held against the slow reference: run by `generate` itself, or call by call."""

import copy

import pytest
import torch
from transformers import DynamicCache, pipeline
from transformers.modeling_outputs import CausalLMOutputWithPast

from helpers import assert_close, texts, tiny_language_model, tiny_tokenizer
from hf_effml import TokenRouterConfig, TokenRouterModel, apply_token_router
from hf_effml.token_router.patching import make_routing_report
from hf_effml.token_router.token_skip_layer import CACHE_ARGUMENT
from routing_reference import POLICIES, Recorder, decode_decisions, slow_run


# Block 3 is over the threshold of generated tokens.
SCHEDULE = [0.0, 0.5, 0.2, 0.7]
every_router = pytest.mark.parametrize("router_type", ["static", "one_pass", "dynamic"])
every_policy = pytest.mark.parametrize("policy", POLICIES)


def routed(family="Llama", kernel="sdpa", **fields):
    fields = {"sparsity_schedule": SCHEDULE, "target_sparsity": 0.35, "min_tokens": 0} | fields
    model = tiny_language_model(family, attn_implementation=kernel)
    return apply_token_router(model, TokenRouterConfig(**fields))


def slow_twin(known, config, family="Llama"):
    """A model whose `generate` runs the reference on all columns at every step.

    `known` are the decisions about its first columns; those that follow are generated tokens.
    """
    policy = {"kv_policy": config.kv_policy, "skip_unit": config.skip_unit}

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        masks = known.repeat_interleave(len(input_ids) // known.shape[1], 1)
        new = torch.ones(len(input_ids), input_ids.shape[1] - masks.shape[-1])
        keep = torch.cat([masks, decode_decisions(config, new)], -1)
        return CausalLMOutputWithPast(
            logits=slow_run(self, input_ids, keep, attention_mask, position_ids, **policy).logits
        )

    twin = tiny_language_model(family)
    twin.__class__ = type("SlowTwin", (type(twin),), {"forward": forward})
    return twin


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.7},
    "beams": {"do_sample": False, "output_scores": True, "num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize(
    "mode, router_type",
    [
        *(("greedy", kind) for kind in ("static", "one_pass", "dynamic")),
        ("sampling", "one_pass"),
        ("beams", "dynamic"),
    ],
)
@every_policy
def test_generate(mode, router_type, policy):
    model = routed(router_type=router_type, **POLICIES[policy])
    ids, mask = texts(2, 20, (0, 9))
    options = {"attention_mask": mask, "max_new_tokens": 6, "return_dict_in_generate": True, **MODES[mode]}
    torch.manual_seed(7)
    found = model.generate(ids, **options)
    report = make_routing_report(model)
    known = report.keep_masks[:, :: 3 if mode == "beams" else 1]
    assert known.shape == (4, 2, 20) and (~known & mask.bool()).any(-1)[1:].all()
    twin = slow_twin(known, model.model.token_routing_hook.config)
    torch.manual_seed(7)
    wanted = twin.generate(ids, use_cache=False, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    if mode == "beams":
        assert_close(found.sequences_scores, wanted.sequences_scores, 1e-5)
    if mode == "sampling":
        torch.manual_seed(8)
        assert not torch.equal(model.generate(ids, **options).sequences, found.sequences)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral", "Qwen3Moe", "Gemma"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_other_families(family, kernel):
    model = routed(family, kernel, router_type="dynamic")
    ids, mask = texts(2, 20, (0, 9))
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    found = model.generate(ids, **options)
    known = make_routing_report(model).keep_masks
    twin = slow_twin(known, model.model.token_routing_hook.config, family)
    assert torch.equal(found, twin.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("fields", [{}, {"decode_threshold": 0.1}, {"decode_threshold": 1.0}])
def test_decode_policies(fields):
    ids, mask = texts(2, 20, (0, 6))
    model = routed(**fields, **({"decode_policy": "threshold"} if fields else {}))
    cache, options = (
        DynamicCache(config=model.config),
        {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False},
    )
    found = model.generate(ids, **options, **{CACHE_ARGUMENT: cache})
    config, known = model.model.token_routing_hook.config, make_routing_report(model).keep_masks
    wanted = slow_twin(known, config).generate(ids, use_cache=False, **options)
    assert torch.equal(found, wanted)
    # The last token is not fed any more.
    assert cache.get_seq_length() == 25
    new = decode_decisions(config, torch.ones(1, 5)).sum((1, 2)).tolist()
    assert [layer.keys.shape[2] for layer in cache.layers] == [
        kept + more for kept, more in zip(known[:, 0].sum(-1).tolist(), new, strict=True)
    ]
    assert sum(new) == (5 if fields.get("decode_threshold") == 0.1 else 20)


@pytest.mark.parametrize("router_type, min_tokens", [("static", 0), ("dynamic", 0), ("one_pass", 8)])
@every_policy
def test_prompt_lookup(router_type, policy, min_tokens):
    """Rejected drafts are cropped from the cache. Long ones are routed like a prompt if they may be."""
    model = routed(router_type=router_type, min_tokens=min_tokens, **POLICIES[policy])
    ids = torch.arange(5, 11).repeat(4).unsqueeze(0)
    recorder = Recorder(model)
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4)
    news = [call["hidden"].shape[1] for call in recorder.calls]
    assert max(news[1:]) > 1, "some call had drafts"
    assert recorder.worst_difference(**POLICIES[policy]) < 1e-4
    # Every token that was put out is the best one after those before it.
    put_out = tokens[0, ids.shape[1] :].tolist()
    for call in recorder.calls:
        length = call["ids"].shape[1]
        logits = slow_run(model, call["ids"], call["keep"], call["real"], call["positions"], **POLICIES[policy]).logits
        best = logits.argmax(-1)[0]
        for column in range(length - call["hidden"].shape[1], length):
            agrees = column + 1 < tokens.shape[1] and torch.equal(
                call["ids"][0, : column + 1], tokens[0, : column + 1]
            )
            if agrees and column + 1 >= ids.shape[1]:
                assert best[column] == put_out[column + 1 - ids.shape[1]]


def test_prompt_lookup_equals_greedy_where_drafts_are_generated_tokens():
    """The first call routes prompt and drafts together, so the prompt gives none here."""
    model = routed(min_tokens=16)
    ids = torch.arange(5, 25).unsqueeze(0)
    options = {"max_new_tokens": 40, "do_sample": False}
    calls = Recorder(model).calls
    found = model.generate(ids, prompt_lookup_num_tokens=3, **options)
    assert max(call["hidden"].shape[1] for call in calls[1:]) > 1
    assert torch.equal(found, model.generate(ids, **options))


def test_assisted_generation():
    """A dense draft model, and a routed one."""
    model, ids = routed(min_tokens=16), texts(1, 20)[0]
    options = {"max_new_tokens": 10, "do_sample": False}
    wanted = model.generate(ids, **options)
    recorder = Recorder(model)
    for draft in (tiny_language_model(), routed(min_tokens=16)):
        recorder.calls.clear()
        draft.generation_config.num_assistant_tokens = 3
        found = model.generate(ids, assistant_model=draft, **options)
        assert found.shape == wanted.shape
        assert recorder.worst_difference() < 1e-4


@every_router
@every_policy
def test_chunked_prefill(router_type, policy):
    model = routed(router_type=router_type, **POLICIES[policy])
    ids, mask = texts(2, 23, (0, 12))
    recorder = Recorder(model)
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    found = model.generate(ids, prefill_chunk_size=10, **options)
    assert [call["hidden"].shape[1] for call in recorder.calls] == [10, 10, 3, 1, 1]
    assert recorder.worst_difference(**POLICIES[policy]) < 1e-4
    known = recorder.calls[2]["keep"]
    twin = slow_twin(known, model.model.token_routing_hook.config)
    assert torch.equal(found, twin.generate(ids, use_cache=False, **options))


@every_router
@every_policy
def test_conversation(router_type, policy):
    """A second turn on the cache of the first; a copy of the cache leads another conversation."""
    model = routed(router_type=router_type, **POLICIES[policy])
    ids, mask = texts(2, 16, (0, 6))
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(ids, attention_mask=mask, **options)
    cache = first[CACHE_ARGUMENT]
    assert cache.get_seq_length() == 19
    config, known = model.model.token_routing_hook.config, make_routing_report(model).keep_masks
    for seed, own in ((1, copy.deepcopy(cache)), (2, cache)):
        said = torch.cat([first.sequences, texts(2, 9, seed=seed)[0]], 1)
        longer = torch.cat([mask, torch.ones(2, 13, dtype=torch.long)], 1)
        found = model.generate(said, attention_mask=longer, **options, **{CACHE_ARGUMENT: own}).sequences
        # The last token of the first turn opens the chunk of the second.
        chunk = make_routing_report(model).keep_masks
        assert chunk.shape[-1] == 10
        masks = torch.cat([known, decode_decisions(config, torch.ones(2, 3)), chunk], -1)
        wanted = slow_twin(masks, config).generate(said, attention_mask=longer, use_cache=False, **options).sequences
        assert torch.equal(found, wanted)
        assert own.get_seq_length() == 32


@every_router
def test_without_cache(router_type):
    """Every step routes the whole text anew."""
    model = routed(router_type=router_type)
    ids, mask = texts(2, 16, (0, 6))
    found = model.generate(ids, attention_mask=mask, use_cache=False, max_new_tokens=4, do_sample=False)
    for _ in range(4):
        with torch.no_grad():
            model(ids, attention_mask=mask, use_cache=False)
        keep = make_routing_report(model).keep_masks
        best = slow_run(model, ids, keep, mask).logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, best], 1), torch.cat([mask, torch.ones_like(best)], 1)
    assert torch.equal(found, ids)


def test_prompts_that_are_too_short_run_dense():
    """And so does everything that follows, where the decode policy skips nothing."""
    ids, mask = texts(2, 16, (0, 6))
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    model = routed(min_tokens=17, decode_policy="keep")
    assert torch.equal(model.generate(ids, **options), tiny_language_model().generate(ids, **options))


def test_wrapper_generates_alike():
    ids, mask = texts(2, 16, (0, 6))
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    wrapped = TokenRouterModel(routed())
    assert wrapped.generation_config is wrapped.model.generation_config
    assert torch.equal(wrapped.generate(ids, **options), routed().generate(ids, **options))
    with wrapped.disable_routing():
        assert torch.equal(wrapped.generate(ids, **options), tiny_language_model().generate(ids, **options))


def test_pipeline():
    """Takes the wrapper for a language model, and so does everything that asks `can_generate`."""
    model = TokenRouterModel(tiny_language_model(vocab_size=258), TokenRouterConfig(min_tokens=0))
    tokenizer = tiny_tokenizer(pad_token="<pad>")
    prompt = "The quick brown fox"
    (found,) = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        prompt, max_new_tokens=5, do_sample=False, return_tensors=True
    )
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    wanted = model.model.generate(ids, max_new_tokens=5, do_sample=False)
    assert found["generated_token_ids"] == wanted[0].tolist()
    assert model.routing_report.sparsity > 0.2


def test_bfloat16_generation_runs():
    ids, mask = texts(2, 24, (0, 6))
    model = routed(router_type="dynamic").to(torch.bfloat16)
    recorder = Recorder(model)
    model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, num_beams=1)
    assert all(call["hidden"].isfinite().all() for call in recorder.calls)
    assert recorder.worst_difference() < 0.5
