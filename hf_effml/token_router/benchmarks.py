"""What token routing gains and costs in time and memory, each measured beside the dense model once outputs agree."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_effml.utils.benchmark import check_agreement, compare
from hf_effml.utils.report import Column, Report

from . import routing_state, token_skip_layer
from .baselines import gate_multiply, remove_blocks
from .configuration_token_router import TokenRouterConfig
from .modeling_token_router import TokenRouterModel
from .patching import copy_config, remove_token_router
from .token_skip_layer import CACHE_ARGUMENT, score_tokens


__all__ = ["bench_choosing", "bench_decoding", "bench_prompts", "bench_zero_schedule", "new_report"]

DENSE, PLAIN, ZERO, FREE = "dense", "no router", "schedule of zeros", "skipping for free"
SHORTGPT, GATE = "ShortGPT, blocks removed", "computed, then multiplied"
LEARNED = {"one_pass": "one-pass router", "dynamic": "dynamic router", "static": "static router"}
KEEP = "one-pass router, K/V kept"
_TIMES = {
    "batch": Column("batch"),
    "sparsity": Column("sparsity"),
    "ms": Column("ms", ".3f"),
    "spread_ms": Column("spread ms", ".3f"),
    "cpu_ms": Column("cpu ms", ".3f"),
    "faster_than_dense": Column("faster than dense", ".3f"),
    "bound": Column("bound", ".3f"),
    "kv": Column("kv", ".1%"),
}


def new_report(tokens: int) -> Report:
    """Makes an empty report with the parts that the functions here fill.

    Args:
        tokens (`int`):
            Tokens of a prompt.

    Returns:
        [`~hf_effml.utils.report.Report`]: with parts `prompts`, `decoding` and `choosing`.
    """
    report = Report("bench_token_router")
    report.add_part("prompts", _TIMES, f"Prompts of {tokens} tokens")
    report.add_part("decoding", _TIMES, "Decoding after them")
    report.add_part("choosing", title="Router, scores and index work")
    return report


def bench_zero_schedule(part: Report, model: TokenRouterModel, given: Tensor, *, rounds: int, threads: int) -> None:
    """Measures a router that skips nothing beside the model without one; outputs must be equal bit by bit.

    Args:
        part ([`~hf_effml.utils.report.Report`]):
            Gets a row for each.
        model ([`TokenRouterModel`]):
            The model; its own schedule is all zeros.
        given (`Tensor` of shape `(batch, tokens)`):
            Prompts.
        rounds (`int`):
            Interleaved rounds.
        threads (`int`):
            Threads of torch.

    Raises:
        RuntimeError: If outputs differ.
    """
    # With the same weights: at another place in memory they can round differently.
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    plain = remove_token_router(copy.deepcopy(model.model, weights))
    functions = {PLAIN: partial(_prompt, plain, given), ZERO: partial(_prompt, model, given)}
    timings = compare(functions, [[PLAIN, ZERO]], rounds=rounds, threads=threads, tolerance=0.0)
    for name, timing in timings.items():
        _add(part, given, 0.0, name, timing, timings[PLAIN], bound=1.0, kv=1.0)


def bench_prompts(
    part: Report,
    model: TokenRouterModel,
    given: Tensor,
    sparsity: float,
    *,
    rounds: int,
    threads: int,
    tolerance: float = 1e-4,
) -> None:
    """Measures prompts: routers of three types, skipping that costs nothing, gates that save nothing, blocks removed.

    Args:
        part ([`~hf_effml.utils.report.Report`]):
            Gets a row for each.
        model ([`TokenRouterModel`]):
            The model.
        given (`Tensor` of shape `(batch, tokens)`):
            Prompts.
        sparsity (`float`):
            Share of the tokens that skip a block.
        rounds (`int`):
            Interleaved rounds.
        threads (`int`):
            Threads of torch.
        tolerance (`float`, *optional*, defaults to 1e-4):
            How far skipping may be from the same decisions computed densely and multiplied.

    Raises:
        RuntimeError: If it is further.
    """
    configs = {name: _config(model, sparsity, router_type=kind) for kind, name in LEARNED.items()}
    if "flash" not in model.model.config._attn_implementation:
        configs[KEEP] = _config(model, sparsity, kv_policy="keep")
    functions: dict[str, Callable] = {DENSE: partial(_dense, model, given)}
    functions |= {name: partial(_prompt, model, given, config) for name, config in configs.items()}
    one_pass = configs[LEARNED["one_pass"]]
    works: dict[str, float] = {DENSE: 1.0}
    caches: dict[str, float | None] = {DENSE: 1.0}
    for name, config in configs.items():
        functions[name]()
        works[name], caches[name] = model.routing_report.flop_ratio, _cache_share(model, given, config)
    functions[GATE] = partial(_multiplied, model, given, one_pass)
    works[GATE], caches[GATE] = 1.0, None
    functions[FREE] = partial(_for_free, model, given, one_pass)
    works[FREE], caches[FREE] = works[LEARNED["static"]], None
    pruned, removed = _shortgpt(model, sparsity)
    functions[SHORTGPT] = partial(_prompt, pruned, given)
    works[SHORTGPT] = caches[SHORTGPT] = 1 - removed / len(model.config.schedule)
    pair = (LEARNED["one_pass"], GATE)
    check_agreement({name: functions[name]() for name in pair}, tolerance=tolerance)
    timings = compare(functions, [], rounds=rounds, threads=threads)
    for name, timing in timings.items():
        _add(part, given, sparsity, name, timing, timings[DENSE], bound=1 / works[name], kv=caches[name])


def bench_decoding(
    part: Report, model: TokenRouterModel, given: Tensor, sparsity: float, steps: int, *, rounds: int, threads: int
) -> None:
    """Measures single steps on the cache of a prompt, which is cut back after each round.

    Args:
        part ([`~hf_effml.utils.report.Report`]):
            Gets a row for each policy.
        model ([`TokenRouterModel`]):
            The model.
        given (`Tensor` of shape `(batch, tokens)`):
            Prompts.
        sparsity (`float`):
            Share of the tokens that skip a block.
        steps (`int`):
            Tokens to generate in a round.
        rounds (`int`):
            Interleaved rounds.
        threads (`int`):
            Threads of torch.
    """
    configs = {
        DENSE: model.config,
        "every token processed": _config(model, sparsity),
        "blocks over 50 % skipped": _config(
            model, sparsity, sparsity_schedule=_stepped(model, sparsity), decode_policy="threshold"
        ),
    }
    functions = {}
    for name, config in configs.items():
        cache = DynamicCache(config=model.model.config)
        model(given, token_router_config=config, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        functions[name] = partial(_decode, model, given[:, -1:], cache, config, steps)
    timings = compare(functions, [], rounds=rounds, threads=threads)
    for name, timing in timings.items():
        _add(part, given, sparsity, name, timing, timings[DENSE], calls=steps)


def bench_choosing(
    part: Report, model: TokenRouterModel, given: Tensor, sparsity: float, *, rounds: int, threads: int
) -> None:
    """Measures what scoring, routing and sorting take of a dense run: the steps alone, as often as a routed run does.

    Args:
        part ([`~hf_effml.utils.report.Report`]):
            Gets a row.
        model ([`TokenRouterModel`]):
            The model.
        given (`Tensor` of shape `(batch, tokens)`):
            Prompts.
        sparsity (`float`):
            Share of the tokens that skip a block.
        rounds (`int`):
            Interleaved rounds.
        threads (`int`):
            Threads of torch.
    """
    functions: dict[str, Callable] = {DENSE: partial(_dense, model, given)}
    for kind in ("one_pass", "dynamic"):
        with _recorded() as (scored, states):
            _prompt(model, given, _config(model, sparsity, router_type=kind))
        functions[kind] = partial(_choose, scored, states[0])
    timings = compare(functions, [], rounds=rounds, threads=threads)
    row: dict[str, Any] = {"batch": len(given), "sparsity": sparsity}
    for kind in ("one_pass", "dynamic"):
        row[f"{kind}_ms"] = round(timings[kind].median, 3)
        row[f"{kind}_share_of_dense"] = f"{1 / timings[DENSE].speedup(timings[kind]):.1%}"
    part.add(f"batch {len(given)}, {sparsity:g}", **row)


def _add(
    part: Report, given: Tensor, sparsity: float, name: str, timing: Any, dense: Any, calls: int = 1, **others: Any
) -> None:
    times = {key: round(value / calls, 3) for key, value in timing.as_row().items()}
    part.add(
        f"{name} ({len(given)} x {sparsity:g})",
        model=name,
        batch=len(given),
        sparsity=sparsity,
        **times,
        faster_than_dense=round(dense.speedup(timing), 3),
        **others,
    )


def _config(model: TokenRouterModel, sparsity: float, **changes: Any) -> TokenRouterConfig:
    return copy_config(model.config, target_sparsity=sparsity, **changes)


def _prompt(model: Any, given: Tensor, config: Any = None, use_cache: bool = True) -> Tensor:
    options = {} if config is None else {"token_router_config": config}
    return model(given, use_cache=use_cache, logits_to_keep=1, **options).logits


def _dense(model: TokenRouterModel, given: Tensor) -> Tensor:
    with model.disable_routing():
        return _prompt(model.model, given)


def _multiplied(model: TokenRouterModel, given: Tensor, config: Any) -> Tensor:
    with gate_multiply(model):
        return _prompt(model, given, config, use_cache=False)


def _for_free(model: TokenRouterModel, given: Tensor, config: Any) -> Tensor:
    """The blocks alone on as many tokens as each of them processes, cut off at the end: no choosing, no moving."""
    decoder, kept = model.decoder, [round((1 - share) * given.shape[1]) for share in config.schedule]
    hidden = decoder.embed_tokens(given)
    rotary = decoder.rotary_emb(hidden, torch.arange(given.shape[1], device=given.device).unsqueeze(0))
    cache = DynamicCache(config=model.model.config)
    mask = None
    if model.model.config._attn_implementation == "eager":
        columns = torch.arange(given.shape[1], device=given.device)
        mask = torch.zeros_like(columns[:, None] + columns, dtype=hidden.dtype)
        mask = mask.masked_fill(columns > columns[:, None], torch.finfo(hidden.dtype).min)[None, None]
    for block, count in zip(decoder.layers, kept, strict=True):
        some = tuple(part[:, :count] for part in rotary)
        own = None if mask is None else mask[..., :count, :count]
        done = block(hidden[:, :count], attention_mask=own, position_embeddings=some, **{CACHE_ARGUMENT: cache})
        hidden = torch.cat([done, hidden[:, count:]], dim=1)
    return model.model.lm_head(decoder.norm(hidden)[:, -1:])


def _shortgpt(model: TokenRouterModel, sparsity: float) -> tuple[Any, int]:
    """As many blocks removed as come nearest to the share; which ones makes no difference to the time."""
    blocks = len(model.config.schedule)
    count = max(1, round(sparsity * blocks))
    return remove_blocks(model.model, range(1, 1 + count)), count


def _cache_share(model: TokenRouterModel, given: Tensor, config: Any) -> float:
    """Bytes that the cache really holds, over those of a dense run."""
    sizes = []
    for chosen in (config, model.config):
        cache = DynamicCache(config=model.model.config)
        model(given, token_router_config=chosen, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        sizes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
    return sizes[0] / sizes[1]


def _stepped(model: TokenRouterModel, sparsity: float) -> list[float]:
    """A schedule of the same mean in which some blocks skip nearly everything and one what is left."""
    schedule, left = [0.0] * len(model.config.schedule), sparsity * len(model.config.schedule)
    for block in range(1, len(schedule) - 1):
        schedule[block] = round(min(0.9, left), 9)
        left -= schedule[block]
    return schedule


def _decode(model: TokenRouterModel, token: Tensor, cache: Any, config: Any, steps: int) -> Tensor:
    for _ in range(steps):
        logits = model(token, token_router_config=config, **{CACHE_ARGUMENT: cache}).logits
    cache.crop(-steps)
    return logits


@contextmanager
def _recorded() -> Iterator[tuple[list, list]]:
    """Notes the arguments of every scoring, and the states that decide."""
    scored, states = [], []
    score, start = token_skip_layer.score_tokens, routing_state.RoutingState.__post_init__

    def noting(*arguments: Any) -> Any:
        scored.append(arguments)
        return score(*arguments)

    def starting(state: Any) -> None:
        states.append(state)
        start(state)

    noting_scores = mock.patch.object(token_skip_layer, "score_tokens", noting)
    with noting_scores, mock.patch.object(routing_state.RoutingState, "__post_init__", starting):
        yield scored, states


def _choose(scored: list, state: Any) -> None:
    """All scores, decisions and orders of one routed run."""
    fresh = replace(state, plans={}, logits={}, scores={})
    scores = iter([score_tokens(*arguments) for arguments in scored])
    for block in range(len(fresh.schedule)):
        plan = fresh.plan_for(block)
        if plan is not None:
            plan.compact()
        if fresh.wants_score(block):
            score = next(scores)
            whole = score if score.shape == fresh.real.shape else score.new_zeros(fresh.real.shape)
            fresh.add_score(block, whole)
