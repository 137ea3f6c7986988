"""Real images of a data set, preprocessed and in memory, as experts and evaluations of a distilled set need them."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hf_effml.utils.sources.class_labels import known_classes, match_classes
from hf_effml.utils.sources.split_files import data_name

from .image_processing_zca import ZCAImageProcessor
from .image_rows import HashedImages, ImageRows, check_rows, read_rows


@dataclass(frozen=True, eq=False)
class RealImages:
    """Preprocessed images and their classes.

    Args:
        images (`Tensor` of shape `(images, channels, height, width)`):
            What a model takes, float32.
        labels (`Tensor` of shape `(images,)`):
            Class numbers, int64.
        label_names (`list[str]`):
            Names of the classes, in the order of their numbers.
        source_fingerprint (`str`, *optional*):
            A text that tells these images, before preprocessing, from others.

    Raises:
        ValueError: If the parts do not belong together.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.distillation.real_images import RealImages

    >>> data = RealImages(torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 0]), ["cat", "dog"])
    >>> len(data), data.num_labels, data.per_class()
    (3, 2, [tensor([0, 2]), tensor([1])])

    ```
    """

    images: Tensor
    labels: Tensor
    label_names: list[str]
    source_fingerprint: str | None = None

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or self.images.dtype != torch.float32:
            raise ValueError(
                f"`images` must be float32 of shape (images, channels, height, width); got {self.images.dtype} of "
                f"shape {tuple(self.images.shape)}."
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(
                f"`labels` must be one int64 class number for each of the {len(self.images)} images; got "
                f"{self.labels.dtype} of shape {tuple(self.labels.shape)}."
            )
        if len(self) and not (self.labels.min() >= 0 and self.labels.max() < self.num_labels):
            raise ValueError(
                f"`labels` must lie in 0 to {self.num_labels - 1}, one number for each of `label_names`; got "
                f"{self.labels.min().item()} to {self.labels.max().item()}."
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    def per_class(self) -> list[Tensor]:
        """For every class the positions of its images, in order."""
        return [(self.labels == label).nonzero().squeeze(1) for label in range(self.num_labels)]

    def subset(self, indices: Tensor | Sequence[int]) -> "RealImages":
        """Takes some of the images.

        Args:
            indices (`Tensor` or `Sequence[int]`):
                Their positions, in the order wanted.

        Returns:
            [`RealImages`]
        """
        indices = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)
        return RealImages(self.images[indices], self.labels[indices], self.label_names)

    def aligned_to(self, config: Any, name: str = "the data") -> "RealImages":
        """The same images with the class numbers of a model, found by the names of the classes.

        Args:
            config (`PreTrainedConfig` or `Sequence[str]`):
                The model's configuration, or the names of its classes. `LABEL_0` and so on count as numbers.
            name (`str`, *optional*, defaults to `"the data"`):
                What to call the images in messages.

        Returns:
            [`RealImages`]: itself where the numbers are the model's.

        Raises:
            ValueError: If the model does not know a class.
        """
        places, known = match_classes(name, self.label_names, config), known_classes(config)
        if places == list(range(len(known))):
            return self
        labels = torch.tensor(places, device=self.labels.device)[self.labels]
        return RealImages(self.images, labels, known)

    def to(self, device: str | torch.device) -> "RealImages":
        """Moves to a device.

        Args:
            device (`str` or `torch.device`):
                Where to.

        Returns:
            [`RealImages`]
        """
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    @cached_property
    def fingerprint(self) -> str:
        """A short text that differs where any image, label or class name does, whatever the preprocessing was."""
        if self.source_fingerprint is not None:
            return self.source_fingerprint
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self.images.cpu().contiguous().numpy())
        return _finish(digest, self.labels.cpu().numpy(), self.label_names)


@dataclass(frozen=True, eq=False)
class RealImageData:
    """A data set, split for distillation.

    Networks are trained on `train`, anything is chosen on `validation`, and `test` is looked at once.

    Args:
        name (`str`):
            What to call it.
        train ([`RealImages`]):
            Images for training; what the preprocessing learned, it learned from them alone.
        validation ([`RealImages`], *optional*):
            Images cut from the training images, if wanted.
        test ([`RealImages`]):
            Images that nothing was fitted or chosen on.
        processor ([`ZCAImageProcessor`]):
            What preprocessed all of them.
        hub_id, revision (`str`, *optional*):
            Its id and commit on the Hub, if it came from there.
        arguments (`dict`, *optional*):
            Arguments of [`load_real_images`] that read the same images again.
    """

    name: str
    train: RealImages
    validation: RealImages | None
    test: RealImages
    processor: ZCAImageProcessor
    hub_id: str | None = None
    revision: str | None = None
    arguments: dict[str, Any] | None = None

    @property
    def label_names(self) -> list[str]:
        """Names of the classes."""
        return self.train.label_names

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return self.train.num_labels

    def aligned_to(self, config: Any) -> "RealImageData":
        """The same images with the class numbers of a model; see [`RealImages.aligned_to`].

        Args:
            config (`PreTrainedConfig` or `Sequence[str]`):
                The model's configuration, or the names of its classes.

        Returns:
            [`RealImageData`]
        """
        train, test = (part.aligned_to(config, self.name) for part in (self.train, self.test))
        validation = None if self.validation is None else self.validation.aligned_to(config, self.name)
        return replace(self, train=train, validation=validation, test=test)


def load_real_images(
    name: str,
    image_size: int | tuple[int, int] | None = None,
    num_channels: int | None = None,
    whiten: bool = True,
    classes: Sequence[int] | None = None,
    validation_share: float = 0.1,
    resize_mode: Literal["crop", "squash"] = "crop",
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    processor: ZCAImageProcessor | None = None,
    device: str | torch.device = "cpu",
) -> RealImageData:
    """Reads a data set into memory, cuts a validation split from its training images, and preprocesses all of it.

    Args:
        name (`str`):
            `"digits"` (scikit-learn's, 8 x 8 pixels, no download, 1000 for training and validation and 797 for
            testing), or a folder or an id on the Hub as [`load_image_data`] takes it.
        image_size (`int` or `tuple[int, int]`, *optional*):
            Height and width wanted; as they are if unset.
        num_channels (`int`, *optional*):
            3 for colours, 1 for grey; if unset, 1 for the digits and 3 for others.
        whiten (`bool`, *optional*, defaults to `True`):
            ZCA whitening, which the papers use for small images. Otherwise the images are normalised per channel.
            Either is fitted to the training images that are left when validation is cut off.
        classes (`Sequence[int]`, *optional*):
            Numbers of the classes to keep, or what labels that are whole numbers call them; they are numbered anew in
            this order.
        validation_share (`float`, *optional*, defaults to 0.1):
            Share of every class's training images; 0 for none.
        resize_mode (`str`, *optional*, defaults to `"crop"`):
            See [`ZCAImageProcessor`].
        max_train (`int`, *optional*):
            Most training images, validation included; taken evenly from the classes.
        max_test (`int`, *optional*):
            Most test images, likewise.
        seed (`int`, *optional*, defaults to 0):
            Seed of what is cut off and left out.
        revision (`str`, *optional*):
            Commit, tag or branch on the Hub.
        processor ([`ZCAImageProcessor`], *optional*):
            A fitted one, as a trajectory bank holds it, to be used instead of fitting a new one; `image_size`,
            `num_channels`, `whiten` and `resize_mode` are then taken from it. Of another one a copy is fitted.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where to fit; the images stay on the CPU.

    Returns:
        [`RealImageData`]

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If a class is unknown, given twice or without images for training, or a number makes no sense.

    Example:

    ```python
    >>> from hf_effml.distillation.real_images import load_real_images

    >>> data = load_real_images("digits", whiten=False)
    >>> len(data.train), len(data.validation), len(data.test), data.train.images.shape[1:]
    (900, 100, 797, torch.Size([1, 8, 8]))

    ```
    """
    if not 0 <= validation_share < 1:
        raise ValueError(f"`validation_share` must be in [0, 1); got {validation_share}.")
    rows = read_rows(name, revision, classes)
    train, test = rows.train.at_most("max_train", max_train, seed), rows.test.at_most("max_test", max_test, seed)
    train, validation = train.cut_validation(validation_share, seed)
    check_rows(name, train, test, rows.names)
    if processor is None:
        channels = num_channels or (1 if name == "digits" else 3)
        processor = ZCAImageProcessor(image_size, resize_mode, channels, do_whiten=whiten)
    elif not processor.is_fitted:
        processor = copy.deepcopy(processor)
    pixels = _read(train, rows.names, processor)
    if not processor.is_fitted:
        processor.fit(pixels.images, device)
    return RealImageData(
        name=data_name(name, rows.hub_id),
        train=_whitened(pixels, processor),
        validation=_whitened(_read(validation, rows.names, processor), processor) if len(validation) else None,
        test=_whitened(_read(test, rows.names, processor), processor),
        processor=processor,
        hub_id=rows.hub_id,
        revision=rows.revision,
        arguments={
            # A path of this machine means nothing elsewhere.
            "name": None if Path(name).is_absolute() else name,
            "classes": None if classes is None else list(classes),
            "revision": rows.revision,
            **{"validation_share": validation_share, "max_train": max_train, "max_test": max_test, "seed": seed},
        },
    )


def reload_real_images(
    arguments: Mapping[str, Any] | None, processor: ZCAImageProcessor | None, name: str | None = None
) -> RealImageData:
    """Reads the images again that a bank or a distilled set was made of.

    Args:
        arguments (`Mapping`, *optional*):
            `arguments` of the [`RealImageData`] of then, as a bank and a set keep them.
        processor ([`ZCAImageProcessor`], *optional*):
            What preprocessed them.
        name (`str`, *optional*):
            Where the data set is now, in place of the name in `arguments`.

    Returns:
        [`RealImageData`]

    Raises:
        ValueError: If nothing says which data set it was, or how images were preprocessed.
    """
    if processor is None:
        raise ValueError(
            "There is no image processor beside the experts, so nobody knows what their images looked like."
        )
    settings = dict(arguments or {})
    settings["name"] = name or settings.get("name")
    if settings["name"] is None:
        raise ValueError(
            "It is not recorded which images were used: they came from a folder of another machine, maybe. Name the "
            "data set, for example `--data digits`."
        )
    return load_real_images(**settings, processor=processor)


def _read(rows: ImageRows, names: list[str], processor: ZCAImageProcessor) -> RealImages:
    """Images as pixels in [0, 1]."""
    source = HashedImages(rows)
    pixels = processor.to_pixels(source)
    return RealImages(pixels, torch.from_numpy(rows.labels), names, _finish(source.digest, rows.labels, names))


def _finish(digest: Any, labels: np.ndarray, names: list[str]) -> str:
    digest.update(np.ascontiguousarray(labels, dtype=np.int64))
    digest.update(repr(names).encode())
    return digest.hexdigest()


def _whitened(data: RealImages, processor: ZCAImageProcessor) -> RealImages:
    return replace(data, images=processor.whiten(data.images))


__all__ = ["RealImageData", "RealImages", "load_real_images", "reload_real_images"]
