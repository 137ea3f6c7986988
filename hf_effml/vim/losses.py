"""What R-MeeTo and DyVM minimise beside the cross-entropy. All in float32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .classification_loss import problem_type_of
from .configuration_dyvm import DyVMConfig
from .token_reduction import take_rows
from .token_selection import patch_rows


def logit_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    problem_type: str = "single_label_classification",
) -> Tensor:
    """How far classes are from a teacher's, of R-MeeTo and DyVM alike: the Kullback-Leibler divergence per image.

    Of several labels at once, which the papers do not have, it is the mean of the labels' own divergences, and of a
    regression the mean squared distance: on the scale of the loss from labels.

    Args:
        logits (`Tensor` of shape `(batch, num_labels)`):
            Scores of the model in training.
        teacher_logits (`Tensor` of shape `(batch, num_labels)`):
            Scores of the teacher.
        temperature (`float`, *optional*, defaults to 1.0):
            Divides both scores; the result is multiplied by its square, so that gradients keep their size. A
            regression has none.
        problem_type (`str`, *optional*, defaults to `"single_label_classification"`):
            What the scores are of, see [`~hf_effml.vim.classification_loss.problem_type_of`].

    Returns:
        `Tensor` of shape `()`
    """
    if problem_type == "regression":
        return F.mse_loss(logits.float(), teacher_logits.float())
    if problem_type == "multi_label_classification":
        # A label is a choice between two classes, of which the other has the score 0.
        logits, teacher_logits = (
            torch.stack([s, torch.zeros_like(s)], -1).view(-1, 2) for s in (logits, teacher_logits)
        )
    student, teacher = (F.log_softmax(scores.float() / temperature, dim=-1) for scores in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def dyvm_patch_features(last_hidden_state: Tensor, cls_token_index: Tensor) -> Tensor:
    """Patch tokens without the class token(s).

    Args:
        last_hidden_state (`Tensor` of shape `(batch, tokens, hidden_size)`):
            All tokens.
        cls_token_index (`Tensor` of shape `(batch, class tokens)`):
            Rows of the class token(s).

    Returns:
        `Tensor` of shape `(batch, patches, hidden_size)`: In their order.
    """
    patches = last_hidden_state.shape[1] - cls_token_index.shape[1]
    return take_rows(last_hidden_state, patch_rows(cls_token_index, patches))


def dyvm_token_ratio_loss(token_decisions: tuple[Tensor, ...], keep_ratios: list[float | int]) -> Tensor:
    """Squared distance between the share of tokens that each image keeps and the share wanted, mean over the stages.

    Args:
        token_decisions (`tuple[Tensor, ...]`):
            Per stage `(batch, patches)` 0 or 1 for every original patch.
        keep_ratios (`list[float]`):
            Per stage the share wanted.

    Returns:
        `Tensor` of shape `()`
    """
    stages = zip(token_decisions, keep_ratios, strict=True)
    return torch.stack([(kept.float().mean(1) - ratio).square().mean() for kept, ratio in stages]).mean()


def dyvm_block_ratio_loss(block_gates: Tensor, keep_ratio: float | int) -> Tensor:
    """Squared distance between the share of scans that run, over the batch, and the share wanted.

    Args:
        block_gates (`Tensor` of shape `(batch, blocks, 2)`):
            The gates.
        keep_ratio (`float`):
            The share wanted.

    Returns:
        `Tensor` of shape `()`
    """
    return (block_gates.float().mean() - keep_ratio).square()


def dyvm_token_distillation_loss(
    features: Tensor, teacher_features: Tensor, positions: Tensor, policy: Tensor | None = None
) -> Tensor:
    """Mean squared distance of kept tokens to the teacher's at the same place of the image; 0 if none is kept.

    Args:
        features (`Tensor` of shape `(batch, patches, hidden_size)`):
            Patch tokens of the student, in its order.
        teacher_features (`Tensor` of shape `(batch, original patches, hidden_size)`):
            Those of the teacher.
        positions (`Tensor` of shape `(batch, patches)`):
            Original patch of every token of the student.
        policy (`Tensor` of shape `(batch, patches)`, *optional*):
            1 for kept tokens; all are without it.

    Returns:
        `Tensor` of shape `()`
    """
    distance = (features.float() - take_rows(teacher_features, positions).float()).square().mean(-1)
    if policy is None:
        return distance.mean()
    kept = (policy.detach() > 0.5).float()
    return (distance * kept).sum() / kept.sum().clamp(min=1)


def dyvm_ratio_losses(outputs: Any, config: DyVMConfig) -> dict[str, Tensor]:
    """The weighted ratio losses of a forward pass in training.

    Args:
        outputs ([`DyVMModelOutput`] or [`DyVMImageClassifierOutput`]):
            Of the student.
        config ([`DyVMConfig`]):
            Targets and weights.

    Returns:
        `dict[str, Tensor]`: `token_ratio` and `block_ratio`, each if its mechanism is on.
    """
    losses = {}
    if outputs.token_decisions is not None:
        token_loss = dyvm_token_ratio_loss(outputs.token_decisions, config.keep_ratios)
        losses["token_ratio"] = config.token_ratio_loss_weight * token_loss
    if outputs.block_gates is not None:
        block_loss = dyvm_block_ratio_loss(outputs.block_gates, config.block_keep_ratio)
        losses["block_ratio"] = config.block_ratio_loss_weight * block_loss
    return losses


def dyvm_distillation_losses(
    outputs: Any, teacher_logits: Tensor, teacher_features: Tensor, config: DyVMConfig
) -> dict[str, Tensor]:
    """The weighted distillation losses of a forward pass.

    Args:
        outputs ([`DyVMImageClassifierOutput`]):
            Of the student.
        teacher_logits (`Tensor` of shape `(batch, num_labels)`):
            Of the teacher.
        teacher_features (`Tensor` of shape `(batch, patches, hidden_size)`):
            Its normalised patch tokens at the end, see [`dyvm_patch_features`].
        config ([`DyVMConfig`]):
            The weight.

    Returns:
        `dict[str, Tensor]`: `distill_logits` and `distill_tokens`.
    """
    divergence = logit_divergence(outputs.logits, teacher_logits, problem_type=problem_type_of(config))
    features = dyvm_patch_features(outputs.last_hidden_state, outputs.cls_token_index)
    token_loss = dyvm_token_distillation_loss(
        features, teacher_features, outputs.token_positions, outputs.token_policy
    )
    return {
        "distill_logits": config.distillation_weight * divergence,
        "distill_tokens": config.distillation_weight * token_loss,
    }


__all__ = [
    "dyvm_block_ratio_loss",
    "dyvm_distillation_losses",
    "dyvm_patch_features",
    "dyvm_ratio_losses",
    "dyvm_token_distillation_loss",
    "dyvm_token_ratio_loss",
    "logit_divergence",
]
