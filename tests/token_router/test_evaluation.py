"""Scores equal what is computed step by step, whatever the batches, and known answers come out."""

import json
import math
from dataclasses import astuple

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import assert_close, require_package, texts, tiny_language_model, tiny_tokenizer
from hf_effml import TokenRouterConfig, TokenRouterModel, disable_routing, remove_blocks
from hf_effml.token_router.continuations import continuation_logits
from hf_effml.token_router.evaluation import retention, score_continuations, score_multiple_choice
from hf_effml.token_router.patching import copy_config
from hf_effml.token_router.token_skip_layer import CACHE_ARGUMENT
from hf_effml.utils.text_data import MultipleChoiceItem, load_multiple_choice, load_text, make_windows, tokenize


PROMPT, WINDOW = 20, 28
# Generated tokens skip the last block.
SCHEDULE = [0.0, 0.3, 0.5, 0.8]
ROUTERS = {
    "static": {"router_type": "static"},
    "one-pass": {"router_type": "one_pass"},
    "dynamic, threshold": {"router_type": "dynamic", "selection": "threshold"},
    "keys kept": {"router_type": "one_pass", "kv_policy": "keep"},
    "MLPs only": {"router_type": "static", "skip_unit": "mlp"},
}


def routed(**fields):
    """A tiny model with a router that is not the static rule, in 64-bit precision so that order does not matter."""
    config = TokenRouterConfig(**{"target_sparsity": 0.4, "sparsity_schedule": SCHEDULE, "min_tokens": 0, **fields})
    model = TokenRouterModel(tiny_language_model(vocab_size=258).double(), config).eval()
    with torch.no_grad():
        for parameter in model.token_router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


def windows_of_text(count=5):
    return texts(count, WINDOW)[0]


@torch.no_grad()
def step_by_step(model, prompt, more, **options):
    """Logits of what follows a prompt: the prompt in one call, then token by token as `generate` does it."""
    output = model(prompt, use_cache=True, **options)
    logits = [output.logits[:, -1]]
    for token in more[:, :-1].unbind(1):
        output = model(token[:, None], **{CACHE_ARGUMENT: output[CACHE_ARGUMENT]}, use_cache=True, **options)
        logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("name", ROUTERS)
def test_continuations_equal_steps(name):
    model, ids = routed(**ROUTERS[name]), windows_of_text()
    scores = score_continuations(model, ids, PROMPT, batch_size=2)
    routed_logits = step_by_step(model, ids[:, :PROMPT], ids[:, PROMPT:])
    report = model.routing_report
    with model.disable_routing():
        dense_logits = step_by_step(model, ids[:, :PROMPT], ids[:, PROMPT:])
    log_p, log_q = dense_logits.log_softmax(-1), routed_logits.log_softmax(-1)
    expected = -log_q.gather(-1, ids[:, PROMPT:, None]).mean()
    assert scores.cross_entropy == pytest.approx(expected.item(), rel=1e-5)
    assert scores.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert scores.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)
    agreement = (dense_logits.argmax(-1) == routed_logits.argmax(-1)).double().mean().item()
    assert scores.top1_agreement == pytest.approx(agreement)
    prompt_logits = model(ids[:, :PROMPT]).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(prompt_logits, ids[:, 1:PROMPT].flatten()).item()
    assert scores.prompt_cross_entropy == pytest.approx(expected, rel=1e-5)
    assert scores.sparsity == pytest.approx(report.sparsity) and 0 < scores.sparsity < 0.7
    assert scores.flop_ratio == pytest.approx(report.flop_ratio) and scores.flop_ratio < 1
    assert (scores.kv_bytes, scores.dense_kv_bytes) == (report.kv_bytes, report.dense_kv_bytes)
    assert scores.kv_ratio == report.kv_bytes / report.dense_kv_bytes


def test_batches_change_nothing():
    model, ids = routed(), windows_of_text()
    alone = score_continuations(model, ids, PROMPT, batch_size=1)
    for batch_size in (2, 5, 9):
        assert astuple(score_continuations(model, ids, PROMPT, batch_size=batch_size)) == pytest.approx(
            astuple(alone), rel=1e-5
        )


