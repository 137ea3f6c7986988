"""What programs share that train image models: the data, the Vim to start from, and what is said at the end."""

import copy
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_effml.utils.imports import require
from hf_effml.utils.shards import ShardFolder

from .recipes import read_recipes


if TYPE_CHECKING:
    from hf_effml import Augmentation, ImageData, VimForImageClassification
    from hf_effml.utils.report import Report


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


def trainer_options(augmentation: "Augmentation", args: Any, data: "ImageData", processor: Any) -> dict[str, Any]:
    """Makes the keyword arguments of an image trainer.

    Args:
        augmentation ([`~hf_effml.Augmentation`]):
            How training images are changed.
        args (`TrainingArguments`):
            How to train. Where labels are mixed, the mixing smooths them, and no longer the loss: a copy says so.
        data ([`~hf_effml.ImageData`]):
            The images.
        processor (`BaseImageProcessor`):
            What makes pixels of them.

    Returns:
        `dict[str, Any]`: all but the model.
    """
    collator = augmentation.collator(len(data.labels), args.label_smoothing_factor)
    if collator is not None:
        args = copy.copy(args)
        args.label_smoothing_factor = 0.0
    return {
        "args": args,
        "data_collator": collator,
        "train_dataset": data.train,
        "eval_dataset": data.test,
        "processing_class": processor,
    }


def load_start(
    script: StartArguments,
    augmentation: "Augmentation",
    args: Any,
    build: "Callable[[VimForImageClassification], Any]",
) -> "tuple[Any, ImageData, dict[str, Any]]":
    """Loads the Vim to start from, training it first if need be, and the data.

    What can be wrong with the options is found before anything is trained: `build` is tried on a Vim without weights.

    Args:
        script ([`StartArguments`]):
            What to load.
        augmentation ([`~hf_effml.Augmentation`]):
            How training images are changed.
        args (`TrainingArguments`):
            How to train.
        build (`Callable`):
            Makes the model to train from the Vim.

    Returns:
        `tuple[PreTrainedModel, ImageData, dict]`: the model, the data, and [`trainer_options`].

    Raises:
        ValueError: If nothing says where to start, or the Vim knows other classes.
    """
    from transformers import set_seed

    from hf_effml import VimForImageClassification, load_image_data, load_image_processor

    _try_options(script, augmentation, args, build)
    start = script.model_name_or_path or _trained_start(script, args)
    set_seed(args.seed)
    processor = load_image_processor(start)
    data = load_image_data(script.data, processor, augmentation, seed=args.seed)
    options = {} if script.drop_path_rate is None else {"drop_path_rate": script.drop_path_rate}
    vim = VimForImageClassification.from_pretrained(start, **options)
    try:
        # Images of some of its classes will do.
        data = data.aligned_to(vim.config)
    except ValueError as error:
        raise ValueError(
            f"{error} That is `hf-effml train vim --model_name_or_path {shlex.quote(start)} --data "
            f"{shlex.quote(script.data)}`."
        ) from error
    return build(vim), data, trainer_options(augmentation, args, data, processor)


def _try_options(script: StartArguments, augmentation: "Augmentation", args: Any, build: Any) -> None:
    """Raises what would be raised once the start model is trained."""
    import torch

    from hf_effml import VimConfig, VimForImageClassification
    from hf_effml.utils.model_kinds import check_task

    if script.model_name_or_path is not None:
        config = VimConfig.from_pretrained(script.model_name_or_path)
    else:
        known = {each.name for each in fields(VimConfig)}
        config = VimConfig(**{name: value for name, value in _start_settings(script).items() if name in known})
    if script.drop_path_rate is not None:
        config = VimConfig(**config.to_dict() | {"drop_path_rate": script.drop_path_rate})
    with torch.device("meta"):
        build(VimForImageClassification(config))
    augmentation.collator(config.num_labels, args.label_smoothing_factor)
    if augmentation.needs_timm:
        require("timm")
    if args.teacher not in ("self", "none"):
        check_task(args.teacher, "AutoModelForImageClassification")


def _start_settings(script: StartArguments) -> dict[str, Any]:
    """The recipe of the start model, which has to exist."""
    if script.start_recipe is None:
        raise ValueError(
            "There is no model to start from. Give one with `--model_name_or_path FOLDER`, or the recipe that trains "
            "one with `--start_recipe smoke`."
        )
    recipes = read_recipes("vim")
    if script.start_recipe not in recipes:
        raise ValueError(
            f"`--start_recipe {script.start_recipe}` is no recipe of a Vim; there are: {', '.join(recipes)}."
        )
    return {name: value for name, value in recipes[script.start_recipe].items() if name not in ("about", "output_dir")}


def _trained_start(script: StartArguments, args: Any) -> str:
    """The folder of the start model; what an earlier run with its settings has left there is used or continued."""
    folder = Path(args.output_dir) / "start"
    own = {"data": script.data, "seed": args.seed}
    # Its card is written last.
    start = ShardFolder(folder, ["README.md"], _start_settings(script) | own, "_start.json")
    if not start.start():
        print(f"The start model `{folder}` is there, trained by an earlier run with the same settings.")
        return str(folder)
    resume = ["--resume_from_checkpoint", "true"] if any(folder.glob("checkpoint-*")) else []
    options = [word for name, value in own.items() for word in (f"--{name}", str(value))]
    train = import_module("hf_effml.scripts.train_vim").main
    train(["--recipe", str(script.start_recipe), *options, "--output_dir", str(folder), *resume])
    return str(folder)


def finish_training(
    trainer: Any, data: "ImageData", report: "Report", base_model: str | None = None, beside: str | None = None
) -> None:
    """Writes the card of a trained and saved model, and prints its table and how to load it.

    Args:
        trainer ([`~hf_effml.trainers.base.EffMLTrainer`]):
            Has trained and saved the model.
        data ([`~hf_effml.ImageData`]):
            What the results were measured on.
        report ([`~hf_effml.utils.report.Report`]):
            The results; its last row is the model's.
        base_model (`str`, *optional*):
            What the model was made from.
        beside (`str`, *optional*):
            The row of the start model.
    """
    trainer.card_facts |= {
        "results": report.card_results([*report.rows][-1], beside=beside),
        "evaluated_on": data.name,
        "base_model": base_model,
        "data": {"name": data.name, "hub_id": data.hub_id},
    }
    trainer.create_model_card()
    folder = trainer.args.output_dir
    print(f"\n{report.as_text()}\nWrote {folder}. To load it:")
    print(f'AutoModelForImageClassification.from_pretrained("{folder}", trust_remote_code=True)')


__all__ = ["StartArguments", "finish_training", "load_start", "trainer_options"]
