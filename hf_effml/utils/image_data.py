"""Image data sets from scikit-learn, folders, parquet files and the Hub, as what a model and the Trainer take."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .augmentation import Augmentation
from .imports import require
from .sources.class_labels import known_classes, match_classes
from .sources.image_splits import load_image_splits
from .sources.image_table import image_to_rgb
from .sources.split_files import data_name


__all__ = ["ImageData", "load_image_data", "load_image_processor"]

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
        labels (`Sequence[str]`, *optional*):
            Names of the classes, in the order of their numbers. With them a model gets its own numbers.
        name (`str`, *optional*, defaults to `"the data"`):
            What to call the images in messages.

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
        labels: Sequence[str] | None = None,
        name: str = "the data",
    ):
        self.rows, self._name = rows, name
        self.labels, self._numbers = labels, None if labels is None else list(range(len(labels)))
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

    def aligned_to(self, config: Any) -> "ImageSplit":
        """The same images with the class numbers of a model, found by the names of the classes.

        Args:
            config (`PreTrainedConfig`):
                The model's configuration.

        Returns:
            [`ImageSplit`]: itself where the numbers are the model's, or names are not known.

        Raises:
            ValueError: If the model does not know a class.
        """
        if self.labels is None or self._numbers is None:
            return self
        places = match_classes(self._name, self.labels, config)
        if places == list(range(len(places))) and len(places) == len(known_classes(config)):
            return self
        aligned = copy.copy(self)
        aligned.labels = known_classes(config)
        aligned._numbers = [places[number] for number in self._numbers]
        return aligned

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
        return {"pixel_values": image, "labels": label if self._numbers is None else self._numbers[label]}

    def _row(self, index: int) -> tuple[Any, int]:
        row = self.rows[index]
        image, label = (row[column] for column in self._columns)
        if not isinstance(image, Image.Image | np.ndarray | Tensor):
            raise TypeError(
                f"The image of row {index} must be a PIL image, an array or a tensor; it is a {type(image).__name__}. "
                "`PIL.Image.open` reads a file."
            )
        if not hasattr(label, "__index__"):
            raise TypeError(f"The label of row {index} must be a class number; it is {str(label)[:80]!r}.")
        if self._numbers is not None and not 0 <= int(label) < len(self._numbers):
            raise ValueError(
                f"The label of row {index} must be in 0 to {len(self._numbers) - 1}, the classes of `labels`; it is "
                f"{int(label)}."
            )
        return image_to_rgb(image) if isinstance(image, Image.Image) else image, int(label)

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

    def aligned_to(self, config: Any) -> "ImageData":
        """The same images with the class numbers of a model, found by the names of the classes.

        Args:
            config (`PreTrainedConfig`):
                The model's configuration. Where it has no names but `LABEL_0` and so on, numbers count.

        Returns:
            [`ImageData`]: with the model's classes, of which these images may be some.

        Raises:
            ValueError: If the model does not know a class.
        """
        train, test = (split.aligned_to(config) for split in (self.train, self.test))
        return replace(self, train=train, test=test, labels=list(train.labels or self.labels))


def aligned(dataset: Any, config: Any) -> Any:
    """Gives images the class numbers of a model, where the names of their classes are known.

    Args:
        dataset (`Dataset` or `Mapping[str, Dataset]`):
            The images, or several sets of them by name.
        config (`PreTrainedConfig`):
            The model's configuration.

    Returns:
        `Any`: the same, aligned; see [`ImageSplit.aligned_to`].

    Raises:
        ValueError: If the model does not know a class.
    """
    if isinstance(dataset, Mapping):
        return {name: aligned(each, config) for name, each in dataset.items()}
    return dataset.aligned_to(config) if isinstance(dataset, ImageSplit) else dataset


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
    name_or_path: str,
    processor: Any,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    only_test: bool = False,
) -> ImageData:
    """Loads images for training and for testing.

    Args:
        name_or_path (`str`):
            `"digits"` (scikit-learn's, no download); a folder of parquet files, or of images in one folder per class,
            with splits named `train` and `validation` or `test`, or without: then a fifth of every class is held out;
            the path of such a folder below the one that the environment variable `HF_EFFML_DATA` names; or the id of
            a data set on the Hub, with a subset as in `"me/flowers:small"`.
        processor (`BaseImageProcessor`):
            Makes pixels of an image: [`vim_image_processor`] or [`load_image_processor`].
        augmentation (`Augmentation`, *optional*):
            How training images are changed.
        seed (`int`, *optional*, defaults to 0):
            Seed of the augmentation.
        only_test (`bool`, *optional*, defaults to `False`):
            Whether images to test on are enough, as for an evaluation.

    Returns:
        [`ImageData`]

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If it lacks a split or a column, a row has no class, or an image is in two splits.

    Example:

    ```python
    >>> from hf_effml import load_image_data, vim_image_processor

    >>> data = load_image_data("digits", vim_image_processor(16, crop_share=1.0))
    >>> len(data.train), len(data.test), data.train[0]["pixel_values"].shape
    (898, 899, torch.Size([3, 16, 16]))
    ```
    """
    if name_or_path == "digits":
        hub_id: str | None = None
        train: Any
        test: Any
        train, test, labels = _load_digits()
    else:
        splits = load_image_splits(name_or_path, only_test=only_test)
        train, test, labels, hub_id = splits.train, splits.test, splits.labels, splits.hub_id
    name = data_name(name_or_path, hub_id)
    return ImageData(
        name=name,
        train=ImageSplit(train, processor, augmentation, seed=seed, labels=labels, name=name),
        test=ImageSplit(test, processor, labels=labels, name=name),
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
