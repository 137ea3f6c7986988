"""Asks whether fine-tuning recovers what dropping tokens and skipping scans costs, and whether learned choices help.

Example: `python scripts/experiment_dyvm.py --recipe selection --output_dir experiments`
"""

import copy
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_effml import (
    Augmentation,
    DyVMForImageClassification,
    DyVMTrainer,
    DyVMTrainingArguments,
    VimForImageClassification,
    load_image_data,
    vim_image_processor,
)
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.cli.small_runs import ExperimentArguments, train_vim
from hf_effml.utils.report import Column
from hf_effml.vim.evaluation.baselines import selection_task
from hf_effml.vim.evaluation.measure import amount_of_work, classify, kept_shares


COLUMNS = {
    "kept": Column("tokens kept"),
    "block_keep_ratio": Column("scans run (%)", ".1f", scale=100),
    "multiply_adds": Column("million multiply-adds", ".2f", scale=1e-6),
    "accuracies": Column("accuracy (%)", ".1f", scale=100),
    "per_seed": Column("per seed"),
}


@dataclass
class DyVMExperimentArguments(ExperimentArguments):
    """The data, the model, how much to drop and how long to train."""

    name: str = field(default="dyvm_digits", metadata={"help": "Name of the files."})
    data: str = field(
        default="digits", metadata={"help": "selection (few patches matter), digits, a folder, or an id on the Hub."}
    )
    token_keep_ratio: list[float] = field(
        default_factory=lambda: [0.7, 0.5], metadata={"help": "Shares that a stage keeps, one setting each."}
    )
    block_keep_ratio: list[float] = field(
        default_factory=lambda: [0.8, 0.7], metadata={"help": "Shares of the scans that run, one per setting."}
    )
    pruning_layers: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "Blocks before which tokens are dropped."}
    )
    image_size: int = field(default=12, metadata={"help": "Side of the images in pixels; 18 for selection."})
    patch_size: int = field(default=2, metadata={"help": "Side of a patch in pixels; 3 for selection."})
    hidden_size: int = field(default=40, metadata={"help": "Width of the model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Number of blocks."})
    epochs: int = field(default=15, metadata={"help": "Passes over the data for the start model."})
    tune_epochs: int = field(default=8, metadata={"help": "Passes over the data for fine-tuning."})
    tune_learning_rate: float = field(default=2e-3, metadata={"help": "For fine-tuning."})

    def __post_init__(self) -> None:
        if len(self.token_keep_ratio) != len(self.block_keep_ratio):
            raise ValueError(
                f"`token_keep_ratio` and `block_keep_ratio` must be of one length, one pair per setting; got "
                f"{self.token_keep_ratio} and {self.block_keep_ratio}."
            )


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    args, augmentation = parse_arguments(
        DyVMExperimentArguments, Augmentation, argv=argv, program=__file__, description=__doc__
    )
    torch.set_num_threads(1)
    found: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for seed in args.seeds:
        for way, keep, measured in _run_seed(args, augmentation, seed):
            found.setdefault((way, keep), []).append(measured)
        report = args.report(COLUMNS, augmentation, seed, [_row(key, values) for key, values in found.items()])
    print(f"\n{report.as_text()}\nWrote {args.name}.md and {args.name}.json into {args.output_dir}.")
    return report.as_dict()


def _run_seed(
    args: DyVMExperimentArguments, augmentation: Augmentation, seed: int
) -> Iterator[tuple[str, float | None, dict[str, Any]]]:
    """Way, share of tokens and what was measured, one after the other; the start model first."""
    from transformers import set_seed

    if args.data == "selection":
        train, test = selection_task(seed)
        fields: dict[str, Any] = {"num_channels": 1, "num_labels": 10}
    else:
        processor = vim_image_processor(args.image_size, crop_share=1.0)
        data = load_image_data(args.data, processor, augmentation, seed=seed)
        train, test, fields = data.train, data.test, data.label_fields
    set_seed(seed)
    settings = args.settings(seed, args.tune_epochs, args.tune_learning_rate)
    start = args.train_start(train, seed, **fields)
    yield "dense", None, _measure(start, test)
    yield "dense, trained on", None, _measure(train_vim(copy.deepcopy(start), train, settings), test)
    for keep, blocks in zip(args.token_keep_ratio, args.block_keep_ratio, strict=True):
        shares = {"token_keep_ratio": keep, "block_keep_ratio": blocks, "pruning_layers": args.pruning_layers}
        for selection in ("random", "even"):
            model = DyVMForImageClassification.from_vim(start, **shares, token_selection=selection)
            yield f"{selection} tokens, not fine-tuned", keep, _measure(model.eval(), test)
        for selection in ("learned", "random", "even"):
            model = DyVMForImageClassification.from_vim(start, **shares, token_selection=selection)
            trainer = DyVMTrainer(model, DyVMTrainingArguments(**settings), train_dataset=train)
            trainer.train()
            # Later entries win: the shares in the last epoch and around the calibration are left.
            logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
            training = {name: value for name, value in logged.items() if "keep_ratio" in name}
            yield f"{selection} tokens, fine-tuned", keep, _measure(model.eval(), test) | {"training": training}


def _measure(model: VimForImageClassification, test: Any) -> dict[str, Any]:
    accuracy, scans = classify(model, test, 128)
    work, _ = amount_of_work(model, scans)
    return {"accuracy": accuracy, "scans": scans, "shares": kept_shares(model), "multiply_adds": work["total"]}


def _row(key: tuple[str, float | None], measured: list[dict[str, Any]]) -> dict[str, Any]:
    way, keep = key
    shares, scans = measured[0]["shares"], [values["scans"] for values in measured]
    return {
        "name": way if keep is None else f"{way}, {keep:g}",
        "model": way,
        "kept": " / ".join(f"{share:.2f}" for share in shares) or "all",
        "token_keep_ratio": shares,
        "block_keep_ratio": statistics.mean(scans),
        "multiply_adds": statistics.mean(values["multiply_adds"] for values in measured),
        "accuracies": [values["accuracy"] for values in measured],
        "block_keep_ratios": scans,
        "training": [values["training"] for values in measured if "training" in values],
    }


if __name__ == "__main__":
    sys.exit(run_script(main))
