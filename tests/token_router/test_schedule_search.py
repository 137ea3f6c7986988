"""Schedules: block influence, the projection, and a search that finds optima, repeats itself and survives a kill."""

import json
import random
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from helpers import require_package, texts, tiny_language_model
from hf_effml import (
    ScheduleSearchResult,
    TokenRouterConfig,
    TokenRouterModel,
    apply_token_router,
    block_influence,
    project_schedule,
    search_sparsity_schedule,
)
from hf_effml.token_router import schedule_search
from hf_effml.token_router.continuations import continuation_logits, cross_entropy, divergence
from hf_effml.token_router.patching import copy_config, disable_routing, find_decoder
from processes import Job


VECTORS = Path(__file__).parents[1] / "vectors" / "token_router"
PROMPT = 20


def routed(blocks=4, model_class=apply_token_router, **fields):
    base = tiny_language_model(num_hidden_layers=blocks)
    return model_class(base, TokenRouterConfig(**{"target_sparsity": 0.3, "min_tokens": 0, **fields}))


def config_of(model):
    return find_decoder(model).token_routing_hook.config


def windows(count=6):
    return texts(count, 28)[0]


def quadratic(weights):
    return lambda model, config: sum(
        weight * share**2 for weight, share in zip(weights, config.sparsity_schedule, strict=True)
    )


# Block influence


@pytest.mark.parametrize("patch", [False, True])
def test_influence_of_the_known_model(patch):
    settings = json.loads((VECTORS / "manifest.json").read_text())["files"]["model.safetensors"]["settings"]
    tensors = load_file(VECTORS / "model.safetensors")
    rope = {"rope_type": "default", "rope_theta": settings["rope_theta"]}
    model = LlamaForCausalLM(
        LlamaConfig(**settings["config"], rms_norm_eps=settings["rms_norm_eps"], rope_parameters=rope)
    )
    model.load_state_dict(
        {name.removeprefix("weight."): value for name, value in tensors.items() if "weight." in name}
    )
    if patch:
        model = TokenRouterModel(model, TokenRouterConfig(target_sparsity=0.4, min_tokens=0))
    batches = [{"input_ids": tensors["input_ids"], "attention_mask": tensors["attention_mask"]}]
    for data in (batches, iter(batches)):
        measured = torch.tensor(block_influence(model, data))
        torch.testing.assert_close(measured, torch.tensor(settings["block_influence"]), rtol=1e-4, atol=5e-5)
        torch.testing.assert_close(measured, tensors["block_influence"].float(), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe", "Gemma"])
def test_influence_is_one_minus_the_cosine(family):
    model = tiny_language_model(family)
    ids, mask = texts(3, 12, padding=(0, 5, 11))
    seen = {}
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda _, args, output, index=index: seen.update({index: (args[0], output)}))
    with torch.no_grad():
        model(ids, attention_mask=mask)
    expected = []
    for given, output in seen.values():
        pairs = [(given[at], output[at]) for at in zip(*mask.nonzero(as_tuple=True), strict=True)]
        expected.append(1 - sum((a @ b / (a.norm() * b.norm())).item() for a, b in pairs) / len(pairs))
    measured = block_influence(model, [{"input_ids": ids, "attention_mask": mask}])
    assert measured == pytest.approx(expected, abs=1e-5)
    assert min(measured) > 1e-3


def test_influence_takes_windows_or_batches_of_any_size():
    model, ids = tiny_language_model().train(), windows(5)
    expected = block_influence(model, ids, batch_size=5)
    assert block_influence(model, ids, batch_size=2) == pytest.approx(expected, abs=1e-6)
    assert block_influence(model, [{"input_ids": ids[:3]}, {"input_ids": ids[3:]}]) == pytest.approx(
        expected, abs=1e-6
    )
    padded = {
        "input_ids": torch.cat([torch.zeros(5, 7, dtype=torch.long), ids], 1),
        "attention_mask": torch.cat([torch.zeros(5, 7), torch.ones(5, 28)], 1),
    }
    assert block_influence(model, [padded]) == pytest.approx(expected, abs=1e-5)
    assert all(module.training for module in model.modules())
    assert not any(block._forward_hooks for block in model.model.layers)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.rand(2, 3), TypeError, r"`data` must be a tensor of token ids; got torch.float32"),
        (torch.arange(3), ValueError, r"`data` must have the shape \(windows, tokens\), .* got \(3,\)"),
        ({"input_ids": torch.ones(1, 2).long()}, TypeError, "got a `dict`. Put a single batch into a list"),
        (3, TypeError, "`data` must be token ids .* or an iterable of batches; got a `int`"),
        ([{"text": "a"}], TypeError, r"`data` must give dictionaries with `input_ids`; got \['text'\]. Tokenize"),
        ([[1, 2]], TypeError, "`data` must give dictionaries with `input_ids`; got a `list`"),
        ([{"input_ids": [[1, 2]]}], TypeError, "`input_ids` must be a tensor of token ids; got a `list`"),
        ([], ValueError, "`data` holds no token"),
        (
            [{"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.zeros(1, 2)}],
            ValueError,
            "`data` holds no token",
        ),
    ],
)
def test_influence_errors(data, error, message):
    model = tiny_language_model()
    with pytest.raises(error, match=message):
        block_influence(model, data)
    assert not any(block._forward_hooks for block in model.model.layers)


def test_influence_refuses_other_models_and_batch_sizes():
    with pytest.raises(TypeError, match="Token routing does not support `Linear`"):
        block_influence(torch.nn.Linear(2, 2), windows())
    with pytest.raises(ValueError, match="`batch_size` must be at least 1; got 0"):
        block_influence(tiny_language_model(), windows(), batch_size=0)


# Projection


@pytest.mark.parametrize("seed", range(40))
def test_projection_keeps_mean_bounds_and_protected_blocks(seed):
    dice = random.Random(seed)
    blocks = dice.choice([1, 2, 3, 5, 32, 80])
    protected = dice.sample(range(blocks), dice.randrange(blocks))
    most = dice.choice([0.95, 0.5])
    target = dice.choice([0, 0.1, 0.9, 1]) * most * (blocks - len(protected)) / blocks
    values = [dice.gauss(0.3, dice.choice([0.05, 1, 100])) for _ in range(blocks)]
    schedule = project_schedule(values, target, protected, most)
    assert abs(sum(schedule) / blocks - target) < 1e-9
    assert all(0 <= share <= most for share in schedule)
    assert not any(schedule[block] for block in protected)
    # Nearest: no other schedule of that mean is nearer, so the free shares are the values shifted alike.
    shifts = [schedule[i] - values[i] for i in range(blocks) if 0 < schedule[i] < most]
    assert max(shifts, default=0) - min(shifts, default=0) < 1e-9
    again = project_schedule(schedule, target, protected, most)
    assert again == pytest.approx(schedule, abs=1e-9)


def test_projection_is_nearer_than_any_other_schedule():
    values, generator = [0.9, -0.4, 0.1, 1.7, 0.3], torch.Generator().manual_seed(0)

    def distance(schedule):
        return sum((share - value) ** 2 for share, value in zip(schedule[1:], values[1:], strict=True))

    best = distance(project_schedule(values, 0.4, [0]))
    for _ in range(200):
        others = project_schedule(torch.rand(5, generator=generator).tolist(), 0.4, [0])
        assert distance(others) > best


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1, float("nan")], 0.1), "`values` must be finite numbers, one per block; got"),
        (([0.1, 0.1], 0.96), r"`target` must be at least 0 and at most 0.95 \* 2 / 2 = 0.95, .* got 0.96. Lower it"),
        (([0.1, 0.1], 0.5, [0]), r"at most 0.95 \* 1 / 2 = 0.475, which 1 protected of 2 blocks leave; got 0.5"),
        (([0.1, 0.1], -0.1), "`target` must be at least 0"),
        (([0.1, 0.1], 0.1, [2]), "`protected` must name blocks from 0 to 1; got 2"),
        (([0.1, 0.1], 0.1, [], 1.5), "`max_sparsity` must be above 0 and less than 1; got 1.5"),
    ],
)
def test_projection_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        project_schedule(*arguments)


