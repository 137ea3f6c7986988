"""Image data sets from scikit-learn, folders, parquet files and the Hub, as what a model and the Trainer take."""

import copy
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .augmentation import Augmentation
from .imports import require


__all__ = ["ImageData", "load_image_data", "load_image_processor"]

DATA_VARIABLE = "HF_EFFML_DATA"
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
_TEST_SPLITS = ("validation", "valid", "test")
_CACHE_BYTES = 2**30


class ImageSplit(Dataset):
    """Images of one split as dictionaries of `pixel_values` and `labels`.

    Augmentation depends on the seed, the epoch and the index alone, so that a resumed run and any number of workers
    see the same images. Trainers of this package call `set_epoch`.

    Args:
        rows (`Sequence[dict]`):
            Anything indexable whose rows hold a PIL image and a class number, such as a `datasets.Dataset`.
        processor (`BaseImageProcessor`):
            Makes pixels of an image.
        augmentation (`Augmentation`, *optional*):
            How images are changed; not at all if unset.
        columns (`tuple[str, str]`, *optional*, defaults to `("image", "label")`):
            Names of the image and the label in a row.
        seed (`int`, *optional*, defaults to 0):
            Seed of the augmentation.

    Example:

    ```python
    >>> from PIL import Image
    >>> from hf_effml import vim_image_processor
    >>> from hf_effml.utils.image_data import ImageSplit

    >>> row = {"image": Image.new("L", (8, 8)), "label": 3}
    >>> split = ImageSplit([row], vim_image_processor(16, crop_share=1.0))
    >>> split[0]["pixel_values"].shape, split[0]["labels"]
    (torch.Size([3, 16, 16]), 3)
    ```
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        processor: Any,
        augmentation: Augmentation | None = None,
        columns: tuple[str, str] = ("image", "label"),
        seed: int = 0,
    ):
        self.rows = rows
        self._processor, self._columns, self._seed = processor, columns, seed
        self._augment = None if augmentation is None else augmentation.transform(processor)
        self._from_image = augmentation is not None and augmentation.needs_timm
        # Shared, so that persistent workers see it change.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        size = 4 * 3 * processor.crop_size["height"] * processor.crop_size["width"]
        self._cache: dict[int, tuple[Tensor, int]] | None = {} if len(rows) * size <= _CACHE_BYTES else None

    def without_augmentation(self) -> "ImageSplit":
        """The same images as they are; what the processor has made of them already is shared."""
        plain = copy.copy(self)
        plain._augment, plain._from_image = None, False
        return plain

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch it is; every epoch has its own augmentation.

        Args:
            epoch (`int`):
                Number of the epoch.
        """
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Prepares one image."""
        index = range(len(self))[index]
        if self._from_image:
            image, label = self._row(index)
        else:
            image, label = self._pixels(index)
        if self._augment is not None:
            image = self._augment(image, ((self._seed * 1_000_003 + int(self._epoch)) * 1_000_003 + index) % 2**63)
        return {"pixel_values": image, "labels": label}

    def _row(self, index: int) -> tuple[Image.Image, int]:
        row = self.rows[index]
        return row[self._columns[0]], int(row[self._columns[1]])

    def _pixels(self, index: int) -> tuple[Tensor, int]:
        """What the processor makes of an image, kept for the next epoch when the whole split fits into memory."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        image, label = self._row(index)
        found = self._processor(image, return_tensors="pt")["pixel_values"][0], label
        if self._cache is not None:
            self._cache[index] = found
        return found


@dataclass(frozen=True)
class ImageData:
    """A data set for image classification.

    Args:
        name (`str`):
            What to call it.
        train (`ImageSplit`):
            The training images.
        test (`ImageSplit`):
            The images that accuracy is measured on.
        labels (`list[str]`):
            Names of the classes, in the order of their numbers.
        hub_id (`str`, *optional*):
            Its id on the Hub, if it came from there.
    """

    name: str
    train: ImageSplit
    test: ImageSplit
    labels: list[str]
    hub_id: str | None = None

    @property
    def label_fields(self) -> dict[str, dict]:
        """The fields of a configuration that name the classes."""
        return {"id2label": dict(enumerate(self.labels)), "label2id": {name: i for i, name in enumerate(self.labels)}}


def load_image_processor(name_or_path: str) -> Any:
    """Load the image processor that lies beside a model, also where an older Transformers misses torchvision.

    Args:
        name_or_path (`str`):
            Folder or Hub id of a model.

    Returns:
        `BaseImageProcessor`: what `AutoImageProcessor` finds.

    Raises:
        OSError: If there is no model or no image processor in it.
    """
    # `transformers.AutoImageProcessor` of 5.17 demands torchvision, which most processors do without.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(name_or_path)