def test_dense_runs():
    model, ids = routed(), windows_of_text()
    plain = tiny_language_model(vocab_size=258).double()
    # Each comes after a routed run, whose report is not theirs.
    nothing = copy_config(model.config, target_sparsity=0.0, sparsity_schedule=None)
    score_continuations(model, ids, PROMPT)
    with model.disable_routing():
        dense = score_continuations(model, ids, PROMPT)
    score_continuations(model, ids, PROMPT)
    zero = score_continuations(model, ids, PROMPT, token_router_config=nothing)
    assert dense == zero == score_continuations(plain, ids, PROMPT)
    assert (dense.kl, dense.top1_agreement, dense.sparsity, dense.flop_ratio) == (pytest.approx(0), 1, 0, 1)
    # Keys and values of 2 heads of 8 channels, 8 bytes each, in 4 blocks.
    assert dense.kv_bytes == dense.dense_kv_bytes == 5 * PROMPT * 4 * 2 * 2 * 8 * 8
    assert dense.prompt_cross_entropy == pytest.approx(plain(ids[:, :PROMPT], labels=ids[:, :PROMPT]).loss.item())


def test_a_reference_takes_the_place_of_the_dense_run():
    model, ids = routed(), windows_of_text()
    with model.disable_routing():
        reference = torch.cat([*continuation_logits(model, ids, PROMPT)])
    assert score_continuations(model, ids, PROMPT, batch_size=2, reference=reference) == score_continuations(
        model, ids, PROMPT, batch_size=2
    )
    smaller = score_continuations(remove_blocks(model, [2]), ids, PROMPT, reference=reference)
    assert smaller.kl > 0 and smaller.kv_bytes == 5 * PROMPT * 3 * 2 * 2 * 8 * 8
    with pytest.raises(ValueError, match=r"`reference` must have the shape \(5, 8\) and a vocabulary; got \(4, 8"):
        score_continuations(model, ids, PROMPT, reference=reference[:4])


def test_wrong_windows():
    model = routed()
    with pytest.raises(ValueError, match="`windows` must hold at least one"):
        score_continuations(model, windows_of_text()[:0], PROMPT)
    with pytest.raises(ValueError, match="`prompt_length` must leave a continuation of windows of 28 tokens; got 28"):
        score_continuations(model, windows_of_text(), WINDOW)


QUESTIONS = [
    MultipleChoiceItem("A rather long question about nothing:", [" yes", " no", " perhaps, but not now"], 2),
    MultipleChoiceItem("Short?", [" a", " b"], 0),
    MultipleChoiceItem("Of one length?", [" one", " two", " six", " ten"], 3),
    MultipleChoiceItem(["Ann was late because Ann", "Ann was late because Bea"], [" slept.", " slept."], 1),
    MultipleChoiceItem("Short?", [" and again", " c"], 1),
]


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("start", [{"bos_token": "<s>"}, {}], ids=["start token", "none"])
def test_choices_equal_calls_of_their_own(name, start):
    model, tokenizer = routed(**ROUTERS[name]), tiny_tokenizer(**start)
    scores = score_multiple_choice(model, tokenizer, QUESTIONS, batch_size=3)
    skipped = tokens = 0
    for item, found in zip(QUESTIONS, scores.log_likelihoods, strict=True):
        assert len(found) == len(item.choices)
        for context, choice, value in zip(item.contexts, item.choices, found, strict=True):
            prompt = torch.tensor([next(tokenize([context], tokenizer))])
            ids = torch.tensor([tokenizer(choice)["input_ids"]])
            logits = step_by_step(model, prompt, ids)
            expected = logits.log_softmax(-1).gather(-1, ids[..., None]).sum().item()
            assert value == pytest.approx(expected, rel=1e-5), (context, choice)
    for context in {context for item in QUESTIONS for context in item.contexts}:
        prompt = torch.tensor([next(tokenize([context], tokenizer))])
        model(prompt)
        skipped, tokens = skipped + model.routing_report.sparsity * prompt.numel(), tokens + prompt.numel()
    assert scores.sparsity == pytest.approx(skipped / tokens)


def test_choices_of_dense_models():
    model, tokenizer = routed(), tiny_tokenizer(bos_token="<s>")
    score_multiple_choice(model, tokenizer, QUESTIONS)
    with model.disable_routing():
        dense = score_multiple_choice(model, tokenizer, QUESTIONS, batch_size=2)
    plain = score_multiple_choice(tiny_language_model(vocab_size=258).double(), tokenizer, QUESTIONS, batch_size=5)
    assert dense.sparsity == plain.sparsity == 0
    assert_close(torch.tensor(sum(dense.log_likelihoods, [])), torch.tensor(sum(plain.log_likelihoods, [])), 1e-6)
    for item, found in zip(QUESTIONS, dense.log_likelihoods, strict=True):
        for context, choice, value in zip(item.contexts, item.choices, found, strict=True):
            ids = torch.tensor([next(tokenize([context + choice], tokenizer))])
            with model.disable_routing(), torch.no_grad():
                logits = model(ids).logits[0, -len(choice) - 1 : -1].log_softmax(-1)
            assert value == pytest.approx(logits.gather(-1, ids[0, -len(choice) :, None]).sum().item(), rel=1e-5)


