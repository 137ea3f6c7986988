"""Where in a classifier its maps of features are, and what images it takes: found by trying."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .flat_student import logits_of


__all__ = [
    "as_planes",
    "demanded_size",
    "evaluating",
    "feature_layers",
    "find_cam_layer",
    "first_tensor",
    "input_channels",
    "own_size",
]

# DINOv2 has five tokens that are no patches, which is the most among common models.
_MOST_CLASS_TOKENS = 8


def find_cam_layer(model: nn.Module, pixel_values: Tensor | None = None) -> str:
    """Finds the layer whose output is the last map of features before the class scores.

    One image goes through the model. Maps of a single place are passed over, so that small images get an earlier
    stage; so are token maps whose patches no longer reach the scores, as after the last block of a ViT.

    Args:
        model (`nn.Module`):
            An image classifier.
        pixel_values (`Tensor` of shape `(images, channels, height, width)`, *optional*):
            Images, of which the first is used; noise of the size that the model's configuration names, or 224 x 224,
            if unset.

    Returns:
        `str`: name of the module.

    Raises:
        ValueError: If no module gives a map.

    Example:

    ```python
    >>> from transformers import ResNetConfig, ResNetForImageClassification
    >>> from hf_effml.distillation.feature_layers import find_cam_layer

    >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    >>> find_cam_layer(ResNetForImageClassification(config))
    'resnet.encoder.stages.1'

    ```
    """
    if pixel_values is None:
        pixel_values = _some_image(model, own_size(model) or (224, 224))
    maps = feature_layers(model, pixel_values)
    if not maps:
        raise ValueError(
            f"No layer of {type(model).__name__} gives a map that its class scores depend on, for images of "
            f"{tuple(pixel_values.shape[-2:])} pixels. Pass a trained model, larger images, or as `layer` the name of "
            "one with a map."
        )
    blocks = [name for name, kind in maps.items() if kind == "tokens" and name[-1].isdigit()]
    planes = [name for name, kind in maps.items() if kind == "planes"]
    order = list(maps)
    return max([*blocks[-1:], *planes[-1:]] or order[-1:], key=order.index)


def demanded_size(model: nn.Module, size: tuple[int, int]) -> tuple[int, int] | None:
    """Says whether a model takes images of a size, by trying, and which size it insists on if it does not.

    Args:
        model (`nn.Module`):
            An image classifier.
        size (`tuple[int, int]`):
            Height and width of the images at hand.

    Returns:
        `tuple[int, int]` or `None`: the size to give it, as a ViT has one; `None` if it takes the images as they are.

    Raises:
        ValueError: If it fails, and its configuration names no other size.

    Example:

    ```python
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> from hf_effml.distillation.feature_layers import demanded_size

    >>> config = ViTConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> demanded_size(ViTForImageClassification(config), (16, 16))
    (32, 32)

    ```
    """
    image = _some_image(model, size).to(next(model.parameters()))
    try:
        with evaluating(model), torch.no_grad():
            model(image)
    # timm asserts the size, transformers raises ValueError, a linear layer on a flattened map RuntimeError.
    except (AssertionError, RuntimeError, ValueError) as error:
        own = own_size(model)
        if own is None or own == tuple(size):
            raise ValueError(
                f"{type(model).__name__} takes no images of {tuple(size)} pixels, and no size that it takes is known. "
                "Choose another model."
            ) from error
        return own
    return None


def feature_layers(model: nn.Module, pixel_values: Tensor) -> dict[str, str]:
    """Lists the modules whose output is a map of more than one place that the class scores depend on.

    Args:
        model (`nn.Module`):
            An image classifier.
        pixel_values (`Tensor` of shape `(images, channels, height, width)`):
            Images, of which the first is used.

    Returns:
        `dict[str, str]`: by name, in the order in which they are done, `"planes"` for maps with two axes of places
        and `"tokens"` for those with one.
    """
    ended: list[tuple[str, Tensor]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None and tensor.requires_grad and len(tensor) == 1:
                ended.append((name, tensor))

        return hook

    image = pixel_values[:1].detach().to(next(model.parameters())).requires_grad_()
    with evaluating(model), torch.enable_grad():
        handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
        try:
            score = logits_of(model(image)).amax()
        finally:
            for handle in handles:
                handle.remove()
        gradients = torch.autograd.grad(score, [tensor for _, tensor in ended], allow_unused=True)
    return _outermost(ended, gradients, image.shape[-2:])


def _outermost(
    ended: list[tuple[str, Tensor]], gradients: tuple[Tensor | None, ...], size: tuple[int, int]
) -> dict[str, str]:
    with_tokens = tuple(f"{name}." for name, tensor in ended if tensor.dim() == 3)
    groups: dict[int, list[str]] = {}
    kinds = {}
    for (name, tensor), gradient in zip(ended, gradients, strict=True):
        planes = None if gradient is None else as_planes(gradient, size)
        if planes is None or planes.shape[-2:].numel() == 1:
            continue
        kind = "tokens" if tensor.dim() == 3 else "planes"
        # Inside of what gives tokens, four dimensions are those of attention.
        if planes.any() if kind == "tokens" else not name.startswith(with_tokens):
            groups.setdefault(id(tensor), []).append(name)
            kinds[id(tensor)] = kind
    # A stage returns what its last block returned: of such modules the outermost that is one of several is meant.
    return {
        min(reversed(names), key=lambda name: (not any(map(str.isdigit, name)), name.count("."))): kinds[key]
        for key, names in groups.items()
    }


def first_tensor(output: Any) -> Tensor | None:
    """Takes the hidden states out of what a module returned.

    Args:
        output (`Any`):
            A tensor, or a tuple or list that begins with one.

    Returns:
        `Tensor` or `None`: `None` if there is none.
    """
    if type(output) in (tuple, list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def as_planes(features: Tensor, size: tuple[int, int]) -> Tensor | None:
    """Brings feature maps of any layout into the usual one.

    Args:
        features (`Tensor`):
            Maps `(batch, channels, h, w)` or `(batch, h, w, channels)`, or tokens `(batch, tokens, channels)`, of
            which the first few may be class tokens.
        size (`tuple[int, int]`):
            Height and width of the images, by whose shape the axes are told apart.

    Returns:
        `Tensor` of shape `(batch, channels, h, w)` or `None`: `None` if it is no map.
    """
    ratio = size[0] / size[1]
    if features.dim() == 4:
        first, last = (abs(math.log(features.shape[i] / features.shape[i + 1] / ratio)) for i in (2, 1))
        return features.permute(0, 3, 1, 2) if last < first else features
    if features.dim() != 3:
        return None
    for class_tokens in range(min(_MOST_CLASS_TOKENS, features.shape[1])):
        patches = features.shape[1] - class_tokens
        rows, columns = round(math.sqrt(patches * ratio)), round(math.sqrt(patches / ratio))
        if rows * columns == patches:
            return features[:, class_tokens:].transpose(1, 2).unflatten(2, (rows, columns))
    return None


def own_size(model: nn.Module) -> tuple[int, int] | None:
    """Reads what size of images a model is made for, in the ways of transformers and timm.

    Args:
        model (`nn.Module`):
            An image classifier.

    Returns:
        `tuple[int, int]` or `None`: height and width; `None` if its configuration does not say.
    """
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if size is None:
        timm = getattr(model, "pretrained_cfg", None) or getattr(config, "pretrained_cfg", None) or {}
        size = timm.get("input_size", ())[1:]
    return (size, size) if isinstance(size, int) else tuple(size) or None


def input_channels(model: nn.Module) -> int:
    """Reads how many channels a model's images have: from its configuration, or else its first kernel.

    Args:
        model (`nn.Module`):
            An image classifier.

    Returns:
        `int`: 3 if neither says.
    """
    kernel = next((weight for weight in model.parameters() if weight.dim() == 4), None)
    channels = getattr(getattr(model, "config", None), "num_channels", None)
    return channels or (3 if kernel is None else kernel.shape[1])


def _some_image(model: nn.Module, size: tuple[int, int]) -> Tensor:
    return torch.rand(1, input_channels(model), *size, generator=torch.Generator().manual_seed(0))


def on_device(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Gives a model on a device without moving the one that is given.

    Args:
        model (`nn.Module`):
            The model.
        device (`torch.device` or `str`):
            Where it is needed.

    Returns:
        `nn.Module`: the model itself if it is there, otherwise a copy.
    """
    device = torch.device(device)
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    there = all(place.type == device.type and device.index in (None, place.index) for place in places)
    return model if there else copy.deepcopy(model).to(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode inside the block; afterwards every module is in the mode it was in.

    Args:
        model (`nn.Module`):
            The model.
    """
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
