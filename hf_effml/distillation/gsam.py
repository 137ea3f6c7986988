"""Gap-guided sharpness-aware minimisation: the optimiser that experts are trained with."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.sgd import sgd


__all__ = ["GSAM"]


class GSAM(Optimizer):
    r"""SGD along the gradient of GSAM (https://huggingface.co/papers/2203.08065) instead of the plain one.

    Every step computes two gradients: $g_1$ where the parameters $w$ are, and $g_2$ at $w + e$, the worst point
    nearby. SGD then moves $w$ along $g_2 - \alpha v$, where $v$ is the part of $g_1$ orthogonal to $g_2$, so that
    trajectories become flat, as distillation wants them (https://huggingface.co/papers/2211.11004):

        e = rho * w^2 * g1 / (norm(w * g1) + eps)      adaptive
        e = rho * g1 / (norm(g1) + eps)                otherwise

    Norms are over all parameters together. With `rho=0` it is SGD, at the cost of SGD.

    Args:
        params (`Iterable`):
            Parameters or parameter groups; `rho` and `alpha` may differ from group to group.
        lr (`float`, *optional*, defaults to 0.01):
            Learning rate.
        momentum (`float`, *optional*, defaults to 0.0):
            Momentum of SGD.
        weight_decay (`float`, *optional*, defaults to 0.0):
            Weight decay of SGD.
        rho (`float`, *optional*, defaults to 0.01):
            How far the second gradient is taken from the parameters.
        alpha (`float`, *optional*, defaults to 0.3):
            How much of the orthogonal part is taken away.
        adaptive (`bool`, *optional*, defaults to `True`):
            Whether the distance is measured in proportion to the size of every parameter.
        eps (`float`, *optional*, defaults to 1e-12):
            Keeps quotients finite.
        module (`nn.Module`, *optional*):
            The network. Its normalisation layers update running statistics in the first pass only; without it, twice.

    Raises:
        ValueError: If a number is negative.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.distillation.gsam import GSAM

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = GSAM([weight], lr=0.1)
    >>> def closure():
    ...     loss = weight.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure)
    tensor(5., grad_fn=<SumBackward0>)
    ```
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        rho: float = 0.01,
        alpha: float = 0.3,
        adaptive: bool = True,
        eps: float = 1e-12,
        module: nn.Module | None = None,
    ):
        numbers = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rho": rho,
            "alpha": alpha,
            "eps": eps,
        }
        for name, value in numbers.items():
            if value < 0:
                raise ValueError(f"`{name}` must be at least 0; got {value}.")
        super().__init__(params, {**numbers, "adaptive": adaptive})
        self._norms = [] if module is None else [each for each in module.modules() if isinstance(each, _NormBase)]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Takes one step.

        Args:
            closure (`Callable`):
                Computes the loss of one batch and its gradients, and returns the loss. It is called twice and must
                see the same batch, augmented alike. Gradients are cleared before each call.

        Returns:
            `Tensor`: the loss where the parameters were.

        Raises:
            ValueError: Without a closure.
        """
        if closure is None:
            raise ValueError("`GSAM.step` computes two gradients and needs a `closure` that computes the loss.")
        loss = self._backward(closure)
        if any(group["rho"] > 0 for group in self.param_groups):
            self._replace_gradients(closure)
        for group in self.param_groups:
            self._descend(group)
        return loss

    def _backward(self, closure: Callable[[], Tensor]) -> Tensor:
        self.zero_grad()
        with torch.enable_grad():
            return closure()

    def _replace_gradients(self, closure: Callable[[], Tensor]) -> None:
        """Takes the second gradient and makes the direction out of both."""
        entries = [(parameter, group) for group in self.param_groups for parameter in _with_gradient(group)]
        parameters = [parameter for parameter, _ in entries]
        if not parameters:
            return
        eps = self.defaults["eps"]
        first, before = _flat(_gradients(parameters)), _flat(parameters)
        scale = _flat([p.abs() if group["adaptive"] else torch.ones_like(p) for p, group in entries])
        away = scale.square() * first / ((scale * first).norm() + eps)
        for (parameter, group), part in zip(entries, _like(away, parameters), strict=True):
            parameter.add_(part, alpha=group["rho"])
        with _statistics_kept(self._norms):
            self._backward(closure)
        # Adding and subtracting again would not give back the same numbers.
        for parameter, part in zip(parameters, _like(before, parameters), strict=True):
            parameter.copy_(part)
        second = _flat(_gradients(parameters))
        length, second_length = first.norm(), second.norm()
        cosine = first.dot(second) / (length * second_length + eps)
        orthogonal = first - (cosine * length / (second_length + eps)) * second
        for (parameter, group), part in zip(entries, _like(orthogonal, parameters), strict=True):
            parameter.grad.sub_(part, alpha=group["alpha"])

    def _descend(self, group: dict[str, Any]) -> None:
        parameters = _with_gradient(group)
        # An entry in `state` that nobody needs would become part of `state_dict`.
        states = [self.state[parameter] if group["momentum"] else {} for parameter in parameters]
        buffers = [state.get("momentum_buffer") for state in states]
        settings = {name: group[name] for name in ("lr", "momentum", "weight_decay")}
        sgd(parameters, _gradients(parameters), buffers, dampening=0, nesterov=False, maximize=False, **settings)
        for state, buffer in zip(states, buffers, strict=True):
            state["momentum_buffer"] = buffer


@contextmanager
def _statistics_kept(norms: list[_NormBase]) -> Iterator[None]:
    """Normalises by the batch inside the block, as in training, without a trace in the running statistics."""
    tracking = [norm for norm in norms if norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


def _with_gradient(group: dict[str, Any]) -> list[Tensor]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _like(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Cuts a vector into parts with the shapes of the tensors."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
