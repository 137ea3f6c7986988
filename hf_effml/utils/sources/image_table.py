"""Images of a data set that are decoded when they are asked for, and that are named when they cannot be."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_effml.utils.imports import require


__all__ = ["ImageTable", "image_in_range", "image_to_rgb"]


class ImageTable:
    """The images of one split and their classes.

    Args:
        rows (`datasets.Dataset`):
            Rows with an image.
        column (`str`):
            Where they have it.
        labels (`np.ndarray`):
            The class number of every row.
        where (`str`):
            What to call the split in messages.
        positions (`np.ndarray`, *optional*):
            Number of every row in the split, for messages.
    """

    def __init__(self, rows: Any, column: str, labels: np.ndarray, where: str, positions: np.ndarray | None = None):
        self._rows, self._column, self._where = rows, column, where
        self.labels = labels
        self._positions = np.arange(len(labels)) if positions is None else positions

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decodes one image, in 8-bit colours; its class is its `label`."""
        index = range(len(self))[index]
        with self._naming(index):
            return {"image": image_to_rgb(self.image(index)), "label": int(self.labels[index])}

    def image(self, index: int) -> Image.Image:
        """Decodes one image.

        Args:
            index (`int`):
                Its position.

        Returns:
            `Image`: the image as it is stored.

        Raises:
            ValueError: If it cannot be decoded; the message names its file.
        """
        with self._naming(index):
            image = self._rows[index][self._column]
            if image is None:
                raise ValueError("there is none")
        return image

    def in_range(self, index: int, image: Image.Image | None = None) -> Image.Image | np.ndarray:
        """Decodes one image, in a range that is known.

        Args:
            index (`int`):
                Its position.
            image (`Image`, *optional*):
                What [`~ImageTable.image`] returned for it, not to be decoded again.

        Returns:
            `Image` or `np.ndarray`: see [`image_in_range`].

        Raises:
            ValueError: If it cannot be decoded or its range is not known; the message names its file.
        """
        with self._naming(index):
            return image_in_range(self.image(index) if image is None else image)

    def select(self, indices: Sequence[int] | np.ndarray) -> "ImageTable":
        """Takes some of the images.

        Args:
            indices (`Sequence[int]` or `np.ndarray`):
                Their positions, in the order wanted.

        Returns:
            [`ImageTable`]
        """
        indices = np.asarray(indices, dtype=np.int64)
        return ImageTable(
            self._rows.select(indices), self._column, self.labels[indices], self._where, self._positions[indices]
        )

    def paths(self) -> list[str]:
        """The files of the images; empty where images lie in tables."""
        # The field alone: the images beside it may be larger than the memory.
        paths = (path for chunk in self._rows.data.column(self._column).chunks for path in chunk.field("path"))
        return [path.as_py() for path in paths if path.is_valid and Path(path.as_py()).is_absolute()]

    @contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Lets an error say which image it is about."""
        try:
            yield
        except _UnreadableImage:
            raise
        # Decoders raise what they like: OSError, SyntaxError, struct.error, DecompressionBombError, ...
        except Exception as error:
            raw = self._rows.cast_column(self._column, require("datasets").Image(decode=False))[int(index)]
            path = (raw[self._column] or {}).get("path")
            raise _UnreadableImage(
                f"Image {self._positions[index]} of {self._where}{f', `{path}`,' if path else ''} cannot be read: "
                f"{(str(error) or type(error).__name__).rstrip('.')}. Replace it, or leave it out."
            ) from error


class _UnreadableImage(ValueError):
    """Says already which image it is about."""


def image_in_range(image: Image.Image) -> Image.Image | np.ndarray:
    """Gives an image a range that is known, whatever Pillow has read.

    Args:
        image (`Image`):
            The image.

    Returns:
        `Image` or `np.ndarray`: the image itself where its values go to 255, and an array of floats in [0, 1] of shape
        `(height, width)` where it has 16 bits.

    Raises:
        ValueError: If nobody knows where white is: 32 bits, or floats.
    """
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.float32) / 65535
    if image.mode in ("I", "F"):
        raise ValueError(
            f"An image of mode {image.mode!r} has no known range. Save it with 8 or 16 bits per channel instead."
        )
    return image


def image_to_rgb(image: Image.Image) -> Image.Image:
    """Makes an image of 8-bit colours, of any that has a known range.

    Args:
        image (`Image`):
            The image.

    Returns:
        `Image`: in mode `RGB`.

    Raises:
        ValueError: If nobody knows where white is: 32 bits, or floats.
    """
    known = image_in_range(image)
    if isinstance(known, np.ndarray):
        known = Image.fromarray((known * 255).round().astype(np.uint8))
    return known.convert("RGB")
