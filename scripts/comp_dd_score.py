"""Scores how complex images are, by class activation maps: the smaller the part that speaks for a class, the more.

The data may be a folder that `hf-effml comp-dd build` wrote, with all its subsets or, as `comp-dd:bird_easy`, one of
them, or any data set of images, here or on the Hub.

Example: `hf-effml comp-dd score comp-dd --model microsoft/resnet-18`
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hf_effml.cli.parsing import parse_arguments, run_script


if TYPE_CHECKING:
    from hf_effml.comp_dd import ComplexityScores
    from hf_effml.utils.report import Report


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
    from hf_effml.utils.benchmark import describe_run
    from hf_effml.utils.image_data import load_image_processor
    from hf_effml.utils.imports import usable
    from hf_effml.utils.model_kinds import check_task

    for name in args.model:
        check_task(name, "AutoModelForImageClassification")
    data = _load(args.data, args.split)
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
    report = _report(data, scores, tables)
    report.facts = {
        name: value for name, value in vars(args).items() if name not in ("device", "output_dir", "figure")
    }
    report.facts |= {"layers": [each.layer for each in networks], "run": describe_run(seed=0, device=device)}
    if groups:
        report.facts["subsets"] = make_subsets(tables[args.threshold[0]], groups, args.k)
    print(f"\n{report.as_text()}")
    written = report.save(args.output_dir)
    print(f"\nWrote {written} and {_save_scores(data, scores, networks, written.with_suffix('.parquet')).name}")
    if args.figure and usable("matplotlib"):
        figure = written.with_suffix(".png")
        draw_complexity(data, networks[0], scores.complexity[args.threshold[0]].mean(1), data.names, figure)
        print(f"Drew {figure}")
    return report.as_dict()


class _Joined:
    """The images of several subsets as one data set whose classes are all of theirs."""

    def __init__(self, parts: Mapping[str, Any], names: Mapping[str, Sequence[str]], synsets: Sequence[str]):
        self.parts, self.synsets = dict(parts), list(synsets)
        every = [name for each in names.values() for name in each]
        # Subsets of one's own may share a class.
        self.by_part = {
            part: [name if every.count(name) == 1 else f"{part}: {name}" for name in own]
            for part, own in names.items()
        }
        self.names = [name for own in self.by_part.values() for name in own]
        self.starts = np.cumsum([0, *map(len, self.parts.values())])
        self._classes = np.cumsum([0, *map(len, names.values())])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        row = list(self.parts.values())[number][index - int(self.starts[number])]
        return row | {"label": row["label"] + int(self._classes[number])}


def _load(data: str, split: str) -> _Joined:
    from hf_effml.comp_dd import list_subsets
    from hf_effml.utils.sources.image_splits import load_image_splits
    from hf_effml.utils.sources.split_files import find_data

    base, _, config = data.partition(":")
    folder = find_data(data)
    built = sorted(path.parent.name for path in folder.glob("*/comp_dd.json")) if folder is not None else []
    if built:
        order = list(list_subsets())
        built = sorted(built, key=lambda name: (order.index(name) if name in order else len(order), name))
    sources = {name: f"{data}:{name}" for name in built} or {config or Path(data).name: data}
    parts, names, synsets = {}, {}, list[str]()
    for name, source in sources.items():
        found = load_image_splits(source, only_test=split == "test")
        parts[name], names[name] = getattr(found, split), found.labels
        facts = (find_data(base) or Path(base)) / name / "comp_dd.json"
        known = list_subsets().get(name)
        if facts.is_file():
            synsets += json.loads(facts.read_text(encoding="utf-8"))["synsets"]
        else:
            synsets += known.synsets if known is not None and list(known.names) == found.labels else found.labels
    return _Joined(parts, names, synsets)


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


def _report(data: _Joined, scores: "ComplexityScores", tables: Mapping[float, "Report"]) -> "Report":
    """A row per subset, what the published means say of them, and a table of all classes."""
    from hf_effml.comp_dd import SUBSETS, subset_complexity
    from hf_effml.utils.report import Column, Report

    percent: dict[str, Any] = {"format": ".1f", "scale": 100.0}
    columns = {"classes": Column("classes"), "images": Column("images")}
    for limit in tables:
        columns |= {f"complexity_{limit}": Column(f"complexity (%) at {limit}", **percent)}
        columns |= {f"error_{limit}": Column("standard error", **percent)}
    columns |= {"published": Column("published (%)", ".1f"), "right": Column("named right", ".1%")}
    report = Report("comp_dd_score", columns, "Complexity")
    known = scores.right[0]
    for number, (part, names) in enumerate(data.by_part.items()):
        rows = slice(int(data.starts[number]), int(data.starts[number + 1]))
        means = {
            limit: subset_complexity(table, [n for n in names if n in table.rows]) for limit, table in tables.items()
        }
        values: dict[str, Any] = {f"complexity_{limit}": mean for limit, (mean, _) in means.items()}
        values |= {f"error_{limit}": error for limit, (_, error) in means.items()}
        published = SUBSETS[part].mean_complexity if part in SUBSETS else None
        right = None if known is None else float(known[rows].mean())
        report.add(part, classes=len(names), images=rows.stop - rows.start, published=published, right=right, **values)
    report.notes += [note for limit in tables for note in _beside_published(report, limit)]
    first, table = next(iter(tables.items()))
    table.title = f"Classes, threshold {first}"
    report.parts.append(table)
    return report


def _beside_published(report: "Report", limit: float) -> list[str]:
    """Whether the subsets stand in the published order."""
    own = {name: row[f"complexity_{limit}"] for name, row in report.rows.items()}
    published = {name: row["published"] for name, row in report.rows.items() if row["published"] is not None}
    pairs = [name.removesuffix("_hard") for name in published if name.endswith("_hard")]
    pairs = [name for name in pairs if f"{name}_easy" in published]
    notes = []
    if pairs:
        above = [name for name in pairs if own[f"{name}_hard"] > own[f"{name}_easy"]]
        notes.append(
            f"Threshold {limit}: hard is above easy in {len(above)} of {len(pairs)} categories ({', '.join(above)})."
        )
    if len(published) > 2:
        ranks = [_ranks([values[name] for name in published]) for values in (own, published)]
        correlation = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
        notes.append(
            f"Threshold {limit}: Spearman's rank correlation with the published means of {len(published)} subsets is "
            f"{correlation:.2f}."
        )
    return notes


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Of equal values each gets the mean of their ranks."""
    array = np.asarray(values)
    return (array[:, None] > array).sum(1) + ((array[:, None] == array).sum(1) + 1) / 2


def _save_scores(data: _Joined, scores: "ComplexityScores", networks: Sequence[Any], path: Path) -> Path:
    """One row per image; of several networks the mean, then each."""
    from datasets import Dataset

    from hf_effml.utils.files import replacing_file

    lengths = np.diff(data.starts)
    columns: dict[str, Any] = {
        "subset": np.repeat(list(data.parts), lengths).tolist(),
        "row": np.concatenate([np.arange(length) for length in lengths]),
        "class": [data.names[label] for label in scores.labels],
    }
    columns |= {f"complexity_{limit}": each.mean(1) for limit, each in scores.complexity.items()}
    for number, network in enumerate(networks):
        end = f"_network_{number + 1}" if len(networks) > 1 else ""
        if end:
            columns |= {f"complexity_{limit}{end}": each[:, number] for limit, each in scores.complexity.items()}
        named = scores.predicted[:, number]
        columns[f"predicted{end}"] = [network.class_names[i] if network.class_names else str(i) for i in named]
        right = scores.right[number]
        if right is not None:
            columns[f"right{end}"] = right
    with replacing_file(path) as unfinished:
        Dataset.from_dict(columns).to_parquet(unfinished)
    return path


if __name__ == "__main__":
    sys.exit(run_script(main))
