"""Routing beside the dense model, other rules and other pruners: quality, work, cache and time, in one report."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from hf_effml.utils.benchmark import compare
from hf_effml.utils.model_kinds import check_task
from hf_effml.utils.report import Column, Report

from .baselines import block_pruner, remove_blocks, remove_sub_blocks, shortgpt_blocks
from .block_influence import block_influence
from .configuration_token_router import TokenRouterConfig
from .continuations import continuation_logits
from .evaluation import retention, score_continuations, score_multiple_choice
from .modeling_token_router import TokenRouterModel
from .patching import apply_token_router, copy_config, disable_routing, find_decoder, is_patched, make_routing_report


__all__ = [
    "VARIANTS",
    "RoutingVariant",
    "compare_routing",
    "draw_routing",
    "load_with_router",
    "make_variants",
    "possible_variants",
    "score_router",
]

VARIANTS = {
    "dense": "dense",
    "random": "random tokens",
    "static": "static router",
    "dynamic": "dynamic router",
    "one_pass": "one-pass router",
    "kv_kept": "K/V kept",
    "shortgpt": "ShortGPT",
    "block_pruner": "BlockPruner",
}
# From which shortfall on a task's sparsity is worth a remark.
_SHORTFALL = 0.05


@dataclass(frozen=True)
class RoutingVariant:
    """A model, and how to run it.

    Args:
        name (`str`):
            Name of its row.
        model (`PreTrainedModel`):
            The model.
        config ([`TokenRouterConfig`], *optional*):
            What to route as.
        attentions (`Sequence[int]`, *optional*, defaults to `()`):
            Blocks whose attention was removed.
        mlps (`Sequence[int]`, *optional*, defaults to `()`):
            Blocks whose MLP was removed.
        dense (`bool`, *optional*, defaults to `False`):
            Run a patched model without routing.
    """

    name: str
    model: PreTrainedModel
    config: TokenRouterConfig | None = None
    attentions: Sequence[int] = ()
    mlps: Sequence[int] = ()
    dense: bool = False

    @property
    def is_smaller(self) -> bool:
        """Whether something was removed."""
        return bool(self.attentions or self.mlps)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the model's calls."""
        return {} if self.config is None else {"token_router_config": self.config}

    def running(self) -> AbstractContextManager:
        """What to run it in."""
        return disable_routing(self.model) if self.dense else nullcontext()


def possible_variants(config: TokenRouterConfig) -> list[str]:
    """Lists what can be compared, without the slow one (`"block_pruner"`).

    Args:
        config ([`TokenRouterConfig`]):
            The router's settings, which rule some out.

    Returns:
        `list[str]`: keys of `VARIANTS`.
    """
    ruled_out = {"block_pruner"}
    if config.num_protected_first < 1:
        ruled_out |= {"dynamic", "one_pass"}
    if config.skip_unit == "mlp":
        ruled_out.add("kv_kept")
    return [row for row in VARIANTS if row not in ruled_out]


def make_variants(
    rows: Sequence[str],
    model: PreTrainedModel,
    config: TokenRouterConfig,
    calibration: Tensor,
    *,
    trained: bool = True,
    batch_size: int = 8,
) -> dict[str, RoutingVariant]:
    """Makes what is compared: the dense model first, asked for or not.

    Args:
        rows (`Sequence[str]`):
            Keys of `VARIANTS`.
        model (`PreTrainedModel`):
            The patched language model.
        config ([`TokenRouterConfig`]):
            What to route as; the others skip or remove as much.
        calibration (`Tensor` of shape `(windows, tokens)`):
            Texts that tell which blocks ShortGPT and BlockPruner remove.
        trained (`bool`, *optional*, defaults to `True`):
            Whether the router was trained; only the name of its row depends on it.
        batch_size (`int`, *optional*, defaults to 8):
            Texts at a time.

    Returns:
        `dict[str, RoutingVariant]`: by the key of `VARIANTS`.
    """
    found = {}
    for row in dict.fromkeys(["dense", *rows]):
        name = VARIANTS[row]
        if row == "dense":
            found[row] = RoutingVariant(name, model, dense=True)
        elif row in ("shortgpt", "block_pruner"):
            found[row] = _without_parts(row, model, config, calibration, batch_size)
        elif row == "kv_kept":
            name = f"{VARIANTS[config.router_type]}, {name}"
            found[row] = RoutingVariant(name, model, copy_config(config, kv_policy="keep"))
        elif row in ("dynamic", "one_pass"):
            name = name if trained else f"{name}, untrained"
            found[row] = RoutingVariant(name, model, copy_config(config, router_type=row))
        else:
            found[row] = RoutingVariant(name, model, copy_config(config, router_type=row, selection="budget"))
    return found


