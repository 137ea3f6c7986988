"""Teaches a trained Vision Mamba which tokens to drop and which scans to skip.

Example: `hf-effml train dyvm --recipe smoke --output_dir dyvm-smoke`
"""

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from hf_effml import Augmentation, DyVMForImageClassification, DyVMTrainer, DyVMTrainingArguments
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.cli.start_model import StartArguments, finish_training, load_start
from hf_effml.utils.report import Column, Report
from hf_effml.vim.evaluation.measure import amount_of_work


COLUMNS = {
    "accuracy": Column("accuracy", ".1%", card="Accuracy", metric="accuracy"),
    "accuracy_before": Column("not fine-tuned", ".1%", card="Accuracy without fine-tuning"),
    "tokens": Column("tokens at the end", card="Tokens in the last block"),
    "block_keep_ratio": Column("scans", ".1%", card="Share of the scans that run"),
    "multiply_adds": Column("M mult-adds", ".2f", scale=1e-6, card="Million multiply-adds per image"),
}


@dataclass
class SelectionArguments:
    """What is dropped and skipped; the fields of `DyVMConfig`."""

    pruning_layers: list[int] | None = field(
        default=None, metadata={"help": "Blocks before which tokens are dropped; at every quarter if left out."}
    )
    token_keep_ratio: list[float] = field(
        default_factory=lambda: [0.7],
        metadata={"help": "Share that each of them keeps of what it gets; or one share of all patches per block."},
    )
    block_keep_ratio: float = field(default=0.8, metadata={"help": "Share of the scans that run, on average."})
    enable_token_pruning: bool = field(default=True, metadata={"help": "Drop tokens."})
    enable_block_selection: bool = field(default=True, metadata={"help": "Skip scans."})
    token_selection: Literal["learned", "random", "even"] = field(
        default="learned", metadata={"help": "Which tokens stay; the last two are for comparisons."}
    )
    token_ratio_loss_weight: float = field(default=10.0, metadata={"help": "Weight of the share of tokens."})
    block_ratio_loss_weight: float = field(default=10.0, metadata={"help": "Weight of the share of scans."})
    distillation_weight: float = field(default=0.5, metadata={"help": "Weight of the distance from the teacher."})

    def fields(self) -> dict[str, Any]:
        """The fields of the configuration; a single share is a number there."""
        shares = self.token_keep_ratio
        return asdict(self) | {"token_keep_ratio": shares[0] if len(shares) == 1 else shares}


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    script, selection, augmentation, args = parse_arguments(
        StartArguments,
        SelectionArguments,
        Augmentation,
        DyVMTrainingArguments,
        argv=argv,
        program=__file__,
        description=__doc__,
    )
    build = partial(DyVMForImageClassification.from_vim, **selection.fields())
    model, data, options = load_start(script, augmentation, args, build)
    trainer = DyVMTrainer(model, **options)
    report = Report("train_dyvm", COLUMNS)
    model.set_pruning(False)
    dense = trainer.evaluate(metric_key_prefix="dense")["dense_accuracy"]
    report.add("its start", accuracy=dense, accuracy_before=dense, **_work(model, 1.0))
    model.set_pruning(True)
    pruned = trainer.evaluate(metric_key_prefix="pruned")["pruned_accuracy"]
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    scans = metrics.get("eval_block_keep_ratio", 1.0)
    report.add("this model", accuracy=metrics["eval_accuracy"], accuracy_before=pruned, **_work(model, scans))
    finish_training(trainer, data, report, script.model_name_or_path, beside="its start")
    return {
        "output_dir": args.output_dir,
        "dense_accuracy": dense,
        "pruned_accuracy": pruned,
        "accuracy": metrics["eval_accuracy"],
        "block_keep_ratio": scans,
        "tokens_per_layer": amount_of_work(model)[1],
        "steps": trainer.state.global_step,
    }


def _work(model: DyVMForImageClassification, scans: float) -> dict[str, Any]:
    work, tokens = amount_of_work(model, scans)
    return {"tokens": tokens[-1], "block_keep_ratio": scans, "multiply_adds": work["total"]}


if __name__ == "__main__":
    sys.exit(run_script(main))
