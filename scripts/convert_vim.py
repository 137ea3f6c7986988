"""Converts an official Vision Mamba checkpoint (Vim, R-MeeTo, DyVM) to a folder for `from_pretrained`.

Example: `hf-effml convert vim_t_midclstok_76p1acc.pth vim-tiny`
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hf_effml.cli.parsing import parse_arguments, run_script


@dataclass
class ConvertArguments:
    """What to read and what to write."""

    source: str = field(metadata={"help": "Official .pth or .safetensors file.", "positional": True})
    out: str = field(metadata={"help": "Folder to write.", "positional": True})
    use_ema: bool = field(default=False, metadata={"help": "Take the moving average of the weights."})
    trained_image_size: int = field(default=224, metadata={"help": "Side in pixels that the file was trained for."})
    image_size: int | None = field(default=None, metadata={"help": "Side wanted, if another: interpolates positions."})
    patch_stride: int | None = field(default=None, metadata={"help": "Patch stride wanted, if another."})
    token_keep_ratio: float | None = field(
        default=None,
        metadata={"help": "Share of the tokens that a stage of a DyVM keeps; its weights do not show it."},
    )
    block_keep_ratio: float | None = field(default=None, metadata={"help": "Share of the scans that a DyVM aims at."})
    pruning_layers: list[int] | None = field(
        default=None, metadata={"help": "Blocks before which a DyVM drops tokens; evenly spaced by default."}
    )
    id2label: str | None = field(default=None, metadata={"help": "JSON file: index of a class -> its name."})


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(ConvertArguments, argv=argv, program=__file__, description=__doc__)
    names = json.loads(Path(args.id2label).read_text(encoding="utf-8")) if args.id2label else None
    from hf_effml.vim.convert_vim import convert_vim_checkpoint

    chosen = {name: getattr(args, name) for name in ("token_keep_ratio", "block_keep_ratio", "pruning_layers")}
    model = convert_vim_checkpoint(
        args.source,
        args.out,
        use_ema=args.use_ema,
        trained_image_size=args.trained_image_size,
        image_size=args.image_size,
        patch_stride=args.patch_stride,
        id2label={int(index): name for index, name in names.items()} if names else None,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    parameters = model.num_parameters()
    print(f"Wrote {args.out} ({parameters:,} parameters). To load it:")
    print(f'AutoModelForImageClassification.from_pretrained("{args.out}", trust_remote_code=True)')
    return {"output_dir": args.out, "parameters": parameters, "num_labels": model.config.num_labels}


if __name__ == "__main__":
    sys.exit(run_script(main))
