"""Merges the tokens of a trained Vision Mamba and re-trains it.

Example: `hf-effml train rmeeto --recipe smoke --output_dir rmeeto-smoke`
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_effml import (
    Augmentation,
    ImageData,
    RMeeToTrainer,
    RMeeToTrainingArguments,
    RMeeToVimConfig,
    RMeeToVimForImageClassification,
    VimForImageClassification,
    load_image_data,
    load_image_processor,
    token_merging,
)
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.hub import CardResult
from hf_effml.vim.complexity import count_multiply_adds
from hf_effml.vim.configuration_rmeeto import merge_schedule


@dataclass
class RMeeToScriptArguments:
    """What to start from, and what to train on."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the trained Vim. `start_recipe` trains one if left out."}
    )
    start_recipe: str | None = field(
        default=None, metadata={"help": "Recipe of `hf-effml train vim` that trains it, in OUTPUT_DIR/start."}
    )
    data: str = field(default="digits", metadata={"help": "digits, a folder, or the id of a data set on the Hub."})
    drop_path_rate: float | None = field(
        default=None, metadata={"help": "Stochastic depth of the last block; the start model's own if left out."}
    )


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
        RMeeToScriptArguments,
        MergeArguments,
        Augmentation,
        RMeeToTrainingArguments,
        argv=argv,
        prog="hf-effml train rmeeto",
        description=__doc__,
        recipe_prefix="rmeeto",
    )
    from transformers import set_seed

    if not merging.merge_r and merging.merge_target_ratio is None:
        raise ValueError("Say how much to merge: `--merge_r 5`, or `--merge_target_ratio 0.3`.")
    start = script.model_name_or_path or _trained_start(script, args.output_dir)
    set_seed(args.seed)
    processor = load_image_processor(start)
    data = load_image_data(script.data, processor, augmentation, seed=args.seed)
    collator = augmentation.collator(len(data.labels), args.label_smoothing_factor)
    if collator is not None:
        args.label_smoothing_factor = 0.0
    trainer = RMeeToTrainer(
        _merged_model(start, script, merging, data),
        args,
        data_collator=collator,
        train_dataset=data.train,
        eval_dataset=data.test,
        processing_class=processor,
    )
    with token_merging(trainer.model, r=0):
        dense = trainer.evaluate(metric_key_prefix="dense")["dense_accuracy"]
    merged = trainer.evaluate(metric_key_prefix="merged")["merged_accuracy"]
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    retrained = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    results = _results(trainer.model.config, dense, merged, retrained)
    trainer.card_facts |= {
        "results": [CardResult(**row) for row in results],
        "evaluated_on": data.name,
        "base_model": script.model_name_or_path,
        "datasets": [data.hub_id] if data.hub_id else [],
    }
    trainer.create_model_card()
    print(f"\n{'':<36}{'this model':>12}{'its start':>12}")
    for row in results:
        print(f"{row['name']:<36}{row['value']:>12.4g}{row['starting_point']:>12.4g}")
    print(f"Wrote {args.output_dir}. To load it:")
    print(f'AutoModelForImageClassification.from_pretrained("{args.output_dir}", trust_remote_code=True)')
    return {
        "output_dir": args.output_dir,
        "dense_accuracy": dense,
        "merged_accuracy": merged,
        "accuracy": retrained,
        "tokens_per_layer": merge_schedule(trainer.model.config),
        "steps": trainer.state.global_step,
    }


def _trained_start(script: RMeeToScriptArguments, output_dir: str) -> str:
    """The folder of the start model; what an earlier run has left there is used or continued."""
    if script.start_recipe is None:
        raise ValueError(
            "There is no model to start from. Give one with `--model_name_or_path FOLDER`, or the recipe that trains "
            "one with `--start_recipe smoke`."
        )
    from hf_effml.scripts import train_vim

    folder = Path(output_dir) / "start"
    # Its card is written last.
    if not (folder / "README.md").exists():
        resume = ["--resume_from_checkpoint", "true"] if any(folder.glob("checkpoint-*")) else []
        train_vim.main(["--recipe", script.start_recipe, "--output_dir", str(folder), *resume])
    return str(folder)


def _merged_model(
    start: str, script: RMeeToScriptArguments, merging: MergeArguments, data: ImageData
) -> RMeeToVimForImageClassification:
    options = {} if script.drop_path_rate is None else {"drop_path_rate": script.drop_path_rate}
    vim = VimForImageClassification.from_pretrained(start, **options)
    if vim.config.num_labels != len(data.labels):
        raise ValueError(
            f"`{start}` knows {vim.config.num_labels} classes, `{data.name}` has {len(data.labels)}. Fine-tune it "
            f"first: `hf-effml train vim --model_name_or_path {start} --data {script.data}`."
        )
    return RMeeToVimForImageClassification.from_vim(vim, **merging.fields())


def _results(config: RMeeToVimConfig, dense: float, merged: float, retrained: float) -> list[dict[str, Any]]:
    """Rows of the card and of the table printed: this model beside the one it started from."""
    tokens = merge_schedule(config)
    work = [count_multiply_adds(config, each)["total"] / 1e6 for each in (tokens, tokens[:1] * len(tokens))]
    rows = [
        ("Accuracy", retrained, dense, "accuracy"),
        ("Accuracy without re-training", merged, dense, None),
        ("Tokens in the last block", tokens[-1], tokens[0], None),
        ("Million multiply-adds per image", *work, None),
    ]
    return [dict(zip(("name", "value", "starting_point", "metric"), row, strict=True)) for row in rows]


if __name__ == "__main__":
    sys.exit(run_script(main))
