"""Plans: known answers, a twin of plain loops, invariants, ties, bad values, gradients, cost."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import assert_close
from hf_effml.vim.evaluation.baselines import ordered_merge_reference
from hf_effml.vim.token_reduction import (
    TokenPlan,
    bipartite_plan,
    compose,
    local_plan,
    random_plan,
)


VECTORS = Path(__file__).parents[1] / "vectors" / "rmeeto"
MANIFEST = json.loads((VECTORS / "manifest.json").read_text())["files"]
REDUCE = {"sum": "mean", "mean": "average", "amax": "amax", "amin": "amin"}
SHAPES = [(1, 2, 1), (2, 3, 5), (4, 9, 2), (3, 22, 4), (2, 37, 11), (1, 70, 70)]  # batch, tokens, r


def cases(name):
    return pytest.mark.parametrize("case", MANIFEST[f"{name}.safetensors"]["cases"], ids=lambda case: case["name"])


def tensors(file, case):
    prefix = case["name"] + "."
    return {
        key.removeprefix(prefix): value for key, value in load_file(VECTORS / file).items() if key.startswith(prefix)
    }


def membership(plan):
    """`(batch, tokens - r, tokens)`: which input tokens an output token consists of."""
    places = torch.arange(plan.keep.shape[1]).view(1, -1, 1)
    return (plan.slot.unsqueeze(1) == places).float()


def plan_by_hand(metric, r, protected=None, choose=1, keep_order=True, exact=False, prune=False, first_source=0):
    """The matching, one sample and one token at a time: `keep`, and the slot of every token."""
    keeps, all_slots = [], []
    for sample in metric.double():
        tokens = len(sample)
        unit = sample / sample.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        free = [token for token in range(tokens) if token != protected]
        sources, destinations = free[first_source::2], free[1 - first_source :: 2]
        count = min(r, len(free) // 2)
        matches = []
        for source in sources if count else []:
            ranked = sorted(destinations, key=lambda other: -float(unit[source] @ unit[other]))
            partner = ranked[min(choose, len(ranked)) - 1]
            matches.append((source, partner, float(unit[source] @ unit[partner])))
        matches.sort(key=lambda match: -match[2])
        leaving = {source: partner for source, partner, _ in matches[:count]}
        if keep_order:
            keep = [token for token in range(tokens) if token not in leaving and (exact or token != protected)]
        else:
            keep = [source for source, _, _ in matches[count:]]
        if protected is not None and not (keep_order and exact):
            of = tokens if keep_order else len(sources)
            keep.insert(protected * (of - count) // of, protected)
        keep += [] if keep_order else destinations
        keep = keep if count else list(range(tokens))
        slots = [keep.index(leaving.get(token, token)) for token in range(tokens)]
        keeps.append(keep)
        all_slots.append([-1 if prune and token in leaving else slot for token, slot in enumerate(slots)])
    return torch.tensor(keeps), torch.tensor(all_slots)


# Known answers


@cases("merge_ops")
def test_official_merges(case):
    given = tensors("merge_ops.safetensors", case)
    plan = bipartite_plan(
        given["metric"],
        case["r"],
        case["p"],
        distance=case["distance"],
        choose=1 if case["choose"] == "max" else int(case["choose"][:-1]),
        keep_order=case["order"],
        prune=case["prune"],
    )
    merged, size = plan.merge(given["x"], given["size"], REDUCE[case["mode"]])
    assert plan.removed.shape[1] == case["r_effective"]
    assert plan.class_index.tolist() == [case["out_position"]] * len(plan.keep)
    torch.testing.assert_close(membership(plan), given["source"], rtol=0, atol=0)
    torch.testing.assert_close(merged, given["out"], rtol=0, atol=1e-6)
    torch.testing.assert_close(size, given["out_size"], rtol=0, atol=1e-6)


@cases("tome")
def test_tome(case):
    """Up to the order of the output: ToMe's is by similarity, ours by position."""
    given = tensors("tome.safetensors", case)
    protected = [position for position, there in enumerate((case["class_token"], case["distill_token"])) if there]
    plan = bipartite_plan(given["metric"], case["r"], protected, first_source=len(protected) % 2)
    merged, size = plan.merge(given["x"], given["size"])
    assert plan.keep.shape[1] == case["out_tokens"]
    # Row g of `same` says which of ToMe's rows has the members of our row g.
    ours, theirs = membership(plan), given["source"]
    same = (ours.unsqueeze(2) == theirs.unsqueeze(1)).all(-1).float()
    assert torch.equal(same.sum(2), torch.ones_like(same.sum(2)))
    torch.testing.assert_close(merged, same @ given["out"], rtol=0, atol=1e-6)
    torch.testing.assert_close(size, same @ given["out_size"], rtol=0, atol=1e-6)
    if "unmerged" in given:
        torch.testing.assert_close(plan.unmerge(merged), given["unmerged"], rtol=0, atol=1e-6)


