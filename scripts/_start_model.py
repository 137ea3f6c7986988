"""What the programs share that make something of a trained Vim: where it comes from, and what is said at the end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_effml import Augmentation, ImageData, VimForImageClassification, load_image_data, load_image_processor
from hf_effml.hub import CardResult


@dataclass
class StartArguments:
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


def load_start(
    script: StartArguments, augmentation: Augmentation, args: Any
) -> tuple[VimForImageClassification, ImageData, dict[str, Any]]:
    """Loads the Vim to start from, training it first if need be, and the data.

    Args:
        script (`StartArguments`):
            What to load.
        augmentation (`Augmentation`):
            How training images are changed.
        args (`TrainingArguments`):
            How to train. Where labels are mixed, the mixing smooths them, and no longer the loss.

    Returns:
        `tuple[VimForImageClassification, ImageData, dict]`: the Vim, the data, and keyword arguments of a trainer.

    Raises:
        ValueError: If nothing says where to start, or the Vim knows another number of classes.
    """
    from transformers import set_seed

    start = script.model_name_or_path or _trained_start(script, args.output_dir)
    set_seed(args.seed)
    processor = load_image_processor(start)
    data = load_image_data(script.data, processor, augmentation, seed=args.seed)
    options = {} if script.drop_path_rate is None else {"drop_path_rate": script.drop_path_rate}
    vim = VimForImageClassification.from_pretrained(start, **options)
    if vim.config.num_labels != len(data.labels):
        raise ValueError(
            f"`{start}` knows {vim.config.num_labels} classes, `{data.name}` has {len(data.labels)}. Fine-tune it "
            f"first: `hf-effml train vim --model_name_or_path {start} --data {script.data}`."
        )
    collator = augmentation.collator(len(data.labels), args.label_smoothing_factor)
    if collator is not None:
        args.label_smoothing_factor = 0.0
    return (
        vim,
        data,
        {
            "args": args,
            "data_collator": collator,
            "train_dataset": data.train,
            "eval_dataset": data.test,
            "processing_class": processor,
        },
    )


def _trained_start(script: StartArguments, output_dir: str) -> str:
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


def report(trainer: Any, rows: Sequence[CardResult], data: ImageData, script: StartArguments) -> None:
    """Writes the card of a trained model, and prints its table and how to load it.

    Args:
        trainer (`EffMLTrainer`):
            Has trained and saved the model.
        rows (`Sequence[CardResult]`):
            Measured values, each beside that of the start model.
        data (`ImageData`):
            What they were measured on.
        script (`StartArguments`):
            What it was made from.
    """
    trainer.card_facts |= {
        "results": list(rows),
        "evaluated_on": data.name,
        "base_model": script.model_name_or_path,
        "datasets": [data.hub_id] if data.hub_id else [],
    }
    trainer.create_model_card()
    print(f"\n{'':<36}{'this model':>12}{'its start':>12}")
    for row in rows:
        print(f"{row.name:<36}{row.value:>12.4g}{row.starting_point:>12.4g}")
    folder = trainer.args.output_dir
    print(f"Wrote {folder}. To load it:")
    print(f'AutoModelForImageClassification.from_pretrained("{folder}", trust_remote_code=True)')
