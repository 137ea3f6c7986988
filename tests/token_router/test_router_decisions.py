"""Decisions of whole models: from the right scores, the same alone and in a batch, and none for short calls."""

import pytest
import torch
from transformers import DynamicCache

from helpers import assert_close, texts, tiny_language_model
from hf_effml import TokenRouter, TokenRouterConfig, TokenRouterModel, apply_token_router
from hf_effml.token_router.patching import copy_config, make_routing_report
from hf_effml.token_router.routing import (
    attention_scores_reference,
    kept_count,
    router_factors,
    select_budget,
    select_threshold,
    update_table,
)
from hf_effml.token_router.routing_state import RoutingState
from hf_effml.token_router.token_skip_layer import CACHE_ARGUMENT
from routing_reference import POLICIES, slow_run


SCHEDULE = [0.0, 0.5, 0.2, 0.7]
every_policy = pytest.mark.parametrize("policy", POLICIES)
learned = pytest.mark.parametrize("router_type", ["one_pass", "dynamic"])


def routed(family="Llama", kernel="sdpa", **fields):
    """With a router whose weights are random, so that all of its factors matter."""
    fields = {"sparsity_schedule": SCHEDULE, "target_sparsity": 0.35, "min_tokens": 0} | fields
    model = tiny_language_model(family, attn_implementation=kernel)
    model = apply_token_router(model, TokenRouterConfig(**fields))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.model.token_router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def decisions(model, ids, mask=None, **more):
    model(ids, attention_mask=mask, **more)
    return make_routing_report(model).keep_masks


@torch.no_grad()
def slow_decisions(model, ids, mask, config):
    """Block after block from the attention of a slow run under the decisions so far; masks and scores."""
    real, lengths = mask.bool(), mask.sum(-1).tolist()
    policy = {"kv_policy": config.kv_policy, "skip_unit": config.skip_unit}
    keep, table, scores = real.repeat(4, 1, 1), torch.zeros(real.shape), []
    newest = real.flip(-1).cumsum(-1).flip(-1)
    forced = real & ((real.cumsum(-1) <= config.always_keep_first) | (newest <= config.always_keep_last))
    for block in range(4):
        if config.schedule[block] > 0:
            factors = router_factors(table, real, [config.schedule[block]], config.normalize_scores)[0]
            logits = model.model.token_router(factors)
            if config.selection == "threshold":
                keep[block] = select_threshold(logits, real) | forced
            else:
                counts = [kept_count(tokens, config.schedule[block], 2) for tokens in lengths]
                priority = (logits[..., 1] - logits[..., 0]).masked_fill(forced, torch.inf)
                keep[block] = select_budget(priority, real, torch.tensor(counts))
        attention = slow_run(model, ids, keep, real, **policy, blocks=block + 1).attention[block]
        took_part = real if config.skip_unit == "mlp" else keep[block]
        scores.append(attention_scores_reference(attention, took_part, config.score_mode, config.score_window))
        if config.router_type == "dynamic" or block == 0:
            table = update_table(table, scores[-1], keep[block])
    return keep, scores


@pytest.fixture
def given_scores(monkeypatch):
    """The scores that blocks hand in."""
    scores = {}
    add_score = RoutingState.add_score

    def note(state, block, values):
        scores[block] = values
        add_score(state, block, values)

    monkeypatch.setattr(RoutingState, "add_score", note)
    return scores


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma"])
@pytest.mark.parametrize("score_mode", ["mean", "last", "window"])
def test_scores_of_a_dense_block(family, score_mode, kernel, given_scores):
    """Held against the attention that the model itself returns."""
    ids, mask = texts(3, 20, (0, 4, 11))
    plain = tiny_language_model(family, attn_implementation="eager")
    attention = plain(ids, attention_mask=mask, output_attentions=True).attentions[0]
    attention = attention * mask[:, None, None]
    model = routed(family, kernel, score_mode=score_mode, score_window=5)
    decisions(model, ids, mask)
    wanted = attention_scores_reference(attention, mask.bool(), score_mode, 5).detach()
    assert given_scores.keys() == {0}
    assert_close(given_scores[0] * mask, wanted, 1e-5)