def compare_routing(
    variants: Mapping[str, RoutingVariant],
    windows: Tensor,
    prompt_length: int,
    *,
    tasks: Mapping[str, Sequence[Any]] | None = None,
    tokenizer: Any = None,
    batch_size: int = 8,
    rounds: int = 7,
) -> Report:
    """Routes prompts, scores what follows them, and measures what the prompts take.

    Args:
        variants (`Mapping[str, RoutingVariant]`):
            From [`make_variants`]; the first is the dense model, patched.
        windows (`Tensor` of shape `(windows, tokens)`):
            Texts.
        prompt_length (`int`):
            Tokens of each that are its prompt.
        tasks (`Mapping[str, Sequence[MultipleChoiceItem]]`, *optional*):
            Questions by the name of their column.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer of the questions.
        batch_size (`int`, *optional*, defaults to 8):
            Prompts at a time.
        rounds (`int`, *optional*, defaults to 7):
            Interleaved rounds of the time; the median counts.

    Returns:
        [`~hf_effml.utils.report.Report`]: a row per variant under its `name`; shares are those of the dense model.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_effml import TokenRouterConfig, apply_token_router
    >>> from hf_effml.token_router.comparison import compare_routing, make_variants

    >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=50)
    >>> model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    >>> config = TokenRouterConfig(target_sparsity=0.3, min_tokens=0)
    >>> texts = torch.arange(120).view(4, 30) % 50
    >>> variants = make_variants(["static"], apply_token_router(model, config), config, texts)
    >>> report = compare_routing(variants, texts, prompt_length=20, rounds=1)
    >>> [(name, round(row["sparsity"], 2)) for name, row in report.rows.items()]
    [('dense', 0.0), ('static router', 0.3)]

    ```
    """
    tasks = tasks or {}
    timings = _time([*variants.values()], windows[:batch_size, :prompt_length], rounds)
    dense = next(iter(variants.values()))
    report = Report("evaluate_token_router", _columns(tasks, dense.model.device, batch_size))
    with dense.running():
        batches = continuation_logits(dense.model, windows, prompt_length, batch_size)
        reference = torch.cat([logits.cpu() for logits in batches])
    for variant, timing in logging.tqdm([*zip(variants.values(), timings, strict=True)], desc="rows", leave=False):
        how: dict[str, Any] = {"batch_size": batch_size, "token_router_config": variant.config}
        with variant.running():
            scores = score_continuations(variant.model, windows, prompt_length, reference=reference, **how)
            answers = {
                name: score_multiple_choice(variant.model, tokenizer, items, **how) for name, items in tasks.items()
            }
        share, work, cache = scores.sparsity, scores.flop_ratio, scores.kv_ratio
        if variant.is_smaller:
            share, work, cache = _removed(dense.model, variant, windows[:1, :prompt_length])
        accuracy = {name: answer.accuracy_normalized for name, answer in answers.items()}
        of_dense = report.rows[dense.name]["accuracy"] if report.rows else accuracy
        report.add(
            variant.name,
            cross_entropy=scores.cross_entropy,
            kl=scores.kl,
            top1_agreement=scores.top1_agreement,
            prompt_cross_entropy=scores.prompt_cross_entropy,
            sparsity=share,
            work=work,
            cache=cache,
            time=1 / timings[0].speedup(timing),
            time_ms=timing.median,
            accuracy=accuracy,
            accuracy_unnormalized={name: answer.accuracy for name, answer in answers.items()},
            task_sparsity={name: answer.sparsity for name, answer in answers.items()},
            retention=retention([*accuracy.values()], [*of_dense.values()])
            if of_dense and all(of_dense.values())
            else None,
        )
    report.notes += _notes(report, variants, windows.shape[1] - prompt_length, prompt_length, batch_size)
    return report