def test_accuracies():
    model, tokenizer = routed(), tiny_tokenizer(bos_token="<s>")
    scores = score_multiple_choice(model, tokenizer, QUESTIONS)
    chosen = [values.index(max(values)) for values in scores.log_likelihoods]
    lengths = [[len(choice.strip()) for choice in item.choices] for item in QUESTIONS]
    shares = [
        [a / b for a, b in zip(*pair, strict=True)] for pair in zip(scores.log_likelihoods, lengths, strict=True)
    ]
    normalized = [values.index(max(values)) for values in shares]
    assert (scores.predictions, scores.predictions_normalized) == (chosen, normalized)
    assert chosen != normalized
    right = [item.label for item in QUESTIONS]
    assert scores.accuracy == sum(a == b for a, b in zip(chosen, right, strict=True)) / 5
    assert scores.accuracy_normalized == sum(a == b for a, b in zip(normalized, right, strict=True)) / 5


def test_short_contexts_run_dense():
    model, tokenizer = routed(min_tokens=30), tiny_tokenizer(bos_token="<s>")
    assert score_multiple_choice(model, tokenizer, QUESTIONS[1:3]).sparsity == 0
    assert score_multiple_choice(model, tokenizer, QUESTIONS[:1]).sparsity > 0.3
    everything = copy_config(model.config, min_tokens=0)
    assert score_multiple_choice(model, tokenizer, QUESTIONS[1:3], token_router_config=everything).sparsity > 0.3


@pytest.mark.parametrize(
    "items, message",
    [
        ([], "`items` must hold at least one question"),
        ([QUESTIONS[0], MultipleChoiceItem("Why?", [" a", ""], 0)], "Question 1 must have a context and choices"),
        ([MultipleChoiceItem("", [" a", " b"], 0)], "Question 0 must have a context and choices"),
    ],
)
def test_wrong_questions(items, message):
    with pytest.raises(ValueError, match=message):
        score_multiple_choice(routed(), tiny_tokenizer(), items)


def test_retention():
    assert retention([0.5, 0.3], [0.5, 0.4]) == pytest.approx(0.875)
    with pytest.raises(ValueError, match="one score per task; got 1 and 2"):
        retention([0.5], [0.5, 0.4])
    with pytest.raises(ValueError, match="one score per task; got 0 and 0"):
        retention([], [])
    with pytest.raises(ValueError, match="`dense_scores` must not be 0"):
        retention([0.5], [0.0])


@pytest.fixture(scope="module")
def stories(shared_data):
    """The trained Llama with a static router of 22 %, its tokenizer, and TinyStories."""
    require_package("datasets")
    folder = shared_data / "llama-stories260k"
    config = TokenRouterConfig(target_sparsity=0.22, router_type="static", min_tokens=0)
    model = TokenRouterModel(AutoModelForCausalLM.from_pretrained(folder), config).eval()
    return model, AutoTokenizer.from_pretrained(folder), load_text(str(shared_data / "text" / "tinystories"))


@pytest.mark.parametrize("fields", [{"target_sparsity": 0.41}, {"sparsity_schedule": [0.0, 0.3, 0.4, 0.6, 0.7]}])
def test_the_default_ruins_no_text(fields, shared_data):
    """Where blocks skip over half of the prompt; the paper's rule removes them from generation."""
    folder = shared_data / "llama-stories260k"
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 4
    windows = AutoTokenizer.from_pretrained(folder)(story, return_tensors="pt").input_ids[:, :128]
    found = {}
    for policy in ({}, {"decode_policy": "threshold"}):
        config = TokenRouterConfig(**{"target_sparsity": 0.4, **fields}, min_tokens=0, **policy)
        model = TokenRouterModel(AutoModelForCausalLM.from_pretrained(folder), config).eval()
        found[len(policy)] = score_continuations(model, windows, prompt_length=96).kl
    assert found[0] < 0.1 and found[1] > 20 * found[0]


