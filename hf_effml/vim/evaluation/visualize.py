"""Pictures of what token merging, or the selection of tokens and scans, did to an image."""

import colorsys
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from hf_effml.vim.token_reduction import MergeInfo


_SIDE = 448
_PANEL = 288
_GAP = 16
_STRIP = 28
_RUNS = {"forward": (47, 110, 186), "backward": (211, 108, 44)}
_SKIPPED = (232, 232, 232)
_GOLDEN = 0.618034


def visualize_merge(
    image: Image.Image, merge_info: MergeInfo, index: int = 0, grid_size: tuple[int, int] | None = None
) -> Image.Image:
    """Draw which patches of an image were merged, beside the image.

    Patches of one group share their mean colour and an outline of one hue, also where they do not touch. Patches that
    stand for themselves keep their pixels; pruned ones turn grey.

    Args:
        image (`PIL.Image.Image`):
            The image as the model saw it, resized and cropped.
        merge_info ([`MergeInfo`]):
            The model's `merge_info`, asked for with `output_merge_info=True`.
        index (`int`, *optional*, defaults to 0):
            Which sample of the batch.
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
    picture, cell = _in_cells(image, rows, columns, _SIDE)
    tokens = _draw_tokens(np.asarray(picture, dtype=np.float32), slots.reshape(rows, columns), cell)
    canvas = Image.new("RGB", (2 * picture.width + _GAP, picture.height), "white")
    canvas.paste(picture, (0, 0))
    canvas.paste(Image.fromarray(tokens), (picture.width + _GAP, 0))
    return canvas


def visualize_selection(
    image: Image.Image, outputs: Any, index: int = 0, grid_size: tuple[int, int] | None = None
) -> Image.Image:
    """Draw which patches of an image a DyVM kept after every stage, and which scans it ran in every block.

    Dropped patches turn grey. Below the pictures every block has one field per direction, from the first block on the
    left to the last on the right: filled where the scan ran.

    Args:
        image (`PIL.Image.Image`):
            The image as the model saw it, resized and cropped.
        outputs ([`DyVMImageClassifierOutput`] or [`DyVMModelOutput`]):
            From a model in evaluation.
        index (`int`, *optional*, defaults to 0):
            Which sample of the batch.
        grid_size (`tuple[int, int]`, *optional*):
            Rows and columns of patches; the grid that fits the shape of the image if unset.

    Returns:
        `PIL.Image.Image`: The image and what is left of it after each stage, the scans below.

    Raises:
        ValueError: If the outputs are from training, or the number of patches does not fit the grid.

    Example:

    ```python
    >>> import torch
    >>> from PIL import Image
    >>> from hf_effml import DyVMConfig, DyVMForImageClassification, visualize_selection
    >>> config = DyVMConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4)
    >>> outputs = DyVMForImageClassification(config).eval()(torch.rand(1, 3, 32, 32))
    >>> visualize_selection(Image.new("RGB", (32, 32)), outputs).size
    (1200, 376)

    ```
    """
    if outputs.token_decisions is not None:
        raise ValueError("These outputs are from training, where decisions are drawn. Call `model.eval()` first.")
    stages = outputs.kept_indices or ()
    shares = outputs.token_keep_ratio
    patches = round(stages[0].shape[1] / shares[0, 0].item()) if stages else outputs.token_positions.shape[1]
    rows, columns = grid_size or _fitting_grid(patches, image.height / image.width)
    if rows * columns != patches:
        raise ValueError(f"`grid_size` {rows}x{columns} does not hold {patches} patches. Pass the model's grid.")
    picture, cell = _in_cells(image, rows, columns, _PANEL)
    panels = [picture]
    for kept in stages:
        groups = np.full(patches, -1)
        groups[kept[index].cpu().numpy()] = np.arange(kept.shape[1])
        pixels = np.asarray(picture, dtype=np.float32)
        panels.append(Image.fromarray(_draw_tokens(pixels, groups.reshape(rows, columns), cell)))
    width = len(panels) * (picture.width + _GAP) - _GAP
    gates = None if outputs.block_gates is None else outputs.block_gates[index].detach().cpu().numpy() > 0
    height = picture.height + (0 if gates is None else _GAP + 2 * _STRIP + _GAP)
    canvas = Image.new("RGB", (width, height), "white")
    for number, panel in enumerate(panels):
        canvas.paste(panel, (number * (picture.width + _GAP), 0))
    if gates is not None:
        _draw_gates(canvas, gates, top=picture.height + _GAP)
    return canvas


def _draw_gates(canvas: Image.Image, gates: np.ndarray, top: int) -> None:
    """One row of fields per direction, one column per block of `gates` `(blocks, 2)`."""
    draw = ImageDraw.Draw(canvas)
    label = 64
    step = (canvas.width - label) / len(gates)
    for row, (direction, colour) in enumerate(_RUNS.items()):
        y = top + row * (_STRIP + _GAP // 2)
        draw.text((0, y + _STRIP // 2), direction, fill="black", anchor="lm")
        for block, runs in enumerate(gates[:, row]):
            left = label + block * step
            draw.rectangle((left, y, left + step - 3, y + _STRIP - 1), fill=colour if runs else _SKIPPED)


def _in_cells(image: Image.Image, rows: int, columns: int, side: int) -> tuple[Image.Image, int]:
    """The image at about `side` pixels, and the side of a patch in it."""
    cell = max(round(side / max(rows, columns)), 4)
    return image.convert("RGB").resize((columns * cell, rows * cell), Image.Resampling.BICUBIC), cell


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


__all__ = ["visualize_merge", "visualize_selection"]
