"""What routing costs in quality and saves in work: scores of continuations and of multiple-choice questions.

lm-evaluation-harness takes a patched language model as it is: `HFLM(pretrained=model.model, tokenizer=tokenizer,
batch_size=1)`. It runs a context with a choice in one call, so that all but the last token of the choice are routed as
part of the prompt; what is here lets them follow it. Its larger batches are padded without a mask, which routing would
take for text.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .configuration_token_router import TokenRouterConfig
from .continuations import continuation_logits, cross_entropy, divergence
from .patching import disable_routing, make_routing_report
from .routing_report import RoutingReport
from .routing_state import RoutingState
from .token_skip_layer import CACHE_ARGUMENT


@dataclass(frozen=True)
class ContinuationScores:
    """How well a model predicts what follows its prompts, beside the dense model, and what the prompts took.

    Args:
        cross_entropy (`float`):
            Mean over the tokens of the continuations, in nats.
        kl (`float`):
            KL divergence of the predictions from those of the dense model, mean over the same tokens, in nats.
        top1_agreement (`float`):
            Share of these tokens for which both predict the same.
        prompt_cross_entropy (`float`):
            Mean over the tokens of the prompts themselves. It is no measure of a language model: later tokens decide
            which of the earlier ones are processed, and skipped tokens are predicted from too few blocks.
        sparsity (`float`):
            Share of the prompts' tokens that skipped a block, averaged over all blocks.
        flop_ratio (`float`):
            Work of the decoder blocks on the prompts over that of a dense run.
        kv_bytes (`int`):
            Keys and values of all prompts.
        dense_kv_bytes (`int`):
            The same without routing.
    """

    cross_entropy: float
    kl: float
    top1_agreement: float
    prompt_cross_entropy: float
    sparsity: float
    flop_ratio: float
    kv_bytes: int
    dense_kv_bytes: int

    @property
    def perplexity(self) -> float:
        """Exponential of `cross_entropy`: of the continuations only."""
        return math.exp(self.cross_entropy)

    @property
    def kv_ratio(self) -> float:
        """Share of the dense cache that the prompts take."""
        return self.kv_bytes / self.dense_kv_bytes


@dataclass(frozen=True)
class MultipleChoiceScores:
    """How a model answers multiple-choice questions.

    Args:
        accuracy (`float`):
            Share of the questions whose right choice has the highest log-likelihood.
        accuracy_normalized (`float`):
            The same with log-likelihoods divided by the number of characters, `acc_norm` of lm-evaluation-harness.
        predictions (`list[int]`):
            The choice of highest log-likelihood of each question.
        predictions_normalized (`list[int]`):
            The same after division.
        log_likelihoods (`list[list[float]]`):
            Of each choice of each question, in nats.
        sparsity (`float`):
            Share of the contexts' tokens that skipped a block; less than asked for where contexts are shorter than
            `min_tokens` and run dense.
    """

    accuracy: float
    accuracy_normalized: float
    predictions: list[int]
    predictions_normalized: list[int]
    log_likelihoods: list[list[float]]
    sparsity: float


@torch.no_grad()
def score_continuations(
    model: nn.Module,
    windows: Tensor,
    prompt_length: int,
    *,
    batch_size: int = 8,
    reference: Tensor | None = None,
    token_router_config: TokenRouterConfig | None = None,
) -> ContinuationScores:
    """Routes the prompts of windows of text and scores what follows them, see [`continuation_logits`].

    Args:
        model (`nn.Module`):
            A causal language model, patched or not, in evaluation mode.
        windows (`Tensor` of shape `(windows, tokens)`):
            Token ids, without padding.
        prompt_length (`int`):
            Tokens of each window that are its prompt.
        batch_size (`int`, *optional*, defaults to 8):
            Windows at a time.
        reference (`Tensor` of shape `(windows, tokens - prompt_length, vocabulary)`, *optional*):
            Logits of the dense model. A patched model without routing is its own dense model if left out; one without
            a router needs them, unless it is the dense model.
        token_router_config ([`TokenRouterConfig`], *optional*):
            What to do instead of the model's own configuration.

    Returns:
        [`ContinuationScores`]: means over all windows.

    Raises:
        ValueError: If there is no window, or `reference` does not fit.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_effml import TokenRouterConfig, TokenRouterModel, score_continuations

    >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=50)
    >>> base = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    >>> model = TokenRouterModel(base, TokenRouterConfig(target_sparsity=0.3, min_tokens=0))
    >>> scores = score_continuations(model, torch.arange(120).view(4, 30) % 50, prompt_length=20)
    >>> round(scores.sparsity, 3), round(scores.kv_ratio, 3)
    (0.3, 0.7)

    ```
    """
    if not len(windows):
        raise ValueError("`windows` must hold at least one window of text; it is empty.")
    expected = (len(windows), windows.shape[1] - prompt_length)
    if reference is not None and reference.shape[:2] != expected:
        raise ValueError(f"`reference` must have the shape {expected} and a vocabulary; got {tuple(reference.shape)}.")
    batches = windows.split(batch_size)
    references: Sequence[Tensor | None] = [None] * len(batches)
    if reference is not None:
        references = reference.split(batch_size)
    pairs = list(zip(batches, references, strict=True))
    totals: dict[str, float] = defaultdict(float)
    for batch, dense in logging.tqdm(pairs, desc="continuations", leave=False, delay=2):
        for name, mean in _score_batch(model, batch, prompt_length, dense, _options(token_router_config)).items():
            totals[name] += mean * len(batch)
    kv_bytes, dense_kv_bytes = round(totals.pop("kv_bytes")), round(totals.pop("dense_kv_bytes"))
    means = {name: total / len(windows) for name, total in totals.items()}
    return ContinuationScores(**means, kv_bytes=kv_bytes, dense_kv_bytes=dense_kv_bytes)


def _score_batch(
    model: nn.Module, batch: Tensor, prompt_length: int, dense: Tensor | None, options: dict[str, Any]
) -> dict[str, float]:
    """The fields of `ContinuationScores` as means over windows."""
    hook = _routing_hook(model)
    before = None if hook is None else hook.latest
    logits = next(continuation_logits(model, batch, prompt_length, len(batch), **options))
    report = _report_since(model, before)
    prompt = model(batch[:, :prompt_length].to(logits.device), use_cache=True, **options)
    if dense is None:
        with nullcontext() if hook is None else disable_routing(model):
            dense = next(continuation_logits(model, batch, prompt_length, len(batch)))
    dense = dense.to(logits.device)
    scores = {
        "cross_entropy": cross_entropy(logits, batch[:, prompt_length:]),
        "kl": divergence(dense, logits),
        "top1_agreement": (dense.argmax(-1) == logits.argmax(-1)).float(),
        "prompt_cross_entropy": cross_entropy(prompt.logits[:, :-1], batch[:, 1:prompt_length]),
    }
    means = {name: score.mean().item() for name, score in scores.items()}
    if report is None:
        stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in prompt[CACHE_ARGUMENT].layers) / len(batch)
        return means | {"sparsity": 0.0, "flop_ratio": 1.0, "kv_bytes": stored, "dense_kv_bytes": stored}
    return means | {
        "sparsity": report.sparsity,
        "flop_ratio": report.flop_ratio,
        "kv_bytes": report.kv_bytes / len(batch),
        "dense_kv_bytes": report.dense_kv_bytes / len(batch),
    }


@torch.no_grad()
def score_multiple_choice(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Any],
    *,
    batch_size: int = 8,
    token_router_config: TokenRouterConfig | None = None,
) -> MultipleChoiceScores:
    """Answers multiple-choice questions by log-likelihood.

    The context of a question is the prompt. It is routed once, and all its choices go on from its cache, following
    `decode_policy` like generated tokens: the choice that is scored has no say in what is skipped.

    Args:
        model (`nn.Module`):
            A causal language model, patched or not, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer. Contexts start with the beginning-of-text token where it has one.
        items (`Sequence[MultipleChoiceItem]`):
            The questions, from [`load_multiple_choice`], or anything else with `contexts`, `choices` and `label`.
        batch_size (`int`, *optional*, defaults to 8):
            Contexts at a time; their choices are scored together.
        token_router_config ([`TokenRouterConfig`], *optional*):
            What to do instead of the model's own configuration.

    Returns:
        [`MultipleChoiceScores`]: accuracies, and what was chosen.

    Raises:
        ValueError: If there is no question, or a context or a choice is empty.

    Example:

    ```python
    >>> from hf_effml.utils.text_data import load_multiple_choice

    >>> items = load_multiple_choice("arc_easy", limit=100)  # doctest: +SKIP
    >>> score_multiple_choice(model, tokenizer, items).accuracy  # doctest: +SKIP
    ```
    """
    if not items:
        raise ValueError("`items` must hold at least one question; it is empty.")
    choices: dict[tuple[int, ...], list[_Choice]] = {}
    for choice in _encode(tokenizer, items):
        choices.setdefault(choice.context, []).append(choice)
    # Contexts of like length need little padding; the longest come first, so that memory runs out at once or never.
    contexts = sorted(choices, key=len, reverse=True)
    found: list[list[float]] = [[0.0] * len(item.choices) for item in items]
    skipped = tokens = 0.0
    starts = range(0, len(contexts), batch_size)
    for start in logging.tqdm(starts, desc="questions", leave=False, delay=2):
        batch = [choices[context] for context in contexts[start : start + batch_size]]
        likelihoods, report = _score_choices(model, batch, _options(token_router_config))
        for choice, value in zip([choice for some in batch for choice in some], likelihoods, strict=True):
            found[choice.item][choice.index] = value
        size = sum(len(some[0].context) for some in batch)
        skipped, tokens = skipped + (0.0 if report is None else report.sparsity * size), tokens + size
    return _decide(items, found, skipped / tokens)


def retention(scores: Sequence[float], dense_scores: Sequence[float]) -> float:
    """Averages which share of the dense model's scores is left.

    Args:
        scores (`Sequence[float]`):
            Of the routed model, one per task.
        dense_scores (`Sequence[float]`):
            Of the dense model, in the same order.

    Returns:
        `float`: mean of their ratios; 1 where nothing is lost.

    Raises:
        ValueError: If the numbers of scores differ, there are none, or a dense score is 0.

    Example:

    ```python
    >>> from hf_effml import retention

    >>> retention([0.45, 0.8], [0.5, 0.8])
    0.95

    ```
    """
    if not scores or len(scores) != len(dense_scores):
        raise ValueError(
            f"`scores` and `dense_scores` must have one score per task; got {len(scores)} and {len(dense_scores)}."
        )
    if not all(dense_scores):
        raise ValueError(f"`dense_scores` must not be 0: nothing of it can be retained; got {list(dense_scores)}.")
    return sum(score / dense for score, dense in zip(scores, dense_scores, strict=True)) / len(scores)


@dataclass(frozen=True)
class _Choice:
    """A continuation to score: of which question, which of its choices, and the tokens."""

    item: int
    index: int
    context: tuple[int, ...]
    ids: list[int]


def _encode(tokenizer: Any, items: Sequence[Any]) -> Iterator[_Choice]:
    """Tokens of a choice are those that it adds to its context, as a tokenizer may see to where words begin."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encode(text: str) -> list[int]:
        return start + tokenizer(text, add_special_tokens=False)["input_ids"]

    for number, item in enumerate(items):
        for index, (text, choice) in enumerate(zip(item.contexts, item.choices, strict=True)):
            context = encode(text)
            ids = encode(text + choice)[len(context) :]
            if not context or not ids:
                raise ValueError(f"Question {number} must have a context and choices with text; got {item}.")
            yield _Choice(number, index, tuple(context), ids)


def _score_choices(
    model: nn.Module, batch: Sequence[Sequence[_Choice]], options: dict[str, Any]
) -> tuple[list[float], RoutingReport | None]:
    """Log-likelihoods of choices, grouped by their context."""
    device = next(model.parameters()).device
    hook = _routing_hook(model)
    before = None if hook is None else hook.latest
    lengths = torch.tensor([len(some[0].context) for some in batch], device=device)
    prompts, real = (part.flip(1) for part in _pad([some[0].context[::-1] for some in batch], device))
    padded = not bool(real.all())
    inputs = {"attention_mask": real.long(), "position_ids": (real.cumsum(1) - 1).clamp(min=0)} if padded else {}
    prompt = model(prompts, **inputs, use_cache=True, logits_to_keep=1, **options)
    report = _report_since(model, before)
    rows = torch.tensor([row for row, some in enumerate(batch) for _ in some], device=device)
    targets, counted = _pad([choice.ids for some in batch for choice in some], device)
    logits = prompt.logits[rows]
    if targets.shape[1] > 1:
        cache = prompt[CACHE_ARGUMENT]
        cache.batch_select_indices(rows)
        given = targets[:, :-1]
        if padded:
            # What a choice is padded with comes after it, where it is seen by nothing that counts.
            inputs["attention_mask"] = torch.cat([real[rows], torch.ones_like(given, dtype=torch.bool)], dim=1).long()
            inputs["position_ids"] = lengths[rows].unsqueeze(1) + torch.arange(given.shape[1], device=device)
        options = options | inputs | ({} if hook is None else {"as_generated": True})
        more = model(given, **{CACHE_ARGUMENT: cache}, use_cache=True, **options)
        logits = torch.cat([logits, more.logits], dim=1)
    return (-(cross_entropy(logits, targets) * counted).sum(-1)).tolist(), report


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pads on the right, and says what is no padding."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) < lengths.unsqueeze(1)


def _decide(items: Sequence[Any], found: list[list[float]], sparsity: float) -> MultipleChoiceScores:
    normalized = [
        [value / len(choice.strip()) for value, choice in zip(values, item.choices, strict=True)]
        for values, item in zip(found, items, strict=True)
    ]
    chosen, chosen_normalized = ([row.index(max(row)) for row in table] for table in (found, normalized))
    return MultipleChoiceScores(
        accuracy=_share_right(chosen, items),
        accuracy_normalized=_share_right(chosen_normalized, items),
        predictions=chosen,
        predictions_normalized=chosen_normalized,
        log_likelihoods=found,
        sparsity=sparsity,
    )


def _share_right(predictions: Sequence[int], items: Sequence[Any]) -> float:
    return sum(found == item.label for found, item in zip(predictions, items, strict=True)) / len(items)


def _options(config: TokenRouterConfig | None) -> dict[str, Any]:
    return {} if config is None else {"token_router_config": config}


def _routing_hook(model: nn.Module) -> Any:
    """The hook of a patched model; `None` where there is none."""
    return next((part.token_routing_hook for part in model.modules() if hasattr(part, "token_routing_hook")), None)


def _report_since(model: nn.Module, before: RoutingState | None) -> RoutingReport | None:
    """The report on a prompt that was routed since then; `None` where it ran dense."""
    hook = _routing_hook(model)
    return None if hook is None or hook.latest is before else make_routing_report(model)
