"""Texts to train and to test on from a file, a folder or the Hub; some are held out where there is no test split."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_effml.utils.imports import require

from .split_files import DATA_VARIABLE, find_data, which_part
from .text_files import TEXT_FILES, checked_texts, need_columns, read_text_folder, read_texts


__all__ = ["find_text", "hold_out_texts", "load_text_splits", "rows_of_the_hub"]

logger = logging.get_logger(__name__)

# The first one that is there is for training, the next one for testing.
_SPLITS = ("train", "validation", "test")
# Where data have no test split, one text of so many is for testing, and that share of one long text.
_HELD_OUT = 5


def find_text(name_or_path: str) -> Path | None:
    """Finds a file or folder of texts, here or below the data folder.

    Args:
        name_or_path (`str`):
            Its path.

    Returns:
        `Path` or `None`: `None` if there is none, and the name may be one on the Hub.

    Raises:
        FileNotFoundError: If there is no file of a name that can only be one.
        ValueError: If it is a file of another kind.
    """
    found = find_data(name_or_path)
    if found is None and Path(name_or_path).suffix.lower() in TEXT_FILES:
        raise FileNotFoundError(
            f"There is no file `{name_or_path}`, neither here nor below the folder that ${DATA_VARIABLE} names."
        )
    if found is not None and found.is_file() and found.suffix.lower() not in TEXT_FILES:
        raise ValueError(f"`{name_or_path}` must be a .txt or a .parquet file, or JSON lines (.jsonl, .json).")
    return found


def load_text_splits(name: str, path: Path | None, column: str) -> tuple[list[str], list[str]]:
    """Loads texts.

    Args:
        name (`str`):
            Their name, on the Hub with a subset as in `"Salesforce/wikitext:wikitext-2-raw-v1"`.
        path (`Path`, *optional*):
            The file or folder; on the Hub if unset.
        column (`str`):
            Where the texts stand in tables and in the objects of JSON.

    Returns:
        `tuple[list[str], list[str]]`: texts to train and to test on.

    Raises:
        ValueError: If there is no such column, no split to train on, or something else than texts.
        FileNotFoundError: If nothing of that name is found.
    """
    splits: dict[str, list[str]] | None = None
    if path is not None and path.is_file():
        splits = {"train": read_texts(path, column, name)}
    elif path is not None:
        splits = read_text_folder(name, path, column)
    if splits is None:
        tables = rows_of_the_hub(*name.partition(":")[::2]) if path is None else _other_files(name, path)
        present = _present(name, tables)
        need_columns(name, tables[present[0]].features, (column,))
        splits = {split: checked_texts(tables[split][column], f"`{name}`, row") for split in present}
    train, *test = (splits[split] for split in _present(name, splits))
    if test:
        return train, test[0]
    held = f"every {_HELD_OUT}th of its texts is" if len(train) > 1 else f"the last {_HELD_OUT}th of its text is"
    logger.warning(f"`{name}` has no split to test on: {held} held out, always the same.")
    return hold_out_texts(train)


def hold_out_texts(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Holds out every fifth text, and the last fifth of a single one; always the same.

    Args:
        texts (`Sequence[str]`):
            All texts.

    Returns:
        `tuple[list[str], list[str]]`: texts to train and to test on; none to test on where there are too few.
    """
    if len(texts) == 1:
        # The last part of the only text, from the start of a line on.
        cut = texts[0].find("\n", len(texts[0]) * (_HELD_OUT - 1) // _HELD_OUT) + 1
        return ([texts[0][:cut]], [texts[0][cut:]]) if cut else (list(texts), [])
    last = _HELD_OUT - 1
    return [text for i, text in enumerate(texts) if i % _HELD_OUT != last], list(texts[last::_HELD_OUT])


def rows_of_the_hub(hub_id: str, subset: str | None) -> Any:
    """Loads a data set of the Hub.

    Args:
        hub_id (`str`):
            Its id.
        subset (`str`, *optional*):
            Which part of it.

    Returns:
        `datasets.DatasetDict`: its splits.

    Raises:
        FileNotFoundError: If it is not there, or not open to you.
    """
    try:
        return require("datasets").load_dataset(str(find_data(hub_id) or hub_id), subset or None)
    except ValueError as error:
        raise ValueError(f"`{hub_id}{subset and f':{subset}' or ''}`: {which_part(hub_id, error)}") from error
    except OSError as error:
        raise FileNotFoundError(
            f"No data `{hub_id}`: it is no file or folder here, not below the folder that ${DATA_VARIABLE} names, and "
            f"not found on the Hub or not open to you ({str(error).splitlines()[0]})."
        ) from error


def _present(name: str, splits: Iterable[str]) -> list[str]:
    """The split to train on, and the one to test on if there is one."""
    present = [split for split in _SPLITS if split in splits]
    if not present:
        raise ValueError(f"`{name}` must have a split `{'` or `'.join(_SPLITS)}`; it has `{'`, `'.join(splits)}`.")
    return present[:2]


def _other_files(name: str, folder: Path) -> Any:
    """What `datasets` knows to read beside the usual files; it says by any kind of error that it cannot."""
    try:
        return require("datasets").load_dataset(str(folder))
    except Exception as error:
        raise ValueError(
            f"`{name}` holds no texts that can be read: {which_part(name, error)} Put files into it that end in "
            f"{', '.join(TEXT_FILES)}, or mend its card."
        ) from error
