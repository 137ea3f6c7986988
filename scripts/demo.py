"""Trains a small model here, makes it faster and distils its data, all methods at hand: some two minutes, no download.

Example: `hf-effml demo --out effml-demo`
"""

import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hf_effml
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.cli.small_runs import SMALL_RUN, train_with_bar


if TYPE_CHECKING:
    from hf_effml import ImageData, VimForImageClassification
    from hf_effml.trainers.vision import VisionTrainer
    from hf_effml.utils.report import Report


START, MERGED, DYNAMIC = "Vim, the start", "merged + re-trained", "DyVM 0.7 / 0.8 fine-tuned"
AMOUNTS, RETRAINED = (8, 14, 20), 20
MACHINE, ROUNDS = "1 CPU thread, batch 32", 7
# What the table shows beside the numbers of the start.
CHANGES = {"accuracy": "difference", "tokens": "share", "multiply_adds": "share"}


@dataclass
class DemoArguments:
    """Where to write, and how long to train."""

    out: str = field(default="effml-demo", metadata={"help": "Folder to write."})
    epochs: int = field(default=10, metadata={"help": "Passes over the digits to train the Vim."})
    retrain_epochs: int = field(default=3, metadata={"help": "Passes over the digits to re-train a faster one."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order and augmentation."})

    def settings(self, folder: str, epochs: int, learning_rate: float) -> dict[str, Any]:
        """Arguments of one training."""
        own = {"num_train_epochs": epochs, "learning_rate": learning_rate, "seed": self.seed}
        quiet = {"logging_strategy": "no", "disable_tqdm": True}
        return SMALL_RUN | quiet | own | {"output_dir": str(Path(self.out, folder))}


class Start(NamedTuple):
    """What every method starts from."""

    model: "VimForImageClassification"
    data: "ImageData"
    processor: Any


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(DemoArguments, argv=argv, program=__file__, description=__doc__)
    began, out = time.perf_counter(), Path(args.out)
    print("Loading torch and transformers ...", flush=True)
    import torch
    from transformers.utils import logging

    from hf_effml.cli.demo_distillation import distil_digits
    from hf_effml.utils.benchmark import describe_run
    from hf_effml.utils.files import write_json

    logging.disable_progress_bar()
    # A second thread hardly helps a model this small, and waits ten times as long wherever the cores are shared.
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    start = _train_start(args)
    models = {START: start.model}
    merged = partial(hf_effml.RMeeToVimForImageClassification.from_vim, start.model, merge_class_position="exact")
    models |= {f"r={r} merged": merged(merge_r=r) for r in AMOUNTS}
    trainers = _make_faster(args, start)
    models |= {name: trainer.model for name, trainer in trainers.items()}
    models = {name: model.eval() for name, model in models.items()}
    report = hf_effml.evaluate_vim(models, start.data.test, rounds=ROUNDS, where=MACHINE, name="results")
    report.columns = {name: replace(c, change=CHANGES.get(name, "")) for name, c in report.columns.items()}
    for name, trainer in trainers.items():
        trainer.save_model()
        results, data = report.card_results(name, beside=START), {"name": start.data.name}
        trainer.card_facts |= {"evaluated_on": start.data.name, "results": results, "data": data}
        trainer.create_model_card()
    _draw(out, report, models, start)
    distilled, set_folder = distil_digits(out, args.seed)
    report.parts.append(distilled)
    run = describe_run(seed=args.seed, rounds=ROUNDS, threads=1)
    report.facts = {"seconds": round(time.perf_counter() - began, 1), "run": run}
    write_json(out / "results.json", report.as_dict())
    print(f"\n{report.as_text()}\n\nWrote {args.out} in {report.facts['seconds']:.0f} s:")
    print(f"  {', '.join(sorted(path.name for path in out.iterdir()))}\nUse it:")
    folders = [str(trainer.args.output_dir) for trainer in trainers.values()]
    print(f'  pipeline("image-classification", "{folders[-1]}", trust_remote_code=True)')
    print(f'  load_dataset("parquet", data_files="{set_folder}/data/*.parquet", split="train")')
    return report.as_dict() | {"folders": folders}


def _train_start(args: DemoArguments) -> Start:
    """A small Vim, trained on scikit-learn's digits."""
    from transformers import set_seed

    set_seed(args.seed)
    processor = hf_effml.vim_image_processor(16, crop_share=1.0)
    data = hf_effml.load_image_data("digits", processor, hf_effml.Augmentation(max_shift=1), seed=args.seed)
    sizes = {"image_size": 16, "patch_size": 2, "hidden_size": 32, "num_hidden_layers": 6, "state_size": 8}
    model = hf_effml.VimForImageClassification(
        hf_effml.VimConfig(**sizes, symmetric_dt_init=True, **data.label_fields)
    )
    settings = hf_effml.VimTrainingArguments(**args.settings("", args.epochs, 3e-3))
    trainer = hf_effml.VimTrainer(model, settings, train_dataset=data.train, processing_class=processor)
    train_with_bar(trainer, "training a Vim")
    return Start(trainer.model, data, processor)


def _make_faster(args: DemoArguments, start: Start) -> "dict[str, VisionTrainer]":
    """The most that R-MeeTo merges here, re-trained; and a DyVM that drops half of its tokens."""
    data = {"train_dataset": start.data.train, "processing_class": start.processor}
    merged = hf_effml.RMeeToVimForImageClassification.from_vim(
        start.model, merge_r=RETRAINED, merge_class_position="exact"
    )
    settings = args.settings("rmeeto-digits", args.retrain_epochs, 2e-3)
    retraining = hf_effml.RMeeToTrainer(merged, hf_effml.RMeeToTrainingArguments(**settings), **data)
    train_with_bar(retraining, f"re-training, r={RETRAINED}")
    shares = {"pruning_layers": [2, 4], "token_keep_ratio": 0.7, "block_keep_ratio": 0.8}
    # Predictors and gates start from nothing, so they get a little longer.
    settings = args.settings("dyvm-digits", args.retrain_epochs + 1, 4e-3)
    dynamic = hf_effml.DyVMForImageClassification.from_vim(start.model, **shares)
    tuning = hf_effml.DyVMTrainer(dynamic, hf_effml.DyVMTrainingArguments(**settings), **data)
    train_with_bar(tuning, "fine-tuning, DyVM")
    return {f"r={RETRAINED} {MERGED}": retraining, DYNAMIC: tuning}


def _draw(out: Path, report: "Report", models: "dict[str, VimForImageClassification]", start: Start) -> None:
    """The trade-off of merging, and what is merged and dropped of some images."""
    from hf_effml.utils.plotting import plot_trade_off

    rows, merged = report.rows, f"r={RETRAINED} {MERGED}"
    points = {name: (name.split()[0], row["speed_up"], row["accuracy"]) for name, row in rows.items()}
    plot_trade_off(
        (START, 1.0, rows[START]["accuracy"]),
        {"merged": [points[f"r={r} merged"] for r in AMOUNTS], MERGED: [points[merged]]},
        out / "accuracy_speed.png",
        title="R-MeeTo on handwritten digits",
        note=f"Vim of 6 blocks, 65 tokens, {rows[START]['multiply_adds'] / 1e6:.1f} M multiply-adds; {MACHINE}",
    )
    labels = [row["label"] for row in start.data.test.rows]
    digits = [labels.index(digit) for digit in range(9)]
    hf_effml.draw_patches(models[merged], start.data, start.processor, out / "merged_tokens.png", digits)
    hf_effml.draw_patches(models[DYNAMIC], start.data, start.processor, out / "dropped_tokens.png")


if __name__ == "__main__":
    sys.exit(run_script(main))
