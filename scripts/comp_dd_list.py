"""Lists subsets of ImageNet: their classes, how complex they are, and the commands that use them."""

import argparse
import sys

from hf_effml.cli.commands import command_line_of
from hf_effml.cli.parsing import UsageError, run_script
from hf_effml.comp_dd.subsets import Subset, custom_subset, list_subsets, subset_info


# Subsets that the authors of EDF give settings for, all with the same numbers of images.
_WITH_SETTINGS = ("bird", "car", "dog")


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    # It answers without transformers, which the parser of other programs needs.
    parser = argparse.ArgumentParser(
        command_line_of(__file__), description=__doc__, epilog="Example: hf-effml comp-dd list bird_easy"
    )
    parser.add_argument("subset", nargs="?", help="a subset: shows its classes and commands; all of them if left out")
    parser.add_argument("--classes", nargs="+", help="your own subset: synsets, numbers or names; SUBSET names it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(f"`{unknown[0]}` is no option or one argument too many.", parser.prog)
    if args.subset is None and args.classes is None:
        print(_overview())
        return {"subsets": [subset.as_dict() for subset in list_subsets().values()]}
    subset = custom_subset(args.subset or "my_subset", args.classes) if args.classes else subset_info(args.subset)
    commands = _commands(subset, args.classes)
    print(_details(subset, commands))
    return {"subset": subset.as_dict(), "commands": commands}


def _overview() -> str:
    lines = [f"{'subset':<14}{'classes':>8}{'train':>9}{'validation':>12}{'complexity':>12}  first classes"]
    for subset in list_subsets().values():
        numbers = f"{subset.train_images:,}" if subset.train_images else "?"
        complexity = f"{subset.mean_complexity:.1f} %" if subset.mean_complexity else "?"
        first = ", ".join(subset.names[:3])
        counts = f"{len(subset.names):>8}{numbers:>9}{subset.validation_images:>12}"
        lines.append(f"{subset.config:<14}{counts}{complexity:>12}  {first}")
    lines += ["", "Counts and complexity as published for Comp-DD. `hf-effml comp-dd list SUBSET` shows one in full."]
    return "\n".join(lines)


def _details(subset: Subset, commands: dict[str, str]) -> str:
    train = f"{subset.train_images:,}" if subset.train_images else "an unpublished number of"
    counts = f"{train} training and {subset.validation_images} validation images"
    lines = [f"{subset.config}: {len(subset.names)} classes, {counts}"]
    if subset.mean_complexity:
        lines[0] += f", mean complexity {subset.mean_complexity} % (published)"
    lines += ["", f"{'label':>5}  {'ImageNet':>8}  {'synset':<10}  {'train':>6}  name"]
    per_class = subset.train_per_class or ("?",) * len(subset.names)
    rows = zip(subset.indices, subset.synsets, per_class, subset.names, strict=True)
    for label, (index, synset, count, name) in enumerate(rows):
        lines.append(f"{label:>5}  {index:>8}  {synset:<10}  {count:>6}  {name}")
    if subset.config == "music_hard":
        lines += ["", "The official list names banjo twice; there are nine classes."]
    lines += [""] + [f"# {what}\n{command}" for what, command in commands.items()]
    return "\n".join(lines)


def _commands(subset: Subset, classes: list[str] | None) -> dict[str, str]:
    name = subset.config
    own = f"--classes {' '.join(subset.synsets)} --name {name} " if classes else f"{name} "
    known = subset.category in _WITH_SETTINGS
    # The classes of a network for ImageNet, by its own numbers.
    cam = f"--cam_classes {' '.join(map(str, subset.indices))}" if classes else f"--cam_subset {name}"
    recipe = f"--recipe {name}_ipc10" if known else "--recipe comp_dd_ipc10"
    further = "" if known else f" --bank expert-{name} --cam_model microsoft/resnet-18 {cam} --output_dir edf-{name}"
    settings = "with the authors' settings" if known else "with the middle of the authors' settings for other subsets"
    return {
        "build it from your copy of ImageNet": f"hf-effml comp-dd build {own}--imagenet PATH_OR_HUB_ID",
        "train experts on it": (
            f"hf-effml train expert --recipe comp_dd --data comp-dd:{name} --output_dir expert-{name}"
        ),
        f"distil 10 images per class by EDF, {settings}": f"hf-effml train edf {recipe}{further}  # or _ipc1, _ipc50",
    }


if __name__ == "__main__":
    sys.exit(run_script(main))
