"""A classifier as a function of one flat vector of parameters, which is what trajectories are made of."""

import hashlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig


__all__ = ["FlatStudent", "build_student", "logits_of", "seed_from", "student_config"]


def seed_from(*parts: int | str) -> int:
    """Makes a seed from numbers and names, so that every draw has its own and none depends on what was drawn before.

    Args:
        parts (`int` or `str`):
            What tells this draw from others, for example seed, step and item.

    Returns:
        `int`: a seed for `torch.Generator.manual_seed`.

    Example:

    ```python
    >>> from hf_effml.distillation.flat_student import seed_from

    >>> seed_from(0, "batches", 12) == seed_from(0, "batches", 12), seed_from(0, 1) == seed_from(1, 0)
    (True, False)
    ```
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & (2**63 - 1)


def student_config(config: PreTrainedConfig | Mapping[str, Any]) -> PreTrainedConfig:
    """Makes a configuration of its dictionary.

    Args:
        config (`PreTrainedConfig` or `Mapping`):
            A configuration, or what its `to_dict` returned.

    Returns:
        `PreTrainedConfig`: the configuration.

    Raises:
        ValueError: If the dictionary does not say of which model it is, or its `problem_type` is another than of one
            class per image.
    """
    if isinstance(config, PreTrainedConfig):
        if config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                "Experts and students classify images of one class each; got "
                f"`problem_type={config.problem_type!r}`. Leave it out."
            )
        return config
    fields = dict(config)
    if "model_type" not in fields:
        raise ValueError(
            f"`config` of a student must have a `model_type`, such as `convnet` or `resnet`; it has {sorted(fields)}."
        )
    return student_config(AutoConfig.for_model(fields.pop("model_type")).from_dict(fields))


def build_student(config: PreTrainedConfig | Mapping[str, Any], seed: int = 0) -> nn.Module:
    """Builds an image classifier with fresh weights and leaves the global random state as it was.

    Args:
        config (`PreTrainedConfig` or `Mapping`):
            Configuration of any image classifier that `AutoModelForImageClassification` knows; `TimmWrapperConfig`
            names a model of timm.
        seed (`int`, *optional*, defaults to 0):
            Seed of the weights.

    Returns:
        `nn.Module`: the model, in evaluation mode, on the CPU.

    Example:

    ```python
    >>> from hf_effml import ConvNetConfig
    >>> from hf_effml.distillation.flat_student import build_student

    >>> student = build_student(ConvNetConfig(image_size=8, depth=2, hidden_size=4), seed=1)
    >>> sum(parameter.numel() for parameter in student.parameters())
    310
    ```
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return AutoModelForImageClassification.from_config(student_config(config)).float().eval()


def logits_of(output: Any) -> Tensor:
    """Takes the class scores out of what a classifier returned.

    Args:
        output (`Tensor` or `ModelOutput`):
            Scores themselves, or an object that has them as `logits`.

    Returns:
        `Tensor` of shape `(batch, classes)`: the scores.

    Raises:
        TypeError: If there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        raise TypeError(
            f"The student must return class scores or an object with `logits`; it returned {type(output).__name__}."
        )
    return logits


class FlatStudent:
    """A classifier whose parameters are one vector, in the order of `module.parameters()`.

    It has no state of its own: batch normalisation uses the statistics of the batch and keeps none, dropout and the
    like are off, and attention runs in plain arithmetic, because fused kernels have no second derivative.

    Args:
        module (`nn.Module`):
            The classifier. It is changed for good: put into evaluation mode, its running statistics taken away.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml import ConvNetConfig
    >>> from hf_effml.distillation.flat_student import FlatStudent, build_student

    >>> student = FlatStudent(build_student(ConvNetConfig(image_size=8, depth=2, hidden_size=4)))
    >>> student.logits(student.flatten(), torch.zeros(5, 3, 8, 8)).shape
    torch.Size([5, 2])
    ```
    """

    def __init__(self, module: nn.Module):
        self.module = replace_all_batch_norm_modules_(module.eval()).requires_grad_(False)
        parameters = dict(self.module.named_parameters())
        self.names = list(parameters)
        self.shapes = [tuple(parameter.shape) for parameter in parameters.values()]
        self._sizes = [math.prod(shape) for shape in self.shapes]

    @property
    def numel(self) -> int:
        """Length of the vector."""
        return sum(self._sizes)

    def to(self, *args: Any, **kwargs: Any) -> "FlatStudent":
        """Moves the classifier, as `nn.Module.to` does; returns itself."""
        self.module.to(*args, **kwargs)
        return self

    def flatten(self) -> Tensor:
        """The module's own parameters as one new vector."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.module.parameters()])

    def load(self, flat: Tensor) -> nn.Module:
        """Writes a vector into the module.

        Args:
            flat (`Tensor` of shape `(parameters,)`):
                The parameters.

        Returns:
            `nn.Module`: the module.
        """
        with torch.no_grad():
            for parameter, value in zip(self.module.parameters(), self.split(flat).values(), strict=True):
                parameter.copy_(value)
        return self.module

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Cuts a vector into named parameters, without a copy.

        Args:
            flat (`Tensor` of shape `(parameters,)`):
                The parameters.

        Returns:
            `dict[str, Tensor]`: views of it in their shapes.
        """
        parts = flat.split(self._sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def logits(self, flat: Tensor, pixel_values: Tensor) -> Tensor:
        """Class scores of images under the given parameters; differentiable, any number of times, in both.

        Args:
            flat (`Tensor` of shape `(parameters,)`):
                The parameters.
            pixel_values (`Tensor` of shape `(batch, channels, height, width)`):
                The images.

        Returns:
            `Tensor` of shape `(batch, classes)`: the scores.
        """
        with math_attention():
            return logits_of(functional_call(self.module, self.split(flat), (pixel_values,)))


def math_attention() -> AbstractContextManager[None]:
    """Attention without fused kernels, inside the block: those have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)
