"""The plain convolutional classifier that dataset distillation is measured with."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from .configuration_convnet import PROBLEM_TYPES, ConvNetConfig


try:
    from hf_effml.utils.model_kinds import NamesWhatFails
except ImportError:  # a saved folder where the package is not installed

    class NamesWhatFails:  # type: ignore[no-redef]
        """Adds nothing."""


# None of them works in place: gradients of gradients need what they were given.
_ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "sigmoid": nn.Sigmoid}
_POOLINGS = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


def _norm(config: ConvNetConfig, map_size: tuple[int, int]) -> list[nn.Module]:
    width = config.hidden_size
    if config.norm == "instance":
        return [nn.GroupNorm(width, width)]
    if config.norm == "group":
        return [nn.GroupNorm(4, width)]
    if config.norm == "batch":
        return [nn.BatchNorm2d(width)]
    if config.norm == "layer":
        return [nn.LayerNorm([width, *map_size])]
    return []


def _block(config: ConvNetConfig, index: int) -> list[nn.Module]:
    """Convolution, normalisation, activation, pooling."""
    channels = config.hidden_size if index else config.num_channels
    padding = 3 if channels == 1 and index == 0 else 1
    pool = _POOLINGS.get(config.pooling)
    return [
        nn.Conv2d(channels, config.hidden_size, kernel_size=3, padding=padding),
        *_norm(config, config.map_sizes[index]),
        _ACTIVATIONS[config.activation](),
        *([] if pool is None else [pool(kernel_size=2, stride=2)]),
    ]


class ConvNetForImageClassification(NamesWhatFails, PreTrainedModel):
    r"""The ConvNet of trajectory matching (https://huggingface.co/papers/2203.11932), for any image size.

    It is `depth` blocks of convolution, normalisation, activation and pooling, then one linear layer on the flattened
    map.

    Parameters carry the official names, `features.0.weight` to `classifier.bias`.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml import ConvNetConfig, ConvNetForImageClassification

    >>> model = ConvNetForImageClassification(ConvNetConfig(num_labels=10))
    >>> model(torch.zeros(2, 3, 32, 32)).logits.shape, model.num_parameters()
    (torch.Size([2, 10]), 320010)

    ```
    """

    config_class = ConvNetConfig
    base_model_prefix = "convnet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False

    def __init__(self, config: ConvNetConfig):
        # Fields may have been assigned since it was made, as `from_pretrained` does.
        config.validate()
        super().__init__(config)
        blocks = [_block(config, index) for index in range(config.depth)]
        self.features = nn.Sequential(*(layer for block in blocks for layer in block))
        self.classifier = nn.Linear(config.hidden_size * math.prod(config.feature_size), config.num_labels)
        self._block_length = len(blocks[0])
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values as torch itself draws them, on which published trajectories start."""
        super()._init_weights(module)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention | tuple:
        """Classifies images.

        Args:
            pixel_values (`Tensor` of shape `(batch, channels, height, width)`):
                Preprocessed images.
            labels (`Tensor`, *optional*):
                Class numbers `(batch,)`, or soft targets `(batch, num_labels)` that add up to 1; with another
                `config.problem_type`, 0 and 1 of shape `(batch, num_labels)`, or numbers for a regression.
            output_hidden_states (`bool`, *optional*):
                Also return the feature map after every block.
            return_dict (`bool`, *optional*):
                `False` returns a tuple.

        Returns:
            `ImageClassifierOutputWithNoAttention`: loss (with `labels`), logits and, if asked for, feature maps.

        Raises:
            ValueError: If images or labels have the wrong shape, or labels are none of the model's.
        """
        self._check(pixel_values)
        hidden = pixel_values.to(self.features[0].weight.dtype)
        maps = []
        for index, layer in enumerate(self.features, start=1):
            hidden = layer(hidden)
            if index % self._block_length == 0:
                maps.append(hidden)
        logits = self.classifier(hidden.flatten(1))
        wants_maps = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else _classification_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=tuple(maps) if wants_maps else None,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _check(self, pixel_values: Tensor) -> None:
        wanted = (self.config.num_channels, *self.config.image_shape)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != wanted:
            raise ValueError(
                f"`pixel_values` must have the shape (batch, {', '.join(map(str, wanted))}); got "
                f"{tuple(pixel_values.shape)}. Resize the images, or build the model for their `image_size` and "
                "`num_channels`."
            )


def _problem_type_of(config: Any) -> str:
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


def _classification_loss(logits: Tensor, labels: Tensor, config: Any, label_smoothing: float = 0.0) -> Tensor:
    """The twin of `hf_effml/vim/classification_loss.py`: a saved folder carries files of one folder only."""
    problem, logits = _problem_type_of(config), logits.float()
    _check_shape(logits, labels, problem)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        _check_values(logits, labels, problem)
    if problem == "regression":
        return F.mse_loss(logits, labels.float().view_as(logits))
    if problem == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    labels = labels if labels.is_floating_point() else labels.long()
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def _check_shape(logits: Tensor, labels: Tensor, problem: str) -> None:
    if problem not in PROBLEM_TYPES:
        raise ValueError(f"`problem_type` must be one of {', '.join(PROBLEM_TYPES)}; got {problem!r}.")
    batch, classes = logits.shape
    single = problem == "single_label_classification"
    table = not single or labels.is_floating_point()
    short = (not table) if single else (problem == "regression" and classes == 1 and labels.dim() == 1)
    wanted = (batch,) if short else (batch, classes)
    if tuple(labels.shape) != wanted:
        what = "soft targets" if single and table else "labels"
        raise ValueError(
            f"`labels` of a model of {classes} labels and `problem_type` {problem!r} are {what} of shape {wanted}; "
            f"got {tuple(labels.shape)} of {labels.dtype}. Pass class numbers as integers of shape {(batch,)}, or set "
            "another `problem_type`."
        )


def _check_values(logits: Tensor, labels: Tensor, problem: str) -> None:
    classes = logits.shape[1]
    if problem == "regression":
        right, what = labels.isfinite(), "a number that is not finite"
        remedy = "Leave such images out."
    elif problem == "multi_label_classification":
        right, what = (labels >= 0) & (labels <= 1), "what is neither 0 nor 1"
        remedy = 'Pass 1 for every label that an image has, or set `problem_type="regression"`.'
    elif labels.is_floating_point():
        right, what = (labels.sum(1) - 1).abs() < 0.02, "soft targets that do not add up to 1"
        remedy = 'For several labels at once set `problem_type="multi_label_classification"`.'
    else:
        if (labels == -100).all():
            raise ValueError(f"`labels` hold no class: all {len(labels)} are -100, or there are none. Leave them out.")
        right = (labels >= 0) & (labels < classes) | (labels == -100)
        what = f"a class outside 0 to {classes - 1}"
        remedy = (
            f"`num_labels` of the model is {classes}. Load it with those of the data, "
            "`from_pretrained(..., num_labels=N, ignore_mismatched_sizes=True)`; -100 marks an image without a class."
        )
    if not right.all():
        raise ValueError(f"`labels` hold {what}: {labels[~right][0].tolist()}. {remedy}")


__all__ = ["ConvNetForImageClassification"]
