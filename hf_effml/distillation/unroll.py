"""Training on synthetic images as a differentiable program: its steps forward, and their exact adjoint backward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, grad_and_value

from .differentiable_augmentation import AugmentationDraw, AugmentationSettings, augment, draw_augmentation
from .flat_student import FlatStudent


__all__ = [
    "InnerProblem",
    "InnerStep",
    "StudentDerivatives",
    "SyntheticGradients",
    "adjoint_sweep",
    "plan_steps",
    "soft_cross_entropy",
    "unroll",
    "unroll_reference",
]


class InnerStep(NamedTuple):
    """What one step of training on the synthetic set looks at: which images, and how they are augmented."""

    index: Tensor
    draw: AugmentationDraw | None


class SyntheticGradients(NamedTuple):
    """Gradients of a loss with respect to a synthetic set."""

    images: Tensor
    labels: Tensor
    lr: Tensor


@dataclass(frozen=True)
class StudentDerivatives:
    """The derivatives of a student's loss that an unroll needs, either as they are or compiled.

    Args:
        student ([`~hf_effml.distillation.flat_student.FlatStudent`]):
            The classifier.
        compile (`bool`, *optional*, defaults to `False`):
            Whether `torch.compile` makes one kernel sequence of each: a minute at the first call of every batch size,
            then faster, the more so the less of the time is convolutions.
    """

    student: FlatStudent
    compile: bool = False
    gradient: Callable[..., Tensor] = field(init=False, repr=False)
    second_order: Callable[..., tuple[Tensor | None, Tensor, Tensor, Tensor]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        gradient, second_order = (
            (self._gradient_of_func, self._second_order_of_func)
            if self.compile
            else (self._gradient_of_graph, self._second_order_of_graph)
        )
        if self.compile:
            # Double backward through a compiled forward is refused: the whole derivative is compiled instead.
            gradient, second_order = (
                torch.compile(function, fullgraph=True, dynamic=False) for function in (gradient, second_order)
            )
        object.__setattr__(self, "gradient", gradient)
        object.__setattr__(self, "second_order", second_order)

    def loss(self, theta: Tensor, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """Soft cross-entropy of the student; labels are logits."""
        return soft_cross_entropy(self.student.logits(theta, pixel_values), labels)

    def _gradient_of_graph(self, theta: Tensor, pixel_values: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            return torch.autograd.grad(self.loss(theta, pixel_values, labels), theta)[0]

    def _second_order_of_graph(
        self, theta: Tensor, pixel_values: Tensor, labels: Tensor, direction: Tensor, with_theta: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """The derivatives of <gradient, direction> in theta, images and labels, and its value."""
        with torch.enable_grad():
            theta, pixel_values, labels = (
                tensor.detach().requires_grad_() for tensor in (theta, pixel_values, labels)
            )
            gradient = torch.autograd.grad(self.loss(theta, pixel_values, labels), theta, create_graph=True)[0]
            product = _inner(gradient, direction)
            wanted = (pixel_values, labels, theta) if with_theta else (pixel_values, labels)
            images, soft_labels, *hessian = torch.autograd.grad(product, wanted)
        return (hessian[0] if with_theta else None), images, soft_labels, product.detach()

    def _gradient_of_func(self, theta: Tensor, pixel_values: Tensor, labels: Tensor) -> Tensor:
        return grad(self.loss)(theta, self._laid_out(pixel_values), labels)

    def _laid_out(self, pixel_values: Tensor) -> Tensor:
        """Pixels whose channels lie together, which convolutions like. Only our own network surely has no `view`."""
        if getattr(getattr(self.student.module, "config", None), "model_type", None) != "convnet":
            return pixel_values
        return pixel_values.contiguous(memory_format=torch.channels_last)

    def _second_order_of_func(
        self, theta: Tensor, pixel_values: Tensor, labels: Tensor, direction: Tensor, with_theta: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        def product(pixel_values: Tensor, labels: Tensor, theta: Tensor) -> Tensor:
            return _inner(grad(self.loss)(theta, pixel_values, labels), direction)

        arguments = (0, 1, 2) if with_theta else (0, 1)
        derive = grad_and_value(product, arguments)
        (images, soft_labels, *hessian), value = derive(self._laid_out(pixel_values), labels, theta)
        return (hessian[0] if with_theta else None), images, soft_labels, value


def _inner(left: Tensor, right: Tensor) -> Tensor:
    # Not `@`, which autocast would compute in half precision.
    return (left * right).sum()


def soft_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy against soft labels that are themselves logits.

    Args:
        logits (`Tensor` of shape `(batch, classes)`):
            Scores of the student.
        labels (`Tensor` of shape `(batch, classes)`):
            Logits of the labels. Their gradient goes through their softmax.

    Returns:
        `Tensor`: a scalar.
    """
    return -(labels.softmax(1) * logits.to(labels.dtype).log_softmax(1)).sum(1).mean()