# Search


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("weights", [[7, 1, 2, 4, 2, 7], [1, 1, 3, 1, 2, 1]])
def test_search_finds_the_optimum_of_a_quadratic(weights, seed):
    model = routed(6, target_sparsity=0.25, num_protected_last=1)
    result = search_sparsity_schedule(model, fitness=quadratic(weights), generations=60, patience=None, seed=seed)
    inverse = [1 / weight for weight in weights[1:-1]]
    expected = [0, *(0.25 * 6 * share / sum(inverse) for share in inverse), 0]
    assert result.schedule == pytest.approx(expected, abs=0.05)
    assert result.schedule[0] == result.schedule[-1] == 0
    assert abs(sum(result.schedule) / 6 - 0.25) < 1e-6
    assert result.fitness == quadratic(weights)(None, config_of(model)) == result.history[-1]


@pytest.mark.parametrize("make", [apply_token_router, TokenRouterModel])
@pytest.mark.parametrize("fitness", ["kl", "cross_entropy"])
def test_fitness_is_that_of_the_continuations(make, fitness):
    model, ids = routed(model_class=make).train(), windows()
    result = search_sparsity_schedule(model, ids, PROMPT, population=5, generations=3, fitness=fitness, batch_size=4)
    assert isinstance(result, ScheduleSearchResult)
    assert all(module.training for module in model.modules())
    model.eval()
    config = config_of(model)
    assert config.sparsity_schedule == result.schedule and config.router_type == "one_pass"
    assert model.config is config or make is apply_token_router

    def score(schedule):
        tried = copy_config(config, sparsity_schedule=schedule, router_type="static", decode_policy="keep")
        given = torch.cat(list(continuation_logits(model, ids, PROMPT, token_router_config=tried)))
        if fitness == "cross_entropy":
            return cross_entropy(given, ids[:, PROMPT:]).mean().item()
        with disable_routing(model):
            dense = torch.cat(list(continuation_logits(model, ids, PROMPT)))
        return divergence(dense, given).mean().item()

    assert score(result.schedule) == pytest.approx(result.fitness, rel=1e-5)
    assert result.fitness <= score([0, 0.4, 0.4, 0.4]) * (1 + 1e-5)
    assert result.history[0] > 0 and result.history == sorted(result.history, reverse=True)
    assert len(result.history) == 4 and result.evaluations <= 5 + 3


def test_search_repeats_itself_and_disturbs_nobody():
    model, ids = routed(), windows()
    state, before = torch.get_rng_state(), asdict_of(config_of(model))

    def search(**arguments):
        return search_sparsity_schedule(model, ids, PROMPT, **{"population": 8, "generations": 4, **arguments})

    first = search(apply=False)
    assert asdict_of(config_of(model)) == before
    assert search() == first == search()
    assert search(seed=1).schedule != first.schedule
    assert torch.equal(torch.get_rng_state(), state)


def asdict_of(config):
    return {name: getattr(config, name) for name in TokenRouterConfig.__annotations__}


def test_teacher_in_half_precision_changes_little(monkeypatch):
    model, ids = routed(), windows()
    full = search_sparsity_schedule(model, ids, PROMPT, population=5, generations=0)
    monkeypatch.setattr(schedule_search, "_LARGE", 0)
    half = search_sparsity_schedule(model, ids, PROMPT, population=5, generations=0)
    assert half.fitness == pytest.approx(full.fitness, rel=0.01)
    assert half.fitness != full.fitness


def test_search_starts_from_what_a_person_would_try():
    model, tried = routed(6, num_protected_last=1), []
    fitness = lambda model, config: float(tried.append(config.sparsity_schedule) or len(tried))  # noqa: E731
    result = search_sparsity_schedule(model, windows(), fitness=fitness, population=5, generations=0, apply=False)
    assert result == ScheduleSearchResult(tried[0], 1.0, [1.0], 5)
    uniform, by_influence, triangular, *_ = tried
    assert uniform == pytest.approx([0, 0.45, 0.45, 0.45, 0.45, 0])
    influence = block_influence(model, windows())[1:-1]
    order = sorted(range(4), key=lambda block: influence[block], reverse=True)
    assert sorted(range(4), key=lambda block: by_influence[1:-1][block]) == order
    assert triangular == pytest.approx([0, 0.3, 0.6, 0.6, 0.3, 0])
    search_sparsity_schedule(model, fitness=fitness, population=5, generations=0)
    assert tried[5:7] == [uniform, triangular]


