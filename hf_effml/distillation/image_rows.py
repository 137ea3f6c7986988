"""Rows of a data set before their images are read: which belong to which split, and which are kept."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_effml.utils.imports import require
from hf_effml.utils.sources.image_splits import load_image_splits
from hf_effml.utils.sources.image_table import ImageTable

from .flat_student import seed_from


__all__ = ["DataRows", "HashedImages", "ImageRows", "check_rows", "read_rows"]

_DIGITS_FOR_TRAINING = 1000


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Images that are not read yet, with their class numbers.

    Args:
        images (`np.ndarray` or [`ImageTable`]):
            The images.
        labels (`np.ndarray`):
            Class numbers.
    """

    images: np.ndarray | ImageTable
    labels: np.ndarray

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "ImageRows":
        """Takes some of the rows.

        Args:
            indices (`np.ndarray`):
                Their positions, in the order wanted.

        Returns:
            `ImageRows`
        """
        images = self.images[indices] if isinstance(self.images, np.ndarray) else self.images.select(indices)
        return ImageRows(images, self.labels[indices])

    def at_most(self, argument: str, most: int | None, seed: int) -> "ImageRows":
        """Takes as many of every class as possible, in their old order.

        Args:
            argument (`str`):
                Name of the argument that says how many, for messages and as part of the seed.
            most (`int`, *optional*):
                How many in all; all of them if unset.
            seed (`int`):
                Seed of the choice.

        Returns:
            `ImageRows`
        """
        if most is None or most >= len(self):
            return self
        if most < 1:
            raise ValueError(f"`{argument}` must be at least 1; got {most}.")
        ranks = _random_ranks(self.labels, seed_from(seed, argument))
        return self.take(np.sort(np.argsort(ranks, kind="stable")[:most]))

    def cut_validation(self, share: float, seed: int) -> "tuple[ImageRows, ImageRows]":
        """Cuts off a share of every class, at least one image, but never its only one.

        Args:
            share (`float`):
                From 0 to below 1.
            seed (`int`):
                Seed of the choice.

        Returns:
            `tuple[ImageRows, ImageRows]`: what is left, and what was cut off.
        """
        counts = np.bincount(self.labels)
        wanted = np.minimum(
            np.maximum(np.round(share * counts).astype(int), int(share > 0)), np.maximum(counts - 1, 0)
        )
        chosen = _random_ranks(self.labels, seed_from(seed, "validation")) < wanted[self.labels]
        return self.take(np.flatnonzero(~chosen)), self.take(np.flatnonzero(chosen))


class DataRows(NamedTuple):
    """The rows of a data set, names and ids of its classes, and its id and commit on the Hub if it is from there."""

    train: ImageRows
    test: ImageRows
    names: list[str]
    ids: list[int]
    hub_id: str | None = None
    revision: str | None = None


class HashedImages:
    """The images of some rows; what is read from them goes into a digest, too.

    Args:
        rows (`ImageRows`):
            The rows.
    """

    def __init__(self, rows: ImageRows):
        self._images = rows.images
        self.digest = hashlib.blake2b(digest_size=16)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def __iter__(self) -> Iterator[Any]:
        """Reads them one by one."""
        table = self._images if isinstance(self._images, ImageTable) else None
        for index in range(len(self)):
            image: Any = self._images[index] if table is None else table.image(index)
            array = np.ascontiguousarray(image)
            self.digest.update(str(array.shape).encode())
            self.digest.update(array.tobytes())
            yield image if table is None else table.in_range(index, image)


def read_rows(name: str, revision: str | None = None, classes: Sequence[int] | None = None) -> DataRows:
    """Looks a data set up.

    Args:
        name (`str`):
            `"digits"`, or a folder or an id on the Hub as [`load_image_data`] takes it.
        revision (`str`, *optional*):
            Commit, tag or branch on the Hub.
        classes (`Sequence[int]`, *optional*):
            Numbers of the classes to keep, or what labels that are whole numbers call them; they are numbered anew in
            this order.

    Returns:
        `DataRows`

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If a class is unknown or given twice, or an image has none.
    """
    found = _digits() if name == "digits" else _read_splits(name, revision)
    if classes is None:
        return found
    numbers = _find_classes(name, classes, found.ids)
    train, test = (_keep_classes(rows, numbers, len(found.names)) for rows in (found.train, found.test))
    return found._replace(train=train, test=test, names=[found.names[number] for number in numbers], ids=list(classes))


def _find_classes(name: str, classes: Sequence[int], ids: list[int]) -> list[int]:
    unknown = sorted({each for each in classes if each not in ids})
    if unknown or not len(classes):
        known = f"{ids[0]} to {ids[-1]}" if ids == list(range(ids[0], ids[-1] + 1)) else ", ".join(map(str, ids[:20]))
        raise ValueError(
            f"`classes` must be numbers of classes of `{name}`, which are {known}; got "
            f"{', '.join(map(str, unknown)) or 'none'}."
        )
    if len(set(classes)) < len(classes):
        raise ValueError(f"`classes` must name every class once; got {list(classes)}.")
    return [ids.index(each) for each in classes]


def check_rows(name: str, train: ImageRows, test: ImageRows, names: list[str]) -> None:
    """Checks that there are images of every class to train on, and some to test on.

    Args:
        name (`str`):
            Name of the data set, for messages.
        train, test (`ImageRows`):
            What is left of it.
        names (`list[str]`):
            Names of the classes.

    Raises:
        ValueError: If not.
    """
    counts = np.bincount(train.labels, minlength=len(names))
    empty = [names[label] for label in np.flatnonzero(counts == 0)]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(names)} classes of `{name}` have no image for training, such as {empty[:3]}. Leave "
            "them out with `classes`, or raise `max_train`."
        )
    if not len(test):
        raise ValueError(f"`{name}` has no test image of the classes that are kept.")


def _keep_classes(rows: ImageRows, classes: Sequence[int], known: int) -> ImageRows:
    renumbered = np.full(known, -1)
    renumbered[list(classes)] = np.arange(len(classes))
    labels = renumbered[rows.labels]
    return replace(rows, labels=labels).take(np.flatnonzero(labels >= 0))


def _read_splits(name: str, revision: str | None) -> DataRows:
    found = load_image_splits(name, revision)
    train, test = (ImageRows(table, table.labels) for table in (found.train, found.test))
    return DataRows(train, test, found.labels, found.ids, found.hub_id, found.revision)


def _digits() -> DataRows:
    digits = require("sklearn.datasets").load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    images, labels = (digits.images[order] / 16).astype(np.float32), digits.target[order]
    cut = _DIGITS_FOR_TRAINING
    train, test = ImageRows(images[:cut], labels[:cut]), ImageRows(images[cut:], labels[cut:])
    return DataRows(train, test, [str(name) for name in digits.target_names], list(range(10)))


def _random_ranks(labels: np.ndarray, seed: int) -> np.ndarray:
    """Numbers the images of every class from 0 in a random order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).numpy()
    grouped = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    ranks = np.empty(len(labels), dtype=int)
    ranks[grouped] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks
