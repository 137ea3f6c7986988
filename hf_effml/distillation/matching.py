"""The loss of trajectory matching, on all parameters or on a part of them, with its exact gradient."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .differentiable_augmentation import AugmentationSettings
from .unroll import InnerProblem, StudentDerivatives, SyntheticGradients, adjoint_sweep, plan_steps, unroll


__all__ = ["MatchedSegment", "MatchingSettings", "kept_entries", "match_segment", "match_segments", "matching_loss"]


@dataclass(frozen=True)
class MatchingSettings:
    """How a student's training on the synthetic set is compared with an expert's training on real images.

    Args:
        syn_steps (`int`, *optional*, defaults to 80):
            Steps that the student takes on the synthetic images.
        batch_syn (`int`, *optional*):
            Synthetic images in a step. All of them if unset.
        mask (`"none"`, `"depth"` or `"loss"`, *optional*, defaults to `"none"`):
            Which parameters the loss leaves out: none; the first ones, which are the shallow layers (PAD); or those
            whose error is smallest (EDF).
        drop_ratio (`float`, *optional*, defaults to 0.0):
            Share of the parameters that is left out, from 0 to below 1.
        gradient_mode (`"exact"` or `"first_order"`, *optional*, defaults to `"exact"`):
            `"first_order"` is TESLA's approximation: a quarter cheaper, and further from the gradient with every step.
        loss_threshold (`float`, *optional*, defaults to 1.0):
            A segment whose loss is larger than this contributes nothing.
        augmentation (`AugmentationSettings`, *optional*):
            How the synthetic images are changed in every step.
    """

    syn_steps: int = 80
    batch_syn: int | None = None
    mask: Literal["none", "depth", "loss"] = "none"
    drop_ratio: float = 0.0
    gradient_mode: Literal["exact", "first_order"] = "exact"
    loss_threshold: float = 1.0
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)

    def __post_init__(self) -> None:
        if self.syn_steps < 0:
            raise ValueError(f"`syn_steps` must be at least 0; got {self.syn_steps}.")
        if self.batch_syn is not None and self.batch_syn < 1:
            raise ValueError(
                f"`batch_syn` must be at least 1; got {self.batch_syn}. Leave it out for all images in every step."
            )
        if self.mask not in ("none", "depth", "loss"):
            raise ValueError(f'`mask` must be "none", "depth" or "loss"; got "{self.mask}".')
        if not 0 <= self.drop_ratio < 1:
            raise ValueError(
                f"`drop_ratio` must be from 0 to below 1; got {self.drop_ratio}. At 1 nothing would be left to match."
            )
        if self.mask == "none" and self.drop_ratio:
            raise ValueError(
                f'`drop_ratio` is {self.drop_ratio}, but `mask` is "none". Choose "depth" (PAD) or "loss" (EDF), or '
                "set `drop_ratio` to 0."
            )
        if self.gradient_mode not in ("exact", "first_order"):
            raise ValueError(f'`gradient_mode` must be "exact" or "first_order"; got "{self.gradient_mode}".')

    def problem(
        self, derivatives: StudentDerivatives, images: Tensor, labels: Tensor, lr: Tensor, start: Tensor, seed: int
    ) -> InnerProblem:
        """Plans the student's training on a synthetic set.

        Args:
            derivatives, images, labels, lr, start:
                As in [`~hf_effml.distillation.unroll.InnerProblem`].
            seed (`int`):
                Seed of batches and augmentation.

        Returns:
            [`~hf_effml.distillation.unroll.InnerProblem`]
        """
        plan = plan_steps(
            len(images),
            images.shape[2:],
            steps=self.syn_steps,
            batch_size=self.batch_syn,
            augmentation=self.augmentation,
            seed=seed,
            device=images.device,
        )
        return InnerProblem(derivatives, images, labels, lr, start, plan, self.augmentation)


class MatchedSegment(NamedTuple):
    """The loss of one segment and, if it was wanted and the loss was fit for it, the gradients."""

    loss: Tensor
    gradients: SyntheticGradients | None


def kept_entries(errors: Tensor, mask: str, drop_ratio: float) -> Tensor | None:
    """Says which entries of the parameters take part in the loss.

    Args:
        errors (`Tensor` of shape `(parameters,)`):
            Squared errors of the student's parameters.
        mask (`"none"`, `"depth"` or `"loss"`):
            As in [`MatchingSettings`]. `"depth"` drops the first entries
            (PAD, https://huggingface.co/papers/2408.03360), `"loss"` those of least error
            (EDF, https://huggingface.co/papers/2410.17193).
        drop_ratio (`float`):
            Share to drop; the number is rounded down.

    Returns:
        `Tensor` or `None`: a mask, 1 where an entry is kept; `None` if all are.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.distillation.matching import kept_entries

    >>> kept_entries(torch.tensor([4.0, 1.0, 9.0, 0.0]), "loss", 0.5)
    tensor([1., 0., 1., 0.])
    ```
    """
    dropped = int(drop_ratio * len(errors))
    if mask == "none" or not dropped:
        return None
    kept = torch.ones_like(errors)
    if mask == "depth":
        kept[:dropped] = 0
    else:
        kept[errors.topk(dropped, largest=False, sorted=False).indices] = 0
    return kept


def matching_loss(
    final: Tensor, start: Tensor, target: Tensor, mask: str = "none", drop_ratio: float = 0.0
) -> tuple[Tensor, Tensor]:
    """How far the student is from where the expert went, relative to the expert's way.

    Args:
        final (`Tensor` of shape `(parameters,)`):
            The student after training on the synthetic set.
        start (`Tensor` of shape `(parameters,)`):
            Where student and expert started.
        target (`Tensor` of shape `(parameters,)`):
            Where the expert went.
        mask (`str`, *optional*, defaults to `"none"`):
            As in [`kept_entries`]; the mask is a constant for differentiation.
        drop_ratio (`float`, *optional*, defaults to 0.0):
            As in [`kept_entries`].

    Returns:
        `tuple[Tensor, Tensor]`: the ratio of squared distances over the kept entries, and its gradient in `final`.
    """
    difference = (final - target).detach()
    kept = kept_entries(difference.square(), mask, drop_ratio)
    way = (start - target).square()
    remaining = (final - target).square()
    if kept is not None:
        remaining, way, difference = remaining * kept, way * kept, difference * kept
    length = way.sum()
    return remaining.sum() / length, 2 * difference / length


def match_segment(
    problem: InnerProblem, target: Tensor, settings: MatchingSettings, needs_gradients: bool = True
) -> MatchedSegment:
    """Matches one segment of an expert's trajectory.

    Args:
        problem ([`~hf_effml.distillation.unroll.InnerProblem`]):
            The student's training on the synthetic set, from the expert at the beginning of the segment; see
            [`MatchingSettings.problem`].
        target (`Tensor` of shape `(parameters,)`):
            The expert at the segment's end.
        settings ([`MatchingSettings`]):
            Mask, threshold and gradient mode.
        needs_gradients (`bool`, *optional*, defaults to `True`):
            Whether to compute gradients if the loss is finite and within the threshold.

    Returns:
        [`MatchedSegment`]: the loss, and the gradients or `None`. A loss whose gradients are not finite is NaN.
    """
    states = unroll(problem)
    loss, adjoint = matching_loss(states[-1], problem.start, target, settings.mask, settings.drop_ratio)
    # Also false where the loss is not a number.
    if not needs_gradients or not bool(loss <= settings.loss_threshold) or not bool(loss.isfinite()):
        return MatchedSegment(loss, None)
    gradients = adjoint_sweep(problem, states, adjoint, first_order=settings.gradient_mode == "first_order")
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        return MatchedSegment(loss * torch.nan, None)
    return MatchedSegment(loss, gradients)


def match_segments(
    derivatives: StudentDerivatives,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    starts: Tensor,
    targets: Tensor,
    seeds: list[int],
    settings: MatchingSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Matches several segments, one after the other, as one differentiable loss.

    Args:
        derivatives ([`~hf_effml.distillation.unroll.StudentDerivatives`]):
            Of the student.
        images (`Tensor` of shape `(images, channels, height, width)`):
            The synthetic images.
        labels (`Tensor` of shape `(images, classes)`):
            Their soft labels, as logits.
        lr (`Tensor`):
            Step size of the student, a scalar.
        starts (`Tensor` of shape `(segments, parameters)`):
            The experts at the beginning of the segments.
        targets (`Tensor` of shape `(segments, parameters)`):
            The experts at their ends.
        seeds (`list[int]`):
            One per segment: of its batches and augmentations.
        settings ([`MatchingSettings`]):
            How to match.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: the mean loss, differentiable in images, labels and step size as far as
        segments are within the threshold; the loss of every segment; and whether each took part.
    """
    return _MatchSegments.apply(images, labels, lr, derivatives, starts, targets, seeds, settings)


class _MatchSegments(torch.autograd.Function):
    """Computes the gradients together with the losses, so that the states of one segment at a time are in memory."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        images: Tensor,
        labels: Tensor,
        lr: Tensor,
        derivatives: StudentDerivatives,
        starts: Tensor,
        targets: Tensor,
        seeds: list[int],
        settings: MatchingSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_gradients = any(ctx.needs_input_grad[:3])
        sums = [torch.zeros_like(tensor) for tensor in (images, labels, lr)]
        losses, took_part = [], []
        for start, target, seed in zip(starts, targets, seeds, strict=True):
            problem = settings.problem(derivatives, images, labels, lr, start, seed)
            matched = match_segment(problem, target, settings, needs_gradients)
            losses.append(matched.loss)
            took_part.append(matched.gradients is not None)
            if matched.gradients is not None:
                for total, gradient in zip(sums, matched.gradients, strict=True):
                    total.add_(gradient, alpha=1 / len(seeds))
        ctx.save_for_backward(*sums)
        each = torch.stack(losses)
        flags = torch.tensor(took_part, device=images.device)
        ctx.mark_non_differentiable(each, flags)
        return each.mean(), each, flags

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradient * saved for saved in ctx.saved_tensors), None, None, None, None, None)