def test_search_with_a_learned_router_keeps_budgets_exact():
    model, configs = routed(selection="threshold", decode_threshold=0.1), []
    fitness = lambda model, config: float(configs.append(config) or 0)  # noqa: E731
    search_sparsity_schedule(model, fitness=fitness, router_type="one_pass", population=2, generations=0, elite=1)
    assert {(one.router_type, one.selection, one.decode_policy) for one in configs} == {("one_pass", "budget", "keep")}
    assert config_of(model).selection == "threshold"
    ids = windows()
    learned, static = (
        search_sparsity_schedule(model, ids, PROMPT, router_type=kind, population=2, generations=0, elite=1).fitness
        for kind in ("random", "static")
    )
    assert learned != static


def test_search_stops_when_nothing_gets_better():
    model = routed()
    calls = []
    fitness = lambda model, config: float(calls.append(0) or 1)  # noqa: E731
    result = search_sparsity_schedule(model, fitness=fitness, patience=2)
    assert len(result.history) == 3 and result.evaluations == len(calls)
    assert len(search_sparsity_schedule(model, fitness=fitness, generations=7, patience=None).history) == 8


def test_one_block_leaves_one_schedule():
    result = search_sparsity_schedule(routed(2), fitness=lambda model, config: 1.0)
    assert result.schedule == pytest.approx([0, 0.6]) and result.evaluations == 1


def test_a_schedule_that_breaks_the_model_loses():
    fitness = lambda model, config: float("nan") if config.sparsity_schedule[1] > 0.35 else 2.0  # noqa: E731
    result = search_sparsity_schedule(routed(), fitness=fitness, generations=2)
    assert result.fitness == 2 and result.schedule[1] <= 0.35
    with pytest.raises(ValueError, match="`fitness` gave no schedule a finite value"):
        search_sparsity_schedule(routed(), fitness=lambda model, config: float("nan"), generations=1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"population": 1}, ValueError, "`population` must be at least 2; got 1"),
        ({"population": 2.5}, TypeError, "`population` must be a whole number; got 2.5"),
        ({"generations": -1}, ValueError, "`generations` must be at least 0; got -1"),
        ({"elite": 0}, ValueError, "`elite` must be at least 1; got 0"),
        ({"elite": 24}, ValueError, "`elite` must leave room for new schedules in a `population` of 24; got 24"),
        ({"patience": 0}, ValueError, "`patience` must be at least 1; got 0"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0; got -1"),
        ({"mutation_rate": 0}, ValueError, "`mutation_rate` must be above 0 and at most 1; got 0"),
        ({"mutation_scale": 0}, ValueError, "`mutation_scale` must be above 0; got 0"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1; got 0"),
        ({"router_type": "magic"}, ValueError, "`router_type` must be one of static, dynamic, .*; got 'magic'"),
        (
            {"fitness": "accuracy"},
            ValueError,
            "`fitness` must be one of kl, cross_entropy, or a .* 'accuracy'",
        ),
        ({"windows": None}, ValueError, '`windows` must be given for `fitness="kl"`'),
        ({"prompt_length": None}, ValueError, '`prompt_length` must be given for `fitness="kl"`'),
        ({"prompt_length": 28}, ValueError, "`prompt_length` must be above 0 and below the 28 tokens .*; got 28"),
        ({"prompt_length": 0}, ValueError, "`prompt_length` must be above 0"),
        ({"windows": torch.ones(3).long()}, ValueError, r"`windows` must have the shape \(windows, tokens\)"),
        ({"windows": torch.ones(2, 3)}, TypeError, "`windows` must be a tensor of token ids; got torch.float32"),
        ({"fitness": lambda model, config: "high"}, TypeError, "`fitness` must return a number, .* got 'high'"),
        ({"fitness": lambda model, config: None}, TypeError, "`fitness` must return a number, .* got None"),
        ({"fitness": lambda model, config: torch.ones(2)}, TypeError, "`fitness` must return a number"),
    ],
)
def test_search_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        search_sparsity_schedule(routed(), **({"windows": windows(), "prompt_length": PROMPT} | arguments))