# The twins


@pytest.mark.parametrize("batch, tokens, r", SHAPES)
@pytest.mark.parametrize("place", ["none", "first", "middle", "last"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exact": True},
        {"prune": True},
        {"exact": True, "prune": True},
        {"keep_order": False},
        {"choose": 3},
        {"first_source": 1},
    ],
    ids=str,
)
def test_plan_equals_plain_loops(batch, tokens, r, place, options):
    metric = torch.randn(batch, tokens, 6)
    protected = {"none": None, "first": 0, "middle": tokens // 2, "last": tokens - 1}[place]
    if place == "last" and not options.get("keep_order", True):
        pytest.skip("the official rule points beyond the sources")
    keep, slot = plan_by_hand(metric, r, protected, **options)
    position = "exact" if options.pop("exact", False) else "proportional"
    plan = bipartite_plan(metric, r, protected, class_position=position, **options)
    assert torch.equal(plan.keep, keep)
    assert torch.equal(plan.slot, slot)


def test_positions_per_sample_equal_single_samples():
    metric, positions = torch.randn(4, 15, 6), torch.tensor([0, 14, 7, 3])
    plan = bipartite_plan(metric, 5, positions, class_position="exact")
    for sample, position in enumerate(positions.tolist()):
        alone = bipartite_plan(metric[sample : sample + 1], 5, position, class_position="exact")
        assert torch.equal(plan.slot[sample], alone.slot[0])
        assert plan.class_index[sample] == alone.class_index[0]


@pytest.mark.parametrize("position", ["proportional", "exact"])
def test_two_protected_tokens(position):
    plan = bipartite_plan(torch.randn(3, 20, 6), 100, (0, 19), class_position=position)
    assert plan.keep.shape[1] == 11
    assert plan.class_index.tolist() == [[0, 10]] * 3
    close = bipartite_plan(torch.randn(3, 20, 6), 9, (18, 19), class_position=position)
    assert close.class_index.tolist() == [[9, 10]] * 3


@pytest.mark.parametrize("reduce", ["mean", "average", "amax", "amin"])
def test_merge_equals_plain_loops(reduce):
    x, size = torch.randn(3, 21, 4), torch.randint(1, 5, (3, 21, 1)).float()
    plan = bipartite_plan(torch.randn(3, 21, 6), 8, 10)
    merged, sizes = plan.merge(x, size, reduce)
    combine = {"mean": torch.sum, "average": torch.mean, "amax": torch.amax, "amin": torch.amin}[reduce]
    for sample in range(3):
        for place in range(13):
            group = plan.slot[sample] == place
            total = combine(size[sample, group], dim=0)
            value = combine(size[sample, group] * x[sample, group], dim=0) / total
            torch.testing.assert_close(merged[sample, place], value, rtol=0, atol=1e-6)
            torch.testing.assert_close(sizes[sample, place], total, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens, r, position", [(37, 3, 18), (38, 11, 19), (197, 11, 98), (20, 9, 0)])
def test_merging_once_equals_the_official_two_steps(tokens, r, position):
    hidden, residual = torch.randn(2, 3, tokens, 16).unbind()
    size = torch.randint(1, 4, (3, tokens, 1)).float()
    a, b, sizes, after = ordered_merge_reference(hidden, hidden, residual, size, position, r)
    plan = bipartite_plan(hidden, r, position)
    merged, ours = plan.merge(hidden + residual, size)
    assert_close(merged, a + b, 1e-6)
    assert torch.equal(ours, sizes)
    assert plan.class_index.tolist() == [after] * 3


# Invariants


def plans(batch, tokens, r, metric=None):
    metric = torch.randn(batch, tokens, 6) if metric is None else metric
    middle = tokens // 2
    yield bipartite_plan(metric, r, middle)
    yield bipartite_plan(metric, r, middle, class_position="exact")
    yield local_plan(metric, r, middle)
    yield random_plan(metric, r, middle, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch, tokens, r", SHAPES)
def test_mass_length_and_order(batch, tokens, r):
    x, size = torch.randn(batch, tokens, 5), torch.randint(1, 9, (batch, tokens, 1)).float()
    for plan in plans(batch, tokens, r):
        merged, sizes = plan.merge(x, size)
        left = tokens - min(r, (tokens - 1) // 2)
        assert merged.shape == (batch, left, 5) and sizes.shape == (batch, left, 1)
        assert_close((sizes * merged).sum(1), (size * x).sum(1), 1e-5)
        assert torch.equal(sizes.sum(1), size.sum(1))
        assert_close(plan.merge(torch.ones_like(x), size)[0], torch.ones(batch, left, 5), 1e-6)
        assert all(sorted(set(row)) == list(range(left)) for row in plan.slot.tolist())
        assert torch.equal(plan.slot.gather(1, plan.keep), torch.arange(left).expand(batch, -1))


@pytest.mark.parametrize("batch, tokens, r", SHAPES)
def test_survivors_and_class_token_keep_their_order(batch, tokens, r):
    x, size = torch.randn(batch, tokens, 5), torch.rand(batch, tokens, 1) + 1
    middle = tokens // 2
    for index, plan in enumerate(plans(batch, tokens, r)):
        merged, sizes = plan.merge(x, size)
        for sample, place in enumerate(plan.class_index.tolist()):
            assert torch.equal(merged[sample, place], x[sample, middle])
            assert torch.equal(sizes[sample, place], size[sample, middle])
            others = [token for token in plan.keep[sample].tolist() if token != middle]
            assert others == sorted(others)
            if index == 1:
                assert place == sum(token < middle for token in others)


@pytest.mark.parametrize("batch, tokens, r", SHAPES)
def test_unmerge(batch, tokens, r):
    x = torch.randn(batch, tokens, 5)
    for plan in plans(batch, tokens, r):
        merged, sizes = plan.merge(x)
        back = plan.unmerge(merged)
        alone = plan.unmerge(sizes) == 1
        assert torch.equal(torch.where(alone, back, 0), torch.where(alone, x, 0))
        assert_close(plan.merge(back)[0], merged, 1e-6)


def test_batch_does_not_matter():
    metric, x = torch.randn(4, 33, 6), torch.randn(4, 33, 5)
    order = torch.tensor([2, 0, 3, 1])
    for whole, shuffled, single in zip(
        plans(4, 33, 9, metric), plans(4, 33, 9, metric[order]), plans(1, 33, 9, metric[2:3]), strict=True
    ):
        assert torch.equal(whole.merge(x)[0][order], shuffled.merge(x[order])[0])
        assert torch.equal(whole.merge(x)[0][2:3], single.merge(x[2:3])[0])


def test_compose():
    metric, x, size = torch.randn(3, 41, 6), torch.randn(3, 41, 5), torch.rand(3, 41, 1) + 1
    first = bipartite_plan(metric, 9, 20)
    once, sizes = first.merge(x, size)
    second = bipartite_plan(once, 7, first.protected)
    twice, final = second.merge(once, sizes)
    both = compose(first, second)
    assert_close(both.merge(x, size), (twice, final), 1e-6)
    assert_close(both.unmerge(twice), first.unmerge(second.unmerge(twice)), 0)
    assert torch.equal(both.class_index, second.class_index)


def test_compose_pruning():
    metric, x = torch.randn(3, 41, 6), torch.randn(3, 41, 5)
    first = bipartite_plan(metric, 9, 20, prune=True)
    second = bipartite_plan(first.merge(x)[0], 7, first.protected, prune=True)
    both = compose(first, second)
    assert torch.equal(both.merge(x)[0], second.merge(first.merge(x)[0])[0])
    assert ((both.slot < 0).sum(1) == 16).all()
    with pytest.raises(ValueError, match="merging and a pruning"):
        compose(first, bipartite_plan(metric[:, :32], 3, 16))


def test_pruning_copies_survivors():
    """Dropped tokens belong to no group: the official source matrix counts them to group 0."""
    metric, x, size = torch.randn(2, 21, 6), torch.randn(2, 21, 5), torch.rand(2, 21, 1)
    plan = bipartite_plan(metric, 6, 10, prune=True)
    merged, sizes = plan.merge(x, size)
    assert torch.equal(merged, torch.stack([x[b, plan.keep[b]] for b in range(2)]))
    assert torch.equal(sizes, torch.stack([size[b, plan.keep[b]] for b in range(2)]))
    dropped = plan.slot < 0
    assert dropped.sum().item() == 12
    assert torch.equal(plan.unmerge(merged)[dropped], torch.zeros(12, 5))
    kept = plan.unmerge(merged)[~dropped]
    assert torch.equal(kept, x[~dropped])


def test_length_of_the_features_does_not_matter():
    metric = torch.randn(2, 33, 6)
    scaled = metric * (torch.rand(2, 33, 1) * 100 + 0.01)
    for distance in ("cosine", "l1", "l2"):
        for make in (bipartite_plan, local_plan):
            plans = [make(features, 8, 16, distance=distance) for features in (metric, scaled)]
            assert torch.equal(plans[0].slot, plans[1].slot)
    assert torch.equal(bipartite_plan(metric, 8, 16).slot, bipartite_plan(metric, 8, 16, distance="l2").slot)


def test_merging_is_linear():
    x, y = torch.randn(2, 3, 33, 5).unbind()
    plan, size = bipartite_plan(torch.randn(3, 33, 6), 9, 16), torch.rand(3, 33, 1) + 1
    assert_close(plan.merge(x, size)[0] + plan.merge(y, size)[0], plan.merge(x + y, size)[0], 1e-6)


def test_nothing_to_do_returns_the_very_tensor():
    x, size = torch.randn(2, 9, 5), torch.rand(2, 9, 1)
    plan = bipartite_plan(x, 0, 4)
    merged, sizes = plan.merge(x, size)
    assert merged is x and sizes is size
    for short in (torch.randn(1, 1, 3), torch.randn(1, 2, 3)):
        assert bipartite_plan(short, 5, 0).keep.shape[1] == short.shape[1]


# Local and random plans


@pytest.mark.parametrize("distance", ["cosine", "l1", "l2"])
@pytest.mark.parametrize("tokens", [3, 4, 9, 22])
def test_local_plan_joins_neighbours(tokens, distance):
    metric, middle = torch.randn(3, tokens, 6), tokens // 2
    plan = local_plan(metric, 4, middle, distance=distance)
    free = [token for token in range(tokens) if token != middle]
    for sample in range(3):
        unit = metric[sample] / metric[sample].norm(dim=-1, keepdim=True)
        best = []
        for index in range(0, len(free), 2):
            near = [free[i] for i in (index - 1, index + 1) if 0 <= i < len(free)]
            norm = {"cosine": 2, "l1": 1, "l2": 2}[distance]
            partner = min(near, key=lambda other: (unit[free[index]] - unit[other]).norm(p=norm))
            best.append(((unit[free[index]] - unit[partner]).norm(p=norm), free[index], partner))
        expected = {source: partner for _, source, partner in sorted(best)[: plan.removed.shape[1]]}
        partners = plan.keep[sample, plan.target[sample]].tolist()
        assert dict(zip(plan.removed[sample].tolist(), partners, strict=True)) == expected


def test_random_plan_repeats_with_its_generator():
    metric = torch.zeros(2, 40, 3)
    first, again, other = (random_plan(metric, 9, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first.slot, again.slot)
    assert not torch.equal(first.slot, other.slot)
    assert torch.equal(first.slot[0], first.slot[1])


# Ties, zeros, infinities and types


@pytest.mark.parametrize("tokens", [4, 5, 23, 50, 197])
@pytest.mark.parametrize("width", [3, 16, 50, 192])
def test_ties_go_to_the_lowest_position(tokens, width):
    """Identical tokens, in batches that a matrix product may treat differently."""
    for batch in (1, 3):
        metric = torch.randn(width).expand(batch, tokens, width).contiguous()
        plan = bipartite_plan(metric, 2)
        left = min(2, tokens // 2)
        assert plan.removed.tolist() == [[0, 2][:left]] * batch
        assert (plan.keep.gather(1, plan.target) == 1).all()


def test_zero_vectors_are_finite():
    """The official code divides by their norm."""
    metric, x = torch.randn(2, 21, 6), torch.randn(2, 21, 5)
    metric[:, ::3] = 0
    for distance in ("cosine", "l1", "l2"):
        for make in (bipartite_plan, local_plan):
            plan = make(metric, 8, 10, distance=distance)
            assert plan.merge(x)[0].isfinite().all()
    assert bipartite_plan(torch.zeros(1, 9, 3), 3).removed.tolist() == [[0, 2, 4]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("token", [0, 1, 10, 20])
def test_what_is_not_finite_reaches_the_output(value, prune, token):
    x = torch.randn(2, 21, 5)
    x[0, token, 2] = value
    for make in (bipartite_plan, local_plan):
        merged, _ = make(x, 6, 10, prune=prune).merge(x)
        assert merged.shape == (2, 15, 5)
        assert not merged[0].isfinite().all() and merged[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype):
    """Half precision in, half precision out, accumulated in float32."""
    x, size = torch.randn(2, 33, 8).to(dtype), torch.randint(1, 200, (2, 33, 1)).float()
    plan = bipartite_plan(x, 9, 16)
    merged, sizes = plan.merge(x, size)
    assert merged.dtype == dtype and sizes.dtype == torch.float32
    assert torch.equal(merged, plan.merge(x.float(), size)[0].to(dtype)) or dtype == torch.float64
    large = bipartite_plan(torch.full((1, 9, 4096), 200.0).to(dtype), 2)
    assert large.removed.tolist() == [[0, 2]]


def test_autocast_does_not_change_the_plan():
    metric = torch.randn(2, 197, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = bipartite_plan(metric, 11, 98)
    assert torch.equal(cast.slot, bipartite_plan(metric, 11, 98).slot)


# Gradients


@pytest.mark.parametrize("reduce", ["mean", "average", "amax"])
def test_gradient(reduce):
    """Those of a dense averaging matrix; none goes to the metric."""
    metric = torch.randn(2, 21, 6, dtype=torch.float64, requires_grad=True)
    x, size = torch.randn(2, 21, 3, dtype=torch.float64, requires_grad=True), torch.rand(2, 21, 1).double() + 1
    plan = bipartite_plan(metric, 7, 10)
    assert torch.autograd.gradcheck(lambda x: plan.merge(x, size, reduce)[0], x)
    if reduce == "amax":
        return
    upstream = torch.randn(2, 14, 3, dtype=torch.float64)
    weights = membership(plan).double() * size.transpose(1, 2)
    dense = weights / weights.sum(2, keepdim=True)
    plan.merge(x, size, reduce)[0].backward(upstream)
    torch.testing.assert_close(x.grad, dense.transpose(1, 2) @ upstream)
    assert metric.grad is None


# Bad values


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": -1}, "`r` must not be negative; got -1"),
        ({"protected": 9}, "positions from 0 to 8"),
        ({"protected": -1}, "positions from 0 to 8"),
        ({"distance": "dot"}, "`distance`.*'dot'"),
        ({"choose": 0}, "`choose` must be at least 1"),
        ({"class_position": "middle"}, "`class_position`.*'middle'"),
        ({"class_position": "exact", "keep_order": False}, "keep_order=True"),
        ({"protected": torch.tensor([4])}, 'class_position="exact"'),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bipartite_plan(torch.randn(1, 9, 3), **{"r": 2, "protected": 4, **options})


def test_bad_merges_are_named():
    plan = bipartite_plan(torch.randn(1, 9, 3), 2)
    with pytest.raises(ValueError, match="for 9 tokens; got `x` with 8"):
        plan.merge(torch.randn(1, 8, 3))
    with pytest.raises(ValueError, match="`reduce`.*'sum'"):
        plan.merge(torch.randn(1, 9, 3), reduce="sum")


# Cost


def count_operations(function):
    with torch.profiler.profile() as profile:
        function()
    views = ("view", "slice", "select", "expand", "squeeze", "transpose", "detach", "flatten", "reshape", "as_strided")
    names = [event.name for event in profile.events() if event.cpu_parent is None]
    return sum(not any(view in name for view in views) for name in names)


def test_half_the_operations_of_the_official_merge():
    """Small kernels are what merging costs on a GPU."""
    x, size = torch.randn(1, 197, 32), torch.ones(1, 197, 1)
    ours = count_operations(lambda: bipartite_plan(x, 11, 98).merge(x, size))
    official = count_operations(lambda: ordered_merge_reference(x, x, x, size, 98, 11))
    assert ours <= 35
    assert ours < 0.65 * official


@pytest.mark.slow
def test_compiles_whole():
    def step(x, size):
        plan: TokenPlan = bipartite_plan(x, 5, 10)
        return (*plan.merge(x, size), plan.slot)

    x, size = torch.randn(2, 21, 6), torch.ones(2, 21, 1)
    merged, sizes, slot = torch.compile(step, fullgraph=True)(x, size)
    expected = step(x, size)
    assert_close(merged, expected[0], 1e-6)
    assert torch.equal(sizes, expected[1]) and torch.equal(slot, expected[2])
