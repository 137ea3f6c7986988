"""Configuration of the ConvNet that dataset distillation is measured with."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


try:
    from hf_effml.utils.model_kinds import read_config_dict
except ImportError:  # a saved folder, which brings its own kind, where the package is not installed

    def read_config_dict(read: Any, wanted: Any, *args: Any, **options: Any) -> Any:  # type: ignore[misc]
        """Reads a configuration as it is."""
        return read(*args, **options)


# The largest sizes, far above any ConvNet: what is larger is a slip, and would fill the memory before it failed.
_LARGEST = {"num_channels": 2**12, "hidden_size": 2**16, "depth": 2**10}
_LARGEST_IMAGE, _MOST_LABELS, _MOST_WEIGHTS = 2**15, 2**20, 10**10
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


def check_classes(id2label: Any, num_labels: Any) -> None:
    """Checks how the classes are named or counted, before transformers makes a table of them.

    Args:
        id2label (`dict`, *optional*):
            Their names by number.
        num_labels (`int`, *optional*):
            How many there are.

    Raises:
        ValueError: If either is something else, or far too much.
    """
    if id2label is not None and not (isinstance(id2label, dict) and all(str(key).isdigit() for key in id2label)):
        raise ValueError(f"`id2label` must map class numbers to names; got {str(id2label)[:200]}.")
    if num_labels is not None and (type(num_labels) is not int or not 0 <= num_labels <= _MOST_LABELS):
        raise ValueError(f"`num_labels` must be from 0 to {_MOST_LABELS}; got {num_labels!r}.")


@strict
class ConvNetConfig(PreTrainedConfig):
    r"""Configuration of [`ConvNetForImageClassification`].

    The defaults give the "ConvNetD3" of trajectory matching (https://huggingface.co/papers/2203.11932); images of 64
    and 128 pixels go with `depth` 4 and 5.

    Args:
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the image. With one channel the first convolution pads by 3, so 28 pixels count as 32.
        image_size (`int` or `list[int]`, *optional*, defaults to 32):
            Height and width in pixels, or one number for both. The classifier is sized by it.
        hidden_size (`int`, *optional*, defaults to 128):
            Channels of every block.
        depth (`int`, *optional*, defaults to 3):
            Number of blocks; each halves the image unless `pooling="none"`.
        norm (`str`, *optional*, defaults to `"instance"`):
            `"instance"`, `"batch"`, `"layer"`, `"group"` (4 groups) or `"none"`. Only `"batch"` keeps running
            statistics, which trajectories do not hold.
        activation (`str`, *optional*, defaults to `"relu"`):
            `"relu"`, `"leaky_relu"` or `"sigmoid"`.
        pooling (`str`, *optional*, defaults to `"avg"`):
            `"avg"`, `"max"` or `"none"`.
        problem_type (`str`, *optional*):
            `"single_label_classification"`, `"multi_label_classification"` or `"regression"`: which loss the model
            has. Without one, `num_labels` of 1 is a regression. Distillation is of single labels only.

    Raises:
        StrictDataclassError: If a field has the wrong type or an impossible value; the message names both.

    Example:

    ```python
    >>> from hf_effml import ConvNetConfig

    >>> ConvNetConfig(image_size=64, depth=4).feature_size
    (4, 4)

    ```
    """

    model_type = "convnet"

    num_channels: int = 3
    image_size: int | list[int] | tuple[int, ...] = 32
    hidden_size: int = 128
    depth: int = 3
    norm: Literal["instance", "batch", "layer", "group", "none"] = "instance"
    activation: Literal["relu", "leaky_relu", "sigmoid"] = "relu"
    pooling: Literal["avg", "max", "none"] = "avg"

    def __post_init__(self, **kwargs: Any) -> None:
        check_classes(self.id2label, kwargs.get("num_labels"))
        if isinstance(self.image_size, tuple):
            self.image_size = list(self.image_size)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a saved configuration; that of another kind of model is refused."""
        return read_config_dict(super().get_config_dict, cls.model_type, *args, **kwargs)

    def validate_architecture(self) -> None:
        """Check ranges and combinations; called by `strict` on construction, and where a model is made."""
        for name, largest in _LARGEST.items():
            if not 1 <= getattr(self, name) <= largest:
                raise ValueError(f"`{name}` must be from 1 to {largest}; got {getattr(self, name)}.")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"`problem_type` must be one of {', '.join(PROBLEM_TYPES)}; got {self.problem_type!r}.")
        size = self.image_size
        if not isinstance(size, int) and len(size) != 2:
            raise ValueError(f"`image_size` must be one number or [height, width]; got {size}.")
        if not 1 <= min(self.image_shape) <= max(self.image_shape) <= _LARGEST_IMAGE:
            raise ValueError(f"`image_size` must be from 1 to {_LARGEST_IMAGE}; got {size}.")
        if self.norm == "group" and self.hidden_size % 4:
            raise ValueError(
                f'`hidden_size` must be a multiple of 4 with `norm="group"`, which has 4 groups; got '
                f'{self.hidden_size}. Change it or use `norm="instance"`.'
            )
        if min(self.feature_size) < 1:
            deepest = min(self.map_sizes[0]).bit_length() - 1
            advice = f"Use `depth` {deepest} or less" if deepest else "Use larger images"
            raise ValueError(
                f"`image_size` {size} is too small for `depth` {self.depth}: every block halves the image and nothing "
                f'is left. {advice}, or `pooling="none"`.'
            )

        convolutions = 9 * self.hidden_size * (self.num_channels + (self.depth - 1) * self.hidden_size)
        weights = convolutions + self.hidden_size * math.prod(self.feature_size) * self.num_labels
        if weights > _MOST_WEIGHTS:
            raise ValueError(
                f"`hidden_size` {self.hidden_size}, `depth` {self.depth}, `image_size` {size} and `num_labels` "
                f"{self.num_labels} make a model of {weights:.2g} weights, of at most {_MOST_WEIGHTS:.0e}. Make them "
                "smaller."
            )

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the image."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def map_sizes(self) -> list[tuple[int, int]]:
        """Height and width of the feature map inside every block, before it is pooled."""
        # The first convolution of one channel pads by 2 pixels more on every side than it takes away.
        height, width = (side + 4 if self.num_channels == 1 else side for side in self.image_shape)
        shift = 0 if self.pooling == "none" else 1
        return [(height >> shift * block, width >> shift * block) for block in range(self.depth)]

    @property
    def feature_size(self) -> tuple[int, int]:
        """Height and width of the last feature map, which the classifier reads."""
        height, width = self.map_sizes[-1]
        return (height, width) if self.pooling == "none" else (height // 2, width // 2)


__all__ = ["PROBLEM_TYPES", "ConvNetConfig", "check_classes"]
