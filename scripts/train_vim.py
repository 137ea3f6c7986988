"""Trains a Vision Mamba on images, from scratch or from a trained one.

Example: `hf-effml train vim --recipe smoke --output_dir vim-smoke`
"""

import sys
from dataclasses import dataclass, field

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


@dataclass
class VimScriptArguments:
    """What to train, and on what."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a Vim to start from; a new one if left out."}
    )
    data: str = field(default="digits", metadata={"help": "digits, a folder, or the id of a data set on the Hub."})
    image_size: int = field(default=224, metadata={"help": "Side of the images in pixels."})
    crop_share: float = field(default=0.875, metadata={"help": "Share of the shorter side that the crop keeps."})
    patch_size: int = field(default=16, metadata={"help": "Side of a patch in pixels."})
    patch_stride: int | None = field(default=None, metadata={"help": "Step between patches; their side if left out."})
    hidden_size: int = field(default=192, metadata={"help": "Width: 192 tiny, 384 small, 768 base."})
    num_hidden_layers: int = field(default=24, metadata={"help": "Number of blocks."})
    state_size: int = field(default=16, metadata={"help": "States per channel of the scan."})
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
        processor = vim_image_processor(script.image_size, script.crop_share)
    else:
        processor = load_image_processor(source)
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
        return VimForImageClassification.from_pretrained(
            script.model_name_or_path,
            drop_path_rate=script.drop_path_rate,
            ignore_mismatched_sizes=True,
            **data.label_fields,
        )
    names = ("image_size", "patch_size", "patch_stride", "hidden_size", "num_hidden_layers", "state_size")
    fields = {name: getattr(script, name) for name in (*names, "drop_path_rate", "symmetric_dt_init")}
    return VimForImageClassification(VimConfig(**fields, **data.label_fields))


if __name__ == "__main__":
    sys.exit(run_script(main))
