"""Builds subsets of ImageNet from your own copy, as folders for `load_dataset` and `hf-effml train expert`.

The copy may be folders by class, a flat validation folder with annotations, Kaggle's download, the two tar files as
they are, or tables of the Hub, here or there. A killed build goes on where it stopped when it is repeated.

Example: `hf-effml comp-dd build bird_easy bird_hard --imagenet /data/imagenet`
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

from hf_effml.cli.parsing import parse_arguments, run_script


@dataclass
class BuildArguments:
    """What to build, and from what."""

    imagenet: str = field(metadata={"help": "Folder of your ImageNet, or a Hub id such as ILSVRC/imagenet-1k."})
    subsets: list[str] = field(
        default_factory=list,
        metadata={"help": "Names as `comp-dd list` shows them, or `all` of Comp-DD.", "positional": True},
    )
    classes: list[str] = field(
        default_factory=list, metadata={"help": "A subset of your own: synsets, numbers or names of classes."}
    )
    name: str = field(default="my_subset", metadata={"help": "What to call that."})
    output_dir: str = field(default="comp-dd", metadata={"help": "Folder to build in."})
    size: int = field(default=128, metadata={"help": "Side of the pictures in pixels."})
    resize_mode: Literal["squash", "center_crop"] = field(
        default="squash", metadata={"help": "squash, as the authors do, or center_crop."}
    )
    image_format: Literal["webp", "png", "original"] = field(
        default="webp", metadata={"help": "webp or png, both without loss, or original bytes in their size."}
    )
    decoder: str | None = field(default=None, metadata={"help": "pil or torchvision; torchvision where it works."})
    fast_decode: bool = field(
        default=False, metadata={"help": "Decode JPEG at a lower resolution, which changes pixels."}
    )
    num_proc: int = field(default=1, metadata={"help": "Pictures decoded at a time, on as many cores."})
    strict: bool = field(default=False, metadata={"help": "Fail where counts differ from the published ones."})
    skip_broken: bool = field(default=False, metadata={"help": "Leave out and list pictures that cannot be decoded."})
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch on the Hub."})

    def __post_init__(self) -> None:
        if not self.subsets and not self.classes:
            raise ValueError("Name subsets, as `hf-effml comp-dd list` shows them, or `--classes` of your own.")


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(BuildArguments, argv=argv, program=__file__, description=__doc__)
    from hf_effml.comp_dd import build_comp_dd, custom_subset
    from hf_effml.comp_dd.building import PictureSettings

    chosen = [*args.subsets, *([custom_subset(args.name, args.classes)] if args.classes else [])]
    how = (args.size, args.resize_mode, args.image_format, args.decoder, args.fast_decode)
    built = build_comp_dd(
        chosen,
        args.imagenet,
        args.output_dir,
        pictures=PictureSettings(*how),
        num_proc=args.num_proc,
        strict=args.strict,
        skip_broken=args.skip_broken,
        revision=args.revision,
    )
    counts = {name: {split: rows.num_rows for split, rows in splits.items()} for name, splits in built.items()}
    for name, numbers in counts.items():
        print(f"{name}: {numbers['train']:,} training and {numbers['validation']:,} validation images")
    first = next(iter(counts))
    print(f'\nWrote {args.output_dir}. To load it:\nload_dataset("{args.output_dir}", "{first}")')
    return {"output_dir": args.output_dir, "images": counts}


if __name__ == "__main__":
    sys.exit(run_script(main))
