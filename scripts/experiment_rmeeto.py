"""Asks whether re-training recovers what merging costs: a small Vision Mamba, several seeds, with pruning beside it.

Example: `python scripts/experiment_rmeeto.py --recipe digits --output_dir experiments`
"""

import copy
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hf_effml import (
    Augmentation,
    ImageData,
    RMeeToTrainer,
    RMeeToTrainingArguments,
    RMeeToVimForImageClassification,
    VimConfig,
    VimForImageClassification,
    VimTrainer,
    VimTrainingArguments,
    load_image_data,
    vim_image_processor,
)
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.scripts.evaluate_rmeeto import accuracy_on, amount_of_work
from hf_effml.utils.benchmark import describe_run, markdown_table, write_report
from hf_effml.vim.configuration_rmeeto import reduction_ratio


# Without re-training; "merged" is what is then re-trained.
_WAYS: dict[str, dict[str, Any]] = {
    "merged": {},
    "merged, class token placed as in the paper": {"merge_class_position": "proportional"},
    "merged, neighbours only": {"merge_matching": "local"},
    "pruned": {"merge_mode": "prune"},
    "random merge": {"merge_matching": "random"},
}


@dataclass
class ExperimentArguments:
    """The data, the model and how long to train."""

    output_dir: str = field(default="experiments", metadata={"help": "Folder for the table and the numbers."})
    name: str = field(default="digits", metadata={"help": "Name of the files."})
    data: str = field(default="digits", metadata={"help": "digits, a folder, or the id of a data set on the Hub."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One start model each."})
    r: list[int] = field(default_factory=lambda: [10, 20], metadata={"help": "Tokens per merging block."})
    image_size: int = field(default=16, metadata={"help": "Side of the images in pixels."})
    patch_size: int = field(default=2, metadata={"help": "Side of a patch in pixels."})
    hidden_size: int = field(default=32, metadata={"help": "Width of the model."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Number of blocks."})
    epochs: int = field(default=10, metadata={"help": "Passes over the data for the start model."})
    retrain_epochs: int = field(default=4, metadata={"help": "Passes over the data for re-training."})
    learning_rate: float = field(default=3e-3, metadata={"help": "For the start model."})
    retrain_learning_rate: float = field(default=2e-3, metadata={"help": "For re-training."})


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    args, augmentation = parse_arguments(
        ExperimentArguments,
        Augmentation,
        argv=argv,
        program=__file__,
        description=__doc__,
    )
    accuracies: dict[tuple[str, int | None], list[float]] = {}
    models: dict[tuple[str, int | None], VimForImageClassification] = {}
    for seed in args.seeds:
        for way, r, model, accuracy in _run_seed(args, augmentation, seed):
            accuracies.setdefault((way, r), []).append(accuracy)
            models[way, r] = model
            print(f"seed {seed}, {way}{'' if r is None else f', r={r}'}: {accuracy:.1%}", flush=True)
        results = [_row(key, values, models[key]) for key, values in accuracies.items()]
        settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
        run = {"arguments": settings, "augmentation": vars(augmentation), "run": describe_run(seed=seed, rounds=1)}
        report = write_report(args.output_dir, args.name, run | {"rows": results}, [markdown_table(_shown(results))])
    print(f"\n{report.read_text(encoding='utf-8')}\nWrote {report} and {report.with_suffix('.json').name}.")
    return {"rows": results}


def _run_seed(
    args: ExperimentArguments, augmentation: Augmentation, seed: int
) -> Iterator[tuple[str, int | None, VimForImageClassification, float]]:
    """Way, r, model and accuracy, one after the other; the start model first."""
    from transformers import set_seed

    set_seed(seed)
    data = load_image_data(args.data, vim_image_processor(args.image_size, crop_share=1.0), augmentation, seed=seed)
    start = _train_start(args, data, seed)
    yield "dense", None, start, accuracy_on(start, data.test, 128)
    longer = _train(copy.deepcopy(start), data, _settings(args, seed, args.retrain_epochs, args.retrain_learning_rate))
    yield "dense, trained on", None, longer, accuracy_on(longer, data.test, 128)
    for r in args.r:
        for way, fields in _WAYS.items():
            model = _merge(start, r, fields)
            yield way, r, model, accuracy_on(model, data.test, 128)
        model = _retrain(args, data, seed, _merge(start, r, {}))
        yield "merged and re-trained", r, model, accuracy_on(model, data.test, 128)


def _train_start(args: ExperimentArguments, data: ImageData, seed: int) -> VimForImageClassification:
    config = VimConfig(
        image_size=args.image_size,
        patch_size=args.patch_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        state_size=8,
        symmetric_dt_init=True,
        **data.label_fields,
    )
    return _train(VimForImageClassification(config), data, _settings(args, seed, args.epochs, args.learning_rate))


def _train(model: VimForImageClassification, data: ImageData, settings: dict[str, Any]) -> VimForImageClassification:
    trainer = VimTrainer(model, VimTrainingArguments(**settings), train_dataset=data.train)
    trainer.train()
    return trainer.model.eval()


def _merge(start: VimForImageClassification, r: int, fields: dict[str, Any]) -> RMeeToVimForImageClassification:
    return RMeeToVimForImageClassification.from_vim(start, merge_r=r, **{"merge_class_position": "exact"} | fields)


def _retrain(
    args: ExperimentArguments, data: ImageData, seed: int, model: RMeeToVimForImageClassification
) -> VimForImageClassification:
    settings = _settings(args, seed, args.retrain_epochs, args.retrain_learning_rate)
    trainer = RMeeToTrainer(model, RMeeToTrainingArguments(**settings), train_dataset=data.train)
    trainer.train()
    return trainer.model.eval()


def _settings(args: ExperimentArguments, seed: int, epochs: int, learning_rate: float) -> dict[str, Any]:
    return {
        "output_dir": args.output_dir,
        "num_train_epochs": epochs,
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


def _row(key: tuple[str, int | None], accuracies: list[float], model: VimForImageClassification) -> dict[str, Any]:
    work, tokens = amount_of_work(model)
    return {
        "model": key[0],
        "r": key[1],
        "tokens saved": reduction_ratio(tokens),
        "multiply-adds": work["total"],
        "accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "accuracies": accuracies,
    }


def _shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for people: percentages, with the standard deviation over the seeds."""
    return [
        {
            "model": row["model"],
            "r": row["r"],
            "tokens saved": f"{row['tokens saved']:.0%}",
            "million multiply-adds": f"{row['multiply-adds'] / 1e6:.2f}",
            "accuracy (%)": f"{100 * row['accuracy']:.1f}"
            + (f" ± {100 * row['spread']:.1f}" if row["spread"] else ""),
            "per seed": " ".join(f"{100 * accuracy:.1f}" for accuracy in row["accuracies"]),
        }
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(run_script(main))