def score_router(model: TokenRouterModel, windows: Tensor, prompt_length: int, batch_size: int = 8) -> Report:
    """Scores a trained router beside the dense model, random tokens and the static rule, without measuring time.

    Args:
        model ([`TokenRouterModel`]):
            The model, in evaluation mode.
        windows (`Tensor` of shape `(windows, tokens)`):
            Texts that it has not seen.
        prompt_length (`int`):
            Tokens of each that are its prompt.
        batch_size (`int`, *optional*, defaults to 8):
            Texts at a time.

    Returns:
        [`~hf_effml.utils.report.Report`]: a row for each, with the fields of [`ContinuationScores`].
    """
    nothing = {"target_sparsity": 0.0, "sparsity_schedule": [0.0] * len(model.config.schedule)}
    ways: dict[str, dict[str, Any]] = {
        "dense": nothing,
        "random tokens": {"router_type": "random", "selection": "budget"},
        "first and newest tokens": {"router_type": "static", "selection": "budget"},
        "trained router": {},
    }
    report = Report(
        "train_token_router",
        {
            "cross_entropy": Column(
                "cross-entropy", ".4f", change="difference", card="Cross-entropy of continuations"
            ),
            "kl": Column("KL to dense", ".5f", card="KL divergence from the dense model"),
            "sparsity": Column("skipped", ".1%", card="Share of the prompt's tokens that skip a block"),
            "flop_ratio": Column("work", ".1%", card="Work of the blocks on the prompt"),
            "kv_ratio": Column("cache", ".1%", card="Keys and values of the prompt"),
            "static_kl": Column("", card="KL divergence with the static rule, first and newest tokens"),
        },
        notes=[f"Prompts of {prompt_length} tokens are routed, what follows them is scored."],
    )
    for name, changes in ways.items():
        config = copy_config(model.config, **changes)
        scores = score_continuations(model, windows, prompt_length, batch_size=batch_size, token_router_config=config)
        report.add(name, **asdict(scores), kv_ratio=scores.kv_ratio)
    report.rows["trained router"]["static_kl"] = report.rows["first and newest tokens"]["kl"]
    return report


