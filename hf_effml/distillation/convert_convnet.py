"""Official ConvNet weights of trajectory matching to models of this package, and back."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers.utils import logging

from hf_effml.utils.model_kinds import load_weights, state_dict_of

from .configuration_convnet import ConvNetConfig
from .modeling_convnet import ConvNetForImageClassification


logger = logging.get_logger(__name__)


def convert_convnet_checkpoint(
    source: str | Path | Mapping[str, Tensor],
    activation: Literal["relu", "leaky_relu", "sigmoid"] = "relu",
    norm: Literal["instance", "group"] = "instance",
    pooling: Literal["avg", "max", "none"] | None = None,
    image_size: int | tuple[int, int] | None = None,
    **fields: Any,
) -> ConvNetForImageClassification:
    """Makes a model of an official ConvNet, whose depth, width, channels, classes and most else show in its weights.

    Args:
        source (`str`, `Path` or `Mapping[str, Tensor]`):
            A state dict with official keys, or a `.pt`, `.pth` or `.safetensors` file of one. Pickles are read without
            running code from them.
        activation (`str`, *optional*, defaults to `"relu"`):
            Leaves no trace in the weights.
        norm (`str`, *optional*, defaults to `"instance"`):
            `"instance"` or `"group"`, whose weights look alike; the other kinds are recognised.
        pooling (`str`, *optional*):
            `"avg"` and `"max"` leave the same trace, and none of them with one block only; if unset, `"avg"` where
            there is room for pooling.
        image_size (`int` or `tuple[int, int]`, *optional*):
            If unset, the smallest square images that fit, which are the official ones.
        fields: Further fields of [`ConvNetConfig`], as `id2label`.

    Returns:
        [`ConvNetForImageClassification`]: The model, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no ConvNet, or the sizes do not fit.

    Example:

    ```python
    >>> from hf_effml import ConvNetConfig, ConvNetForImageClassification
    >>> from hf_effml.distillation.convert_convnet import convert_convnet_checkpoint, to_official

    >>> weights = to_official(ConvNetForImageClassification(ConvNetConfig(depth=4, image_size=64, hidden_size=8)))
    >>> convert_convnet_checkpoint(weights).config.image_size
    64

    ```
    """
    state = _read(source)
    config = _detect(state, activation, norm, pooling, image_size, fields)
    model = ConvNetForImageClassification(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        name = differing[0]
        raise ValueError(
            f"The weights do not fit a ConvNet of `depth` {config.depth}, `norm={config.norm!r}`, "
            f"`pooling={config.pooling!r}` and `image_size` {config.image_size}: {len(differing)} tensors differ, as "
            f"{name!r} with {found.get(name, 'none')} for {wanted.get(name, 'none')}. Pass what they do not show."
        )
    model.load_state_dict(state)
    return model.eval()


def to_official(model: ConvNetForImageClassification) -> dict[str, Tensor]:
    """Takes the weights out of a model, as the official code loads them with `load_state_dict`.

    Args:
        model ([`ConvNetForImageClassification`]):
            The model.

    Returns:
        `dict[str, Tensor]`: Copies on the CPU, with official keys.
    """
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def _read(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    what = f"`{source}`" if isinstance(source, (str, Path)) else "This"
    state = state_dict_of(source if isinstance(source, Mapping) else load_weights(source), what)
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{what} is no state dict of tensors.")
    return state


def _detect(
    state: dict[str, Tensor],
    activation: str,
    norm: str,
    pooling: str | None,
    image_size: Any,
    fields: dict[str, Any],
) -> ConvNetConfig:
    convolutions = [name for name, value in state.items() if name.startswith("features.") and value.dim() == 4]
    classifier = state.get("classifier.weight")
    if "features.0.weight" not in convolutions or classifier is None or classifier.dim() != 2:
        raise ValueError(
            "These are no weights of a ConvNet: `features.0.weight` of four axes or `classifier.weight` of two is "
            f"missing. They start with {list(state)[:5]}."
        )
    width, channels = state["features.0.weight"].shape[:2]
    norm = _detect_norm(state, norm)
    # Activation, and normalisation and pooling if there are any: what stands between two convolutions.
    layers = int(sorted(convolutions, key=_index)[1].split(".")[1]) if len(convolutions) > 1 else 4
    room = layers > (3 if norm != "none" else 2)
    shape = {
        "num_channels": channels,
        "hidden_size": width,
        "depth": len(convolutions),
        "norm": norm,
        "activation": activation,
        "pooling": pooling or ("avg" if room else "none"),
        "num_labels": state["classifier.weight"].shape[0],
    }
    if image_size is None:
        image_size = _detect_size(state, shape)
    shape["image_size"] = image_size if isinstance(image_size, int) else list(image_size)
    if "id2label" in fields:
        shape.pop("num_labels")
    return ConvNetConfig(**{**shape, **fields})


def _index(name: str) -> int:
    return int(name.split(".")[1])


def _detect_norm(state: dict[str, Tensor], unless_seen: str) -> str:
    weight = state.get("features.1.weight")
    if weight is None:
        return "none"
    if "features.1.running_mean" in state:
        return "batch"
    return "layer" if weight.dim() == 3 else unless_seen


def _detect_size(state: dict[str, Tensor], shape: dict[str, Any]) -> int | list[int]:
    """The size of the images, from the first normalised map or from what the classifier reads."""
    extra = 4 if shape["num_channels"] == 1 else 0
    if shape["norm"] == "layer":
        height, width = (side - extra for side in state["features.1.weight"].shape[1:])
        return height if height == width else [height, width]
    values = state["classifier.weight"].shape[1]
    side = math.isqrt(values // shape["hidden_size"])
    if side**2 * shape["hidden_size"] != values:
        raise ValueError(
            f"The classifier reads {values} values of {shape['hidden_size']} channels, which are no square maps. Pass "
            "`image_size=(height, width)`."
        )
    if shape["pooling"] == "none":
        return side - extra
    smallest = side * 2 ** shape["depth"] - extra
    if extra:
        largest = (side + 1) * 2 ** shape["depth"] - 1 - extra
        logger.warning(
            f"These weights fit grey images of {smallest} to {largest} pixels and do not tell which; {smallest} are "
            "taken, as official ones have. Pass `image_size` for others: the model refuses images of another size."
        )
    return smallest


__all__ = ["convert_convnet_checkpoint", "to_official"]