def test_search_refuses_models_without_anything_to_search():
    with pytest.raises(RuntimeError, match="no token router whose schedule could be searched. Patch it"):
        search_sparsity_schedule(tiny_language_model(), windows(), PROMPT)
    with pytest.raises(ValueError, match="`target_sparsity` of the model's token router is 0"):
        search_sparsity_schedule(routed(target_sparsity=0), windows(), PROMPT)
    with pytest.raises(ValueError, match="`prompt_length` must be at least 64: `min_tokens` .* got 20"):
        search_sparsity_schedule(routed(min_tokens=64), windows(), PROMPT)
    with pytest.raises(ValueError, match="`num_protected_first` must be at least 1"):
        search_sparsity_schedule(
            routed(router_type="static", num_protected_first=0), windows(), PROMPT, router_type="dynamic"
        )


# Interrupted searches

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[2])
from helpers import require_package, texts, tiny_language_model
from hf_effml import TokenRouterConfig, apply_token_router, search_sparsity_schedule

model = apply_token_router(tiny_language_model(), TokenRouterConfig(target_sparsity=0.3, min_tokens=0))
search_sparsity_schedule(model, texts(6, 28)[0], 20, population=10, generations=40, patience=None,
                         checkpoint=sys.argv[1])
"""


def run_and_kill(checkpoint, evaluations):
    process = Job(PROGRAM, checkpoint, Path(__file__).parents[1], cwd=checkpoint.parents[1], package=True)
    deadline = time.time() + 120
    while time.time() < deadline:
        if checkpoint.exists() and len(json.loads(checkpoint.read_text())["evaluated"]) >= evaluations:
            break
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


def test_a_killed_search_goes_on_as_if_nothing_had_happened(tmp_path):
    checkpoint = tmp_path / "new" / "search.json"
    for evaluations in (1, 40):
        run_and_kill(checkpoint, evaluations)
    done = len(json.loads(checkpoint.read_text())["evaluated"])
    assert 40 <= done < 200
    (checkpoint.parent / ".search.json.a1b2c3d4.unfinished").write_text("half a fi")
    settings = {"population": 10, "generations": 40, "patience": None}
    straight = search_sparsity_schedule(routed(), windows(), PROMPT, **settings)
    calls = []
    model = routed()
    model.register_forward_hook(lambda *_: calls.append(0))
    resumed = search_sparsity_schedule(model, windows(), PROMPT, checkpoint=checkpoint, **settings)
    assert resumed == straight and config_of(model).sparsity_schedule == straight.schedule
    # Two calls of the model for each evaluation that was missing, and for the teacher.
    assert len(calls) == 2 * (straight.evaluations - done) + 2
    calls.clear()
    assert search_sparsity_schedule(model, windows(), PROMPT, checkpoint=str(checkpoint), **settings) == straight
    assert not calls
    assert [path.name for path in checkpoint.parent.iterdir()] == ["search.json"]


def test_a_longer_search_goes_on_from_a_shorter_one(tmp_path):
    arguments = {"fitness": quadratic([9, 3, 1, 2]), "population": 6}
    straight = search_sparsity_schedule(routed(), generations=9, patience=None, **arguments)
    checkpoint = tmp_path / "search.json"
    for generations in (0, 3, 9):
        result = search_sparsity_schedule(
            routed(), generations=generations, patience=None, checkpoint=checkpoint, **arguments
        )
        assert asdict(result)["history"] == straight.history[: generations + 1]
    assert result == straight
    shorter = search_sparsity_schedule(routed(), generations=3, patience=None, checkpoint=checkpoint, **arguments)
    assert shorter.evaluations < straight.evaluations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "`seed` was 0 and is 1 now"),
        ({"population": 7}, "`population` was 6 and is 7 now"),
        ({"elite": 2}, "`elite` was 4 and is 2 now"),
        ({"mutation_rate": 0.5}, "`mutation_rate` was 0.3 and is 0.5 now"),
        ({"mutation_scale": 0.2}, "`mutation_scale` was 0.1 and is 0.2 now"),
        ({"router_type": "random"}, "`router_type` was 'static' and is 'random' now"),
        ({"fitness": "cross_entropy"}, "`fitness` was 'kl' and is 'cross_entropy' now"),
        ({"fitness": quadratic([1, 1, 1, 1])}, "`fitness` was 'kl' and is 'function quadratic"),
        ({"prompt_length": 21}, "`prompt_length` was 20 and is 21 now"),
        ({"windows": windows(5)}, "`windows` was another one"),
        ({"model": lambda: routed(target_sparsity=0.31)}, "`target_sparsity` was 0.3 and is 0.31 now"),
        ({"model": lambda: routed(kv_policy="keep")}, "`kv_policy` was 'drop' and is 'keep' now"),
        ({"model": lambda: routed(num_protected_last=1)}, "`num_protected_last` was 0 and is 1 now"),
        ({"model": lambda: other_weights(0)}, "`model` was another one"),
    ],
)
def test_a_checkpoint_of_another_search_is_refused(tmp_path, changes, message):
    checkpoint = tmp_path / "search.json"
    given = {"windows": windows(), "prompt_length": PROMPT, "population": 6, "generations": 0}
    search_sparsity_schedule(routed(), checkpoint=checkpoint, **given)
    content = checkpoint.read_text()
    model = changes.pop("model", routed)()
    with pytest.raises(ValueError, match=f"`checkpoint` belongs to a search with other arguments: {message}"):
        search_sparsity_schedule(model, checkpoint=checkpoint, **(given | changes))
    assert checkpoint.read_text() == content


def other_weights(block):
    model = routed()
    with torch.no_grad():
        model.model.layers[block].mlp.up_proj.weight.mul_(1.01)
    return model


def test_a_trained_router_matters_to_searches_that_ask_it(tmp_path):
    given = {"windows": windows(), "prompt_length": PROMPT, "population": 2, "elite": 1, "generations": 0}
    for kind in ("static", "one_pass"):
        model, checkpoint = routed(), tmp_path / f"{kind}.json"
        search_sparsity_schedule(model, router_type=kind, checkpoint=checkpoint, **given)
        with torch.no_grad():
            model.model.token_router.fc1.weight.add_(1)
        if kind == "static":
            search_sparsity_schedule(model, router_type=kind, checkpoint=checkpoint, **given)
        else:
            with pytest.raises(ValueError, match="`model` was another one"):
                search_sparsity_schedule(model, router_type=kind, checkpoint=checkpoint, **given)


@pytest.mark.parametrize("content", ["half a fi", "[]", '{"arguments": {}}', "3"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    checkpoint = tmp_path / "search.json"
    checkpoint.write_text(content)
    with pytest.raises(ValueError, match="`checkpoint` must be a file that `search_sparsity_schedule` wrote"):
        search_sparsity_schedule(routed(), windows(), PROMPT, checkpoint=checkpoint)
    assert checkpoint.read_text() == content


# A trained model


def story_windows(folder, split, count, length=256):
    dataset = require_package("datasets").Dataset
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama-stories260k", model_max_length=10**6)
    ids = []
    for story in dataset.from_parquet(str(folder / "text" / "tinystories" / f"{split}.parquet"))["text"]:
        ids += [1, *tokenizer(story.replace("\n\n", "\n"), add_special_tokens=False).input_ids]
    return torch.tensor(ids[: count * length]).view(count, length)


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.22, 0.40])
def test_searched_schedules_of_a_real_model(shared_data, target):
    base = LlamaForCausalLM.from_pretrained(shared_data / "llama-stories260k").eval()
    model = TokenRouterModel(base, TokenRouterConfig(target_sparsity=target, router_type="static"))
    uniform = config_of(model).schedule
    train, validation = (story_windows(shared_data, *part) for part in (("train", 48), ("validation", 64)))
    result = search_sparsity_schedule(model, train, 192, population=12, generations=4)
    with disable_routing(model):
        dense = list(continuation_logits(model, validation, 192))

    def validated(schedule):
        config = copy_config(config_of(model), sparsity_schedule=schedule, decode_policy="keep")
        given = continuation_logits(model, validation, 192, token_router_config=config)
        return torch.cat([divergence(*pair) for pair in zip(dense, given, strict=True)]).mean().item()

    baseline = search_sparsity_schedule(model, train, 192, population=2, elite=1, generations=0, apply=False)
    assert result.fitness <= baseline.fitness
    # All blocks of this model are alike, so that nothing is gained on other texts.
    assert validated(result.schedule) <= 1.25 * validated(uniform)