@pytest.mark.slow
def test_loss_of_the_trained_llama(stories, shared_data):
    model, tokenizer, data = stories
    expected = json.loads((shared_data / "llama-stories260k" / "reference.json").read_text())["nll_nats_per_token"]
    (expected,) = expected.values()
    tokens, total = 0, 0.0
    for ids in tokenize(data.test[:100], tokenizer, single_line_breaks=True):
        ids = torch.tensor([ids[:512]])
        with disable_routing(model), torch.no_grad():
            total += F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    assert tokens == expected["tokens"]
    assert total / tokens == pytest.approx(expected["nll"], abs=2e-4)


@pytest.mark.slow
def test_what_routing_costs_the_trained_llama(stories):
    model, tokenizer, data = stories
    windows = make_windows(data.test, tokenizer, 256, limit=32, single_line_breaks=True)
    with model.disable_routing():
        dense = score_continuations(model, windows, 192, batch_size=16)
    static = score_continuations(model, windows, 192, batch_size=16)
    tokens_at_random = copy_config(model.config, router_type="random")
    random = score_continuations(model, windows, 192, batch_size=16, token_router_config=tokens_at_random)
    assert 1.3 < dense.cross_entropy < 1.7 and dense.prompt_cross_entropy == pytest.approx(1.53, abs=0.15)
    assert static.cross_entropy - dense.cross_entropy < (random.cross_entropy - dense.cross_entropy) / 5
    assert static.kl < random.kl / 5 and static.kl < 0.02
    # Skipped tokens predict nothing, which is why prompts are no measure.
    assert static.prompt_cross_entropy > 4
    assert static.sparsity == random.sparsity == pytest.approx(0.22, abs=0.005)
    assert static.kv_ratio == pytest.approx(1 - static.sparsity)


@pytest.mark.parametrize("name, accuracy", [("arc_easy", 0.26), pytest.param("piqa", 0.60, marks=pytest.mark.slow)])
def test_answers_of_the_trained_llama(stories, shared_data, name, accuracy):
    """The data's own figures: the first 150 questions as they stand, likelihoods divided by the number of tokens."""
    model, tokenizer, _ = stories
    items = load_multiple_choice(str(shared_data / "mcq" / f"{name}.parquet"), limit=150)
    bare = [
        MultipleChoiceItem(item.context.removeprefix("Question: ").removesuffix("\nAnswer:"), item.choices, item.label)
        for item in items
    ]
    with model.disable_routing():
        dense = score_multiple_choice(model, tokenizer, bare, batch_size=16)
    lengths = [
        [len(tokenizer(f" {c.strip()}", add_special_tokens=False)["input_ids"]) for c in i.choices] for i in bare
    ]
    right = 0
    for item, values, sizes in zip(bare, dense.log_likelihoods, lengths, strict=True):
        shares = [value / size for value, size in zip(values, sizes, strict=True)]
        right += shares.index(max(shares)) == item.label
    assert right / 150 == pytest.approx(accuracy, abs=0.01)
    pruned = score_multiple_choice(model, tokenizer, bare, batch_size=16)
    agreement = sum(a == b for a, b in zip(dense.predictions, pruned.predictions, strict=True)) / 150
    assert agreement > 0.9 and pruned.sparsity == pytest.approx(0.21, abs=0.01)


def test_lm_evaluation_harness(shared_data, stories):
    """Its documented call. It scores context and choice in one run, so that only dense numbers are the same."""
    HFLM = require_package("lm_eval.models.huggingface").HFLM
    Instance = require_package("lm_eval.api.instance").Instance
    model, tokenizer, _ = stories
    items = load_multiple_choice(str(shared_data / "mcq" / "arc_easy.parquet"), limit=5)
    pairs = [pair for item in items for pair in zip(item.contexts, item.choices, strict=True)]
    harness = HFLM(pretrained=model.model, tokenizer=tokenizer, batch_size=1, device="cpu")

    def ask():
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        return [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]

    routed_answers = ask()
    with model.disable_routing():
        dense_answers = ask()
        scores = score_multiple_choice(model, tokenizer, items)
    assert sum(scores.log_likelihoods, []) == pytest.approx(dense_answers, abs=1e-3)
    assert routed_answers != pytest.approx(dense_answers, abs=1e-2)
    # What it did with a router: everything but the last token was a prompt.
    ids = torch.tensor([next(tokenize(["".join(pairs[0])], tokenizer))])
    length = len(tokenizer(pairs[0][0])["input_ids"])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0, length - 1 :].log_softmax(-1)
    assert logits.gather(-1, ids[0, length:, None]).sum().item() == pytest.approx(routed_answers[0], abs=1e-3)
