"""Asks whether fine-tuning recovers what dropping tokens and skipping scans costs, and whether learned choices help.

Example: `python scripts/experiment_dyvm.py --recipe selection --output_dir experiments`
"""

import copy
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from hf_effml import (
    Augmentation,
    DyVMForImageClassification,
    DyVMTrainer,
    DyVMTrainingArguments,
    VimConfig,
    VimForImageClassification,
    VimTrainer,
    VimTrainingArguments,
    load_image_data,
    vim_image_processor,
)
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.scripts.evaluate_dyvm import amount_of_work, kept_shares, run_over
from hf_effml.utils.benchmark import describe_run, markdown_table, write_report


@dataclass
class ExperimentArguments:
    """The data, the model and how long to train."""

    output_dir: str = field(default="experiments", metadata={"help": "Folder for the table and the numbers."})
    name: str = field(default="dyvm_digits", metadata={"help": "Name of the files."})
    data: str = field(
        default="digits", metadata={"help": "selection (few patches matter), digits, a folder, or an id on the Hub."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One start model each."})
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
    learning_rate: float = field(default=3e-3, metadata={"help": "For the start model."})
    tune_learning_rate: float = field(default=2e-3, metadata={"help": "For fine-tuning."})

    def __post_init__(self) -> None:
        if len(self.token_keep_ratio) != len(self.block_keep_ratio):
            raise ValueError(
                f"`token_keep_ratio` and `block_keep_ratio` must be of one length, one pair per setting; got "
                f"{self.token_keep_ratio} and {self.block_keep_ratio}."
            )


class Data(NamedTuple):
    """Images as the trainers take them, and the fields of a `VimConfig` that describe them."""

    train: Any
    test: Any
    fields: dict[str, Any]


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    args, augmentation = parse_arguments(
        ExperimentArguments,
        Augmentation,
        argv=argv,
        program=__file__,
        description=__doc__,
    )
    torch.set_num_threads(1)
    found: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for seed in args.seeds:
        data = _load(args, augmentation, seed)
        for way, keep, measured in _run_seed(args, data, seed):
            found.setdefault((way, keep), []).append(measured)
        # Written after every seed: what is done is not lost.
        results = [_row(key, values) for key, values in found.items()]
        settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
        run = {"arguments": settings, "augmentation": vars(augmentation), "run": describe_run(seed=seed, rounds=1)}
        report = write_report(args.output_dir, args.name, run | {"rows": results}, [markdown_table(_shown(results))])
    print(f"\n{report.read_text(encoding='utf-8')}\nWrote {report} and {report.with_suffix('.json').name}.")
    return {"rows": results}


def selection_task(
    seed: int, train: int = 1600, test: int = 2000
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Makes images in which few patches matter: all is noise but two patches, at random places, that tell the class.

    Args:
        seed (`int`):
            Of the ten patterns, the places and the noise.
        train (`int`, *optional*, defaults to 1600):
            Number of training images.
        test (`int`, *optional*, defaults to 2000):
            Number of test images.

    Returns:
        `tuple[list[dict], list[dict]]`: training and test images, `pixel_values` `(1, 18, 18)` and `labels`.
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(10, 9, generator=generator)
    count = train + test
    labels = torch.randint(10, (count,), generator=generator)
    patches = torch.randn(count, 36, 9, generator=generator)
    places = torch.rand(count, 36, generator=generator).argsort(dim=1)[:, :2]
    noise = 0.3 * torch.randn(count, 2, 9, generator=generator)
    patches[torch.arange(count)[:, None], places] = patterns[labels][:, None] + noise
    pixels = patches.view(count, 6, 6, 3, 3).transpose(2, 3).reshape(count, 1, 18, 18)
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels.tolist(), strict=True)]
    return rows[:train], rows[train:]


def _load(args: ExperimentArguments, augmentation: Augmentation, seed: int) -> Data:
    if args.data == "selection":
        return Data(*selection_task(seed), {"num_channels": 1, "num_labels": 10})
    data = load_image_data(args.data, vim_image_processor(args.image_size, crop_share=1.0), augmentation, seed=seed)
    return Data(data.train, data.test, data.label_fields)


def _run_seed(args: ExperimentArguments, data: Data, seed: int) -> Iterator[tuple[str, float | None, dict[str, Any]]]:
    """Way, share of tokens and what was measured, one after the other; the start model first."""
    from transformers import set_seed

    set_seed(seed)
    start = _train_start(args, data, seed)
    yield "dense", None, _measure(start, data)
    longer = _train_dense(copy.deepcopy(start), data, _settings(args, seed, tune=True))
    yield "dense, trained on", None, _measure(longer, data)
    for keep, blocks in zip(args.token_keep_ratio, args.block_keep_ratio, strict=True):
        for selection in ("random", "even"):
            model = _dynamic(args, start, keep, blocks, selection)
            yield f"{selection} tokens, not fine-tuned", keep, _measure(model.eval(), data)
        for selection in ("learned", "random", "even"):
            model = _dynamic(args, start, keep, blocks, selection)
            shares = _tune(model, data, _settings(args, seed, tune=True))
            yield f"{selection} tokens, fine-tuned", keep, _measure(model.eval(), data) | {"training": shares}


def _train_start(args: ExperimentArguments, data: Data, seed: int) -> VimForImageClassification:
    names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers")
    sizes = {name: getattr(args, name) for name in names}
    config = VimConfig(**sizes, state_size=8, symmetric_dt_init=True, **data.fields)
    return _train_dense(VimForImageClassification(config), data, _settings(args, seed, tune=False))


def _train_dense(model: VimForImageClassification, data: Data, settings: dict[str, Any]) -> VimForImageClassification:
    trainer = VimTrainer(model, VimTrainingArguments(**settings), train_dataset=data.train)
    trainer.train()
    return trainer.model.eval()


def _dynamic(
    args: ExperimentArguments, start: VimForImageClassification, keep: float, blocks: float, selection: str
) -> DyVMForImageClassification:
    return DyVMForImageClassification.from_vim(
        start,
        pruning_layers=args.pruning_layers,
        token_keep_ratio=keep,
        block_keep_ratio=blocks,
        token_selection=selection,
    )


def _tune(model: DyVMForImageClassification, data: Data, settings: dict[str, Any]) -> dict[str, float]:
    """Fine-tunes in place; returns the shares of tokens and scans in the last epoch and around the calibration."""
    trainer = DyVMTrainer(model, DyVMTrainingArguments(**settings), train_dataset=data.train)
    trainer.train()
    # Later entries win: what is left is the last of its kind.
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    return {name: value for name, value in logged.items() if "keep_ratio" in name}


def _settings(args: ExperimentArguments, seed: int, tune: bool) -> dict[str, Any]:
    learning_rate = args.tune_learning_rate if tune else args.learning_rate
    return {
        "output_dir": args.output_dir,
        "num_train_epochs": args.tune_epochs if tune else args.epochs,
        "learning_rate": learning_rate,
        "min_learning_rate": learning_rate / 100,
        "warmup_steps": 0.1,
        "per_device_train_batch_size": 32,
        "weight_decay": 0.05,
        "max_grad_norm": 1.0,
        "seed": seed,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "epoch",
        "report_to": "none",
    }


def _measure(model: VimForImageClassification, data: Data) -> dict[str, Any]:
    accuracy, scans = run_over(model, data.test, 128)
    work, _ = amount_of_work(model, scans)
    return {"accuracy": accuracy, "scans": scans, "shares": kept_shares(model), "multiply_adds": work["total"]}


def _row(key: tuple[str, float | None], measured: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [values["accuracy"] for values in measured]
    return {
        "model": key[0],
        "token_keep_ratio": measured[0]["shares"],
        "block_keep_ratio": statistics.mean(values["scans"] for values in measured),
        "multiply_adds": statistics.mean(values["multiply_adds"] for values in measured),
        "accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "accuracies": accuracies,
        "block_keep_ratios": [values["scans"] for values in measured],
        "training": [values["training"] for values in measured if "training" in values],
    }


def _shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for people: percentages, with the standard deviation over the seeds."""
    return [
        {
            "model": row["model"],
            "tokens kept": " / ".join(f"{share:.2f}" for share in row["token_keep_ratio"]) or "all",
            "scans run (%)": f"{100 * row['block_keep_ratio']:.1f}",
            "million multiply-adds": f"{row['multiply_adds'] / 1e6:.2f}",
            "accuracy (%)": f"{100 * row['accuracy']:.1f}"
            + (f" ± {100 * row['spread']:.1f}" if row["spread"] is not None else ""),
            "per seed": " ".join(f"{100 * accuracy:.1f}" for accuracy in row["accuracies"]),
        }
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(run_script(main))
