"""Sheets of test images with what a model merged or dropped of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hf_effml.utils.image_data import ImageData
from hf_effml.utils.plotting import plot_images
from hf_effml.vim.modeling_dyvm import DyVMForImageClassification
from hf_effml.vim.modeling_vim import VimForImageClassification

from .visualize import visualize_merge, visualize_selection


def draw_dropped_patches(
    model: DyVMForImageClassification,
    data: ImageData,
    processor: Any,
    path: str | Path,
    indices: Sequence[int] = range(6),
) -> None:
    """Draws which patches of test images a DyVM drops, and where.

    Args:
        model ([`DyVMForImageClassification`]):
            The model, in evaluation mode.
        data ([`~hf_effml.ImageData`]):
            The data; its test images are drawn.
        processor (`BaseImageProcessor`):
            What made pixels of them.
        path (`str` or `Path`):
            PNG file to write.
        indices (`Sequence[int]`, *optional*, defaults to `range(6)`):
            Which of them.
    """
    pixels, titles, output = _classified(model, data, indices)
    left = model.config.tokens_kept_at_default_size[-1]
    plot_images(
        [visualize_selection(_picture(image, processor), output, index) for index, image in enumerate(pixels)],
        titles,
        path,
        columns=3,
        title=f"{model.config.num_patches} patches and the {left} that DyVM keeps to the end",
    )


def draw_merged_patches(
    model: VimForImageClassification,
    data: ImageData,
    processor: Any,
    path: str | Path,
    indices: Sequence[int] = range(6),
) -> None:
    """Draws which patches of test images a Vim with merging merges.

    Args:
        model ([`VimForImageClassification`]):
            The model, in evaluation mode.
        data, processor, path, indices:
            See [`draw_dropped_patches`].
    """
    pixels, titles, output = _classified(model, data, indices, output_merge_info=True)
    info = output.merge_info
    left = info.sizes.shape[1] - model.config.num_class_tokens
    plot_images(
        [visualize_merge(_picture(image, processor), info, index) for index, image in enumerate(pixels)],
        titles,
        path,
        columns=3,
        title=f"{model.config.num_patches} patches and the {left} tokens that R-MeeTo leaves of them",
    )


def _classified(
    model: VimForImageClassification, data: ImageData, indices: Sequence[int], **options: Any
) -> tuple[Tensor, list[str], Any]:
    """Pixels of test images, what each is and is taken for, and the model's output."""
    rows = [data.test[index] for index in indices]
    pixels = torch.stack([row["pixel_values"] for row in rows])
    with torch.inference_mode():
        output = model(pixels.to(model.device), **options)
    found = output.logits.argmax(-1).tolist()
    pairs = zip(rows, found, strict=True)
    return pixels, [f"{data.labels[row['labels']]}, read as {data.labels[label]}" for row, label in pairs], output


def _picture(pixels: Tensor, processor: Any) -> Image.Image:
    """An image as the model saw it."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std))
    values = ((pixels * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


__all__ = ["draw_dropped_patches", "draw_merged_patches"]
