"""Images of any kind and layout as pixels in [0, 1]."""

from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.image_utils import load_image
from transformers.utils import logging


# Rec. 601, as Pillow turns colours to grey.
_LUMA = (0.299, 0.587, 0.114)


def images_to_pixels(
    images: Any,
    num_channels: int = 3,
    size: tuple[int, int] | None = None,
    resize_mode: Literal["crop", "squash"] = "crop",
) -> Tensor:
    """Makes pixels in [0, 1] of images, in the wanted size and number of channels.

    Args:
        images:
            One image, or any iterable of them such as a list or the column of a data set; with a length it shows
            progress. An image is a PIL image, the path of one, or an array or tensor of shape `(height, width)`,
            `(channels, height, width)` or `(height, width, channels)`: integers from 0 to 255, or floats in
            [0, 1]. An array may also be a batch with four axes.
        num_channels (`int`, *optional*, defaults to 3):
            3 for colours, 1 for grey.
        size (`tuple[int, int]`, *optional*):
            Height and width; as the images are if unset.
        resize_mode (`str`, *optional*, defaults to `"crop"`):
            How images of another shape get there: `"crop"` cuts the largest piece of the right shape out of the
            centre, `"squash"` changes the aspect ratio. Both resize with an antialiased bilinear filter.

    Returns:
        `Tensor` of shape `(images, channels, height, width)`: the pixels, float32.

    Raises:
        ValueError: If there are no images, or they differ in size while `size` is unset, or cannot be read.

    Example:

    ```python
    >>> from PIL import Image
    >>> from hf_effml.distillation.image_pixels import images_to_pixels

    >>> images_to_pixels([Image.new("L", (8, 6)), Image.new("RGB", (5, 9))], size=(4, 4)).shape
    torch.Size([2, 3, 4, 4])

    ```
    """
    if size is not None and min(size) < 1:
        raise ValueError(f"`size` must be at least 1 pixel high and wide; got {tuple(size)}.")
    if isinstance(images, (Image.Image, str, Path, np.ndarray, Tensor)):
        return _to_pixels(images, num_channels, size, resize_mode)
    if not isinstance(images, Iterable) or isinstance(images, Mapping):
        raise ValueError(f"`images` must be an image or an iterable of images; got {type(images).__name__}.")
    total = len(images) if isinstance(images, Sized) else None
    bar = logging.tqdm(images, total=total, desc="Images", unit="image", leave=False, delay=2)
    pixels = [_to_pixels(image, num_channels, size, resize_mode) for image in bar]
    if not pixels:
        raise ValueError("`images` is empty. Pass at least one image.")
    sizes = sorted({tuple(part.shape[2:]) for part in pixels})
    if len(sizes) > 1:
        raise ValueError(f"Images have different sizes, such as {sizes[0]} and {sizes[-1]}. Give them one size.")
    return torch.cat(pixels)


def _to_pixels(image: Any, channels: int, size: tuple[int, int] | None, resize_mode: str) -> Tensor:
    """An image, or an array of several, as pixels with four axes."""
    if isinstance(image, (str, Path)):
        image = load_image(str(image))
    if isinstance(image, Image.Image):
        image = _pillow_array(image, channels)
    pixels = _with_channels(_unit_range(image), channels)
    return pixels if size is None else _resized(pixels, size, resize_mode)


def _pillow_array(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.float32) / 65535
    if image.mode in ("I", "F"):
        raise ValueError(
            f"An image of mode {image.mode!r} has no known range. Pass an array of floats in [0, 1] instead."
        )
    return np.array(image.convert("L" if channels == 1 else "RGB"))


def _unit_range(image: Any) -> Tensor:
    """An array as float32 in [0, 1]."""
    if not isinstance(image, Tensor):
        image = np.ascontiguousarray(image)
        if image.dtype.kind not in "biuf":
            raise ValueError(f"An image must be an array of numbers; got one of {image.dtype}.")
        image = torch.from_numpy(image)
    pixels = image
    if pixels.is_complex():
        raise ValueError(f"An image must be an array of real numbers; got one of {pixels.dtype}.")
    if not pixels.numel():
        raise ValueError(f"An image of shape {tuple(pixels.shape)} has no pixels.")
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    low, high = (value.item() for value in pixels.aminmax())
    if pixels.is_floating_point():
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(
                f"Images of floating-point numbers must lie in [0, 1]; got {low:.4g} to {high:.4g}. Divide by the "
                "largest possible value, or pass whole numbers from 0 to 255."
            )
        return pixels.float()
    if low < 0 or high > 255:
        raise ValueError(f"Images of whole numbers must lie in 0 to 255; got {low} to {high}.")
    return pixels.float() if pixels.dtype == torch.bool else pixels.float() / 255


def _with_channels(pixels: Tensor, channels: int) -> Tensor:
    """Any layout as `(images, channels, height, width)`."""
    shape = tuple(pixels.shape)
    if pixels.dim() == 2:
        pixels = pixels.unsqueeze(0)
    elif pixels.dim() not in (3, 4) or (shape[-3] not in (1, 3) and shape[-1] not in (1, 3)):
        raise ValueError(
            f"An image must have the shape (height, width), (1 or 3, height, width) or (height, width, 1 or 3), "
            f"batches one axis more; got {shape}. Give grey images in a batch an axis for their channel."
        )
    elif shape[-3] not in (1, 3):
        pixels = pixels.movedim(-1, -3)
    pixels = pixels if pixels.dim() == 4 else pixels.unsqueeze(0)
    if pixels.shape[1] == channels:
        return pixels.contiguous()
    if channels == 3:
        return pixels.repeat(1, 3, 1, 1)
    return (pixels * pixels.new_tensor(_LUMA).view(3, 1, 1)).sum(1, keepdim=True)


def _resized(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    height, width = pixels.shape[2:]
    if (height, width) == size:
        return pixels
    if mode == "crop":
        scale = min(height / size[0], width / size[1])
        kept = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        top, left = (height - kept[0]) // 2, (width - kept[1]) // 2
        pixels = pixels[:, :, top : top + kept[0], left : left + kept[1]]
    return F.interpolate(pixels, size, mode="bilinear", antialias=True).clamp_(0, 1)


__all__ = ["images_to_pixels"]
