"""Measures what token routing keeps and saves: quality, work, cache and time beside the dense model and other pruners.

MODEL is a router, a full checkpoint, or any language model of a supported family together with --target_sparsity.
Prompts are routed, and what follows them is scored: the continuations of texts, and the choices of questions.

Example: `hf-effml evaluate token-router token-router-smoke --tasks mcq/arc_easy.parquet --min_tokens 0`
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from hf_effml.cli.parsing import did_you_mean, parse_arguments, run_script
from hf_effml.hub import CardResult, add_results
from hf_effml.token_router.comparison import (
    VARIANTS,
    compare_routing,
    draw_routing,
    load_with_router,
    make_variants,
    possible_variants,
)
from hf_effml.utils.report import Report
from hf_effml.utils.text_data import load_multiple_choice, load_text, make_windows, tokenize


# Windows that removal is calibrated on.
_CALIBRATION = 32


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
            "help": f"What to measure, of {', '.join(VARIANTS)}. All if left out, without block_pruner: it is slow."
        },
    )
    data: str = field(default="pydoc", metadata={"help": "pydoc, .txt, .jsonl or .parquet, or a set of the Hub."})
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
            if name not in VARIANTS:
                raise ValueError(f"`--rows` knows {', '.join(VARIANTS)}; got `{name}`{did_you_mean(name, VARIANTS)}")
        for name, least in (("limit", 1), ("prompt_length", 2), ("continuation_length", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`--{name}` must be at least {least}; got {getattr(self, name)}.")
        if self.add_to_card and not Path(self.model, "README.md").is_file():
            raise ValueError(f"`--add_to_card` needs a folder with a card; there is no `{self.model}/README.md`.")


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(EvaluateArguments, argv=argv, program=__file__, description=__doc__)

    model, tokenizer, config, trained = load_with_router(
        args.model,
        args.base_model,
        dtype=args.dtype,
        device=args.device,
        target_sparsity=args.target_sparsity,
        min_tokens=args.min_tokens,
        random_seed=args.seed,
    )
    rows = args.rows or possible_variants(config)
    if args.add_to_card and config.router_type not in rows:
        raise ValueError(
            f"`--add_to_card` needs the row of the router itself: add `{config.router_type}` to `--rows`."
        )
    data = load_text(args.data)
    tasks = {Path(name).stem: load_multiple_choice(name, args.limit) for name in args.tasks}

    def windows(texts: list[str], limit: int) -> torch.Tensor:
        length = args.prompt_length + args.continuation_length
        return make_windows(texts, tokenizer, length, limit=limit, single_line_breaks=args.single_line_breaks)

    test, calibration = windows(data.test, args.limit), windows(data.train, _CALIBRATION)
    variants = make_variants(rows, model, config, calibration, trained=trained, batch_size=args.batch_size)
    report = compare_routing(
        variants,
        test,
        args.prompt_length,
        tasks=tasks,
        tokenizer=tokenizer,
        batch_size=args.batch_size,
        rounds=args.rounds,
    )
    report.facts |= {"model": args.model, "data": data.name, "device": args.device}
    report.facts |= {"target_sparsity": config.target_sparsity, "sparsity_schedule": list(config.schedule)}
    print(f"\n{report.as_text()}")
    if args.picture:
        text = None if args.prompt is None else torch.tensor(next(tokenize([args.prompt], tokenizer)))
        ids = test[0, : args.prompt_length] if text is None else text
        draw_routing(args.picture, Path(args.model).name, model, tokenizer, config, ids)
        print(f"Drew {args.picture}")
    if args.add_to_card:
        own, dense = variants[config.router_type].name, variants["dense"].name
        print(f"Renewed {_add_to_card(args, report, own, dense, data.name)}")
    return report.as_dict()


def _add_to_card(args: EvaluateArguments, report: Report, own: str, dense: str, data: str) -> Path:
    results = report.card_results(own, beside=dense)
    path = add_results(args.model, results, f"{data}, prompts of {args.prompt_length} tokens")
    for task, accuracy in report.rows[own]["accuracy"].items():
        result = CardResult("Accuracy", accuracy, report.rows[dense]["accuracy"][task], "accuracy")
        add_results(args.model, [result], task)
    return path


if __name__ == "__main__":
    sys.exit(run_script(main))