@learned
@every_policy
@pytest.mark.parametrize("score_mode", ["mean", "last", "window"])
def test_decisions_and_scores(router_type, policy, score_mode, given_scores):
    ids, mask = texts(3, 24, (0, 3, 14))
    fields = {"router_type": router_type, "score_mode": score_mode, "score_window": 5, **POLICIES[policy]}
    others = [{"normalize_scores": True}, {"selection": "threshold"}] if score_mode == "window" else []
    for more in ({}, *others):
        given_scores.clear()
        model = routed(**fields, **more)
        keep = decisions(model, ids, mask)
        wanted, scores = slow_decisions(model, ids, mask, model.model.token_routing_hook.config)
        assert torch.equal(keep, wanted)
        assert (~keep & mask.bool()).any(-1)[1:].all(), "every sample skips in every routed block"
        assert given_scores.keys() == ({0} if router_type == "one_pass" else {0, 1, 2})
        for block, found in given_scores.items():
            took_part = mask.bool() if policy == "mlp" else keep[block]
            assert_close(found * took_part, scores[block] * took_part, 1e-5)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral", "Qwen3Moe", "Gemma"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_decisions_of_other_families(family, kernel):
    ids, mask = texts(3, 24, (0, 3, 14))
    model = routed(family, kernel, router_type="dynamic")
    wanted, _ = slow_decisions(model, ids, mask, model.model.token_routing_hook.config)
    assert torch.equal(decisions(model, ids, mask), wanted)


def test_scores_of_all_queries_are_summed_in_pieces(monkeypatch, given_scores):
    ids, mask = texts(2, 50, (0, 9))
    model = routed(score_mode="mean")
    decisions(model, ids, mask)
    whole = given_scores[0]
    monkeypatch.setattr("hf_effml.token_router.token_skip_layer._QUERY_CHUNK", 7)
    decisions(model, ids, mask)
    assert_close(given_scores[0], whole, 1e-6)


@learned
@every_policy
def test_scores_of_a_second_chunk(router_type, policy, given_scores):
    """Queries of the chunk look at all that is in the cache; its own columns get the scores."""
    ids, mask = texts(3, 26, (0, 4, 13))
    model = routed(router_type=router_type, score_window=5, **POLICIES[policy])
    cache = DynamicCache(config=model.config)
    first = decisions(model, ids[:, :12], mask[:, :12], **{CACHE_ARGUMENT: cache})
    given_scores.clear()
    second = decisions(model, ids[:, 12:], mask, **{CACHE_ARGUMENT: cache})
    keep = torch.cat([first, second], -1)
    attention = slow_run(model, ids, keep, mask.bool(), **POLICIES[policy]).attention
    assert given_scores.keys() == ({0} if router_type == "one_pass" else {0, 1, 2})
    for block, found in given_scores.items():
        took_part = mask.bool() if policy == "mlp" else keep[block]
        took_part = took_part & (torch.arange(26) >= 12)
        wanted = attention_scores_reference(attention[block], took_part, "window", 5)[:, 12:]
        assert_close(found * took_part[:, 12:], wanted * took_part[:, 12:], 1e-5)


# Batches


@pytest.mark.parametrize(
    "router_type, selection",
    [("static", "budget"), *((kind, how) for kind in ("one_pass", "dynamic") for how in ("budget", "threshold"))],
)
@every_policy
def test_a_sample_is_routed_alike_alone_and_in_a_batch(router_type, selection, policy):
    model = routed(router_type=router_type, selection=selection, **POLICIES[policy])
    padding = (0, 9, 17)
    ids, mask = texts(3, 30, padding)
    together = decisions(model, ids, mask)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for sample, columns in enumerate(padding):
        alone = ids[sample : sample + 1, columns:]
        assert torch.equal(decisions(model, alone)[:, 0], together[:, sample, columns:])
        again = model.generate(alone, attention_mask=torch.ones_like(alone), max_new_tokens=6, do_sample=False)
        assert torch.equal(again[0], tokens[sample, columns:])


