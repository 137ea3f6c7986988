"""Selection, factors and the router as functions of tensors."""

import pytest
import torch

from hf_effml import TokenRouter, TokenRouterConfig
from hf_effml.token_router.routing import (
    kept_count,
    rank_scores,
    router_factors,
    select_budget,
    select_threshold,
    static_priority,
)
from hf_effml.token_router.routing_state import KeepPlan, RoutingState


def random_real(batch, tokens, seed=0, shortest=1):
    """Left-padded samples of `shortest` to `tokens` tokens."""
    lengths = torch.randint(shortest, tokens + 1, (batch, 1), generator=torch.Generator().manual_seed(seed))
    return torch.arange(tokens) >= tokens - lengths


def state(real, router=None, **fields):
    """A routing state of a prompt whose block 0 gave these scores."""
    past = {name: fields.pop(name) for name in ("past", "past_real") if name in fields}
    config = TokenRouterConfig(**({"num_hidden_layers": 4, "min_tokens": 0} | fields))
    return RoutingState(config, router or TokenRouter(), real, real.sum(-1).tolist(), **past)


def masks_of(routing, scores):
    if routing.config.is_learned:
        for block in range(3):
            routing.plan_for(block)
            if routing.wants_score(block):
                routing.add_score(block, scores)
        routing.plan_for(3)
    return routing.keep_masks()


@pytest.mark.parametrize("tokens", [1, 2, 63])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.95])
def test_kept_count(tokens, sparsity):
    kept = kept_count(tokens, sparsity)
    assert 1 <= kept <= tokens
    assert abs(tokens - kept - sparsity * tokens) < 1
    assert kept_count(tokens, sparsity, at_least=2) == max(kept, min(2, tokens))


def test_kept_count_rounds_as_written():
    """0.29 * 100 is less than 29 in binary, and still 29 tokens skip."""
    assert int(0.29 * 100) == 28
    assert [kept_count(100, share) for share in (0.1, 0.29, 0.57, 0.298)] == [90, 71, 43, 71]


@pytest.mark.parametrize("seed", range(3))
def test_budget_is_exact_nested_and_ignores_padding(seed):
    real = random_real(5, 31, seed)
    # Coarse values, so that many of them tie.
    priority = torch.randint(0, 5, real.shape).float()
    before = real
    for sparsity in (0.0, 0.2, 0.5, 0.8, 0.95):
        counts = torch.tensor([kept_count(tokens, sparsity) for tokens in real.sum(-1).tolist()])
        keep = select_budget(priority, real, counts)
        assert torch.equal(keep.sum(-1), counts)
        assert not (keep & ~before).any()
        for sample in range(5):
            kept, others = priority[sample][keep[sample]], priority[sample][real[sample] & ~keep[sample]]
            assert others.numel() == 0 or kept.min() >= others.max()
            ties = keep[sample][real[sample] & (priority[sample] == kept.min())]
            assert (ties.int().diff() <= 0).all(), "ties go to the earlier token"
        before = keep


def test_budget_survives_nan():
    real = torch.tensor([[False, True, True, True]])
    priority = torch.full((1, 4), torch.nan)
    assert select_budget(priority, real, torch.tensor([2])).tolist() == [[False, True, True, False]]


def test_threshold():
    logits = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [torch.nan, torch.nan]]])
    real = torch.tensor([[True, True, True, False, True]])
    assert select_threshold(logits, real).tolist() == [[True, False, False, False, False]]


def test_factors_of_a_single_token():
    factors = router_factors(torch.tensor([[0.0, 0.25]]), torch.tensor([[False, True]]), [0.3], normalize_scores=True)
    assert factors.tolist() == [[[[0.0] * 4, [0.0, 0.25, 0.0, pytest.approx(0.3)]]]]


def test_normalized_scores():
    real = random_real(3, 9)
    table = torch.rand(3, 9)
    plain, normalized = (router_factors(table, real, [0.3], flag) for flag in (False, True))
    lengths = real.sum(-1, keepdim=True)
    assert torch.equal(normalized[..., 1], plain[..., 1] * lengths)
    assert torch.equal(normalized[..., [0, 2, 3]], plain[..., [0, 2, 3]])


def test_factors_do_not_depend_on_padding():
    table = torch.rand(2, 12)
    real = torch.ones(2, 12, dtype=torch.bool)
    padded = router_factors(torch.cat([torch.rand(2, 17), table], 1), torch.cat([~real, ~real[:, :5], real], 1), [0.3])
    assert torch.equal(padded[:, :, 17:], router_factors(table, real, [0.3]))
    assert (padded[:, :, :17] == 0).all()


