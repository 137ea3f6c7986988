"""Class activation maps: how much every place of an image speaks for a class, by Grad-CAM and its kin."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .feature_layers import as_planes, evaluating, feature_layers, find_cam_layer, first_tensor
from .flat_student import logits_of


__all__ = ["class_activation_map", "explain_images", "resize"]

MapMethod = Literal["gradcam", "hirescam", "smoothgradcampp"]

# Smooth Grad-CAM++ as the authors of EDF ran it.
_NOISY_COPIES = 4
_NOISE = 0.3
_EPS = 1e-8
# What float32 cannot tell from a map without any contrast.
_FLAT = 1e-6


def class_activation_map(
    model: nn.Module,
    pixel_values: Tensor,
    class_ids: Tensor | None,
    layer: str | None = None,
    method: MapMethod = "gradcam",
    size: tuple[int, int] | Literal["map"] | None = None,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Says how much every place of an image speaks for a class, from 0 to 1, according to a classifier.

    Grad-CAM (https://huggingface.co/papers/1610.02391), HiResCAM (https://huggingface.co/papers/2011.08891) or Smooth
    Grad-CAM++ (https://huggingface.co/papers/1908.01224) at one layer. Only what follows that layer is differentiated,
    for a whole batch at once; the model is in evaluation mode meanwhile and is left as it was found.

    Args:
        model (`nn.Module`):
            Any image classifier that returns class scores or an object with `logits`. Its layer may give maps
            `(batch, channels, height, width)`, the same with channels last, or tokens `(batch, tokens, channels)`;
            class tokens are taken to stand in front and are left out.
        pixel_values (`Tensor` of shape `(images, channels, height, width)`):
            Images as the model expects them; see [`for_map_network`].
        class_ids (`Tensor` of shape `(images,)` or `None`):
            The class to explain in each image, as the model numbers its classes; see [`map_class_ids`]. `None`
            explains the class that the model names itself.
        layer (`str`, *optional*):
            Name of the module whose output is looked at; found by [`find_cam_layer`] if unset.
        method (`str`, *optional*, defaults to `"gradcam"`):
            `"gradcam"` averages gradients over places: where the classifier reads a flattened map instead of a pooled
            one, as in [`ConvNetForImageClassification`], its maps may miss the object. `"hirescam"` leaves every
            gradient in its place, which is right there, and the same as Grad-CAM where the map is pooled.
            `"smoothgradcampp"` takes five forward passes and depends on random noise.
        size (`tuple[int, int]` or `"map"`, *optional*):
            Height and width of the result; those of the images if unset, and with `"map"` those of the layer's map.
        batch_size (`int`, *optional*, defaults to 64):
            Images per forward pass. A larger value needs more memory.
        generator (`torch.Generator`, *optional*):
            Source of the noise of Smooth Grad-CAM++; one seeded with 0 if unset.
        noise (`Tensor` of shape `(copies, images, channels, height, width)`, *optional*):
            The noise itself, instead of drawing it.

    Returns:
        `Tensor` of shape `(images, height, width)`: float32. Every map is stretched to [0, 1] before it is enlarged;
        one without contrast is 0 everywhere.

    Raises:
        ValueError: If an argument is impossible, or the layer does not exist or gives no map that reaches the scores.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ResNetConfig, ResNetForImageClassification
    >>> from hf_effml.distillation.class_activation import class_activation_map

    >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    >>> model = ResNetForImageClassification(config)
    >>> class_activation_map(model, torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 1])).shape
    torch.Size([3, 32, 32])

    ```
    """
    maps, _ = explain_images(model, pixel_values, class_ids, layer, method, batch_size, generator, noise)
    if size == "map":
        return maps
    return resize(maps.unsqueeze(1), size or pixel_values.shape[-2:]).squeeze(1)


def explain_images(
    model: nn.Module,
    pixel_values: Tensor,
    class_ids: Tensor | None,
    layer: str | None = None,
    method: MapMethod = "gradcam",
    batch_size: int = 64,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws class activation maps in the layer's own size, and gives the class scores of the same forward pass.

    Args:
        model, pixel_values, class_ids, layer, method, batch_size, generator, noise:
            As for [`class_activation_map`].

    Returns:
        `tuple[Tensor, Tensor]`: float32 maps `(images, h, w)` from 0 to 1, and class scores `(images, classes)`.

    Raises:
        ValueError: As [`class_activation_map`].
    """
    _check_request(pixel_values, class_ids, method, batch_size, noise)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    pixel_values, maps, scores = pixel_values.detach(), [], []
    with evaluating(model):
        explain = _Explainer(model, layer, pixel_values)
        for start in range(0, len(pixel_values), batch_size):
            part = slice(start, start + batch_size)
            pixels, ids = pixel_values[part], None if class_ids is None else class_ids[part]
            features, gradient, logits = explain(pixels, ids)
            if method == "gradcam":
                maps.append(_weighted_sum(features, gradient.mean(dim=(2, 3))))
            elif method == "hirescam":
                maps.append((features * gradient).sum(1).relu())
            else:
                copies = _draw_noise(pixels, generator) if noise is None else noise[:, part]
                ids = logits.argmax(1) if ids is None else ids
                maps.append(_smooth_gradcampp(explain, features, pixels, ids, copies.to(pixels)))
            scores.append(logits)
    return _stretch(torch.cat(maps)).to(pixel_values.device), torch.cat(scores).to(pixel_values.device)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarges or shrinks images bilinearly, without aliases.

    Args:
        images (`Tensor` of shape `(images, channels, height, width)`):
            What to resize.
        size (`tuple[int, int]`):
            New height and width.

    Returns:
        `Tensor` of shape `(images, channels, *size)`: the very images if they have this size.
    """
    if images.shape[-2:] == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)


