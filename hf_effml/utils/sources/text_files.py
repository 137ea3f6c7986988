"""Texts in files and folders: plain ones, JSON lines and tables; what is no text is named by file and line."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hf_effml.utils.imports import require

from .split_files import check_overlap, lists_files, names_split, split_tables, visible_files


__all__ = ["TEXT_FILES", "checked_texts", "need_columns", "read_table", "read_text_folder", "read_texts"]

# Of a folder, files of one kind are read: of that which has files named after splits, of which there are most, and of
# the first of these where there are as many.
TEXT_FILES = (".parquet", ".jsonl", ".txt", ".json")
# What lies beside texts and is none of them.
_BESIDE = (
    "readme",
    "license",
    "licence",
    "notice",
    "changelog",
    "requirements",
    "config",
    "dataset_info",
    "dataset_infos",
)


def read_texts(path: Path, column: str, name: str | None = None) -> list[str]:
    """Reads the texts of a file.

    Args:
        path (`Path`):
            A `.txt` file, which is one text; JSON lines, or one list, of objects (`.jsonl`, `.json`); or a `.parquet`
            file.
        column (`str`):
            Where the texts stand in all but the first.
        name (`str`, *optional*):
            What to call the file in messages; its path if unset.

    Returns:
        `list[str]`: the texts; an empty one where a row has none.

    Raises:
        ValueError: If the file cannot be read, has no such column, or something else than texts there.
    """
    ending, name = path.suffix.lower(), name or str(path)
    if ending == ".parquet":
        rows = read_table(path)
        need_columns(name, rows.features, (column,))
        return checked_texts(rows[column], f"`{name}`, row")
    text = _decoded(path)
    if ending == ".txt":
        return [text]
    values = []
    for number, row in _json_rows(path, text):
        if not isinstance(row, Mapping) or column not in row:
            held = f"the fields `{'`, `'.join(map(str, row))}`" if isinstance(row, Mapping) else json.dumps(row)[:80]
            raise ValueError(f"`{name}`, line {number}, must be an object with a field `{column}`; it has {held}.")
        values += checked_texts([row[column]], f"`{name}`, line", number)
    return values


def read_text_folder(name: str, folder: Path, column: str) -> dict[str, list[str]] | None:
    """Reads the texts of a folder, by split.

    Args:
        name (`str`):
            What to call it in messages.
        folder (`Path`):
            The folder.
        column (`str`):
            Where the texts stand in tables.

    Returns:
        `dict[str, list[str]]` or `None`: the texts of every split; `None` if there is no file that could hold
        some, or the card lists them: those are for `datasets` to read.

    Raises:
        ValueError: If a file cannot be read, or belongs to two splits.
    """
    files = [file for file in visible_files(folder) if file.suffix.lower() in TEXT_FILES]
    files = [file for file in files if file.stem.lower() not in _BESIDE]
    if not files or lists_files(folder):
        return None
    counts = Counter(file.suffix.lower() for file in files)
    named = {file.suffix.lower() for file in files if names_split(folder, file)}
    ending = max(TEXT_FILES, key=lambda each: (each in named, counts[each], -TEXT_FILES.index(each)))
    placed = split_tables(name, folder, [file for file in files if file.suffix.lower() == ending])
    check_overlap(name, placed)
    return {split: [text for file in each for text in read_texts(file, column)] for split, each in placed.items()}


def read_table(path: Path) -> Any:
    """Opens a parquet file.

    Args:
        path (`Path`):
            The file.

    Returns:
        `datasets.Dataset`: its rows.

    Raises:
        ValueError: If it cannot be read, or has no row.
    """
    from_parquet, parquet = require("datasets").Dataset.from_parquet, import_module("pyarrow.parquet")
    try:
        if not parquet.read_metadata(path).num_rows:
            raise ValueError("it has no row")
        return from_parquet(str(path))
    # What pyarrow and `datasets` raise has no common kind.
    except Exception as error:
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"`{path}` cannot be read as a table: {reason.rstrip('.')}. Replace it.") from error


def need_columns(name: str, columns: Iterable[str], needed: Sequence[str]) -> None:
    """Checks that a table has columns.

    Args:
        name (`str`):
            What to call it in messages.
        columns (`Iterable[str]`):
            Those that it has.
        needed (`Sequence[str]`):
            Those that it must have.

    Raises:
        ValueError: If one is missing.
    """
    columns = list(columns)
    missing = [column for column in needed if column not in columns]
    if missing:
        raise ValueError(f"`{name}` must have a column `{'`, `'.join(missing)}`; it has `{'`, `'.join(columns)}`.")


def checked_texts(values: Iterable[Any], where: str, first: int = 0) -> list[str]:
    """Checks that values are texts.

    Args:
        values (`Iterable`):
            The values; `None` is an empty text.
        where (`str`):
            Where they are, for messages; a number follows.
        first (`int`, *optional*, defaults to 0):
            The number of the first.

    Returns:
        `list[str]`: the texts.

    Raises:
        ValueError: If one is none, or holds what is no character.
    """
    texts = []
    for number, value in enumerate(values, first):
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"{where} {number}, must be a text; it is of type {type(value).__name__}. Say which column holds "
                "the texts."
            )
        text = value or ""
        if not _is_clean(text):
            raise ValueError(f"{where} {number}, holds half a character (a lone surrogate). Write it as UTF-8 anew.")
        texts.append(text)
    return texts


def _decoded(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`{path}` is no UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}. Convert it, or say "
            "which file holds the texts."
        ) from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The objects of a file with the numbers of their lines, or in a list their own numbers."""
    if text.lstrip().startswith("["):
        yield from enumerate(_json(path, 1, text), 1)
        return
    # Other ends of lines may stand inside a text.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _json(path, number, line)


def _json(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        number += getattr(error, "lineno", 1) - 1
        raise ValueError(
            f"`{path}`, line {number}, is no JSON ({error}). Every line must be one object, as in "
            '{"text": "Once upon a time"}.'
        ) from error


def _is_clean(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
