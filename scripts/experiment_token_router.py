"""Asks what skipping tokens costs in the text that follows, and whether a trained router beats the static rule.

Example: `python scripts/experiment_token_router.py --recipe stories --output_dir experiments`
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import set_seed

from hf_effml import (
    TokenRouterConfig,
    TokenRouterModel,
    TokenRouterTrainer,
    TokenRouterTrainingArguments,
    block_influence,
    remove_blocks,
    score_continuations,
    search_sparsity_schedule,
    shortgpt_blocks,
)
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.token_router.continuations import continuation_logits
from hf_effml.token_router.patching import copy_config
from hf_effml.utils.benchmark import describe_run
from hf_effml.utils.language_models import load_language_model
from hf_effml.utils.report import Column, Report
from hf_effml.utils.text_data import load_text, make_windows


@dataclass
class ExperimentArguments:
    """The model, the data and how long to train."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a language model."})
    data: str = field(metadata={"help": "Texts: a file, a folder, or a data set on the Hub."})
    output_dir: str = field(default="experiments", metadata={"help": "Folder for the table and the numbers."})
    name: str = field(default="token_router_stories", metadata={"help": "Name of the files."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Of random tokens, search and training."}
    )
    sparsities: list[float] = field(
        default_factory=lambda: [0.22, 0.4], metadata={"help": "Shares of the tokens that skip a block."}
    )
    single_line_breaks: bool = field(default=True, metadata={"help": "Replace double line breaks by single ones."})
    packed: bool = field(default=True, metadata={"help": "Cut windows across texts, or each from one text."})
    prompt_length: int = field(default=192, metadata={"help": "Tokens that are routed."})
    continuation_length: int = field(default=64, metadata={"help": "Tokens after them that are scored."})
    eval_windows: int = field(default=128, metadata={"help": "Texts to measure on."})
    search_windows: int = field(default=48, metadata={"help": "Texts to search the schedule on."})
    generations: int = field(default=5, metadata={"help": "Of the search."})
    steps: int = field(default=150, metadata={"help": "Of training, with four texts each."})


DENSE, RANDOM, STATIC, SEARCHED = "dense", "random tokens", "static", "static, searched schedule"
STATIC_KEPT, SHORTGPT = "static, K/V kept", "ShortGPT, blocks removed"
_COLUMNS = {
    "cross_entropy": Column("cross-entropy", ".4f"),
    "kl": Column("KL", ".5f"),
    "prompt_cross_entropy": Column("prompt cross-entropy", ".3f"),
    "sparsity": Column("sparsity", ".4f"),
}
# Cross-entropy that the static rule may add, by sparsity.
_LIMITS = {0.22: 0.010, 0.4: 0.020}
_TRAINING: dict[str, Any] = {"per_device_train_batch_size": 4, "save_strategy": "no", "logging_strategy": "no"}
_TRAINING |= {"report_to": "none", "use_cpu": True}
# What is trained: changes of the configuration and of the training arguments.
TRAINED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one-pass, trained": ({}, {}),
    "dynamic, trained": ({"router_type": "dynamic"}, {}),
    "one-pass, trained on all tokens": ({}, {"continuation_share": 0.0}),
    "one-pass, trained, by threshold": ({"selection": "threshold"}, {}),
}
_WAYS = (DENSE, RANDOM, STATIC, STATIC_KEPT, SEARCHED, SHORTGPT, *TRAINED)


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(ExperimentArguments, argv=argv, program=__file__, description=__doc__)
    torch.set_num_threads(1)
    report = Report(args.name, _COLUMNS)
    settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
    for seed in args.seeds:
        for sparsity in args.sparsities:
            for way, measured in _run(args, sparsity, seed):
                report.add_seed(f"{sparsity:g}, {way}", **measured)
                print(f"seed {seed}, {sparsity:g}, {way}: KL {measured['kl']:.5f}", flush=True)
        # Written after every seed: what is done is not lost.
        report.facts = {"arguments": settings, "run": describe_run(seed=seed)}
        report.parts = [_gates(report, args.sparsities)]
        path = report.save(args.output_dir)
    print(f"\n{report.as_markdown()}\n\nWrote {path} and {path.with_suffix('.json').name}.")
    return report.as_dict()


