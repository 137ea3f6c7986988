"""Results of a model as data beside it, as the table on its card and as the `model-index` of the Hub."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_effml.utils.files import write_json
from hf_effml.utils.report import CardResult, as_code, markdown_table

from .privacy import scrub


__all__ = [
    "RESULTS_NAME",
    "arguments_table",
    "merge_index",
    "merge_results",
    "read_results",
    "results_section",
    "set_model_index",
]

RESULTS_NAME = "results.json"
_COLUMNS = ["", "This model", "Its starting point"]
# A result as it is kept: a `CardResult`'s fields and `evaluated_on`.
Entry = Mapping[str, Any]


def read_results(folder: str | Path) -> list[Entry]:
    """Reads what was measured of the model in a folder.

    Args:
        folder (`str` or `Path`):
            The folder.

    Returns:
        `list[Mapping]`: `name`, `value`, `starting_point`, `metric` and `evaluated_on` of each; empty without a file.

    Raises:
        ValueError: If `results.json` is not what this package writes.
    """
    path = Path(folder) / RESULTS_NAME
    if not path.exists():
        return []
    try:
        return [_entry(**entry) for entry in json.loads(path.read_text(encoding="utf-8-sig"))["results"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`{path}` must hold a list `results` as this package writes it ({error}). Mend it or move it away."
        ) from error


def merge_results(
    folder: str | Path, results: Sequence[CardResult], evaluated_on: str | None, replace: bool = False
) -> list[Entry]:
    """Adds results to those that are kept beside a model, in place of equal ones.

    Args:
        folder (`str` or `Path`):
            Folder of the model.
        results (`Sequence[CardResult]`):
            What was measured.
        evaluated_on (`str`, *optional*):
            Name of the data it was measured on. Results of the same name on other data stay.
        replace (`bool`, *optional*, defaults to `False`):
            Whether all earlier ones go, because they are another model's.

    Returns:
        `list[Mapping]`: the earlier ones; empty if they cannot be read and are to go.

    Raises:
        ValueError: If the earlier ones cannot be read and are to stay.
    """
    try:
        earlier = read_results(folder)
    except ValueError:
        if not replace:
            raise
        earlier = []
    new = [_entry(**asdict(result), evaluated_on=scrub(evaluated_on)) for result in results]
    merged = {(entry["name"], entry["evaluated_on"]): entry for entry in [*([] if replace else earlier), *new]}
    if merged:
        write_json(Path(folder) / RESULTS_NAME, {"results": list(merged.values())})
    else:
        (Path(folder) / RESULTS_NAME).unlink(missing_ok=True)
    return earlier


def results_section(entries: Sequence[Entry]) -> str:
    """Writes results as Markdown, a table for the data they were measured on.

    Args:
        entries (`Sequence[Mapping]`):
            Of [`read_results`].

    Returns:
        `str`: the tables; empty without results.
    """
    order = list(dict.fromkeys(entry["evaluated_on"] for entry in entries))
    blocks = []
    for data, group in groupby(sorted(entries, key=lambda entry: order.index(entry["evaluated_on"])), _data):
        rows = [[entry["name"], entry["value"], entry["starting_point"]] for entry in group]
        columns = 3 if any(row[2] is not None for row in rows) else 2
        blocks += [f"Measured on {' '.join(data.split())}."] if data else []
        blocks.append(markdown_table(_COLUMNS[:columns], [row[:columns] for row in rows]))
    return "\n\n".join(blocks)


def set_model_index(data: ModelCardData, model_name: str, entries: Sequence[Entry]) -> None:
    """Puts the results that have a metric into a card's metadata.

    Args:
        data (`ModelCardData`):
            Metadata to change. Without a `pipeline_tag` it stays as it is: the `model-index` demands a task, and the
            name of the data as well.
        model_name (`str`):
            Name of the model in the index.
        entries (`Sequence[Mapping]`):
            Of [`read_results`].
    """
    results = [
        EvalResult(
            task_type=data.pipeline_tag,
            dataset_type=re.sub(r"[^a-z0-9/_.]+", "-", entry["evaluated_on"].lower()).strip("-") or "unnamed",
            dataset_name=entry["evaluated_on"],
            metric_type=entry["metric"],
            metric_name=entry["name"],
            metric_value=entry["value"],
        )
        for entry in entries
        if data.pipeline_tag and entry["metric"] and entry["evaluated_on"]
    ]
    if results:
        data.model_name, data.eval_results = model_name, list({_identity(each): each for each in results}.values())


def merge_index(data: ModelCardData, new: ModelCardData, earlier: Sequence[Entry] = ()) -> None:
    """Renews the `model-index` in a card's metadata. Results that a person added to it stay.

    Args:
        data (`ModelCardData`):
            Metadata to change.
        new (`ModelCardData`):
            That of a new card.
        earlier (`Sequence[Mapping]`, *optional*, defaults to `()`):
            Of [`read_results`]: what goes unless it is in the new one.
    """
    gone = {(entry["metric"], entry["name"], entry["evaluated_on"]) for entry in earlier}
    kept = [each for each in data.eval_results or [] if _identity(each)[-3:] not in gone]
    found = {_identity(each): each for each in [*kept, *(new.eval_results or [])]}
    data.eval_results = list(found.values()) or None
    data.model_name = (data.model_name or new.model_name) if found else None


def arguments_table(arguments: Mapping[str, Any]) -> str:
    """Writes arguments as a Markdown table, without tokens and absolute paths.

    Args:
        arguments (`Mapping`):
            Names and values.

    Returns:
        `str`: the table, empty without arguments.
    """
    shown = scrub(dict(arguments))
    return markdown_table(["Argument", "Value"], [[as_code(name), as_code(value)] for name, value in shown.items()])


def _entry(
    name: str, value: Any, starting_point: Any = None, metric: str | None = None, evaluated_on: str | None = None
) -> Entry:
    if not isinstance(name, str) or not isinstance(evaluated_on, str | None):
        raise TypeError("`name` and `evaluated_on` must be texts")
    return {
        "name": name,
        "value": value,
        "starting_point": starting_point,
        "metric": metric,
        "evaluated_on": evaluated_on,
    }


def _data(entry: Entry) -> str | None:
    return entry["evaluated_on"]


def _identity(entry: EvalResult) -> tuple:
    return (*entry.unique_identifier, entry.metric_type, entry.metric_name, entry.dataset_name)