@pytest.mark.parametrize("router_type", ["static", "one_pass", "dynamic"])
@every_policy
def test_the_amount_of_padding_changes_nothing(router_type, policy):
    model = routed(router_type=router_type, **POLICIES[policy])
    ids, mask = texts(2, 24, (0, 5))
    wide_ids, wide_mask = (torch.cat([torch.zeros(2, 17, dtype=torch.long), part], 1) for part in (ids, mask))
    keep, wide_keep = decisions(model, ids, mask), decisions(model, wide_ids, wide_mask)
    assert torch.equal(wide_keep[..., 17:], keep) and not wide_keep[..., :17].any()
    with torch.no_grad():
        logits, wide = model(ids, attention_mask=mask).logits, model(wide_ids, attention_mask=wide_mask).logits
    assert_close(wide[:, 17:] * mask[..., None], logits * mask[..., None], 1e-5)


def test_right_padding():
    model = routed(router_type="dynamic")
    ids, mask = texts(2, 24, (0, 8))
    left = decisions(model, ids, mask)
    rolled = torch.stack([ids[0], ids[1].roll(-8)]), torch.stack([mask[0], mask[1].roll(-8)])
    right = decisions(model, *rolled)
    assert torch.equal(right[:, 1, :16], left[:, 1, 8:]) and not right[:, 1, 16:].any()


@pytest.mark.parametrize("router_type", ["static", "random", "one_pass", "dynamic"])
def test_embeddings_as_inputs(router_type):
    model = routed(router_type=router_type)
    ids, mask = texts(2, 24, (0, 8))
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
        found = model(inputs_embeds=model.model.embed_tokens(ids), attention_mask=mask).logits
    assert torch.equal(found, wanted)


# Reports, and what a call may change


@pytest.mark.parametrize("router_type", ["static", "random", "one_pass", "dynamic"])
@every_policy
def test_reported_decisions_can_be_replayed(router_type, policy):
    model = routed(router_type=router_type, **POLICIES[policy])
    ids, mask = texts(3, 24, (0, 8, 2))
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
        report = make_routing_report(model)
        masks = dict(enumerate(report.keep_masks))
        for replayed in (report.keep_masks, masks, {block: masks[block] for block in (1, 2, 3)}):
            assert_close(model(ids, attention_mask=mask, keep_mask=replayed).logits, wanted)
        slow = slow_run(model, ids, report.keep_masks, mask, **POLICIES[policy])
    assert_close(wanted * mask[..., None], slow.logits, 1e-5)


def test_report():
    model = TokenRouterModel(tiny_language_model(), TokenRouterConfig(target_sparsity=0.3, min_tokens=0))
    ids, mask = texts(2, 20, (0, 10))
    with pytest.raises(RuntimeError, match="Nothing has been routed yet"):
        model.routing_report  # noqa: B018
    model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    report = model.routing_report
    assert report.keep_masks.shape == (4, 2, 20), "generated tokens are no prompt"
    assert report.kept_counts.tolist() == [[20, 10], [12, 6], [12, 6], [12, 6]]
    assert report.kept_per_block == [15.0, 9.0, 9.0, 9.0]
    assert report.required_sparsity == [0.0, 0.4, 0.4, 0.4]
    assert report.sparsity_per_block == pytest.approx([0.0, 0.4, 0.4, 0.4])
    assert report.sparsity == pytest.approx(0.3)
    # Two tensors of two heads of 8 float32 numbers.
    assert (report.kv_bytes, report.dense_kv_bytes) == (2 * 16 * 4 * 84, 2 * 16 * 4 * 120)
    linear, attention = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48, 32
    dense = 4 * (30 * linear + (400 + 100) * attention)
    work = 30 * linear + 500 * attention + 3 * (18 * linear + (144 + 36) * attention)
    assert report.flop_ratio == pytest.approx(work / dense)
    assert str(report) == f"30.0% skipped, {work / dense:.1%} of the work, 70.0% of the cache"


