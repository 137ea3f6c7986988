"""Configuration of Vision Mamba (Vim)."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin


try:
    from hf_effml.utils.model_kinds import read_config_dict
except ImportError:  # a saved folder, which brings its own kind, where the package is not installed

    def read_config_dict(read: Any, wanted: Any, *args: Any, **options: Any) -> Any:  # type: ignore[misc]
        """Reads a configuration as it is."""
        return read(*args, **options)


PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
# The largest sizes, far above any Vim: what is larger is a slip, and would fill the memory before it failed.
_LARGEST = {
    "patch_size": 2**12,
    "patch_stride": 2**12,
    "num_channels": 2**12,
    "hidden_size": 2**16,
    "num_hidden_layers": 2**12,
    "state_size": 2**12,
    "conv_kernel": 2**12,
    "expand": 2**8,
    "time_step_rank": 2**16,
}
_LARGEST_IMAGE, _MOST_LABELS, _MOST_WEIGHTS = 2**15, 2**20, 10**10
# Their weights are those of a Vim, and more: each loads from the folders of the others.
_KINDS = ("vim", "rmeeto_vim", "dyvm")


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
class VimConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of [`VimModel`] and its heads.

    The defaults give Vim-tiny of "Vision Mamba" (https://huggingface.co/papers/2401.09417); `hidden_size` 384 and 768
    give small and base.

    Args:
        image_size (`int` or `list[int]`, *optional*, defaults to 224):
            Height and width in pixels, or one number for both.
        patch_size (`int`, *optional*, defaults to 16):
            Side of a patch in pixels.
        patch_stride (`int`, *optional*, defaults to `patch_size`):
            Step between patches. A smaller one overlaps them: the "+" models use 8, four times the tokens.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the image.
        hidden_size (`int`, *optional*, defaults to 192):
            Width of the residual stream.
        num_hidden_layers (`int`, *optional*, defaults to 24):
            Number of blocks.
        state_size (`int`, *optional*, defaults to 16):
            States per channel of the scan; time and memory of the scan grow with it.
        conv_kernel (`int`, *optional*, defaults to 4):
            Length of the depthwise convolution before the scan.
        expand (`int`, *optional*, defaults to 2):
            Inner width of the mixer over `hidden_size`.
        time_step_rank (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Rank of the step-size projection; `"auto"` is `ceil(hidden_size / 16)`.
        time_step_min (`float`, *optional*, defaults to 0.001):
            Smallest initial step size.
        time_step_max (`float`, *optional*, defaults to 0.1):
            Largest initial step size.
        time_step_floor (`float`, *optional*, defaults to 1e-4):
            Lower clamp of the initial step size.
        time_step_scale (`float`, *optional*, defaults to 1.0):
            Scale of the initial step-size projection.
        time_step_init_scheme (`"random"` or `"constant"`, *optional*, defaults to `"random"`):
            How that projection starts.
        use_conv_bias (`bool`, *optional*, defaults to `True`):
            Whether the convolutions have a bias.
        use_bias (`bool`, *optional*, defaults to `False`):
            Whether the input and output projections have a bias.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the RMS norms.
        residual_in_fp32 (`bool`, *optional*, defaults to `True`):
            Keep the residual stream in float32 in half-precision models.
        cls_token_position (`str`, *optional*, defaults to `"middle"`):
            `"middle"` (all published weights), `"head"`, `"double"` (one at each end) or `"none"`.
        pooling (`str`, *optional*, defaults to `"cls"`):
            `"cls"` reads the class token(s); `"mean"` or `"last"` over the patches are for models without class token.
        divide_output (`bool`, *optional*, defaults to `True`):
            Halve the sum of the two directions, as all published weights do.
        layer_scale_init_value (`float`, *optional*):
            Initial value of a learned scale on every mixer's output; none if unset.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after the position embedding.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth of the last block; it grows linearly from 0.
        use_abs_pos_embed (`bool`, *optional*, defaults to `True`):
            Whether to add a learned position embedding.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of class token, positions and classifier.
        symmetric_dt_init (`bool`, *optional*, defaults to `False`):
            Initialise the backward direction's step sizes like the forward ones. The original leaves their bias at
            zero, a quirk kept by default for parity.
        problem_type (`str`, *optional*):
            `"single_label_classification"`, `"multi_label_classification"` or `"regression"`: which loss a classifier
            has. Without one, `num_labels` of 1 is a regression and more are classes of which an image has one.
        out_features, out_indices:
            Stages that [`VimBackbone`] returns, of `"stem"`, `"stage1"`, ... ; the last by
        default.

    Raises:
        StrictDataclassError: If a field has the wrong type or an impossible value; the message names both.

    Example:

    ```python
    >>> from hf_effml import VimConfig
    >>> VimConfig(hidden_size=384).intermediate_size
    768

    ```
    """

    model_type = "vim"

    image_size: int | list[int] | tuple[int, ...] = 224
    patch_size: int = 16
    patch_stride: int | None = None
    num_channels: int = 3
    hidden_size: int = 192
    num_hidden_layers: int = 24
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    time_step_rank: int | Literal["auto"] = "auto"
    time_step_min: float | int = 0.001
    time_step_max: float | int = 0.1
    time_step_floor: float | int = 1e-4
    time_step_scale: float | int = 1.0
    time_step_init_scheme: Literal["random", "constant"] = "random"
    use_conv_bias: bool = True
    use_bias: bool = False
    layer_norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    cls_token_position: Literal["middle", "head", "double", "none"] = "middle"
    pooling: Literal["cls", "mean", "last"] = "cls"
    divide_output: bool = True
    layer_scale_init_value: float | int | None = None
    hidden_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    use_abs_pos_embed: bool = True
    initializer_range: float | int = 0.02
    symmetric_dt_init: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.patch_stride = self.patch_size if self.patch_stride is None else self.patch_stride
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        check_classes(self.id2label, kwargs.get("num_labels"))
        # A depth that is refused below needs no names.
        depth = min(self.num_hidden_layers, _LARGEST["num_hidden_layers"])
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, depth + 1)]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a saved configuration; that of a model which is no Vim is refused."""
        return read_config_dict(super().get_config_dict, _KINDS, *args, **kwargs)

    def validate_architecture(self) -> None:
        """Check ranges and combinations; called by `strict` on construction, and where a model is made."""
        for name, largest in _LARGEST.items():
            if not 1 <= getattr(self, name) <= largest:
                raise ValueError(f"`{name}` must be from 1 to {largest}; got {getattr(self, name)}.")
        self._check_numbers()
        for name in ("hidden_dropout_prob", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1); got {getattr(self, name)}.")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"`problem_type` must be one of {', '.join(PROBLEM_TYPES)}; got {self.problem_type!r}.")
        size = self.image_size
        if not isinstance(size, int) and len(size) != 2:
            raise ValueError(f"`image_size` must be one number or [height, width]; got {size}.")
        if max(self._image_shape) > _LARGEST_IMAGE:
            raise ValueError(f"`image_size` must be at most {_LARGEST_IMAGE}; got {size}.")
        if min(self._image_shape) < self.patch_size:
            raise ValueError(
                f"`image_size` {size} is smaller than `patch_size` {self.patch_size}. Use smaller patches."
            )
        if self.pooling == "cls" and self.cls_token_position == "none":
            raise ValueError('`pooling="cls"` needs a class token; set `pooling` to "mean" or "last", or add one.')
        if self.pooling != "cls" and self.cls_token_position != "none":
            raise ValueError(
                f"`pooling={self.pooling!r}` is for models without class token; got "
                f'`cls_token_position={self.cls_token_position!r}`. Use `pooling="cls"`.'
            )

        if self._weights > _MOST_WEIGHTS:
            raise ValueError(
                f"`hidden_size` {self.hidden_size}, `num_hidden_layers` {self.num_hidden_layers}, `expand` "
                f"{self.expand}, `state_size` {self.state_size} and `image_size` {size} make a model of "
                f"{self._weights:.2g} weights, of at most {_MOST_WEIGHTS:.0e}. Make them smaller."
            )

    def _check_numbers(self) -> None:
        for name in ("time_step_max", "time_step_scale", "layer_scale_init_value"):
            if not math.isfinite(getattr(self, name) or 0):
                raise ValueError(f"`{name}` must be finite; got {getattr(self, name)}.")
        for name in ("layer_norm_eps", "time_step_floor", "initializer_range"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive and finite; got {value}.")
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"`time_step_min` must be positive and at most `time_step_max`; got {self.time_step_min} and "
                f"{self.time_step_max}."
            )

    @property
    def _weights(self) -> int:
        """How many there are, apart from biases and vectors."""
        width, inner, rank = self.hidden_size, self.intermediate_size, int(self.time_step_rank)
        direction = inner * (self.conv_kernel + 2 * rank + 3 * self.state_size)
        outside = self.num_channels * self.patch_size**2 + self.num_patches + self.num_labels
        return self.num_hidden_layers * (3 * width * inner + 2 * direction) + width * outside

    @property
    def _image_shape(self) -> tuple[int, int]:
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        stride = self.patch_stride or self.patch_size
        height, width = ((side - self.patch_size) // stride + 1 for side in self._image_shape)
        return height, width

    @property
    def num_patches(self) -> int:
        """Number of patches of one image."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_class_tokens(self) -> int:
        """0, 1 or 2, by `cls_token_position`."""
        return {"none": 0, "double": 2}.get(self.cls_token_position, 1)

    @property
    def intermediate_size(self) -> int:
        """Inner width of the mixer."""
        return self.expand * self.hidden_size


__all__ = ["PROBLEM_TYPES", "VimConfig", "check_classes"]
