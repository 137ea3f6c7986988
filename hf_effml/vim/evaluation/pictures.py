"""Sheets of test images with what a model merged or dropped of them."""

from collections.abc import Callable, Sequence
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


def draw_patches(
    model: VimForImageClassification,
    data: ImageData,
    processor: Any,
    path: str | Path,
    indices: Sequence[int] = range(6),
) -> None:
    """Draws which patches of test images a Vim merges, or a DyVM drops and where.

    Args:
        model ([`VimForImageClassification`]):
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
    data = data.aligned_to(model.config)
    rows = [data.test[index] for index in indices]
    with torch.inference_mode():
        output = model(torch.stack([row["pixel_values"] for row in rows]).to(model.device), output_merge_info=True)
    if isinstance(model, DyVMForImageClassification):
        draw: Callable[..., Image.Image] = visualize_selection
        shown = output
        left = f"{model.config.tokens_kept_at_default_size[-1]} that DyVM keeps to the end"
    else:
        draw, shown = visualize_merge, output.merge_info
        tokens = output.merge_info.sizes.shape[1] - model.config.num_class_tokens
        left = f"{tokens} tokens that R-MeeTo leaves of them"
    labels = [data.labels[row["labels"]] for row in rows]
    found = [data.labels[label] for label in output.logits.argmax(-1).tolist()]
    plot_images(
        [draw(_picture(row["pixel_values"], processor), shown, index) for index, row in enumerate(rows)],
        [f"{label}, read as {name}" for label, name in zip(labels, found, strict=True)],
        path,
        columns=3,
        title=f"{model.config.num_patches} patches and the {left}",
    )


def _picture(pixels: Tensor, processor: Any) -> Image.Image:
    """An image as the model saw it."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std))
    values = ((pixels * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


__all__ = ["draw_patches"]
