"""The three losses that a router is trained with, as plain functions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def router_distillation_loss(teacher: Tensor, student: Tensor, counted: Tensor) -> Tensor:
    """How far the routed model's predictions are from the dense model's: KL(teacher || student) at temperature 1.

    Args:
        teacher (`Tensor` of shape `(batch, tokens, vocabulary)`):
            Logits of the dense model.
        student (`Tensor` of the same shape):
            Logits of the routed model.
        counted (`Tensor` of shape `(batch, tokens)`):
            `True` where a prediction counts.

    Returns:
        `Tensor`: mean over the predictions that count, in nats.
    """
    teacher, student = (logits[counted].float().log_softmax(-1) for logits in (teacher, student))
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / counted.sum().clamp(min=1)


def router_hidden_state_loss(teacher: Tensor, student: Tensor, counted: Tensor) -> Tensor:
    """How far the routed model's last hidden states are from the dense model's.

    Args:
        teacher (`Tensor` of shape `(batch, tokens, channels)`):
            States of the dense model.
        student (`Tensor` of the same shape):
            States of the routed model.
        counted (`Tensor` of shape `(batch, tokens)`):
            `True` where a state counts.

    Returns:
        `Tensor`: mean squared difference over the states that count, and over their channels.
    """
    return F.mse_loss(student[counted].float(), teacher[counted].float())


def router_sparsity_loss(logits: Tensor, real: Tensor, required: Sequence[float], two_sided: bool = False) -> Tensor:
    """How far the share of tokens that the router would skip is from what each block requires.

    The share is counted from hard decisions and has the gradient of the soft ones. A soft share would be satisfied by
    probabilities a little above a half everywhere, with which nothing is skipped.

    Args:
        logits (`Tensor` of shape `(blocks, batch, tokens, 2)`):
            Of the router.
        real (`Tensor` of shape `(batch, tokens)`):
            `True` for tokens that are decided on.
        required (`Sequence[float]`):
            Required sparsity of each block.
        two_sided (`bool`, *optional*, defaults to `False`):
            Also punish more sparsity than required. The paper punishes less only, with which a router that decides by
            threshold skips too much.

    Returns:
        `Tensor`: sum over the blocks.
    """
    soft_skip = logits.softmax(-1)[..., 0]
    hard_skip = (logits[..., 1] <= logits[..., 0]).to(soft_skip)
    skip = hard_skip + soft_skip - soft_skip.detach()
    achieved = (skip * real).flatten(1).sum(-1) / real.sum().clamp(min=1)
    missing = torch.tensor(required, dtype=achieved.dtype, device=achieved.device) - achieved
    return missing.abs().sum() if two_sided else missing.clamp(min=0).sum()


def router_guide_loss(logits: Tensor, static_keep: Tensor, real: Tensor) -> Tensor:
    """How far the router is from the static rule: cross-entropy to its decisions.

    Args:
        logits (`Tensor` of shape `(blocks, batch, tokens, 2)`):
            Of the router.
        static_keep (`Tensor` of shape `(blocks, batch, tokens)`):
            `True` where the static router keeps a token.
        real (`Tensor` of shape `(batch, tokens)`):
            `True` for tokens that are decided on.

    Returns:
        `Tensor`: mean over blocks and tokens.
    """
    counted = real.expand(static_keep.shape)
    return F.cross_entropy(logits[counted].float(), static_keep[counted].long())
