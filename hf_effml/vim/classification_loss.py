"""The loss of an image classifier by the `problem_type` of its configuration, and labels that do not go with it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_vim import PROBLEM_TYPES


def problem_type_of(config: Any) -> str:
    """What a head is trained for.

    Args:
        config (`PreTrainedConfig`):
            Its `problem_type` says so; without one, a single output is a number and several are classes.

    Returns:
        `str`: `"single_label_classification"`, `"multi_label_classification"` or `"regression"`.
    """
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


def classification_loss(logits: Tensor, labels: Tensor, config: Any, label_smoothing: float = 0.0) -> Tensor:
    """The mean loss of a batch: cross-entropy, binary cross-entropy or squared distance, in float32.

    Floating-point labels are soft targets unless `problem_type` says otherwise, which differs from transformers: there
    they mean several labels at once. What labels hold is checked on the CPU; a GPU would have to be waited for.

    Args:
        logits (`Tensor` of shape `(batch, num_labels)`):
            Scores.
        labels (`Tensor`):
            Of one class: numbers `(batch,)`, of which -100 is ignored, or soft targets `(batch, num_labels)` that add
            up to 1. Of several: 0 or 1 `(batch, num_labels)`. Of a regression: numbers of that shape, or `(batch,)`
            for one output.
        config (`PreTrainedConfig`):
            See [`problem_type_of`].
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Share of the target that is spread over all classes, of one class only.

    Returns:
        `Tensor` of shape `()`

    Raises:
        ValueError: If labels have another shape, or hold what no label can be.
    """
    problem, logits = problem_type_of(config), logits.float()
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


__all__ = ["classification_loss", "problem_type_of"]