def _smooth_gradcampp(
    explain: "_Explainer", clean: Tensor, pixels: Tensor, class_ids: Tensor, noise: Tensor
) -> Tensor:
    """As the version the authors used: the last copy alone gives features and the sign of the gradient."""
    squares, cubes = torch.zeros_like(clean), torch.zeros_like(clean)
    for copy in noise:
        features, gradient, _ = explain(pixels + copy, class_ids)
        squares += gradient**2 / len(noise)
        cubes += gradient**3 / len(noise)
    alpha = squares / (2 * squares + (cubes * clean).sum(dim=(2, 3), keepdim=True) + _EPS)
    return _weighted_sum(features, (alpha * gradient.relu()).sum(dim=(2, 3)))


def _draw_noise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """`(copies, *pixels.shape)`, drawn image by image, so that it hardly matters how images are batched."""
    shape = len(pixels), _NOISY_COPIES, *pixels.shape[1:]
    return torch.randn(shape, generator=generator, device=generator.device).transpose(0, 1) * _NOISE


def _weighted_sum(features: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("bk,bkhw->bhw", weights, features).relu()


def _stretch(maps: Tensor) -> Tensor:
    """Every map from 0 to 1, however small its values are; 0 where there is no contrast."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    spread = high - low
    return torch.where(spread > _FLAT * high, (maps - low) / spread, 0.0)


class _Explainer:
    """Features at a layer and the gradient of a class score with respect to them, both `(batch, channels, h, w)`."""

    def __init__(self, model: nn.Module, layer: str | None, pixel_values: Tensor):
        self.model = model
        self.layer = find_cam_layer(model, pixel_values) if layer is None else layer
        modules = dict(model.named_modules())
        if self.layer not in modules:
            raise ValueError(f"`layer` {layer!r} is not in {type(model).__name__}. {_candidates(model, pixel_values)}")
        self.module = modules[self.layer]

    def __call__(self, pixels: Tensor, class_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The class scores are those of the forward pass; without `class_ids` the highest one is explained."""
        pixels = pixels.to(next(self.model.parameters()))
        leaf, logits = self._run(pixels)
        class_ids = logits.argmax(1) if class_ids is None else class_ids.to(logits.device, torch.int64)
        _check_classes(class_ids, logits.shape[1])
        scores = logits.gather(1, class_ids.unsqueeze(1)).sum()
        gradient = None
        if leaf is not None and scores.requires_grad:
            (gradient,) = torch.autograd.grad(scores, leaf, allow_unused=True)
        features, slopes = (
            None if tensor is None else as_planes(tensor, pixels.shape[-2:]) for tensor in (leaf, gradient)
        )
        if features is None or slopes is None or len(features) != len(pixels):
            raise ValueError(
                f"`layer` {self.layer!r} of {type(self.model).__name__} gives no map that the class scores depend on. "
                f"{_candidates(self.model, pixels)}"
            )
        return features.detach().float(), slopes.float(), logits.detach().float()

    def _run(self, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        """The layer's output, from which on a graph is recorded, and the class scores."""
        leaves: list[Tensor] = []

        def cut(module: nn.Module, arguments: Any, output: Any) -> Any:
            features = first_tensor(output)
            if features is None:
                return output
            leaves.append(features.detach().requires_grad_())
            # Until the end of the forward pass. The clone may be changed in place by what follows.
            torch.set_grad_enabled(True)
            clone = leaves[-1].clone()
            return clone if features is output else type(output)([clone, *output[1:]])

        handle = self.module.register_forward_hook(cut)
        try:
            with torch.no_grad():
                logits = logits_of(self.model(pixels))
        finally:
            handle.remove()
        return (leaves[-1] if leaves else None), logits


def _candidates(model: nn.Module, pixel_values: Tensor) -> str:
    names = list(feature_layers(model, pixel_values))[-8:]
    return f"The last layers with a map are {names}; leave `layer` unset for a good choice." if names else ""


def _check_request(
    pixel_values: Tensor, class_ids: Tensor | None, method: str, batch_size: int, noise: Tensor | None
) -> None:
    if pixel_values.dim() != 4 or not len(pixel_values):
        raise ValueError(
            f"`pixel_values` must be images `(images, channels, height, width)`; got {tuple(pixel_values.shape)}."
        )
    if class_ids is not None and class_ids.shape != pixel_values.shape[:1]:
        raise ValueError(
            f"`class_ids` must be one class per image, {len(pixel_values)} in all; got {tuple(class_ids.shape)}."
        )
    if method not in ("gradcam", "hirescam", "smoothgradcampp"):
        raise ValueError(f'`method` must be "gradcam", "hirescam" or "smoothgradcampp"; got {method!r}.')
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
    if noise is not None and (noise.dim() != 5 or noise.shape[1:] != pixel_values.shape or not len(noise)):
        raise ValueError(
            f"`noise` must be copies of the images' shape, (copies, {', '.join(map(str, pixel_values.shape))}); "
            f"got {tuple(noise.shape)}."
        )


def _check_classes(class_ids: Tensor, num_classes: int) -> None:
    if class_ids.min() < 0 or class_ids.max() >= num_classes:
        raise ValueError(
            f"`class_ids` must be below the model's {num_classes} classes; got {class_ids.min().item()} to "
            f"{class_ids.max().item()}. Translate them with `map_class_ids`."
        )