def test_bfloat16_scores_tie_to_the_earlier_token():
    table = torch.linspace(0.5, 0.501, 8).flip(0).unsqueeze(0).to(torch.bfloat16)
    assert len(table.unique()) < 8
    assert rank_scores(table, torch.ones(1, 8, dtype=torch.bool)).tolist() == [list(range(8))]


# The router


def test_parameters():
    router = TokenRouter()
    assert sum(parameter.numel() for parameter in router.parameters()) == 450
    shapes = {name: tuple(value.shape) for name, value in router.state_dict().items()}
    assert shapes == {"fc1.weight": (64, 4), "fc1.bias": (64,), "fc2.weight": (2, 64), "fc2.bias": (2,)}


@pytest.mark.parametrize("router_type", ["one_pass", "dynamic"])
@pytest.mark.parametrize("hidden", [2, 64])
def test_a_fresh_router_follows_the_static_rule(router_type, hidden):
    """It keeps exactly what the static router keeps, whatever the scores, where there is room for two tokens."""
    real = random_real(6, 40, shortest=10)
    for target in (0.1, 0.3, 0.6):
        learned = state(real, TokenRouter(hidden), router_type=router_type, target_sparsity=target)
        static = state(real, router_type="static", target_sparsity=target)
        assert torch.equal(masks_of(learned, torch.rand(real.shape)), masks_of(static, None))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
def test_a_quantised_router_is_heard():
    router, factors = TokenRouter(), torch.rand(2, 9, 4)
    small = torch.ao.quantization.quantize_dynamic(router, {torch.nn.Linear}, dtype=torch.qint8)
    heard = []
    for layer in (small.fc1, small.fc2):
        layer.register_forward_hook(lambda layer, *_: heard.append(layer))
    assert (small(factors) - router(factors)).abs().max() < 0.1 and heard == [small.fc1, small.fc2]


def test_a_fresh_router_thresholds_near_its_budget():
    real = torch.ones(1, 200, dtype=torch.bool)
    keep = masks_of(state(real, selection="threshold", target_sparsity=0.3), torch.rand(1, 200))
    assert ((~keep[1:]).float().mean((1, 2)) - 0.4).abs().max() < 0.01


def test_router_computes_in_float32():
    router = TokenRouter().to(torch.bfloat16)
    factors = torch.rand(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router(factors.to(torch.bfloat16))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, router.float()(factors.to(torch.bfloat16)))


# Whole decisions


def random_router(seed=0):
    router, generator = TokenRouter(), torch.Generator().manual_seed(seed)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return router


@pytest.mark.parametrize("router_type", ["one_pass", "dynamic", "static", "random"])
def test_counts_are_those_of_the_schedule(router_type):
    real, schedule = random_real(6, 40), [0.0, 0.3, 0.9, 0.4]
    fields = {"router_type": router_type, "sparsity_schedule": schedule, "target_sparsity": 0.4}
    keep = masks_of(state(real, random_router(), **fields), torch.rand(real.shape))
    lengths = real.sum(-1).tolist()
    forced = 0 if router_type in ("static", "random") else 2
    wanted = [[kept_count(tokens, share, forced) for tokens in lengths] for share in schedule]
    assert keep.sum(-1).tolist() == wanted
    assert not (keep & ~real).any()
    if forced:
        first = (real.cumsum(-1) == 1) & real
        assert keep[:, first].all() and keep[..., -1].all()


def test_nested_within_one_pass():
    """A block that skips more keeps some of what another one keeps, where the router does not look at the sparsity."""
    router = random_router()
    router.fc1.weight.data[:, 3] = 0
    real, schedule = random_real(6, 40), [0.0, 0.2, 0.4, 0.8]
    keep = masks_of(state(real, router, sparsity_schedule=schedule, target_sparsity=0.35), torch.rand(real.shape))
    for less, more in ((0, 1), (1, 2), (2, 3)):
        assert not (keep[more] & ~keep[less]).any()


