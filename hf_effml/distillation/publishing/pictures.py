"""Synthetic images, their activation maps and the course of a distillation as pictures for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hf_effml.utils.plotting import plot_curves


__all__ = ["image_grid", "map_grid", "save_curves", "to_pictures"]

_LEAST_SIDE = 48
_GAP = 2
# Colours of a map from 0 to 1.
_COLD, _NEUTRAL, _HOT = (42, 111, 151), (242, 232, 201), (178, 58, 72)


def to_pictures(pixel_values: Tensor, processor: Any = None) -> list[Image.Image]:
    """Turns preprocessed images back into pictures. Values beyond black and white are cut off.

    Args:
        pixel_values (`Tensor` of shape `(images, channels, height, width)`):
            Images in the space of the processor, one or three channels.
        processor (`Any`, *optional*):
            An image processor with `unwhiten`, which undoes the preprocessing. Without one, every image is stretched
            from its least to its largest value.

    Returns:
        `list[PIL.Image.Image]`: one picture per image, in its size.
    """
    pixels = pixel_values.detach().cpu().float()
    if processor is not None and hasattr(processor, "unwhiten"):
        pixels = processor.unwhiten(pixels).clamp(0, 1)
    else:
        low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
        pixels = (pixels - low) / (high - low).clamp(min=1e-8)
    arrays = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array) for array in arrays]


def image_grid(pixel_values: Tensor, processor: Any = None, columns: int = 10, most_rows: int = 20) -> Image.Image:
    """Puts images side by side into one picture.

    Args:
        pixel_values (`Tensor` of shape `(images, channels, height, width)`):
            Images in the space of the processor.
        processor (`Any`, *optional*):
            As for [`to_pictures`].
        columns (`int`, *optional*, defaults to 10):
            Images of a row; a set with one image per class is better seen with all in one row, so 1 counts as 10.
        most_rows (`int`, *optional*, defaults to 20):
            Rows beyond that are left out.

    Returns:
        `PIL.Image.Image`: the picture. Small images are enlarged, pixel by pixel.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.distillation.publishing.pictures import image_grid

    >>> image_grid(torch.rand(6, 3, 8, 8), columns=3).size
    (152, 102)
    ```
    """
    columns = _columns(columns, len(pixel_values))
    return _join(to_pictures(pixel_values[: columns * most_rows], processor), columns)


def map_grid(
    pixel_values: Tensor,
    maps: Tensor,
    processor: Any = None,
    columns: int = 10,
    most_rows: int = 20,
    strength: float = 0.6,
) -> Image.Image:
    """Puts images with their activation maps on top side by side: blue is 0, red is 1.

    Args:
        pixel_values (`Tensor` of shape `(images, channels, height, width)`):
            Images in the space of the processor.
        maps (`Tensor` of shape `(images, height, width)`):
            Values from 0 to 1, as [`class_activation_map`] returns them.
        processor, columns, most_rows (*optional*):
            As for [`image_grid`].
        strength (`float`, *optional*, defaults to 0.6):
            How much of the map is seen: 0 shows the images in grey, 1 the maps alone.

    Returns:
        `PIL.Image.Image`: the picture.

    Raises:
        ValueError: If there is not one map of its size for every image.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.distillation.publishing.pictures import map_grid

    >>> map_grid(torch.rand(6, 3, 8, 8), torch.rand(6, 8, 8), columns=3).size
    (152, 102)
    ```
    """
    wanted = (len(pixel_values), *pixel_values.shape[2:])
    if tuple(maps.shape) != wanted:
        raise ValueError(f"`maps` must have the shape {wanted}, one map per image; got {tuple(maps.shape)}.")
    columns = _columns(columns, len(pixel_values))
    shown = columns * most_rows
    pictures = to_pictures(pixel_values[:shown], processor)
    heat = _heat(maps[:shown].detach().cpu().float())
    # In grey, so that the only colours are those of the map.
    pairs = zip(pictures, heat, strict=True)
    overlays = [Image.blend(picture.convert("L").convert("RGB"), colours, strength) for picture, colours in pairs]
    return _join(overlays, columns)


def save_curves(
    log_history: Sequence[Mapping[str, Any]],
    path: str | Path,
    title: str = "Course of the distillation",
    note: str = "",
) -> Path | None:
    """Draws matching loss, accuracy of evaluations and learned step size over the steps of a distillation.

    Args:
        log_history (`Sequence[Mapping]`):
            `trainer.state.log_history`.
        path (`str` or `Path`):
            PNG file to write.
        title (`str`, *optional*, defaults to `"Course of the distillation"`):
            What stands above.
        note (`str`, *optional*):
            Small print below, for example how accuracy was measured.

    Returns:
        `Path` or `None`: the file; `None` if nothing was logged.

    Example:

    ```python
    >>> from hf_effml.distillation.publishing.pictures import save_curves

    >>> save_curves(trainer.state.log_history, "curves.png")  # doctest: +SKIP
    ```
    """
    values = {
        "matching loss": ("loss", 1.0),
        "accuracy (%)": ("eval_accuracy", 100.0),
        "step size of students": ("synthetic_lr", 1.0),
    }
    panels = {}
    for name, (key, factor) in values.items():
        points = [(entry["step"], factor * entry[key]) for entry in log_history if key in entry]
        if points:
            panels[name] = {"": points}
    if not panels:
        return None
    plot_curves(panels, path, title=title, note=note)
    return Path(path)


def _columns(wanted: int, images: int) -> int:
    return min(10 if wanted == 1 else min(wanted, 20), images)


def _heat(maps: Tensor) -> list[Image.Image]:
    cold, neutral, hot = (torch.tensor(colour, dtype=torch.float32) for colour in (_COLD, _NEUTRAL, _HOT))
    values = 2 * maps.clamp(0, 1).unsqueeze(-1)
    colours = torch.where(values < 1, torch.lerp(cold, neutral, values), torch.lerp(neutral, hot, values - 1))
    return [Image.fromarray(array) for array in colours.round().to(torch.uint8).numpy()]


def _join(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    factor = max(1, -(-_LEAST_SIDE // min(pictures[0].size)))
    width, height = pictures[0].width * factor, pictures[0].height * factor
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        place = (_GAP + column * (width + _GAP), _GAP + row * (height + _GAP))
        grid.paste(picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST), place)
    return grid