def load_with_router(
    name_or_path: str,
    base_model: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    target_sparsity: float | None = None,
    min_tokens: int | None = None,
    random_seed: int = 0,
) -> tuple[PreTrainedModel, Any, TokenRouterConfig, bool]:
    """Loads a language model that routes: by its own router, or by the static rule where it has none.

    Args:
        name_or_path (`str`):
            Folder or Hub id of a router, a full checkpoint, or a language model of a supported family.
        base_model (`str`, *optional*):
            The language model of a router, if not the one that it names.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights.
        device (`str`, *optional*, defaults to `"cpu"`):
            Where to.
        target_sparsity (`float`, *optional*):
            Share of the tokens to skip, evenly over the blocks. A router has its own.
        min_tokens (`int`, *optional*):
            Shorter prompts run dense. A router has its own.
        random_seed (`int`, *optional*, defaults to 0):
            Seed of random tokens.

    Returns:
        `tuple`: the patched model in evaluation mode, its tokenizer, the settings, and whether the router was trained.

    Raises:
        ValueError: If nothing says what to skip.
    """
    tokenizer_of = name_or_path
    if check_task(name_or_path, "AutoModelForCausalLM") == TokenRouterConfig.model_type:
        found = TokenRouterConfig.from_pretrained(name_or_path)
        tokenizer_of = base_model or found.base_model_name_or_path or name_or_path
        names = [name_or_path] if base_model is None else [base_model, name_or_path]
        model = TokenRouterModel.from_pretrained(*names, dtype=dtype).model
    else:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    changes: dict[str, Any] = {}
    if target_sparsity is not None:
        changes |= {"target_sparsity": target_sparsity, "sparsity_schedule": None}
    if min_tokens is not None:
        changes["min_tokens"] = min_tokens
    has_router = is_patched(find_decoder(model))
    if not has_router:
        if target_sparsity is None:
            raise ValueError(f"`{name_or_path}` has no router. Say what to skip, for example `--target_sparsity 0.3`.")
        apply_token_router(model, TokenRouterConfig(**changes))
    model = model.to(device).eval()
    config = copy_config(find_decoder(model).token_routing_hook.config, **changes, random_seed=random_seed)
    if config.target_sparsity == 0:
        raise ValueError("`target_sparsity` is 0: nothing is skipped. Give another one with `--target_sparsity 0.3`.")
    return model, AutoTokenizer.from_pretrained(tokenizer_of), config, has_router and config.is_learned


def draw_routing(
    path: str | Path, name: str, model: PreTrainedModel, tokenizer: Any, config: TokenRouterConfig, ids: Tensor
) -> None:
    """Draws which blocks process which tokens of a prompt, however short it is.

    Args:
        path (`str` or `Path`):
            PNG file to write.
        name (`str`):
            What to call the model.
        model (`PreTrainedModel`):
            The patched model.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        config ([`TokenRouterConfig`]):
            What to route as.
        ids (`Tensor` of shape `(tokens,)`):
            The prompt.
    """
    from hf_effml.utils.plotting import plot_routing

    with torch.inference_mode():
        model(ids[None].to(model.device), use_cache=False, token_router_config=copy_config(config, min_tokens=0))
    report = make_routing_report(model)
    title = f"{name}, {VARIANTS[config.router_type]}: {report.sparsity:.0%} skipped"
    plot_routing(report.keep_masks[:, 0].cpu(), [tokenizer.decode([token]) for token in ids], path, title=title)


def _columns(tasks: Mapping[str, Any], device: Any, batch_size: int) -> dict[str, Column]:
    return {
        "cross_entropy": Column("cross-entropy", ".3f", change="difference", card="Cross-entropy of continuations"),
        "kl": Column("KL", ".4f", card="KL divergence from the dense model"),
        "prompt_cross_entropy": Column("prompt CE", ".3f"),
        "sparsity": Column("skipped", ".1%", card="Share of the prompt's tokens that skip a block"),
        "work": Column("work", ".1%", card="Work of the blocks on the prompt"),
        "cache": Column("cache", ".1%", card="Keys and values of the prompt"),
        "time": Column("time", ".1%"),
        "time_ms": Column("", card=f"Time of the prompt (ms per batch, {device}, batch {batch_size})"),
        **{f"accuracy.{task}": Column(task, ".1%") for task in tasks},
        **({"retention": Column("retention", ".1%")} if tasks else {}),
    }


def _notes(
    report: Report, variants: Mapping[str, RoutingVariant], after: int, prompt: int, batch_size: int
) -> list[str]:
    """What has to be known to read the table."""
    notes = [
        f"Cross-entropy and KL to the dense model are those of {after} tokens after routed prompts of {prompt}. "
        "Prompt CE is that of the prompts themselves, where routing looks ahead: no measure of the model. Work, cache "
        f"and time (batch {batch_size}) are shares of the dense model's for the prompts."
    ]
    dense = next(iter(variants.values()))
    config = next((each.config for each in variants.values() if each.config is not None), None)
    if report.rows[dense.name]["accuracy"]:
        notes[0] += " Accuracies are normalised by length."
    if config is None:
        return notes
    if any(variant.is_smaller for variant in variants.values()):
        skips = config.decode_policy == "threshold"
        decoding = [skips and share > config.decode_threshold for share in config.schedule]
        routed = (config.target_sparsity * prompt + sum(decoding) / len(decoding) * after) / (prompt + after)
        smaller = [report.rows[each.name]["sparsity"] for each in variants.values() if each.is_smaller]
        notes.append(
            f"* These parts are missing for the continuation, too: {' and '.join(map('{:.1%}'.format, smaller))} "
            f"of the blocks that {prompt + after} tokens pass are spared, by routing {routed:.1%}."
        )
    for task in report.rows[dense.name]["task_sparsity"]:
        found = max(row["task_sparsity"][task] for row in report.rows.values())
        if found < config.target_sparsity - _SHORTFALL and len(report.rows) > 1:
            notes.append(
                f"Of the tokens of {task}, {found:.1%} were skipped: contexts of less than {config.min_tokens} tokens "
                "run dense. `--min_tokens 0` routes all."
            )
    return notes


def _time(variants: Sequence[RoutingVariant], prompts: Tensor, rounds: int) -> list[Any]:
    """Times of one batch of prompts, as `generate` begins with."""

    def run(variant: RoutingVariant) -> None:
        with variant.running():
            variant.model(prompts.to(variant.model.device), use_cache=True, logits_to_keep=1, **variant.options)

    calls = {str(index): partial(run, variant) for index, variant in enumerate(variants)}
    with torch.inference_mode():
        return list(compare(calls, agree=[], rounds=rounds, threads=torch.get_num_threads()).values())


def _removed(model: PreTrainedModel, variant: RoutingVariant, prompt: Tensor) -> tuple[float, float, float]:
    """Share of the parts that were removed, work and cache: counted as if all tokens of a prompt skipped them."""
    config = find_decoder(model).token_routing_hook.config

    def skipping(blocks: Sequence[int], unit: str) -> Any:
        nobody = torch.zeros_like(prompt, dtype=torch.bool)
        plain = copy_config(config, skip_unit=unit, kv_policy="drop")
        # A block that keeps all, because there has to be one.
        masks = {0: ~nobody} | dict.fromkeys(blocks, nobody)
        with torch.inference_mode():
            model(prompt.to(model.device), keep_mask=masks, token_router_config=plain, use_cache=False)
        return make_routing_report(model)

    attentions = skipping(variant.attentions, "block")
    with_their_mlps = skipping(variant.attentions, "mlp")
    work = attentions.flop_ratio - with_their_mlps.flop_ratio + skipping(variant.mlps, "mlp").flop_ratio
    share = (len(variant.attentions) + len(variant.mlps)) / (2 * len(config.schedule))
    return share, work, attentions.kv_bytes / attentions.dense_kv_bytes


def _without_parts(
    row: str, model: PreTrainedModel, config: TokenRouterConfig, calibration: Tensor, batch_size: int
) -> RoutingVariant:
    """A model without as large a share of its blocks, or of its attentions and MLPs, as tokens skip."""
    blocks = len(config.schedule)
    if row == "shortgpt":
        count = max(round(config.target_sparsity * blocks), 1)
        gone = shortgpt_blocks(block_influence(model, calibration, batch_size), count)
        name = f"{VARIANTS[row]}, {count} of {blocks} blocks*"
        return RoutingVariant(name, remove_blocks(model, gone), attentions=gone, mlps=gone)
    count = max(round(2 * config.target_sparsity * blocks), 1)
    parts = block_pruner(model, calibration, count, batch_size)
    attentions, mlps = ([block for kind, block in parts if kind == wanted] for wanted in ("attention", "mlp"))
    name = f"{VARIANTS[row]}, {count} of {2 * blocks} parts*"
    return RoutingVariant(name, remove_sub_blocks(model, parts), attentions=attentions, mlps=mlps)
