"""The one road of a number: rows by name, the facts of the run and notes, as a table, Markdown, JSON and card rows."""

import math
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import write_json, write_text


__all__ = ["CardResult", "Column", "Report", "as_code", "markdown_table"]

_ABSENT = object()
_WIDTH = 119


@dataclass(frozen=True)
class CardResult:
    """One row of a card's results: this model beside its starting point.

    Args:
        name (`str`):
            What was measured, with its unit and, for speeds, the device: `"Latency (ms per image, 2 CPU cores)"`.
        value (`float` or `int` or `str`):
            The value of this model.
        starting_point (`float` or `int` or `str`, *optional*):
            The value of the model it was made from. Leave it out when it was not measured.
        metric (`str`, *optional*):
            The Hub's name of the metric, for example `"accuracy"`. Rows with a metric also go into the card's
            `model-index`.

    Example:

    ```python
    >>> from hf_effml.hub import CardResult

    >>> CardResult("Accuracy", 0.93, starting_point=0.95, metric="accuracy").value
    0.93

    ```
    """

    name: str
    value: float | int | str
    starting_point: float | int | str | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Column:
    """How a quantity is shown; what is kept in JSON is the quantity itself.

    Args:
        title (`str`):
            Head of its column; with `""` the quantity is on the card only.
        format (`str`, *optional*, defaults to `".4g"`):
            Format of a number, as after the colon of an f-string.
        unit (`str`, *optional*, defaults to `""`):
            What follows the number, for example `"x"`.
        scale (`float`, *optional*, defaults to 1.0):
            What a number is multiplied by, for tables and cards.
        change (`str`, *optional*, defaults to `""`):
            What stands in brackets behind a number of a later row, beside the first row's: the `"difference"`, or the
            `"share"` by which it differs.
        card (`str`, *optional*):
            Name of the quantity on a card; it is on none if unset.
        metric (`str`, *optional*):
            The Hub's name of the metric, see [`CardResult`].
    """

    title: str
    format: str = ".4g"
    unit: str = ""
    scale: float = 1.0
    change: str = ""
    card: str | None = None
    metric: str | None = None

    def show(self, value: Any, first: Any = None) -> str:
        """Writes a value for people.

        Args:
            value (`Any`):
                A number; a list of finite numbers, one per seed, is shown as mean and standard deviation (of a
                sample); a tuple as its parts; `None` as a dash; anything else as it is.
            first (`Any`, *optional*):
                The value of the report's first row, for `change`.

        Returns:
            `str`: the text.
        """
        if _are_finite(value):
            return self._spread(value)
        if isinstance(value, tuple):
            return " ".join(self.show(part) for part in value)
        if not _is_number(value):
            return "-" if value is None else str(value)
        text = f"{value * self.scale:{self.format}}{self.unit}" if self._formats(value) else str(value)
        return f"{text} ({self._change(value, first)})" if self.change and _is_number(first) else text

    def _formats(self, value: float) -> bool:
        """Whole numbers stay whole unless the column says how many digits it wants."""
        return isinstance(value, float) or self.format != ".4g" or self.scale != 1

    def _spread(self, values: list[float]) -> str:
        mean = statistics.fmean(values) * self.scale
        if len(values) == 1:
            return f"{mean:{self.format}}{self.unit}"
        spread = statistics.stdev(values) * self.scale
        return f"{f'{mean:{self.format}}'.removesuffix('%')} ± {spread:{self.format}}{self.unit}"

    def _change(self, value: float, first: float) -> str:
        if self.change == "share":
            return f"{value / first - 1:+.0%}" if first else "-"
        # Points, not per cent of the first row.
        return f"{(value - first) * self.scale:+{self.format}}".removesuffix("%")


