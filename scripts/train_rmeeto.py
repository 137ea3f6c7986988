"""Merges the tokens of a trained Vision Mamba and re-trains it.

Example: `hf-effml train rmeeto --recipe smoke --output_dir rmeeto-smoke`
"""

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from hf_effml import (
    Augmentation,
    RMeeToTrainer,
    RMeeToTrainingArguments,
    RMeeToVimConfig,
    RMeeToVimForImageClassification,
    count_multiply_adds,
    merge_schedule,
    token_merging,
)
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.cli.start_model import StartArguments, finish_training, load_start
from hf_effml.utils.report import Column, Report


COLUMNS = {
    "accuracy": Column("accuracy", ".1%", card="Accuracy", metric="accuracy"),
    "accuracy_before": Column("not re-trained", ".1%", card="Accuracy without re-training"),
    "tokens": Column("tokens at the end", card="Tokens in the last block"),
    "multiply_adds": Column("M mult-adds", ".2f", scale=1e-6, card="Million multiply-adds per image"),
}


@dataclass
class MergeArguments:
    """How tokens are merged; the fields of `RMeeToVimConfig`."""

    merge_r: float = field(
        default=0.0, metadata={"help": "Tokens that a merging block removes; below 0.5 their share."}
    )
    merge_target_ratio: float | None = field(
        default=None, metadata={"help": "Share of the tokens to save on average, instead of merge_r."}
    )
    merge_interval: int = field(default=2, metadata={"help": "Blocks from one merge to the next."})
    merge_metric: Literal["hidden", "B", "C", "delta"] = field(
        default="hidden", metadata={"help": "What similarity is measured on."}
    )
    merge_matching: Literal["bipartite", "local", "random"] = field(
        default="bipartite", metadata={"help": "Which tokens may meet; local is linear in their number."}
    )
    merge_mode: Literal["merge", "prune"] = field(default="merge", metadata={"help": "prune drops the same tokens."})
    merge_class_position: Literal["proportional", "exact"] = field(
        default="proportional", metadata={"help": "exact keeps the class token between its true neighbours."}
    )

    def fields(self) -> dict[str, Any]:
        """The fields of the configuration; a whole number of tokens is an integer there."""
        r = self.merge_r
        return asdict(self) | {"merge_r": int(r) if r.is_integer() else r}


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    script, merging, augmentation, args = parse_arguments(
        StartArguments,
        MergeArguments,
        Augmentation,
        RMeeToTrainingArguments,
        argv=argv,
        program=__file__,
        description=__doc__,
    )
    if not merging.merge_r and merging.merge_target_ratio is None:
        raise ValueError("Say how much to merge: `--merge_r 5`, or `--merge_target_ratio 0.3`.")
    build = partial(RMeeToVimForImageClassification.from_vim, **merging.fields())
    model, data, options = load_start(script, augmentation, args, build)
    trainer = RMeeToTrainer(model, **options)
    report, config = Report("train_rmeeto", COLUMNS), trainer.model.config
    tokens = merge_schedule(config)
    with token_merging(trainer.model, r=0):
        dense = trainer.evaluate(metric_key_prefix="dense")["dense_accuracy"]
    report.add("its start", accuracy=dense, accuracy_before=dense, **_work(config, tokens[:1] * len(tokens)))
    merged = trainer.evaluate(metric_key_prefix="merged")["merged_accuracy"]
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    retrained = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    report.add("this model", accuracy=retrained, accuracy_before=merged, **_work(config, tokens))
    finish_training(trainer, data, report, script.model_name_or_path, beside="its start")
    return {
        "output_dir": args.output_dir,
        "dense_accuracy": dense,
        "merged_accuracy": merged,
        "accuracy": retrained,
        "tokens_per_layer": tokens,
        "steps": trainer.state.global_step,
    }


def _work(config: RMeeToVimConfig, tokens: list[int]) -> dict[str, Any]:
    return {"tokens": tokens[-1], "multiply_adds": count_multiply_adds(config, tokens)["total"]}


if __name__ == "__main__":
    sys.exit(run_script(main))
