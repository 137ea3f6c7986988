"""Subsets scored as one data set, and what is said and kept of their scores."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_effml.utils.files import replacing_file
from hf_effml.utils.imports import require
from hf_effml.utils.report import Column, Report
from hf_effml.utils.sources.image_splits import load_image_splits
from hf_effml.utils.sources.split_files import find_data, split_subset

from .complexity import ComplexityScores, subset_complexity
from .subsets import SUBSETS, list_subsets


__all__ = ["JoinedSubsets", "load_subsets", "save_scores", "score_report"]


class JoinedSubsets:
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


def load_subsets(data: str, split: str) -> JoinedSubsets:
    """Opens a split of all subsets of a built folder, of one of them, or of any data set of images.

    Args:
        data (`str`):
            A folder or an id on the Hub, with `:SUBSET` for one subset.
        split (`str`):
            `"train"` or `"test"`.

    Returns:
        [`JoinedSubsets`]

    Raises:
        FileNotFoundError: If there is no such data.
    """
    base, config = split_subset(data)
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
    return JoinedSubsets(parts, names, synsets)


def score_report(data: JoinedSubsets, scores: ComplexityScores, tables: Mapping[float, Report]) -> Report:
    """Makes a table of subsets beside the published means, and one of all classes.

    Args:
        data ([`JoinedSubsets`]):
            What was scored.
        scores ([`ComplexityScores`]):
            From [`score_images`].
        tables (`Mapping[float, Report]`):
            By threshold, from [`class_complexity`]; the first one is shown.

    Returns:
        [`Report`]
    """
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


def _beside_published(report: Report, limit: float) -> list[str]:
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


def save_scores(data: JoinedSubsets, scores: ComplexityScores, networks: Sequence[Any], path: Path) -> Path:
    """Writes a parquet file with one row per image; of several networks the mean, then each.

    Args:
        data ([`JoinedSubsets`]):
            What was scored.
        scores ([`ComplexityScores`]):
            From [`score_images`].
        networks (`Sequence[MapNetwork]`):
            Who scored.
        path (`Path`):
            File to write.

    Returns:
        `Path`: the file.
    """
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
        require("datasets").Dataset.from_dict(columns).to_parquet(unfinished)
    return path