def plan_steps(
    num_images: int,
    image_size: Sequence[int],
    *,
    steps: int,
    batch_size: int | None,
    augmentation: AugmentationSettings,
    seed: int,
    device: torch.device | str = "cpu",
) -> list[InnerStep]:
    """Draws which images each step looks at and how they are augmented, all from one seed.

    A random order of the images is cut into batches, with what is left over at its end, and the batches are used from
    that end: the small one comes first. A new order follows when all are used.

    Args:
        num_images (`int`):
            Number of synthetic images.
        image_size (`Sequence[int]`):
            Their height and width.
        steps (`int`):
            Number of steps.
        batch_size (`int`, *optional*):
            Images in a step; all of them if unset or larger than their number.
        augmentation (`AugmentationSettings`):
            What changes the images.
        seed (`int`):
            Seed of order and augmentation.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the plan is used. The draws are the same everywhere.

    Returns:
        `list[InnerStep]`: one entry per step.

    Example:

    ```python
    >>> from hf_effml.distillation.differentiable_augmentation import AugmentationSettings
    >>> from hf_effml.distillation.unroll import plan_steps

    >>> plan = plan_steps(10, (8, 8), steps=4, batch_size=4, augmentation=AugmentationSettings("none"), seed=0)
    >>> [len(step.index) for step in plan]
    [2, 4, 4, 2]
    ```
    """
    generator = torch.Generator().manual_seed(seed)
    chunks: list[Tensor] = []
    plan = []
    for _ in range(steps):
        if not chunks:
            order = torch.randperm(num_images, generator=generator)
            chunks = list(order.split(min(batch_size or num_images, num_images)))
        index = chunks.pop()
        draw = draw_augmentation(augmentation, len(index), tuple(image_size), generator, device)
        plan.append(InnerStep(index.to(device), draw))
    return plan


class InnerProblem(NamedTuple):
    """The training of a student on a synthetic set: all that its steps depend on.

    Args:
        derivatives ([`StudentDerivatives`]):
            Of the student.
        images (`Tensor` of shape `(images, channels, height, width)`):
            The synthetic images.
        labels (`Tensor` of shape `(images, classes)`):
            Their soft labels, as logits.
        lr (`Tensor`):
            Step size, a scalar.
        start (`Tensor` of shape `(parameters,)`):
            The student's parameters at the beginning.
        plan (`Sequence[InnerStep]`):
            From [`plan_steps`].
        augmentation (`AugmentationSettings`):
            What the plan was drawn for.
    """

    derivatives: StudentDerivatives
    images: Tensor
    labels: Tensor
    lr: Tensor
    start: Tensor
    plan: Sequence[InnerStep]
    augmentation: AugmentationSettings


@torch.no_grad()
def unroll(problem: InnerProblem) -> list[Tensor]:
    """Trains the student by plain gradient descent on the synthetic set and remembers every state, but no graph.

    Args:
        problem ([`InnerProblem`]):
            What is trained, and on what.

    Returns:
        `list[Tensor]`: the parameters before the first step and after every step, one more than there are steps.
    """
    states = [problem.start]
    for step in problem.plan:
        batch = augment(problem.images[step.index], step.draw, problem.augmentation)
        gradient = problem.derivatives.gradient(states[-1], batch, problem.labels[step.index])
        states.append(states[-1] - problem.lr * gradient)
    return states


def adjoint_sweep(
    problem: InnerProblem, states: list[Tensor], adjoint: Tensor, first_order: bool = False
) -> SyntheticGradients:
    """Carries the gradient at the last state back through all steps, rebuilding one step's graph at a time.

    The result is the gradient of the whole unroll, to rounding. Beyond a single step it needs the states only.

    Args:
        problem ([`InnerProblem`]):
            What was trained, and on what.
        states (`list[Tensor]`):
            From [`unroll`]. Emptied on the way back.
        adjoint (`Tensor` of shape `(parameters,)`):
            Gradient of the loss with respect to the last state.
        first_order (`bool`, *optional*, defaults to `False`):
            Leaves out that later steps start from where earlier ones ended. This is TESLA's approximation
            (https://huggingface.co/papers/2211.10586), exact for a single step only.

    Returns:
        [`SyntheticGradients`]: gradients of the loss in images, labels and step size.
    """
    derivatives, images, labels, lr, _, plan, augmentation = problem
    found = SyntheticGradients(torch.zeros_like(images), torch.zeros_like(labels), torch.zeros_like(lr))
    states.pop()
    for number in reversed(range(len(plan))):
        index, draw = plan[number]
        with torch.enable_grad():
            own = images[index].detach().requires_grad_()
            batch = augment(own, draw, augmentation)
        # The first step's is not needed, but leaving it out would be another function to compile.
        with_theta = not first_order and (number > 0 or derivatives.compile)
        curvature, pixels, soft_labels, product = derivatives.second_order(
            states.pop(), batch.detach(), labels[index], adjoint, with_theta
        )
        if draw is not None:
            (pixels,) = torch.autograd.grad(batch, own, pixels)
        # Rows are unique within a step, so this is deterministic on every device.
        found.images[index] -= lr * pixels
        found.labels[index] -= lr * soft_labels
        found.lr.sub_(product)
        if curvature is not None:
            adjoint = adjoint - lr * curvature
    return found


def unroll_reference(problem: InnerProblem, checkpoint: bool = False) -> Tensor:
    """The same training as one graph that autograd differentiates: the obvious twin; its memory grows with the steps.

    Args:
        problem ([`InnerProblem`]):
            What is trained, and on what; its derivatives are not compiled.
        checkpoint (`bool`, *optional*, defaults to `False`):
            Recomputes every step on the way back instead of keeping its graph.

    Returns:
        `Tensor` of shape `(parameters,)`: the last state, differentiable in images, labels and step size.
    """

    def take(theta: Tensor, step: InnerStep) -> Tensor:
        batch = augment(problem.images[step.index], step.draw, problem.augmentation)
        loss = problem.derivatives.loss(theta, batch, problem.labels[step.index])
        return theta - problem.lr * torch.autograd.grad(loss, theta, create_graph=True)[0]

    theta = problem.start.detach().requires_grad_()
    for step in problem.plan:
        if checkpoint:
            theta = torch.utils.checkpoint.checkpoint(take, theta, step, use_reentrant=False)
        else:
            theta = take(theta, step)
    return theta