def _run(args: ExperimentArguments, sparsity: float, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ways to skip, and what was measured, one after the other; the dense model first."""
    data = load_text(args.data)
    base, tokenizer = load_language_model(args.model_name_or_path)

    windows = partial(
        make_windows,
        tokenizer=tokenizer,
        length=args.prompt_length + args.continuation_length,
        single_line_breaks=args.single_line_breaks,
        packed=args.packed,
    )
    test, train = windows(data.test, limit=args.eval_windows), windows(data.train)
    config = TokenRouterConfig(target_sparsity=sparsity, random_seed=seed)
    model = TokenRouterModel(base, config)
    with model.disable_routing():
        reference = torch.cat(list(continuation_logits(model.model, test, args.prompt_length, 32)))

    def score(which: Any, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        chosen = None if changes is None else copy_config(model.config, **changes)
        scores = score_continuations(
            which, test, args.prompt_length, batch_size=32, reference=reference, token_router_config=chosen
        )
        return {name: getattr(scores, name) for name in ("cross_entropy", "kl", "prompt_cross_entropy", "sparsity")}

    nothing = {"target_sparsity": 0.0, "sparsity_schedule": [0.0] * len(config.schedule)}
    yield DENSE, score(model, nothing)
    yield RANDOM, score(model, {"router_type": "random"})
    yield STATIC, score(model, {"router_type": "static"})
    yield STATIC_KEPT, score(model, {"router_type": "static", "kv_policy": "keep"})
    found = search_sparsity_schedule(
        model,
        train[: args.search_windows],
        args.prompt_length,
        generations=args.generations,
        seed=seed,
        batch_size=16,
        apply=False,
    )
    yield SEARCHED, score(model, {"router_type": "static", "sparsity_schedule": list(found.schedule)})
    influence = block_influence(model.model, train[: args.search_windows])
    count = max(1, round(sparsity * len(influence)))
    yield SHORTGPT, score(remove_blocks(model.model, shortgpt_blocks(influence, count)))
    for way, (changes, settings) in TRAINED.items():
        set_seed(seed)
        fresh, _ = load_language_model(args.model_name_or_path)
        student = TokenRouterModel(fresh, copy_config(config, **changes))
        arguments = TokenRouterTrainingArguments(
            args.output_dir, max_steps=args.steps, seed=seed, **_TRAINING, **settings
        )
        TokenRouterTrainer(student, arguments, train_dataset=[{"input_ids": window} for window in train]).train()
        yield way, score(student.eval())


def _gates(report: Report, sparsities: list[float]) -> Report:
    """What the method has to show, beside what it showed: the worst of the seeds."""
    part = Report("gates", title="What it has to show")
    for sparsity in sparsities:
        rows = {way: report.rows[f"{sparsity:g}, {way}"] for way in _WAYS}
        dense, kl = rows[DENSE]["cross_entropy"], {way: row["kl"] for way, row in rows.items()}
        added = {
            way: [own - d for own, d in zip(row["cross_entropy"], dense, strict=True)] for way, row in rows.items()
        }
        off = [abs(share - sparsity) for share in rows["one-pass, trained"]["sparsity"]]
        most = {
            "cross-entropy that the static rule adds": (max(added[STATIC]), _LIMITS.get(sparsity, math.inf)),
            "KL, K/V kept over dropped": (max(_ratios(kl[STATIC_KEPT], kl[STATIC])), 1.0),
            "KL, one-pass over static": (max(_ratios(kl["one-pass, trained"], kl[STATIC])), 1.5),
            "KL, dynamic over static": (max(_ratios(kl["dynamic, trained"], kl[STATIC])), 1.5),
            "distance from the sparsity asked for": (max(off), 0.01),
        }
        least = {
            "random over static": (min(_ratios(added[RANDOM], added[STATIC])), 5.0),
            "ShortGPT over static": (min(_ratios(added[SHORTGPT], added[STATIC])), 20.0),
        }
        for side, checks in (("at most", most), ("at least", least)):
            for what, (value, limit) in checks.items():
                if math.isinf(limit):
                    continue
                holds = value <= limit if side == "at most" else value >= limit
                row = {"worst_seed": round(value, 4), "gate": f"{side} {limit:g}", "holds": "yes" if holds else "no"}
                part.add(f"{sparsity:g}, {what}", **row)
    return part


def _ratios(own: list[float], other: list[float]) -> list[float]:
    return [mine / theirs for mine, theirs in zip(own, other, strict=True)]


if __name__ == "__main__":
    sys.exit(run_script(main))