def test_report_of_other_policies():
    """Keys and values are dense; one skips queries and MLPs, the other MLPs."""
    ids, _ = texts(2, 20)
    key, query, mlp, attention = 2 * 32 * 16, 2 * 32 * 32, 3 * 32 * 48, 32
    dense = 4 * (20 * (key + query + mlp) + 400 * attention)
    works = {
        "keep": dense / 4 + 3 * (20 * key + 12 * (query + mlp) + 240 * attention),
        "mlp": dense - 3 * 8 * mlp,
    }
    for policy, work in works.items():
        model = routed(sparsity_schedule=None, target_sparsity=0.3, **POLICIES[policy])
        decisions(model, ids)
        report = make_routing_report(model)
        assert report.kv_bytes == report.dense_kv_bytes == 2 * 16 * 4 * 160
        assert report.flop_ratio == pytest.approx(work / dense)


def test_report_of_experts():
    """Each token visits two of the four."""
    model = routed("Qwen3Moe", sparsity_schedule=None, target_sparsity=0.3, skip_unit="mlp")
    decisions(model, texts(1, 20)[0])
    linear, mlp = 2 * 32 * 32 + 2 * 32 * 16, 2 * 3 * 32 * 16
    dense = 4 * (20 * (linear + mlp) + 400 * 32)
    assert make_routing_report(model).flop_ratio == pytest.approx((dense - 3 * 8 * mlp) / dense)


def test_another_configuration_for_one_call():
    model = routed()
    config = model.model.token_routing_hook.config
    ids, _ = texts(1, 20)
    other = copy_config(config, router_type="static", sparsity_schedule=[0.0, 0.0, 0.0, 0.8], target_sparsity=0.2)
    before = decisions(model, ids)
    assert decisions(model, ids, token_router_config=other).sum(-1).flatten().tolist() == [20, 20, 20, 4]
    assert torch.equal(decisions(model, ids), before)
    assert config.router_type == "one_pass" and config.sparsity_schedule == SCHEDULE
    config.router_type = "static"
    assert not torch.equal(decisions(model, ids), before), "a change of the configuration takes effect"


@pytest.mark.parametrize("router_type", ["static", "one_pass", "dynamic"])
@every_policy
def test_as_generated(router_type, policy):
    """A continuation of any length follows the decode policy: alone on a cache, or behind its prompt in one call."""
    model = routed(router_type=router_type, decode_policy="threshold", **POLICIES[policy])
    ids, mask = texts(2, 30, (0, 7))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(ids[:, :20], attention_mask=mask[:, :20], **{CACHE_ARGUMENT: cache}).logits
        keep = make_routing_report(model).keep_masks
        rest = model(ids[:, 20:], attention_mask=mask, as_generated=True, **{CACHE_ARGUMENT: cache}).logits
        assert make_routing_report(model).keep_masks.shape[-1] == 20
        follows = torch.tensor([True, True, True, False])[:, None, None].expand(4, 2, 10)
        both = torch.cat([keep, follows], -1)
        wanted = slow_run(model, ids, both, mask, **POLICIES[policy]).logits
        assert_close(torch.cat([first, rest], 1) * mask[..., None], wanted, 1e-5)
        generated = (torch.arange(30) >= 20).expand(2, -1)
        at_once = model(ids, attention_mask=mask, generated=generated).logits
    assert_close(at_once * mask[..., None], wanted, 1e-5)


def test_fresh_routers_are_alike_whatever_the_model():
    """The rule that a router starts from does not depend on the seed; only its idle units do."""
    first, other = TokenRouter(), TokenRouter()
    assert not torch.equal(first.fc1.weight, other.fc1.weight)
    factors = torch.rand(50, 4)
    assert torch.equal(first(factors), other(factors))