@pytest.mark.parametrize("first, last", [(0, 0), (3, 0), (0, 4), (2, 3)])
@pytest.mark.parametrize("selection", ["budget", "threshold"])
def test_forced_tokens(first, last, selection):
    real = random_real(8, 20)
    fields = {"always_keep_first": first, "always_keep_last": last, "selection": selection, "target_sparsity": 0.7}
    routing = state(real, random_router(), **fields)
    keep = masks_of(routing, torch.rand(real.shape))
    forced = real & ((real.cumsum(-1) <= first) | (real.flip(-1).cumsum(-1).flip(-1) <= last))
    assert keep[:, forced].all()
    for block in (1, 2, 3):
        if selection == "threshold":
            wanted = select_threshold(routing.logits[block], real) | forced
            assert torch.equal(keep[block], wanted)
        else:
            lengths = real.sum(-1).tolist()
            assert keep[block].sum(-1).tolist() == [
                kept_count(n, routing.schedule[block], first + last) for n in lengths
            ]


def test_only_the_first_chunk_has_a_first_token():
    """Of a later chunk the static and the learned routers keep the newest ones, and no more than the budget."""
    real, scores = torch.ones(2, 10, dtype=torch.bool), torch.rand(2, 10)
    newest = torch.arange(10) >= 9
    for router_type in ("static", "one_pass"):
        fields = {"router_type": router_type, "target_sparsity": 0.7, "past": 5}
        assert (masks_of(state(real, **fields), scores)[1:] == newest).all()
        # The second sample begins in this call, as all before it was padding.
        begins = torch.tensor([[True] * 5, [False] * 5])
        keep = masks_of(state(real, **fields, past_real=begins), scores)
        assert (keep[1:, 0] == newest).all()
        if router_type == "static":
            assert (keep[1:, 1] == (torch.arange(10) == 0)).all()
        else:
            assert (keep[1:, 1] == (newest | (torch.arange(10) == 0))).all()


@pytest.mark.parametrize("router_type", ["one_pass", "dynamic", "static", "random"])
@pytest.mark.parametrize("selection", ["budget", "threshold"])
def test_short_prompts_run_dense(router_type, selection):
    if selection == "threshold" and router_type in ("static", "random"):
        selection = "budget"
    real = torch.arange(20) >= torch.tensor([[0], [12], [13]])
    fields = {"router_type": router_type, "selection": selection, "min_tokens": 8, "target_sparsity": 0.5}
    keep = masks_of(state(real, **fields), torch.rand(3, 20))
    assert torch.equal(keep[:, 2], real[2].expand(4, -1))
    assert (keep[1:, :2] != real[:2]).any(-1).all()


def test_short_calls_on_a_cache_follow_the_decode_policy():
    real = torch.ones(2, 7, dtype=torch.bool)
    fields = {"sparsity_schedule": [0.0, 0.6, 0.4, 0.2], "target_sparsity": 0.3, "min_tokens": 8, "past": 30}
    assert state(real, **fields).keep_masks().all()
    fields |= {"decode_policy": "threshold"}
    routing = state(real, **fields)
    assert not routing.is_prompt
    assert routing.keep_masks().flatten(1).all(1).tolist() == [True, False, True, True]
    assert routing.keep_masks().flatten(1).any(1).tolist() == [True, False, True, True]
    stricter = state(real, **fields, decode_threshold=0.2)
    assert stricter.keep_masks().flatten(1).any(1).tolist() == [True, False, False, True]
    assert state(real, **(fields | {"min_tokens": 7}), router_type="static").is_prompt
    # A short prompt is a prompt all the same, and runs dense.
    for router_type in ("static", "one_pass"):
        prompt = state(real, **(fields | {"past": 0}), router_type=router_type)
        assert prompt.is_prompt and masks_of(prompt, torch.rand(2, 7)).all()


def test_random_routing_repeats():
    real = torch.ones(2, 30, dtype=torch.bool)
    first, again, other = (
        state(real, router_type="random", random_seed=seed, target_sparsity=0.4).keep_masks() for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[1], first[2]) and not torch.equal(first[1, 0], first[1, 1])


def test_static_priority():
    real = torch.tensor([[False, True, True, True], [True, True, True, True]])
    sink = torch.tensor([[False, True, False, False], [False] * 4])
    order = static_priority(real, sink).masked_fill(~real, -1).argsort(dim=-1, descending=True, stable=True)
    assert order.tolist() == [[1, 3, 2, 0], [3, 2, 1, 0]]


def test_compact():
    keep = torch.tensor([[False, True, True], [True, False, False]])
    order, valid = KeepPlan(keep, [2, 1]).compact()
    assert order.tolist() == [[1, 2, 0], [0, 1, 2]]
    assert valid.tolist() == [[True, True], [True, False]]
    order, valid = KeepPlan(keep.flip(-1)[:1], [2]).compact()
    assert order.tolist() == [[0, 1, 2]] and valid is None
