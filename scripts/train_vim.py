"""Trains a Vision Mamba on images, from scratch or from a trained one.

Example: `hf-effml train vim --recipe smoke --output_dir vim-smoke`
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from hf_effml import (
    Augmentation,
    ImageData,
    VimConfig,
    VimForImageClassification,
    VimTrainer,
    VimTrainingArguments,
    load_image_data,
    load_image_processor,
    vim_image_processor,
)
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.cli.start_model import trainer_options
from hf_effml.utils.sources.class_labels import are_names, known_classes


SIZES = ("image_size", "patch_size", "patch_stride", "hidden_size", "num_hidden_layers", "state_size")


@dataclass
class VimScriptArguments:
    """What to train, and on what. A trained Vim has its own sizes; those after a semicolon are a new one's."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a Vim to start from; a new one if left out."}
    )
    data: str = field(default="digits", metadata={"help": "digits, a folder, or the id of a data set on the Hub."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the images in pixels; 224."})
    crop_share: float | None = field(
        default=None, metadata={"help": "Share of the shorter side that the crop keeps; 0.875."}
    )
    patch_size: int | None = field(default=None, metadata={"help": "Side of a patch in pixels; 16."})
    patch_stride: int | None = field(default=None, metadata={"help": "Step between patches; their side."})
    hidden_size: int | None = field(default=None, metadata={"help": "Width: 192 tiny, 384 small, 768 base; 192."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Number of blocks; 24."})
    state_size: int | None = field(default=None, metadata={"help": "States per channel of the scan; 16."})
    drop_path_rate: float = field(default=0.0, metadata={"help": "Stochastic depth of the last block."})
    symmetric_dt_init: bool = field(
        default=False, metadata={"help": "Start both directions alike; learns faster on small data."}
    )


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    script, augmentation, args = parse_arguments(
        VimScriptArguments,
        Augmentation,
        VimTrainingArguments,
        argv=argv,
        program=__file__,
        description=__doc__,
    )
    from transformers import set_seed

    set_seed(args.seed)
    source = script.model_name_or_path
    if source is None:
        _new_config(script)
        processor = vim_image_processor(script.image_size or 224, script.crop_share or 0.875)
    else:
        config = VimConfig.from_pretrained(source)
        processor = load_image_processor(source)
        _check_shape(script, config, processor)
    data = load_image_data(script.data, processor, augmentation, seed=args.seed)
    trainer = VimTrainer(_model(script, data), **trainer_options(augmentation, args, data, processor))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    trainer.card_facts["data"] = {"name": data.name, "hub_id": data.hub_id}
    trainer.create_model_card(dataset=data.name)
    print(f"\nAccuracy on {data.name}: {accuracy:.1%}. Wrote {args.output_dir}. To load it:")
    print(f'AutoModelForImageClassification.from_pretrained("{args.output_dir}", trust_remote_code=True)')
    return {"output_dir": args.output_dir, "accuracy": accuracy, "steps": trainer.state.global_step}


def _model(script: VimScriptArguments, data: ImageData) -> VimForImageClassification:
    if script.model_name_or_path is not None:
        return _trained(script.model_name_or_path, data, drop_path_rate=script.drop_path_rate)
    return VimForImageClassification(_new_config(script, **data.label_fields))


def _new_config(script: VimScriptArguments, **labels: Any) -> VimConfig:
    sizes = {name: getattr(script, name) for name in SIZES if getattr(script, name) is not None}
    others = {"drop_path_rate": script.drop_path_rate, "symmetric_dt_init": script.symmetric_dt_init}
    return VimConfig(**sizes, **others, **labels)


def _check_shape(script: VimScriptArguments, config: VimConfig, processor: Any) -> None:
    """Refuses sizes that a trained Vim does not have; recipes may say those that it has."""
    height = processor.crop_size["height"]
    own = {name: getattr(config, name) for name in SIZES}
    own["crop_share"] = round(height / processor.size.get("shortest_edge", height), 3)
    for name, value in own.items():
        asked = getattr(script, name)
        if asked is not None and asked != value:
            raise ValueError(
                f"`--{name} {asked}` does not fit `{script.model_name_or_path}`, which has {value}, and a trained Vim "
                "keeps its shape. Leave the option out, or train a new one without `--model_name_or_path`."
            )


def _trained(source: str, data: ImageData, **options: float) -> VimForImageClassification:
    """A trained Vim; where it knows other classes than the data, with a head that starts anew."""
    known = VimConfig.from_pretrained(source)
    if set(known_classes(known)) == set(data.labels):
        # It keeps its own numbers, and the trainer gives them to the images.
        return VimForImageClassification.from_pretrained(source, **options)
    fields: dict[str, Any] = options | data.label_fields
    vim = VimForImageClassification.from_pretrained(source, ignore_mismatched_sizes=True, **fields)
    if known.num_labels != len(data.labels) or not are_names(known_classes(known)):
        return vim
    print(f"{source} knows other classes than {data.name}: its head starts anew.")
    fresh = VimForImageClassification(vim.config)
    fresh.vim.load_state_dict(vim.vim.state_dict())
    return fresh


if __name__ == "__main__":
    sys.exit(run_script(main))
