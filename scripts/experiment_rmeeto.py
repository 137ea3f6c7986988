"""Asks whether re-training recovers what merging costs: a small Vision Mamba, several seeds, with pruning beside it.

Example: `python scripts/experiment_rmeeto.py --recipe digits --output_dir experiments`
"""

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hf_effml import (
    Augmentation,
    RMeeToTrainer,
    RMeeToTrainingArguments,
    RMeeToVimForImageClassification,
    VimForImageClassification,
    load_image_data,
    reduction_ratio,
    vim_image_processor,
)
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.cli.small_runs import ExperimentArguments, train_vim
from hf_effml.utils.report import Column
from hf_effml.vim.evaluation.measure import amount_of_work, classify


# Without re-training; "merged" is what is then re-trained.
_WAYS: dict[str, dict[str, Any]] = {
    "merged": {},
    "merged, class token placed as in the paper": {"merge_class_position": "proportional"},
    "merged, neighbours only": {"merge_matching": "local"},
    "pruned": {"merge_mode": "prune"},
    "random merge": {"merge_matching": "random"},
}
COLUMNS = {
    "tokens saved": Column("tokens saved", ".0%"),
    "multiply-adds": Column("million multiply-adds", ".2f", scale=1e-6),
    "accuracies": Column("accuracy (%)", ".1f", scale=100),
    "per_seed": Column("per seed"),
}


@dataclass
class RMeeToExperimentArguments(ExperimentArguments):
    """The data, the model, how much to merge and how long to train."""

    r: list[int] = field(default_factory=lambda: [10, 20], metadata={"help": "Tokens per merging block."})
    retrain_epochs: int = field(default=4, metadata={"help": "Passes over the data for re-training."})
    retrain_learning_rate: float = field(default=2e-3, metadata={"help": "For re-training."})


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    args, augmentation = parse_arguments(
        RMeeToExperimentArguments, Augmentation, argv=argv, program=__file__, description=__doc__
    )
    rows: dict[str, dict[str, Any]] = {}
    for seed in args.seeds:
        for way, r, model, accuracy in _run_seed(args, augmentation, seed):
            name = way if r is None else f"{way}, r={r}"
            work, tokens = amount_of_work(model)
            fixed = {"tokens saved": reduction_ratio(tokens), "multiply-adds": work["total"]}
            row = rows.setdefault(name, {"name": name, "model": way, "r": r, **fixed, "accuracies": []})
            row["accuracies"].append(accuracy)
            print(f"seed {seed}, {name}: {accuracy:.1%}", flush=True)
        report = args.report(COLUMNS, augmentation, seed, [*rows.values()])
    print(f"\n{report.as_text()}\nWrote {args.name}.md and {args.name}.json into {args.output_dir}.")
    return report.as_dict()


def _run_seed(
    args: RMeeToExperimentArguments, augmentation: Augmentation, seed: int
) -> Iterator[tuple[str, int | None, VimForImageClassification, float]]:
    """Way, r, model and accuracy, one after the other; the start model first."""
    from transformers import set_seed

    set_seed(seed)
    data = load_image_data(args.data, vim_image_processor(args.image_size, crop_share=1.0), augmentation, seed=seed)
    settings = args.settings(seed, args.retrain_epochs, args.retrain_learning_rate)

    def measured(way: str, r: int | None, model: VimForImageClassification) -> tuple[Any, ...]:
        return way, r, model, classify(model, data.test, 128)[0]

    start = args.train_start(data.train, seed, **data.label_fields)
    yield measured("dense", None, start)
    yield measured("dense, trained on", None, train_vim(copy.deepcopy(start), data.train, settings))
    for r in args.r:
        merged = partial(RMeeToVimForImageClassification.from_vim, start, merge_r=r)
        for way, fields in _WAYS.items():
            yield measured(way, r, merged(**{"merge_class_position": "exact"} | fields))
        trainer = RMeeToTrainer(
            merged(merge_class_position="exact"), RMeeToTrainingArguments(**settings), train_dataset=data.train
        )
        trainer.train()
        yield measured("merged and re-trained", r, trainer.model.eval())


if __name__ == "__main__":
    sys.exit(run_script(main))
