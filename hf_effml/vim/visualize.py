"""A picture of what token merging did to an image."""

import colorsys

import numpy as np
from PIL import Image

from .token_reduction import MergeInfo


_SIDE = 448
_GAP = 16
_GOLDEN = 0.618034


def visualize_merge(
    image: Image.Image, merge_info: MergeInfo, index: int = 0, grid_size: tuple[int, int] | None = None
) -> Image.Image:
    """
    Draw which patches of an image were merged, beside the image.

    Patches of one group share their mean colour and an outline of one hue, also where they do not touch. Patches that
    stand for themselves keep their pixels; pruned ones turn grey.

    Args:
        image (`PIL.Image.Image`): The image as the model saw it, resized and cropped.
        merge_info ([`MergeInfo`]): The model's `merge_info`, asked for with `output_merge_info=True`.
        index (`int`, *optional*, defaults to 0): Which sample of the batch.
        grid_size (`tuple[int, int]`, *optional*):
            Rows and columns of patches; the grid that fits the shape of the image if unset.

    Returns:
        `PIL.Image.Image`: The image on the left, its tokens on the right.

    Raises:
        ValueError: If the number of patches does not fit the grid.

    Example:

    ```python
    >>> import torch
    >>> from PIL import Image
    >>> from hf_effml import RMeeToVimConfig, RMeeToVimForImageClassification, visualize_merge
    >>> config = RMeeToVimConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, merge_r=4)
    >>> model = RMeeToVimForImageClassification(config)
    >>> info = model(torch.rand(1, 3, 32, 32), output_merge_info=True).merge_info
    >>> visualize_merge(Image.new("RGB", (32, 32)), info).size
    (912, 448)

    ```
    """
    slots = merge_info.slot[index].cpu().numpy()
    # Class tokens never merge, so whatever shares their place is one; it may stand anywhere in the input.
    slots = slots[~np.isin(slots, merge_info.class_index[index].cpu().numpy())]
    rows, columns = grid_size or _fitting_grid(len(slots), image.height / image.width)
    if rows * columns != len(slots):
        raise ValueError(f"`grid_size` {rows}x{columns} does not hold {len(slots)} patches. Pass the model's grid.")
    cell = max(round(_SIDE / max(rows, columns)), 4)
    picture = image.convert("RGB").resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
    tokens = _draw_tokens(np.asarray(picture, dtype=np.float32), slots.reshape(rows, columns), cell)
    canvas = Image.new("RGB", (2 * picture.width + _GAP, picture.height), "white")
    canvas.paste(picture, (0, 0))
    canvas.paste(Image.fromarray(tokens), (picture.width + _GAP, 0))
    return canvas


def _fitting_grid(patches: int, aspect: float) -> tuple[int, int]:
    rows = max(round((patches * aspect) ** 0.5), 1)
    if patches % rows:
        raise ValueError(f"{patches} patches do not fill a grid of the image's shape. Pass `grid_size`.")
    return rows, patches // rows


def _draw_tokens(pixels: np.ndarray, groups: np.ndarray, cell: int) -> np.ndarray:
    """Recolour `pixels` `(height, width, 3)` by the `groups` `(rows, columns)` of its cells."""
    rows, columns = groups.shape
    cells = pixels.reshape(rows, cell, columns, cell, 3).swapaxes(1, 2).copy()
    pruned = groups < 0
    cells[pruned] = 0.25 * cells[pruned].mean(axis=-1, keepdims=True) + 0.75 * 200
    # A cell's neighbours above, below, left and right; beyond the edge nothing belongs to the group.
    padded = np.pad(groups, 1, constant_values=-2)
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    width = min(1 + cell // 20, 4)
    sides = (np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:])
    for number, group in enumerate(np.unique(groups[~pruned])):
        member = groups == group
        if member.sum() == 1:
            continue
        cells[member] = cells[member].mean(axis=(0, 1, 2))
        hue = np.array(colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.75, 0.95)) * 255
        for side, neighbour in zip(sides, neighbours, strict=True):
            for row, column in np.argwhere(member & (neighbour != group)):
                cells[row, column][side] = hue
    return cells.swapaxes(1, 2).reshape(pixels.shape).round().astype(np.uint8)


__all__ = ["visualize_merge"]
