"""The losses of DyVM: how many tokens and scans to keep, and staying close to a teacher. All in float32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_dyvm import DyVMConfig
from .token_reduction import take_rows
from .token_selection import patch_rows


def patch_features(last_hidden_state: Tensor, cls_token_index: Tensor) -> Tensor:
    """
    Patch tokens without the class token(s).

    Args:
        last_hidden_state (`Tensor` of shape `(batch, tokens, hidden_size)`): All tokens.
        cls_token_index (`Tensor` of shape `(batch, class tokens)`): Rows of the class token(s).

    Returns:
        `Tensor` of shape `(batch, patches, hidden_size)`: In their order.
    """
    patches = last_hidden_state.shape[1] - cls_token_index.shape[1]
    return take_rows(last_hidden_state, patch_rows(cls_token_index, patches))


def token_ratio_loss(token_decisions: tuple[Tensor, ...], keep_ratios: list[float | int]) -> Tensor:
    """
    Squared distance between the share of tokens that each image keeps and the share wanted, mean over the stages.

    Args:
        token_decisions (`tuple[Tensor, ...]`): Per stage `(batch, patches)` 0 or 1 for every original patch.
        keep_ratios (`list[float]`): Per stage the share wanted.

    Returns:
        `Tensor` of shape `()`
    """
    stages = zip(token_decisions, keep_ratios, strict=True)
    return torch.stack([(kept.float().mean(1) - ratio).square().mean() for kept, ratio in stages]).mean()


def block_ratio_loss(block_gates: Tensor, keep_ratio: float | int) -> Tensor:
    """
    Squared distance between the share of scans that run, over the batch, and the share wanted.

    Args:
        block_gates (`Tensor` of shape `(batch, blocks, 2)`): The gates.
        keep_ratio (`float`): The share wanted.

    Returns:
        `Tensor` of shape `()`
    """
    return (block_gates.float().mean() - keep_ratio).square()


def logit_distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """
    Kullback-Leibler divergence of the teacher from the student, mean over the batch.

    Args:
        logits (`Tensor` of shape `(batch, num_labels)`): Of the student.
        teacher_logits (`Tensor` of shape `(batch, num_labels)`): Of the teacher.

    Returns:
        `Tensor` of shape `()`
    """
    student, teacher = (F.log_softmax(scores.float(), dim=-1) for scores in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def token_distillation_loss(
    features: Tensor, teacher_features: Tensor, positions: Tensor, policy: Tensor | None = None
) -> Tensor:
    """
    Mean squared distance of kept tokens to the teacher's at the same place of the image; 0 if none is kept.

    Args:
        features (`Tensor` of shape `(batch, patches, hidden_size)`): Patch tokens of the student, in its order.
        teacher_features (`Tensor` of shape `(batch, original patches, hidden_size)`): Those of the teacher.
        positions (`Tensor` of shape `(batch, patches)`): Original patch of every token of the student.
        policy (`Tensor` of shape `(batch, patches)`, *optional*): 1 for kept tokens; all are without it.

    Returns:
        `Tensor` of shape `()`
    """
    distance = (features.float() - take_rows(teacher_features, positions).float()).square().mean(-1)
    if policy is None:
        return distance.mean()
    kept = (policy.detach() > 0.5).float()
    return (distance * kept).sum() / kept.sum().clamp(min=1)


def ratio_losses(outputs: Any, config: DyVMConfig) -> dict[str, Tensor]:
    """
    The weighted ratio losses of a forward pass in training.

    Args:
        outputs ([`DyVMModelOutput`] or [`DyVMImageClassifierOutput`]): Of the student.
        config ([`DyVMConfig`]): Targets and weights.

    Returns:
        `dict[str, Tensor]`: `token_ratio` and `block_ratio`, each if its mechanism is on.
    """
    losses = {}
    if outputs.token_decisions is not None:
        token_loss = token_ratio_loss(outputs.token_decisions, config.keep_ratios)
        losses["token_ratio"] = config.token_ratio_loss_weight * token_loss
    if outputs.block_gates is not None:
        block_loss = block_ratio_loss(outputs.block_gates, config.block_keep_ratio)
        losses["block_ratio"] = config.block_ratio_loss_weight * block_loss
    return losses


def distillation_losses(
    outputs: Any, teacher_logits: Tensor, teacher_features: Tensor, config: DyVMConfig
) -> dict[str, Tensor]:
    """
    The weighted distillation losses of a forward pass.

    Args:
        outputs ([`DyVMImageClassifierOutput`]): Of the student.
        teacher_logits (`Tensor` of shape `(batch, num_labels)`): Of the teacher.
        teacher_features (`Tensor` of shape `(batch, patches, hidden_size)`):
            Its normalised patch tokens at the end, see [`patch_features`].
        config ([`DyVMConfig`]): The weight.

    Returns:
        `dict[str, Tensor]`: `distill_logits` and `distill_tokens`.
    """
    features = patch_features(outputs.last_hidden_state, outputs.cls_token_index)
    token_loss = token_distillation_loss(features, teacher_features, outputs.token_positions, outputs.token_policy)
    return {
        "distill_logits": config.distillation_weight * logit_distillation_loss(outputs.logits, teacher_logits),
        "distill_tokens": config.distillation_weight * token_loss,
    }


__all__ = [
    "block_ratio_loss",
    "distillation_losses",
    "logit_distillation_loss",
    "patch_features",
    "ratio_losses",
    "token_distillation_loss",
    "token_ratio_loss",
]
