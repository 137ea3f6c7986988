"""Results on a card: a table for readers, the `model-index` for the Hub, and how to renew both."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_effml.utils.report import CardResult, markdown_table

from .privacy import scrub


_HEADING = "## Results"
_FOLLOWING_HEADING = "## How it was made"
_COLUMNS = ["", "This model", "Its starting point"]


def set_model_index(
    data: ModelCardData, model_name: str, results: Sequence[CardResult], evaluated_on: str | None
) -> None:
    """Puts the results that have a metric into a card's metadata, in place of equal ones.

    Args:
        data (`ModelCardData`):
            Metadata to change. Without a `pipeline_tag` it stays as it is: the `model-index` demands a task.
        model_name (`str`):
            Name of the model in the index.
        results (`Sequence[CardResult]`):
            What was measured.
        evaluated_on (`str`, *optional*):
            Name of the data it was measured on, which the index demands as well.
    """
    if data.pipeline_tag is None or evaluated_on is None:
        return
    entries = {_identity(entry): entry for entry in data.eval_results or []}
    for result in results:
        if result.metric is not None:
            entry = EvalResult(
                task_type=data.pipeline_tag,
                dataset_type=re.sub(r"[^a-z0-9/_.]+", "-", evaluated_on.lower()).strip("-"),
                dataset_name=evaluated_on,
                metric_type=result.metric,
                metric_name=result.name,
                metric_value=result.value,
            )
            entries[_identity(entry)] = entry
    if entries:
        data.model_name, data.eval_results = model_name, list(entries.values())


def results_table(results: Sequence[CardResult]) -> str:
    """Writes results as a Markdown table, without the last column when no starting point is known.

    Args:
        results (`Sequence[CardResult]`):
            The rows.

    Returns:
        `str`: the table, empty without rows.
    """
    rows = [[result.name, result.value, result.starting_point] for result in results]
    columns = 3 if any(result.starting_point is not None for result in results) else 2
    return markdown_table(_COLUMNS[:columns], [row[:columns] for row in rows])


def arguments_table(arguments: Mapping[str, Any]) -> str:
    """Writes arguments as a Markdown table, without tokens and absolute paths.

    Args:
        arguments (`Mapping`):
            Names and values.

    Returns:
        `str`: the table, empty without arguments.
    """
    shown = scrub(dict(arguments))
    return markdown_table(["Argument", "Value"], [[f"`{name}`", f"`{value}`"] for name, value in shown.items()])


def merge_into_text(text: str, results: Sequence[CardResult], evaluated_on: str) -> str:
    """Adds rows to the results table in a card's text, or renews them; everything else stays.

    Args:
        text (`str`):
            The card without its metadata.
        results (`Sequence[CardResult]`):
            Rows to add. A row whose name is in the table already replaces that one.
        evaluated_on (`str`):
            Name of the data. When the table is about other data, the new rows bear this name.

    Returns:
        `str`: the new text.
    """
    table = _find_table(text)
    if table is None:
        section = f"{_HEADING}\n\nMeasured on {evaluated_on}.\n\n{results_table(results)}\n\n"
        position = text.find(_FOLLOWING_HEADING)
        return f"{text.rstrip()}\n\n{section}" if position < 0 else text[:position] + section + text[position:]
    if f"Measured on {evaluated_on}." not in text:
        results = [replace(result, name=f"{result.name}, {evaluated_on}") for result in results]
    rows = {row.name: row for row in [*_parse_table(table), *results]}
    return text.replace(table, results_table(list(rows.values())) + "\n", 1)


def _find_table(text: str) -> str | None:
    """The results table as `results_table` wrote it."""
    match = re.search(rf"^\| +\| {_COLUMNS[1]} \|.*\n(?:\|.*\n)*", text + "\n", flags=re.M)
    return match.group() if match else None


def _parse_table(table: str) -> list[CardResult]:
    rows = []
    for line in table.splitlines()[2:]:
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        starting_point = cells[2] if len(cells) > 2 and cells[2] != "-" else None
        rows.append(CardResult(cells[0], cells[1], starting_point))
    return rows


def _identity(entry: EvalResult) -> tuple:
    return (*entry.unique_identifier, entry.metric_type, entry.metric_name)
