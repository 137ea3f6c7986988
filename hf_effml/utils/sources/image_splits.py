"""A data set of images in a folder or on the Hub: its splits, columns and classes; a test split if it lacks one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import logging

from hf_effml.utils.imports import require

from .class_labels import in_order, number_classes
from .image_table import ImageTable
from .split_files import (
    DATA_VARIABLE,
    check_overlap,
    find_data,
    lists_files,
    split_class_folders,
    split_folders,
    split_subset,
    split_tables,
    visible_files,
    which_part,
)


__all__ = ["ImageSplits", "load_image_splits"]

logger = logging.get_logger(__name__)

_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
# Kinds of pictures that need a package or program of their own to be read.
_UNREAD = (".heic", ".heif", ".svg", ".dng", ".raw", ".cr2", ".nef", ".arw", ".psd")
_TEST_SPLITS = ("validation", "valid", "test")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Where there is no split to test on, this share of every class is held out, always the same images: what was trained
# with one seed is tested with another.
_HELD_OUT = 5


@dataclass(frozen=True)
class ImageSplits:
    """A data set of images, not read yet.

    Args:
        train, test ([`ImageTable`]):
            The images of its split `train`, and of its split `validation`, or else `valid` or `test`. Where it has
            none of these, a fifth of every class is held out.
        labels (`list[str]`):
            Names of the classes, in the order of their numbers.
        ids (`list[int]`):
            What its labels call the classes if they are whole numbers; else their numbers.
        hub_id (`str`, *optional*):
            Its id on the Hub, if it came from there.
        revision (`str`, *optional*):
            The commit it came from, if it came from the Hub.
    """

    train: ImageTable
    test: ImageTable
    labels: list[str]
    ids: list[int]
    hub_id: str | None = None
    revision: str | None = None


def load_image_splits(name_or_path: str, revision: str | None = None, only_test: bool = False) -> ImageSplits:
    """Finds a data set of images in a folder or on the Hub.

    Args:
        name_or_path (`str`):
            See [`load_image_data`].
        revision (`str`, *optional*):
            Commit, tag or branch on the Hub.
        only_test (`bool`, *optional*, defaults to `False`):
            Whether images to test on are enough; those to train on are none where there is no split of them.

    Returns:
        [`ImageSplits`]

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it lacks a split or a column, a row has no class, or an image is in two splits.

    Example:

    ```python
    >>> from hf_effml.utils.sources.image_splits import load_image_splits

    >>> load_image_splits("cifar10").labels[:2]  # doctest: +SKIP
    ['airplane', 'automobile']
    ```
    """
    folder, base = find_data(name_or_path), split_subset(name_or_path)[0]
    is_remote = folder is None and find_data(base) is None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"`{name_or_path}` must be a folder of images or parquet files; it is a file.")
    splits = _from_hub(name_or_path, revision) if folder is None else _from_folder(name_or_path, folder)
    test = next((split for split in _TEST_SPLITS if split in splits), None)
    lone_test = only_test and test is not None and "train" not in splits
    if not lone_test and ("train" not in splits or (test is None and len(splits) > 1)):
        raise ValueError(
            f"`{name_or_path}` must have a split `train` and a split `validation` or `test`; it has "
            f"`{'`, `'.join(splits)}`."
        )
    used = [split for split in ("train", test) if split is not None and split in splits]
    for split in used:
        if not len(splits[split]):
            raise ValueError(f"The split `{split}` of `{name_or_path}` is empty.")
    label = column_of(name_or_path, splits[used[0]].features, _LABEL_COLUMNS)
    classes = number_classes(name_or_path, splits, label, used)
    if len(classes.names) < 2 and not only_test:
        raise ValueError(
            f"`{name_or_path}` has one class, `{classes.names[0]}`: there is nothing to tell apart. Name the folder "
            "that holds those of all classes, or a column of labels."
        )
    tables = [_table(name_or_path, split, splits[split], classes.numbers[split]) for split in used]
    if test is None:
        tables = list(_hold_out(name_or_path, tables[0]))
    elif lone_test:
        tables = [tables[0].select([]), tables[0]]
    else:
        check_overlap(name_or_path, {split: table.paths() for split, table in zip(used, tables, strict=True)})
    return ImageSplits(
        train=tables[0],
        test=tables[1],
        labels=classes.names,
        ids=classes.ids,
        hub_id=base if is_remote else None,
        revision=_commit(splits[used[0]]) if is_remote else None,
    )


def column_of(name: str, features: Mapping[str, Any], wanted: tuple[str, ...]) -> str:
    """Finds a column by the names that it may have.

    Args:
        name (`str`):
            What to call the data set in messages.
        features (`Mapping[str, Any]`):
            The columns.
        wanted (`tuple[str, ...]`):
            The names.

    Returns:
        `str`: the first of them that is there.

    Raises:
        ValueError: If none is.
    """
    found = next((column for column in wanted if column in features), None)
    if found is None:
        raise ValueError(f"`{name}` must have a column `{'` or `'.join(wanted)}`; it has `{'`, `'.join(features)}`.")
    return found


def _from_hub(name: str, revision: str | None) -> Mapping[str, Any]:
    base, subset = split_subset(name)
    folder = find_data(base)
    if folder is not None:
        return _load(name, str(folder), subset=subset)
    at = {} if revision is None else {"revision": revision}
    try:
        return require("datasets").load_dataset(base, *([subset] if subset else []), **at)
    except ValueError as error:
        raise ValueError(f"`{name}`: {which_part(base, error)}") from error
    except OSError as error:
        raise FileNotFoundError(
            f"No data `{name}`: it is no folder, not below the one that ${DATA_VARIABLE} names, and not found "
            f"on the Hub or not open to you ({_first_line(error)})."
        ) from error


def _load(
    name: str, kind: str, placed: Mapping[str, list[Path]] | None = None, subset: str | None = None
) -> Mapping[str, Any]:
    """Lets `datasets` read files, which says by any kind of error that it cannot."""
    files = {split: [str(file) for file in each] for split, each in (placed or {}).items()}
    options = {key: value for key, value in (("name", subset), ("data_files", files)) if value}
    try:
        return require("datasets").load_dataset(kind, **options)
    except Exception as error:
        hint = (
            " Unpack archives, and let images lie as in `train/CLASS/1.png` and `test/CLASS/2.png`, or as in "
            "`CLASS/1.png`."
        )
        raise ValueError(
            f"`{name}` cannot be read as a data set of images: {which_part(name, error.__cause__ or error)}"
            f"{hint if subset is None else ''}"
        ) from error


def _from_folder(name: str, folder: Path) -> Mapping[str, Any]:
    """The splits of a folder by its layout; a card that lists files, and other formats, are for `datasets` to read."""
    datasets = require("datasets")
    files = visible_files(folder)
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images = [file for file in files if file.suffix.lower() in endings]
    tables = [file for file in files if file.suffix.lower() == ".parquet" and file.name not in _METADATA]
    described = [file for file in files if file.name in _METADATA]
    if not files:
        raise FileNotFoundError(f"The folder `{folder}` holds no file. Put images or parquet files into it.")
    for file in images if len(images) > len(tables) else tables:
        if not file.stat().st_size:
            raise ValueError(f"`{file}` is empty. Replace or remove it.")
    _announce_unread(name, files, endings, bool(images or tables))
    if lists_files(folder) or not (images or tables):
        return _load(name, str(folder))
    if len(tables) >= len(images):
        placed = split_tables(name, folder, tables)
        _check_same_classes(name, placed)
        return _load(name, "parquet", placed)
    if described:
        return _load(name, "imagefolder", split_folders(folder, [*images, *described]))
    by_class = split_class_folders(name, folder, images)
    names = in_order({label for each in by_class.values() for _, label in each})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    columns = {
        split: {"image": [str(file) for file, _ in each], "label": [label for _, label in each]}
        for split, each in by_class.items()
    }
    return {split: datasets.Dataset.from_dict(each, features=features) for split, each in columns.items()}


def _announce_unread(name: str, files: list[Path], endings: set[str], others: bool) -> None:
    """Says which pictures are left out because nothing here can read them."""
    unread = [file for file in files if file.suffix.lower() in _UNREAD and file.suffix.lower() not in endings]
    if not unread:
        return
    what = f"{len(unread)} pictures of `{name}`, the first `{unread[0]}`, are of a kind that Pillow does not read"
    if not others:
        raise ValueError(f"{what}. Convert them to JPEG or PNG.")
    logger.warning(f"{what}, and are left out. Convert them to JPEG or PNG.")


def _check_same_classes(name: str, placed: Mapping[str, list[Path]]) -> None:
    """Numbers mean what the first file says; another must not say otherwise, nor be empty."""
    datasets, parquet = require("datasets"), import_module("pyarrow.parquet")
    seen: dict[str, tuple[Path, list[str] | None]] = {}
    for file in (file for files in placed.values() for file in files):
        try:
            opened = parquet.ParquetFile(file)
            features = datasets.Features.from_arrow_schema(opened.schema_arrow)
        # What pyarrow and `datasets` raise has no common kind.
        except Exception as error:
            raise ValueError(f"`{file}` cannot be read as a table: {_first_line(error)}. Replace it.") from error
        if not opened.metadata.num_rows:
            raise ValueError(f"`{file}` holds no row. Replace or remove it.")
        for column in _LABEL_COLUMNS:
            names = getattr(features.get(column), "names", None)
            first, known = seen.setdefault(column, (file, names))
            if names != known:
                raise ValueError(
                    f"`{first}` and `{file}` of `{name}` name the classes of `{column}` otherwise: {str(known)[:200]} "
                    f"and {str(names)[:200]}. Write both with the same ClassLabel."
                )


def _table(name: str, split: str, rows: Any, labels: np.ndarray) -> ImageTable:
    """Images and classes of a split; tables that were not written by `datasets` do not say that they hold images."""
    datasets = require("datasets")
    column = column_of(name, rows.features, _IMAGE_COLUMNS)
    feature = rows.features[column]
    if not isinstance(feature, datasets.Image):
        parts = feature if isinstance(feature, dict) else {"bytes": feature}
        if "binary" not in str(getattr(parts.get("bytes"), "dtype", "")):
            raise ValueError(
                f"The column `{column}` of `{name}` must hold images: bytes of image files, or `bytes` and `path`; "
                f"it holds {str(feature)[:200]}."
            )
        rows = rows.cast_column(column, datasets.Image())
    return ImageTable(rows.select_columns([column]), column, labels, f"the split `{split}` of `{name}`")


def _hold_out(name: str, table: ImageTable) -> tuple[ImageTable, ImageTable]:
    """Every fifth image of every class in a random order, at least one, but never the only one."""
    order = np.random.RandomState(0).permutation(len(table))
    held: list[int] = []
    for label in np.unique(table.labels):
        members = order[table.labels[order] == label]
        held += members[: min(max(len(members) // _HELD_OUT, 1), len(members) - 1)].tolist()
    if not held:
        raise ValueError(f"`{name}` has no split `validation` or `test`, and one image of each class alone.")
    chosen = np.zeros(len(table), dtype=bool)
    chosen[held] = True
    logger.warning(
        f"`{name}` has no split to test on: {len(held)} of its {len(table)} images are held out, every "
        f"{_HELD_OUT}th of a class, always the same ones."
    )
    return table.select(np.flatnonzero(~chosen)), table.select(np.flatnonzero(chosen))


def _commit(rows: Any) -> str | None:
    """The commit on the Hub that rows came from: `datasets` keeps every one in a folder of its name."""
    folders = [Path(file["filename"]).parent.name for file in rows.cache_files]
    return next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), None)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