@dataclass
class Report:
    """What a program measured.

    Args:
        name (`str`):
            Name of its files, and of its rows in the JSON of a larger report.
        columns (`Mapping[str, Column]`, *optional*, defaults to `{}`):
            Which quantities tables show, and how; `"accuracy.digits"` is an entry of a quantity that is a mapping.
            All are shown, under their own names, where none are declared.
        title (`str`, *optional*, defaults to `""`):
            Heading.
        facts (`dict[str, Any]`, *optional*):
            What has to be known about the run, JSON-plain; `run` is [`~hf_effml.utils.benchmark.describe_run`]'s.
        notes (`list[str]`, *optional*):
            Sentences under the table.
        parts (`list[Report]`, *optional*):
            Further tables of the same run.

    Example:

    ```python
    >>> from hf_effml.utils.report import Column, Report

    >>> report = Report("digits", {"accuracy": Column("accuracy", ".1%", card="Accuracy", metric="accuracy")})
    >>> report.add("dense", accuracy=0.95)
    >>> report.add("merged", accuracy=[0.92, 0.94], steps=7)
    >>> print(report.as_text())
               accuracy
    dense         95.0%
    merged  93.0 ± 1.4%
    >>> report.as_dict()["rows"][1]
    {'name': 'merged', 'accuracy': [0.92, 0.94], 'steps': 7}

    ```
    """

    name: str
    columns: Mapping[str, Column] = field(default_factory=dict)
    title: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    parts: list["Report"] = field(default_factory=list)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)

    def add(self, name: str, /, **values: Any) -> None:
        """Adds a row, in place of one of that name.

        Args:
            name (`str`):
                What was measured.
            values (`dict`):
                Its quantities. Numbers and arrays of numpy and torch become plain ones, what JSON does not know its
                text.

        Raises:
            ValueError: If a quantity is called `name`, which is the row's own.
        """
        if "name" in values:
            raise ValueError(f"`name` is the row's own name; got a quantity `name` for `{name}`. Call it otherwise.")
        self.rows[name] = _plain(values)

    def add_seed(self, name: str, /, **values: Any) -> None:
        """Adds what one more seed measured to a row: its numbers become lists, one entry per seed.

        Args:
            name (`str`):
                What was measured.
            values (`dict`):
                Its quantities, the same for every seed.
        """
        row = self.rows.setdefault(name, {})
        for key, value in _plain(values).items():
            row.setdefault(key, []).append(value)

    def add_part(self, name: str, columns: Mapping[str, Column] | None = None, title: str = "") -> "Report":
        """Adds a table of its own.

        Args:
            name (`str`):
                Name of its rows in the JSON.
            columns (`Mapping[str, Column]`, *optional*):
                Its columns.
            title (`str`, *optional*, defaults to `""`):
                Its heading.

        Returns:
            [`Report`]: the part, to fill.

        Raises:
            ValueError: If the JSON has something of that name already.
        """
        if name in ("rows", "notes", *self.facts, *(part.name for part in self.parts)):
            raise ValueError(f"`{self.name}` has `{name}` already, and the part would replace it. Name it otherwise.")
        part = Report(name, columns or {}, title)
        self.parts.append(part)
        return part

    def as_text(self) -> str:
        """Writes the tables for a screen.

        Returns:
            `str`: without a line break at the end.
        """
        return "\n\n".join(
            [
                *self._texts(),
                *(text for part in self.parts for text in [*part._texts(), *map(_wrapped, part.notes)]),
                *map(_wrapped, [*self.notes, *self._of_run()]),
            ]
        )

    def as_markdown(self) -> str:
        """Writes the tables as Markdown.

        Returns:
            `str`: without a line break at the end.
        """
        blocks = [
            block
            for one in [self, *self.parts]
            for block in [
                f"## {one.title}" if one.title else "",
                one._markdown(),
                *(one.notes if one is not self else ()),
            ]
        ]
        return "\n\n".join(block for block in [*blocks, *self.notes, *self._of_run()] if block)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values.

        Returns:
            `dict`: the facts, `rows` (those of every part under its name) and `notes`.
        """
        content = _plain(self.facts)
        if self.rows or not self.parts:
            content["rows"] = self._plain_rows()
        content |= {part.name: part._plain_rows() for part in self.parts}
        notes = [note for one in [self, *self.parts] for note in one.notes]
        return content | ({"notes": notes} if notes else {})

    def save(self, folder: str | Path) -> Path:
        """Writes `<name>.json` and `<name>.md`, each in one go.

        Args:
            folder (`str` or `Path`):
                Where to; it is made if need be.

        Returns:
            `Path`: the Markdown file.
        """
        write_json(Path(folder) / f"{self.name}.json", self.as_dict())
        return write_text(Path(folder) / f"{self.name}.md", self.as_markdown() + "\n")

    def card_results(self, name: str, beside: str | None = None) -> list[CardResult]:
        """Makes the rows of a card of the columns that are meant for one.

        Args:
            name (`str`):
                The row of the model that the card is about.
            beside (`str`, *optional*):
                The row of what it was made from.

        Returns:
            `list[CardResult]`: one for every quantity that was measured.
        """
        own, other = self.rows[name], self.rows[beside] if beside is not None else {}
        return [
            CardResult(column.card, _for_card(own[key], column), _for_card(other.get(key), column), column.metric)
            for key, column in self.columns.items()
            if column.card is not None and own.get(key) is not None
        ]

    def _plain_rows(self) -> list[dict[str, Any]]:
        return [{"name": name, **values} for name, values in self.rows.items()]

    def _shown(self) -> tuple[list[str], list[list[str]]]:
        """Heads and cells, the names of the rows first."""
        keys = dict.fromkeys(key for values in self.rows.values() for key in values)
        columns = self.columns or {key: Column(key.replace("_", " ")) for key in keys}
        rows = [{key: _find(values, key) for key in columns} for values in self.rows.values()]
        columns = {k: c for k, c in columns.items() if c.title and any(row[k] is not _ABSENT for row in rows)}
        cells = [
            [_one_line(name)]
            + [
                ""
                if row[key] is _ABSENT
                else _one_line(column.show(row[key], None if row is rows[0] else rows[0][key]))
                for key, column in columns.items()
            ]
            for name, row in zip(self.rows, rows, strict=True)
        ]
        return ["", *(column.title for column in columns.values())], cells

    def _texts(self) -> list[str]:
        head, cells = self._shown()
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = [
            "  ".join(
                [
                    line[0].ljust(widths[0]),
                    *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
                ]
            )
            for line in [head, *cells]
        ]
        return [text for text in (self.title, "\n".join(line.rstrip() for line in lines) if cells else "") if text]

    def _markdown(self) -> str:
        head, cells = self._shown()
        return markdown_table(head, cells)

    def _of_run(self) -> list[str]:
        run = self.facts.get("run")
        if not run:
            return []
        from .benchmark import one_line

        return [one_line(run)]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Writes a table in Markdown.

    Args:
        head (`Sequence[str]`):
            Names of the columns.
        rows (`Sequence[Sequence]`):
            One value per column: numbers with four significant digits, `None` as a dash.

    Returns:
        `str`: the table, empty without rows.
    """
    if not rows:
        return ""
    lines = [map(_cell, head), ["---"] * len(head), *(map(_cell, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_code(value: Any) -> str:
    """Writes a name as code in Markdown, whatever is in it.

    Args:
        value (`Any`):
            The name, or another value.

    Returns:
        `str`: one line.

    Example:

    ```python
    >>> from hf_effml.utils.report import as_code

    >>> as_code("cat"), as_code("a`b")
    ('`cat`', '`` a`b ``')

    ```
    """
    text = _one_line(str(value))
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if _is_number(value):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return _one_line(str(value)).replace("|", r"\|")


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


def _find(values: Any, key: str) -> Any:
    if not isinstance(values, Mapping):
        return _ABSENT
    name, _, rest = key.partition(".")
    if key in values or not rest:
        return values.get(key, _ABSENT)
    return _find(values.get(name), rest)


def _plain(value: Any) -> Any:
    """As JSON has it, but for tuples, which tables show in another way than lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value)) if isinstance(value, tuple) else [*map(_plain, value)]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_finite(values: Any) -> bool:
    return isinstance(values, list) and values != [] and all(_is_number(v) and math.isfinite(v) for v in values)


def _for_card(value: Any, column: Column) -> Any:
    if isinstance(value, list):
        value = statistics.fmean(value) if _are_finite(value) else column.show(value)
    return value * column.scale if _is_number(value) and column.scale != 1 else value
