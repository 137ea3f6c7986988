"""Scores how complex images are, by class activation maps: the smaller the part that speaks for a class, the more.

The data may be a folder that `hf-effml comp-dd build` wrote, with all its subsets or, as `comp-dd:bird_easy`, one of
them, or any data set of images, here or on the Hub.

Example: `hf-effml comp-dd score comp-dd --model microsoft/resnet-18`
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hf_effml.cli.parsing import parse_arguments, run_script


@dataclass
class ScoreArguments:
    """What to score, and with what."""

    data: str = field(metadata={"help": "A built folder, with `:SUBSET` for one, or any images.", "positional": True})
    model: list[str] = field(
        default_factory=list, metadata={"help": "Folder or Hub id of a classifier; scores of several are averaged."}
    )
    split: Literal["train", "test"] = field(default="train", metadata={"help": "train, or test: what is tested on."})
    target: Literal["prediction", "label"] = field(
        default="prediction", metadata={"help": "Class to explain: the one that a network names, or the label."}
    )
    threshold: list[float] = field(
        default_factory=lambda: [0.5],
        metadata={"help": "Active is what is at least this, in (0, 1); the first counts."},
    )
    layer: str | None = field(default=None, metadata={"help": "Whose map is looked at; the last one if left out."})
    method: Literal["gradcam", "hirescam", "smoothgradcampp"] = field(
        default="gradcam", metadata={"help": "gradcam, hirescam, or smoothgradcampp as by the authors."}
    )
    upsample: bool = field(default=False, metadata={"help": "Count pixels of enlarged maps."})
    groups: str | None = field(
        default=None, metadata={"help": "JSON or YAML file, GROUP: [classes], to make easy and hard subsets of."}
    )
    k: int = field(default=10, metadata={"help": "Classes of each of those."})
    batch_size: int = field(default=64, metadata={"help": "Images at a time."})
    device: str | None = field(default=None, metadata={"help": "Where to run; a GPU if there is one."})
    output_dir: str = field(default="comp-dd-scores", metadata={"help": "Folder of report, scores and figure."})
    figure: bool = field(default=True, metadata={"help": "Draw pictures with their maps; needs matplotlib."})

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("`--model` must name an image classifier, for example `--model microsoft/resnet-18`.")
        for limit in self.threshold:
            if not 0 < limit < 1:
                raise ValueError(f"`--threshold` must lie in (0, 1); got {limit}. The authors use 0.5.")


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(ScoreArguments, argv=argv, program=__file__, description=__doc__)
    import torch
    from transformers import AutoModelForImageClassification

    import hf_effml.distillation  # noqa: F401  (lets transformers know the kinds of models of this package)
    from hf_effml.comp_dd import MapNetwork, class_complexity, draw_complexity, make_subsets, score_images
    from hf_effml.comp_dd.score_report import load_subsets, save_scores, score_report
    from hf_effml.utils.benchmark import describe_run
    from hf_effml.utils.image_data import load_image_processor
    from hf_effml.utils.imports import usable
    from hf_effml.utils.model_kinds import check_task

    for name in args.model:
        check_task(name, "AutoModelForImageClassification")
    data = load_subsets(args.data, args.split)
    groups = _read_groups(args.groups, data.names)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    networks = [
        MapNetwork(
            AutoModelForImageClassification.from_pretrained(name).to(device),
            load_image_processor(name),
            args.layer,
            args.method,
        )
        for name in args.model
    ]
    scores = score_images(data, networks, data.synsets, args.target, args.threshold, args.upsample, args.batch_size)
    tables = {x: class_complexity(scores.complexity[x], scores.labels, data.names) for x in args.threshold}
    report = score_report(data, scores, tables)
    report.facts = {
        name: value for name, value in vars(args).items() if name not in ("device", "output_dir", "figure")
    }
    report.facts |= {"layers": [each.layer for each in networks], "run": describe_run(seed=0, device=device)}
    if groups:
        report.facts["subsets"] = make_subsets(tables[args.threshold[0]], groups, args.k)
    print(f"\n{report.as_text()}")
    written = report.save(args.output_dir)
    print(f"\nWrote {written} and {save_scores(data, scores, networks, written.with_suffix('.parquet')).name}")
    if args.figure and usable("matplotlib"):
        figure = written.with_suffix(".png")
        draw_complexity(data, networks[0], scores.complexity[args.threshold[0]].mean(1), data.names, figure)
        print(f"Drew {figure}")
    return report.as_dict()


def _read_groups(path: str | None, names: Sequence[str]) -> dict[str, list[str]]:
    """Groups of classes, checked before anything is scored."""
    if path is None:
        return {}
    import yaml

    groups = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(groups, dict) or not all(isinstance(each, list) for each in groups.values()):
        raise ValueError(f"`--groups`: `{path}` must hold lists of classes by the name of their group.")
    groups = {str(group): [str(name) for name in each] for group, each in groups.items()}
    unknown = sorted({name for each in groups.values() for name in each} - set(names))
    if unknown:
        raise ValueError(f"`--groups`: `{unknown[0]}` is no class of the data. There are: {', '.join(names[:12])} ...")
    return groups


if __name__ == "__main__":
    sys.exit(run_script(main))
