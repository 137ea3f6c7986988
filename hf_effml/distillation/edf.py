"""Discriminative areas of synthetic images (EDF, arXiv 2410.17193): what activation maps do to their gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .class_activation import resize


__all__ = [
    "area_weights",
    "constant_maps",
    "for_map_network",
    "map_class_ids",
    "preprocess_pixels",
]


def area_weights(maps: Tensor, beta: float, threshold: float | None = None) -> Tensor:
    """Turns activation maps into factors for the gradient of the images (EDF, discriminative area enhancement).

    The weight is `map + beta` where the map reaches the threshold and 1 elsewhere. An image whose map has no contrast
    (see [`constant_maps`]) gets 1 everywhere.

    Args:
        maps (`Tensor` of shape `(images, height, width)`):
            From [`class_activation_map`].
        beta (`float`):
            At least 0; the authors use 1 and 2. Below 1, weak areas of interest get less than the background.
        threshold (`float`, *optional*):
            One value for all images, above 0 and at most 1; the mean of each image's own map if unset, for which the
            authors' settings write 0.

    Returns:
        `Tensor` of shape `(images, 1, height, width)`: the weights.

    Raises:
        ValueError: If `beta` is negative or `threshold` outside of its range.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.distillation.edf import area_weights

    >>> area_weights(torch.tensor([[[0.0, 0.25], [0.5, 1.0]]]), beta=1.0)
    tensor([[[[1.0000, 1.0000],
              [1.5000, 2.0000]]]])

    ```
    """
    if not beta >= 0:
        raise ValueError(f"`beta` must be at least 0; got {beta}. The authors use 1 or 2.")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(
            f"`threshold` must be above 0 and at most 1; got {threshold}. Leave it unset for the mean of each map."
        )
    limit = maps.mean(dim=(1, 2), keepdim=True) if threshold is None else threshold
    raised = (maps >= limit) & ~constant_maps(maps)[:, None, None]
    return torch.where(raised, maps + beta, 1.0).unsqueeze(1)


def constant_maps(maps: Tensor) -> Tensor:
    """Says which activation maps have the same value everywhere and so say nothing.

    Args:
        maps (`Tensor` of shape `(images, height, width)`):
            From [`class_activation_map`].

    Returns:
        `Tensor` of shape `(images,)`: `True` for a map without contrast.
    """
    return maps.amax(dim=(1, 2)) == maps.amin(dim=(1, 2))


def map_class_ids(labels: Tensor, cam_label_map: Mapping[int, int]) -> Tensor:
    """Translates class ids of a data set into those of the network that draws the maps.

    Args:
        labels (`Tensor` of shape `(images,)`):
            Class ids, of synthetic images the `argmax` of their soft labels.
        cam_label_map (`Mapping[int, int]`):
            The network's class id for every class of the data set, for example
            `dict(enumerate(subset_info("imagenette").indices))`.

    Returns:
        `Tensor` of shape `(images,)`: int64, on the device of `labels`.

    Raises:
        ValueError: If a class is missing.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.comp_dd import subset_info
    >>> from hf_effml.distillation.edf import map_class_ids

    >>> map_class_ids(torch.tensor([2, 0]), dict(enumerate(subset_info("imagenette").indices)))
    tensor([482,   0])

    ```
    """
    ids = labels.tolist()
    missing = sorted(set(ids) - cam_label_map.keys())
    if missing:
        raise ValueError(
            f"`cam_label_map` must name a class of the map network for every class; {missing} are missing, "
            f"it has {sorted(cam_label_map)}."
        )
    return torch.tensor([cam_label_map[index] for index in ids], dtype=torch.int64, device=labels.device)


def for_map_network(
    pixel_values: Tensor, source_processor: Any, target_processor: Any, size: tuple[int, int] | None = None
) -> Tensor:
    """Turns synthetic images, preprocessed for the students, into what the network that draws the maps expects.

    Args:
        pixel_values (`Tensor` of shape `(images, channels, height, width)`):
            Synthetic images.
        source_processor ([`ZCAImageProcessor`] or an image processor of transformers):
            What they were preprocessed with. It is undone, and what no picture can show is cut off.
        target_processor ([`ZCAImageProcessor`] or an image processor of transformers):
            That of the network. Its statistics are used, but no resizing or cropping.
        size (`tuple[int, int]`, *optional*):
            Height and width that the network insists on, see [`demanded_size`]. If unset, the images keep theirs, or
            get the one that `target_processor` can whiten.

    Returns:
        `Tensor` of shape `(images, channels, height, width)`: without a graph. Grey images become as many equal
        channels as the network takes.

    Raises:
        TypeError: If a processor does not say how it normalises.
        ValueError: If the numbers of channels do not fit.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ViTImageProcessorPil
    >>> from hf_effml.distillation.edf import for_map_network

    >>> halves = ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    >>> shifted = ViTImageProcessorPil(image_mean=[0.0] * 3, image_std=[0.1] * 3)
    >>> for_map_network(torch.tensor([-4.0, 0.0, 1.0]).view(1, 3, 1, 1), halves, shifted).flatten()
    tensor([ 0.,  5., 10.])

    ```
    """
    with torch.no_grad():
        pixels = _unit_range(pixel_values, source_processor)
        if size is None and getattr(target_processor, "do_whiten", False):
            size = target_processor.image_size
        return preprocess_pixels(pixels if size is None else resize(pixels, size), target_processor)


def _unit_range(pixel_values: Tensor, processor: Any) -> Tensor:
    if hasattr(processor, "unwhiten"):
        return processor.unwhiten(pixel_values, clip=True)
    mean, std = _statistics(processor, pixel_values)
    if pixel_values.shape[1] != mean.shape[1]:
        raise ValueError(
            f"`pixel_values` have {pixel_values.shape[1]} channels, `source_processor` is for {mean.shape[1]}. "
            "Pass the processor that made them."
        )
    return (pixel_values * std + mean).clamp(0, 1)


def preprocess_pixels(pixels: Tensor, processor: Any) -> Tensor:
    """Normalises or whitens pixels with the statistics of an image processor, without resizing or cropping.

    Args:
        pixels (`Tensor` of shape `(images, channels, height, width)`):
            Values in [0, 1]; grey images become as many equal channels as are wanted.
        processor ([`ZCAImageProcessor`] or an image processor of transformers):
            That of the network.

    Returns:
        `Tensor` of the same images.

    Raises:
        TypeError: If the processor does not say how it normalises.
        ValueError: If the numbers of channels do not fit.
    """
    if hasattr(processor, "whiten"):
        return processor.whiten(_with_channels(pixels, processor.num_channels))
    mean, std = _statistics(processor, pixels)
    return (_with_channels(pixels, mean.shape[1]) - mean) / std


def _with_channels(pixels: Tensor, channels: int) -> Tensor:
    if pixels.shape[1] not in (1, channels):
        raise ValueError(
            f"`target_processor` is for images of {channels} channels; the synthetic ones have {pixels.shape[1]}. "
            "Choose another map network."
        )
    return pixels.expand(-1, channels, -1, -1)


def _statistics(processor: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `(1, channels, 1, 1)` for pixels in [0, 1]."""
    # timm's settings arrive in a dictionary of its own.
    settings = getattr(processor, "data_config", None) or {}
    mean = settings.get("mean", getattr(processor, "image_mean", None))
    std = settings.get("std", getattr(processor, "image_std", None))
    if mean is None or std is None:
        raise TypeError(
            f"A {type(processor).__name__} does not say how it normalises; an image processor with `image_mean` and "
            "`image_std` is needed."
        )
    if not getattr(processor, "do_normalize", True):
        mean, std = [0.0] * len(mean), [1.0] * len(mean)
    # Some processors make other numbers than [0, 1] of bytes before they normalise.
    scale = 255 * processor.rescale_factor if getattr(processor, "do_rescale", False) else 1.0
    mean, std = (like.new_tensor(values).view(1, -1, 1, 1) / scale for values in (mean, std))
    return mean, std