def load_image_data(
    name_or_path: str, processor: Any, augmentation: Augmentation | None = None, seed: int = 0
) -> ImageData:
    """Loads images for training and for testing.

    Args:
        name_or_path (`str`):
            `"digits"` (scikit-learn's, no download); a folder of parquet files, or of images in one folder per class,
            both with splits named `train` and `validation` or `test`; the path of such a folder below the one that
            the environment variable `HF_EFFML_DATA` names; or the id of a data set on the Hub.
        processor (`BaseImageProcessor`):
            Makes pixels of an image: [`vim_image_processor`] or [`load_image_processor`].
        augmentation (`Augmentation`, *optional*):
            How training images are changed.
        seed (`int`, *optional*, defaults to 0):
            Seed of the augmentation.

    Returns:
        [`ImageData`]

    Example:

    ```python
    >>> from hf_effml import load_image_data, vim_image_processor

    >>> data = load_image_data("digits", vim_image_processor(16, crop_share=1.0))
    >>> len(data.train), len(data.test), data.train[0]["pixel_values"].shape
    (898, 899, torch.Size([3, 16, 16]))
    ```
    """
    if name_or_path == "digits":
        hub_id, columns = None, ("image", "label")
        train, test, labels = _load_digits()
    else:
        splits = load_image_splits(name_or_path)
        train, test, labels = splits.train, splits.test, splits.labels
        hub_id, columns = splits.hub_id, splits.columns
    return ImageData(
        name=Path(name_or_path).name if hub_id is None else hub_id,
        train=ImageSplit(train, processor, augmentation, columns, seed),
        test=ImageSplit(test, processor, columns=columns),
        labels=labels,
        hub_id=hub_id,
    )


def _load_digits() -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """scikit-learn's 1797 digits, 898 for training and 899 for testing, always the same ones."""
    digits = require("sklearn.datasets").load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(pixels))
    rows = [{"image": Image.fromarray(pixels[i]), "label": int(digits.target[i])} for i in order]
    return rows[:898], rows[898:], [str(name) for name in digits.target_names]


def _find_folder(name_or_path: str) -> Path | None:
    candidates = [Path(name_or_path).expanduser()]
    if os.environ.get(DATA_VARIABLE):
        candidates.append(Path(os.environ[DATA_VARIABLE]).expanduser() / name_or_path)
    return next((path for path in candidates if path.is_dir()), None)


@dataclass(frozen=True)
class ImageSplits:
    """Rows of a data set of images, not read yet.

    Args:
        train, test (`datasets.Dataset`):
            The rows of its split `train`, and of its split `validation`, or else `valid` or `test`.
        labels (`list[str]`):
            Names of the classes, in the order of their numbers.
        columns (`tuple[str, str]`):
            Names of the image and of the class number in a row.
        hub_id (`str`, *optional*):
            Its id on the Hub, if it came from there.
        revision (`str`, *optional*):
            The commit it came from, if it came from the Hub.
    """

    train: Any
    test: Any
    labels: list[str]
    columns: tuple[str, str]
    hub_id: str | None = None
    revision: str | None = None


def load_image_splits(name_or_path: str, revision: str | None = None) -> ImageSplits:
    """Finds a data set of images in a folder or on the Hub.

    Args:
        name_or_path (`str`):
            See [`load_image_data`].
        revision (`str`, *optional*):
            Commit, tag or branch on the Hub.

    Returns:
        [`ImageSplits`]

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it lacks a split or a column.

    Example:

    ```python
    >>> from hf_effml.utils.image_data import load_image_splits

    >>> load_image_splits("cifar10").labels[:2]  # doctest: +SKIP
    ['airplane', 'automobile']
    ```
    """
    datasets = require("datasets")
    folder = _find_folder(name_or_path)
    at = {"revision": revision} if revision is not None and folder is None else {}
    try:
        splits = datasets.load_dataset(name_or_path if folder is None else str(folder), **at)
    except OSError as error:
        raise FileNotFoundError(
            f"No data `{name_or_path}`: it is no folder, not below the one that ${DATA_VARIABLE} names, and not found "
            f"on the Hub or not open to you ({str(error).splitlines()[0]})."
        ) from error
    test = next((split for split in _TEST_SPLITS if split in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(
            f"`{name_or_path}` must have a split `train` and a split `validation` or `test`; it has "
            f"`{'`, `'.join(splits)}`."
        )
    commit = _commit(splits["train"]) if folder is None else None
    features = splits["train"].features
    image = _column(name_or_path, features, _IMAGE_COLUMNS)
    label = _column(name_or_path, features, _LABEL_COLUMNS)
    if not hasattr(features[label], "names"):
        splits = splits.class_encode_column(label)
        features = splits["train"].features
    return ImageSplits(
        train=splits["train"],
        test=splits[test],
        labels=list(features[label].names),
        columns=(image, label),
        hub_id=name_or_path if folder is None else None,
        revision=commit,
    )


def _commit(rows: Any) -> str | None:
    """The commit on the Hub that rows came from: `datasets` keeps every one in a folder of its name."""
    folders = [Path(file["filename"]).parent.name for file in rows.cache_files]
    return next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), None)


def _column(name: str, features: Any, wanted: tuple[str, ...]) -> str:
    found = next((column for column in wanted if column in features), None)
    if found is None:
        raise ValueError(f"`{name}` must have a column `{'` or `'.join(wanted)}`; it has `{'`, `'.join(features)}`.")
    return found
