"""Measures what token routing keeps and saves: quality, work, cache and time beside the dense model and other pruners.

MODEL is a router, a full checkpoint, or any language model of a supported family together with --target_sparsity.
Prompts are routed, and what follows them is scored: the continuations of texts, and the choices of questions.

Example: `hf-effml evaluate token-router token-router-smoke --tasks mcq/arc_easy.parquet --min_tokens 0`
"""

import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_effml.cli.parsing import did_you_mean, parse_arguments, run_script


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hf_effml import TokenRouterConfig
    from hf_effml.hub import CardResult
    from hf_effml.utils.text_data import MultipleChoiceItem


ROWS = {
    "dense": "dense",
    "random": "random tokens",
    "static": "static router",
    "dynamic": "dynamic router",
    "one_pass": "one-pass router",
    "kv_kept": "K/V kept",
    "shortgpt": "ShortGPT",
    "block_pruner": "BlockPruner",
}
# Windows that removal is calibrated on.
_CALIBRATION = 32
# From which shortfall on a task's sparsity is worth a remark.
_SHORTFALL = 0.05
_WIDTH = 119


@dataclass
class EvaluateArguments:
    """What to measure, and on what."""

    model: str = field(metadata={"help": "Folder or Hub id.", "positional": True})
    base_model: str | None = field(
        default=None, metadata={"help": "The language model of a router, if not the one it names."}
    )
    target_sparsity: float | None = field(
        default=None, metadata={"help": "Share of the tokens to skip, evenly over the blocks; a router has its own."}
    )
    min_tokens: int | None = field(default=None, metadata={"help": "Shorter prompts run dense; a router has its own."})
    rows: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"What to measure, of {', '.join(ROWS)}. All if left out, without block_pruner: it is slow."
        },
    )
    data: str = field(default="pydoc", metadata={"help": "pydoc, a .txt or .parquet file, or a data set of the Hub."})
    single_line_breaks: bool = field(default=False, metadata={"help": "Replace double line breaks by single ones."})
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Multiple-choice questions: hellaswag, arc_easy, ... from the Hub, or parquet files."},
    )
    limit: int = field(default=64, metadata={"help": "Windows of text, and questions of each task."})
    prompt_length: int = field(default=192, metadata={"help": "Tokens of a window that are routed."})
    continuation_length: int = field(default=64, metadata={"help": "Tokens after them that are scored."})
    batch_size: int = field(default=8, metadata={"help": "Prompts at a time, also for the time."})
    rounds: int = field(default=7, metadata={"help": "Interleaved rounds of the time; the median counts."})
    device: str = field(default="cpu", metadata={"help": "Where to run: cpu, cuda, ..."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Type of the weights."}
    )
    seed: int = field(default=0, metadata={"help": "Of the random tokens."})
    picture: str | None = field(default=None, metadata={"help": "PNG file to draw skipped tokens into."})
    prompt: str | None = field(default=None, metadata={"help": "Text to draw; the first one of the data if left out."})
    add_to_card: bool = field(default=False, metadata={"help": "Put the results on the card in the model's folder."})

    def __post_init__(self) -> None:
        for name in self.rows:
            if name not in ROWS:
                raise ValueError(f"`--rows` knows {', '.join(ROWS)}; got `{name}`{did_you_mean(name, ROWS)}")
        for name, least in (("limit", 1), ("prompt_length", 2), ("continuation_length", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`--{name}` must be at least {least}; got {getattr(self, name)}.")
        if self.add_to_card and not Path(self.model, "README.md").is_file():
            raise ValueError(f"`--add_to_card` needs a folder with a card; there is no `{self.model}/README.md`.")


@dataclass(frozen=True)
class Variant:
    """One row of the table: a model, and how to run it.

    Args:
        name (`str`):
            Name of the row.
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
    model: "PreTrainedModel"
    config: "TokenRouterConfig | None" = None
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
        from hf_effml import disable_routing

        return disable_routing(self.model) if self.dense else nullcontext()


@dataclass(frozen=True)
class Measurement:
    """One row: quality, and shares of what the dense model takes for prompts; `time_ms` is for a batch of them."""

    name: str
    cross_entropy: float
    kl: float
    top1_agreement: float
    prompt_cross_entropy: float
    sparsity: float
    work: float
    cache: float
    time: float
    time_ms: float
    accuracy: dict[str, float]
    accuracy_unnormalized: dict[str, float]
    task_sparsity: dict[str, float]
    retention: float | None


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(EvaluateArguments, argv=argv, program=__file__, description=__doc__)
    from hf_effml.utils.text_data import load_multiple_choice, load_text, make_windows

    model, tokenizer, config, trained = _load(args)
    rows = args.rows or _possible_rows(config)
    if args.add_to_card and config.router_type not in rows:
        raise ValueError(
            f"`--add_to_card` needs the row of the router itself: add `{config.router_type}` to `--rows`."
        )
    data = load_text(args.data)
    tasks = {Path(name).stem: load_multiple_choice(name, args.limit) for name in args.tasks}

    def windows(texts: list[str], limit: int) -> "Tensor":
        length = args.prompt_length + args.continuation_length
        return make_windows(texts, tokenizer, length, limit=limit, single_line_breaks=args.single_line_breaks)

    test = windows(data.test, args.limit)
    variants = _variants(rows, model, config, trained, windows(data.train, _CALIBRATION), args.batch_size)
    measurements = measure(variants, test, args.prompt_length, tasks, tokenizer, args.batch_size, args.rounds)
    print_table(measurements)
    print_notes(measurements, variants, config, args)
    if args.picture:
        ids = test[0, : args.prompt_length] if args.prompt is None else _tokens(args.prompt, tokenizer)
        draw_routing(args.picture, Path(args.model).name, model, tokenizer, config, ids)
        print(f"Drew {args.picture}")
    if args.add_to_card:
        own = next(measurements[i] for i, row in enumerate(_with_dense(rows)) if row == config.router_type)
        print(f"Renewed {_add_to_card(args, own, measurements[0], data.name)}")
    return {
        "model": args.model,
        "data": data.name,
        "device": args.device,
        "target_sparsity": config.target_sparsity,
        "sparsity_schedule": list(config.schedule),
        "rows": [asdict(measurement) for measurement in measurements],
    }


def measure(
    variants: Sequence[Variant],
    windows: "Tensor",
    prompt_length: int,
    tasks: "Mapping[str, Sequence[MultipleChoiceItem]]",
    tokenizer: Any,
    batch_size: int = 8,
    rounds: int = 7,
) -> list[Measurement]:
    """Measures variants beside the first of them.

    Args:
        variants (`Sequence[Variant]`):
            What to measure; the first is the dense model, patched.
        windows (`Tensor` of shape `(windows, tokens)`):
            Texts.
        prompt_length (`int`):
            Tokens of each that are its prompt.
        tasks (`Mapping[str, Sequence[MultipleChoiceItem]]`):
            Questions by the name of their column.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer of the questions.
        batch_size (`int`, *optional*, defaults to 8):
            Prompts at a time.
        rounds (`int`, *optional*, defaults to 7):
            Rounds of the time, in each of which every variant has its turn.

    Returns:
        `list[Measurement]`: one per variant.
    """
    import torch
    from tqdm import tqdm

    from hf_effml.token_router.continuations import continuation_logits
    from hf_effml.token_router.evaluation import score_continuations, score_multiple_choice

    dense = variants[0]
    timings = _time(variants, windows[:batch_size, :prompt_length], rounds)
    with dense.running():
        batches = continuation_logits(dense.model, windows, prompt_length, batch_size)
        reference = torch.cat([logits.cpu() for logits in batches])
    rows: list[Measurement] = []
    for variant, timing in tqdm(list(zip(variants, timings, strict=True)), desc="rows", leave=False, delay=2):
        how: dict[str, Any] = {"batch_size": batch_size, "token_router_config": variant.config}
        with variant.running():
            scores = score_continuations(variant.model, windows, prompt_length, reference=reference, **how)
            answers = {
                name: score_multiple_choice(variant.model, tokenizer, items, **how) for name, items in tasks.items()
            }
        accuracy = {name: answer.accuracy_normalized for name, answer in answers.items()}
        share, work, cache = scores.sparsity, scores.flop_ratio, scores.kv_ratio
        if variant.is_smaller:
            share, work, cache = _removed(dense.model, variant, windows[:1, :prompt_length])
        rows.append(
            Measurement(
                name=variant.name,
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
                retention=_retention(accuracy, rows[0].accuracy if rows else accuracy),
            )
        )
    return rows


def _retention(accuracy: dict[str, float], dense: dict[str, float]) -> float | None:
    """Which share of the accuracy is left; of nothing right there is none."""
    from hf_effml.token_router.evaluation import retention

    return retention([*accuracy.values()], [*dense.values()]) if dense and all(dense.values()) else None


def _time(variants: Sequence[Variant], prompts: "Tensor", rounds: int) -> list[Any]:
    """Times of one batch of prompts, as `generate` begins with."""
    import torch

    from hf_effml.utils.benchmark import compare

    def run(variant: Variant) -> None:
        with variant.running():
            variant.model(prompts.to(variant.model.device), use_cache=True, logits_to_keep=1, **variant.options)

    calls = {str(index): partial(run, variant) for index, variant in enumerate(variants)}
    with torch.inference_mode():
        return list(compare(calls, agree=[], rounds=rounds, threads=torch.get_num_threads()).values())


def _removed(model: "PreTrainedModel", variant: Variant, prompt: "Tensor") -> tuple[float, float, float]:
    """Share of the parts that were removed, work and cache: counted as if all tokens of a prompt skipped them."""
    import torch

    from hf_effml.token_router.patching import copy_config, find_decoder, make_routing_report

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


def print_table(rows: Sequence[Measurement]) -> None:
    """Prints measurements, cross-entropy beside that of the first row.

    Args:
        rows (`Sequence[Measurement]`):
            What to print.
    """
    width = max(len(row.name) for row in rows) + 1
    tasks = list(rows[0].accuracy)
    head = f"{'cross-entropy':>18}{'KL':>9}{'prompt CE':>11}{'skipped':>9}{'work':>8}{'cache':>8}{'time':>8}"
    columns = [(task, max(len(task) + 2, 8)) for task in [*tasks, *(["retention"] if tasks else [])]]
    print(f"\n{'':<{width}}{head}{''.join(f'{name:>{size}}' for name, size in columns)}")
    for row in rows:
        entropy = f"{row.cross_entropy:.3f} ({row.cross_entropy - rows[0].cross_entropy:+.3f})"
        shares = f"{row.sparsity:>9.1%}{row.work:>8.1%}{row.cache:>8.1%}{row.time:>8.1%}"
        scores = [row.accuracy[task] for task in tasks] + ([row.retention] if tasks else [])
        cells = [
            f"{'-' if score is None else f'{score:.1%}':>{size}}"
            for score, (_, size) in zip(scores, columns, strict=True)
        ]
        print(
            f"{row.name:<{width}}{entropy:>18}{row.kl:>9.4f}{row.prompt_cross_entropy:>11.3f}{shares}{''.join(cells)}"
        )


def print_notes(
    rows: Sequence[Measurement], variants: Sequence[Variant], config: "TokenRouterConfig", args: EvaluateArguments
) -> None:
    """Prints what has to be known to read the table.

    Args:
        rows (`Sequence[Measurement]`):
            The measurements.
        variants (`Sequence[Variant]`):
            What was measured.
        config ([`TokenRouterConfig`]):
            What was routed as.
        args (`EvaluateArguments`):
            The program's arguments.
    """
    prompt, after = args.prompt_length, args.continuation_length
    notes = [
        f"Cross-entropy and KL to the dense model are those of {after} tokens after routed prompts of {prompt}. "
        "Prompt CE is that of the prompts themselves, where routing looks ahead: no measure of the model. Work, cache "
        f"and time (batch {args.batch_size}) are shares of the dense model's for the prompts."
    ]
    if args.tasks:
        notes[0] += " Accuracies are normalised by length."
    if any(variant.is_smaller for variant in variants):
        skips = config.decode_policy == "threshold"
        decoding = [skips and share > config.decode_threshold for share in config.schedule]
        routed = (config.target_sparsity * prompt + sum(decoding) / len(decoding) * after) / (prompt + after)
        spared = " and ".join(f"{row.sparsity:.1%}" for row in rows if row.name.endswith("*"))
        notes.append(
            f"* These parts are missing for the continuation, too: {spared} of the blocks that {prompt + after} "
            f"tokens pass are spared, by routing {routed:.1%}."
        )
    for task in args.tasks:
        name = Path(task).stem
        found = max(row.task_sparsity[name] for row in rows)
        if found < config.target_sparsity - _SHORTFALL and len(rows) > 1:
            notes.append(
                f"Of the tokens of {name}, {found:.1%} were skipped: contexts of less than {config.min_tokens} tokens "
                "run dense. `--min_tokens 0` routes all."
            )
    print("\n" + "\n".join(textwrap.fill(note, _WIDTH, break_on_hyphens=False) for note in notes))


def _load(args: EvaluateArguments) -> "tuple[PreTrainedModel, Any, TokenRouterConfig, bool]":
    """The patched language model, its tokenizer, what to route as, and whether its router was trained."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from hf_effml import TokenRouterConfig, TokenRouterModel, apply_token_router
    from hf_effml.token_router.patching import copy_config, find_decoder, is_patched

    found = AutoConfig.from_pretrained(args.model)
    tokenizer_of = args.model
    if isinstance(found, TokenRouterConfig):
        tokenizer_of = args.base_model or found.base_model_name_or_path or args.model
        names = [args.model] if args.base_model is None else [args.base_model, args.model]
        model = TokenRouterModel.from_pretrained(*names, dtype=args.dtype).model
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    changes: dict[str, Any] = {}
    if args.target_sparsity is not None:
        changes |= {"target_sparsity": args.target_sparsity, "sparsity_schedule": None}
    if args.min_tokens is not None:
        changes["min_tokens"] = args.min_tokens
    has_router = is_patched(find_decoder(model))
    if not has_router:
        if args.target_sparsity is None:
            raise ValueError(f"`{args.model}` has no router. Say what to skip, for example `--target_sparsity 0.3`.")
        apply_token_router(model, TokenRouterConfig(**changes))
    model = model.to(args.device).eval()
    config = copy_config(find_decoder(model).token_routing_hook.config, **changes, random_seed=args.seed)
    if config.target_sparsity == 0:
        raise ValueError("`target_sparsity` is 0: nothing is skipped. Give another one with `--target_sparsity 0.3`.")
    return model, AutoTokenizer.from_pretrained(tokenizer_of), config, has_router and config.is_learned


def _possible_rows(config: "TokenRouterConfig") -> list[str]:
    """All rows but the slow one and those that the router's settings rule out."""
    ruled_out = {"block_pruner"}
    if config.num_protected_first < 1:
        ruled_out |= {"dynamic", "one_pass"}
    if config.skip_unit == "mlp":
        ruled_out.add("kv_kept")
    return [row for row in ROWS if row not in ruled_out]


def _with_dense(rows: Sequence[str]) -> list[str]:
    """The dense model comes first, asked for or not."""
    return ["dense", *(row for row in dict.fromkeys(rows) if row != "dense")]


def _variants(
    rows: Sequence[str],
    model: "PreTrainedModel",
    config: "TokenRouterConfig",
    trained: bool,
    calibration: "Tensor",
    batch_size: int,
) -> list[Variant]:
    """What the rows stand for."""
    from hf_effml.token_router.patching import copy_config

    found = []
    for row in _with_dense(rows):
        name = ROWS[row]
        if row == "dense":
            found.append(Variant(name, model, dense=True))
        elif row in ("shortgpt", "block_pruner"):
            found.append(_without_parts(row, model, config, calibration, batch_size))
        elif row == "kv_kept":
            found.append(Variant(f"{ROWS[config.router_type]}, {name}", model, copy_config(config, kv_policy="keep")))
        elif row in ("dynamic", "one_pass"):
            name = name if trained else f"{name}, untrained"
            found.append(Variant(name, model, copy_config(config, router_type=row)))
        else:
            found.append(Variant(name, model, copy_config(config, router_type=row, selection="budget")))
    return found


def _without_parts(
    row: str, model: "PreTrainedModel", config: "TokenRouterConfig", calibration: "Tensor", batch_size: int
) -> Variant:
    """A model without as large a share of its blocks, or of its attentions and MLPs, as tokens skip."""
    from hf_effml import block_influence, block_pruner, remove_blocks, remove_sub_blocks, shortgpt_blocks

    blocks = len(config.schedule)
    if row == "shortgpt":
        count = max(round(config.target_sparsity * blocks), 1)
        gone = shortgpt_blocks(block_influence(model, calibration, batch_size), count)
        return Variant(
            f"{ROWS[row]}, {count} of {blocks} blocks*", remove_blocks(model, gone), attentions=gone, mlps=gone
        )
    count = max(round(2 * config.target_sparsity * blocks), 1)
    parts = block_pruner(model, calibration, count, batch_size)
    attentions, mlps = ([block for kind, block in parts if kind == wanted] for wanted in ("attention", "mlp"))
    name = f"{ROWS[row]}, {count} of {2 * blocks} parts*"
    return Variant(name, remove_sub_blocks(model, parts), attentions=attentions, mlps=mlps)


def _tokens(text: str, tokenizer: Any) -> "Tensor":
    import torch

    from hf_effml.utils.text_data import tokenize

    return torch.tensor(next(tokenize([text], tokenizer)))


def draw_routing(
    path: str | Path, name: str, model: "PreTrainedModel", tokenizer: Any, config: "TokenRouterConfig", ids: "Tensor"
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
    import torch

    from hf_effml.token_router.patching import copy_config, make_routing_report
    from hf_effml.utils.plotting import plot_routing

    with torch.inference_mode():
        model(ids[None].to(model.device), use_cache=False, token_router_config=copy_config(config, min_tokens=0))
    report = make_routing_report(model)
    title = f"{name}, {ROWS[config.router_type]}: {report.sparsity:.0%} skipped"
    plot_routing(report.keep_masks[:, 0].cpu(), [tokenizer.decode([token]) for token in ids], path, title=title)


def card_results(own: Measurement, dense: Measurement, args: EvaluateArguments) -> "list[CardResult]":
    """Makes the rows of a card that are about texts.

    Args:
        own (`Measurement`):
            Of the router that the card is about.
        dense (`Measurement`):
            Of the dense model.
        args (`EvaluateArguments`):
            The program's arguments.

    Returns:
        `list[CardResult]`: the rows.
    """
    from hf_effml.hub import CardResult

    where = f"{args.device}, batch {args.batch_size}"
    return [
        CardResult("Cross-entropy of continuations", own.cross_entropy, dense.cross_entropy),
        CardResult("KL divergence from the dense model", own.kl, dense.kl),
        CardResult("Share of the prompt's tokens that skip a block", own.sparsity, dense.sparsity),
        CardResult("Work of the blocks on the prompt", own.work, dense.work),
        CardResult("Keys and values of the prompt", own.cache, dense.cache),
        CardResult(f"Time of the prompt (ms per batch, {where})", own.time_ms, dense.time_ms),
    ]


def _add_to_card(args: EvaluateArguments, own: Measurement, dense: Measurement, data: str) -> Path:
    from hf_effml.hub import CardResult, add_results

    path = add_results(args.model, card_results(own, dense, args), f"{data}, prompts of {args.prompt_length} tokens")
    for task, accuracy in own.accuracy.items():
        add_results(args.model, [CardResult("Accuracy", accuracy, dense.accuracy[task], "accuracy")], task)
    return path


if __name__ == "__main__":
    sys.exit(run_script(main))
