"""Training a network on a small set of images by a protocol, and measuring it."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import logging

from hf_effml.distillation.differentiable_augmentation import AugmentationSettings, augment, draw_augmentation
from hf_effml.distillation.feature_layers import evaluating, on_device
from hf_effml.distillation.flat_student import logits_of, seed_from

from .protocols import EvaluationProtocol, get_protocol
from .students import Student, make_student, student_name
from .training_sets import TrainingSet


if TYPE_CHECKING:
    from hf_effml.distillation.real_images import RealImages


__all__ = ["accuracy", "keeps_statistics", "train_student", "with_statistics_of"]

logger = logging.get_logger(__name__)


def train_student(
    training_set: TrainingSet,
    student: Student,
    protocol: str | EvaluationProtocol = "tm",
    seed: int = 0,
    device: torch.device | str | None = None,
    teacher: nn.Module | None = None,
    disable_tqdm: bool = False,
) -> nn.Module:
    """Trains a network with fresh weights on a small set that is held in memory.

    Weights, batches, augmentation and dropout depend on the seed alone, and the global random state stays as it was.

    Args:
        training_set ([`TrainingSet`]):
            What to train on.
        student (`PreTrainedConfig`, `Mapping` or `Callable[[], nn.Module]`):
            The network: a configuration, its dictionary, or a function that makes one.
        protocol (`str` or [`EvaluationProtocol`], *optional*, defaults to `"tm"`):
            How to train.
        seed (`int`, *optional*, defaults to 0):
            Seed of all that is random.
        device (`torch.device` or `str`, *optional*):
            Where to train; where the images are if unset.
        teacher (`nn.Module`, *optional*):
            A trained network, for protocols with `labels="teacher"`. It stays where and as it is.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Show no progress bar.

    Returns:
        `nn.Module`: the trained network, in evaluation mode, on the device.

    Raises:
        ValueError: If the protocol asks for labels that are not there, or the network cannot be trained on the images.

    Example:

    ```python
    >>> import torch
    >>> from torch import nn
    >>> from hf_effml.distillation.evaluation.training_sets import TrainingSet
    >>> from hf_effml.distillation.evaluation.protocols import get_protocol
    >>> from hf_effml.distillation.evaluation.training import train_student

    >>> two = TrainingSet(torch.stack([-torch.ones(1, 8, 8), torch.ones(1, 8, 8)]), torch.tensor([0, 1]))
    >>> protocol = get_protocol("hard", epochs=30)
    >>> student = train_student(two, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), protocol)
    >>> student(two.images).argmax(-1)
    tensor([0, 1])
    ```
    """
    settings = get_protocol(protocol).for_set(training_set)
    images = training_set.images if device is None else training_set.images.to(device)
    targets = _targets(training_set, settings, teacher, images.device)
    model = make_student(student, seed_from(seed, "student")).to(images.device).train()
    generator = torch.Generator().manual_seed(seed_from(seed, "batches"))
    teacher = None if teacher is None or targets is not None else on_device(teacher, images.device)
    run = _Training(model, student_name(student), settings, teacher, generator)
    epochs = logging.tqdm(range(settings.epochs), desc="training", leave=False, delay=2, disable=disable_tqdm)
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        torch.manual_seed(seed_from(seed, "dropout"))
        for epoch in epochs:
            run.start_epoch(epoch)
            for chosen in _batches(len(images), settings.batch_size, generator):
                loss = run.step(images[chosen], None if targets is None else targets[chosen])
    if not torch.isfinite(loss):
        logger.warning(
            f"Training of {student_name(student)} ended with a loss of {loss.item()}: the learning rate of "
            f"{settings.learning_rate:.3g} is too large for it. Its accuracy says nothing about the images."
        )
    return model.eval()


def accuracy(model: nn.Module, images: "RealImages", batch_size: int = 512) -> float:
    """Measures the share of images that a network classifies right.

    Args:
        model (`nn.Module`):
            The network; its mode is restored afterwards.
        images ([`RealImages`]):
            The images.
        batch_size (`int`, *optional*, defaults to 512):
            Images at a time.

    Returns:
        `float`: the accuracy, from 0 to 1.

    Raises:
        ValueError: If there are no images.
    """
    if not len(images.labels):
        raise ValueError("`images` has no image to measure the accuracy on.")
    device = next(model.parameters()).device
    mode = model.training
    model.eval()
    right = 0
    with torch.inference_mode():
        for pixels, labels in zip(images.images.split(batch_size), images.labels.split(batch_size), strict=True):
            right += (logits_of(model(pixels.to(device))).argmax(-1) == labels.to(device)).sum()
    model.train(mode)
    return int(right) / len(images.labels)


def keeps_statistics(model: nn.Module) -> bool:
    """Says whether a network classifies by statistics of the images that it was trained on.

    Args:
        model (`nn.Module`):
            The network.

    Returns:
        `bool`: whether it has batch normalisation with running statistics.
    """
    return any(isinstance(layer, _BatchNorm) and layer.track_running_stats for layer in model.modules())


def with_statistics_of(images: "RealImages", model: nn.Module, batch_size: int = 512) -> nn.Module:
    """Takes the statistics of batch normalisation anew; weights stay, and labels are not looked at.

    Those of a few synthetic images, on which a network was trained, are not those of real ones.

    Args:
        images ([`RealImages`]):
            Images like those to be classified.
        model (`nn.Module`):
            The network; it stays as it is.
        batch_size (`int`, *optional*, defaults to 512):
            Images at a time; statistics are averaged over the batches.

    Returns:
        `nn.Module`: a copy in evaluation mode.
    """
    model = copy.deepcopy(model).train()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.reset_running_stats()
            # A plain average.
            layer.momentum = None
        elif isinstance(layer, nn.Dropout):
            layer.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        for pixels in images.images.split(batch_size):
            model(pixels.to(device))
    return model.eval()


class _Training:
    """One training: network, optimiser, augmentation and where the labels come from."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        protocol: EvaluationProtocol,
        teacher: nn.Module | None,
        generator: torch.Generator,
    ):
        self.model, self.name, self.protocol = model, name, protocol
        self.teacher, self.generator = teacher, generator
        settings = protocol.augmentation or AugmentationSettings("none")
        self.augmentations = [settings]
        if protocol.all_operations:
            self.augmentations = [replace(settings, strategy=operation) for operation in settings.operations]
        self.learning_rate = protocol.learning_rate or 0.0
        self.optimizer = self._make_optimizer(self.learning_rate)
        self.sizes_tried: set[int] = set()

    def start_epoch(self, epoch: int) -> None:
        """Sets the learning rate of an epoch."""
        if self.protocol.schedule == "cosine":
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 + math.cos(math.pi * epoch / self.protocol.epochs)) / 2
        elif epoch == self.protocol.drop_epoch:
            # A new optimiser has no momentum.
            self.optimizer = self._make_optimizer(self.learning_rate / 10)

    def step(self, images: Tensor, targets: Tensor | None) -> Tensor:
        """Takes one step on a batch and returns its loss."""
        for settings in self.augmentations:
            draw = draw_augmentation(settings, len(images), images.shape[2:], self.generator, images.device)
            images = augment(images, draw, settings)
        other, pasted = None, 0.0
        if self.protocol.cutmix:
            images, other, pasted = _cutmix(images, self.generator)
        if self.teacher is not None:
            with torch.no_grad(), evaluating(self.teacher):
                targets = logits_of(self.teacher(images)).softmax(-1)
        logits = self._logits(images)
        loss = F.cross_entropy(logits, targets)
        # A teacher has seen the mixed images; other labels are mixed as the images are.
        if other is not None and self.teacher is None and targets is not None:
            loss = torch.lerp(loss, F.cross_entropy(logits, targets[other]), pasted)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _logits(self, images: Tensor) -> Tensor:
        """Class scores; the first time for a size of batch, what goes wrong is explained."""
        if len(images) in self.sizes_tried:
            return logits_of(self.model(images))
        self.sizes_tried.add(len(images))
        try:
            return logits_of(self.model(images))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self.name} cannot be trained on {len(images)} image(s) of shape {tuple(images.shape[1:])}: "
                f"{error} Build it for images of this size, take a smaller network, or another `batch_size` where "
                "batch normalisation gets too few values."
            ) from error

    def _make_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        decay = self.protocol.weight_decay
        parameters = self.model.parameters()
        if self.protocol.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=decay)
        return torch.optim.SGD(parameters, lr=learning_rate, momentum=self.protocol.momentum, weight_decay=decay)


def _batches(count: int, batch_size: int, generator: torch.Generator) -> Sequence[Tensor | slice]:
    """Indices of the batches of an epoch; a set that is one batch is not copied."""
    if count <= batch_size:
        return [slice(None)]
    return torch.randperm(count, generator=generator).split(batch_size)


def _targets(
    training_set: TrainingSet, protocol: EvaluationProtocol, teacher: nn.Module | None, device: torch.device
) -> Tensor | None:
    """Classes, or probabilities; `None` where the teacher makes them of every batch."""
    if protocol.labels == "teacher":
        if teacher is None:
            raise ValueError(
                f"The protocol `{protocol.name}` trains on the labels of a `teacher`; give a trained network, for "
                "example `bank.network(0)`."
            )
        return None
    if protocol.labels == "hard":
        return training_set.class_ids.to(device)
    if training_set.soft_labels is None:
        raise ValueError(
            f"The protocol `{protocol.name}` trains on soft labels and the set has none. Use the protocol `hard`, or "
            "give the logits as `soft_labels`."
        )
    return training_set.soft_labels.to(device).softmax(-1)


def _cutmix(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Pastes one rectangle of the images into those of another order (https://huggingface.co/papers/1905.04899)."""
    height, width = images.shape[2:]
    share, centre_y, centre_x = torch.rand(3, generator=generator).tolist()
    reach = math.sqrt(1 - share) / 2
    top, bottom = (round(height * min(max(centre_y + sign * reach, 0), 1)) for sign in (-1, 1))
    left, right = (round(width * min(max(centre_x + sign * reach, 0), 1)) for sign in (-1, 1))
    other = torch.randperm(len(images), generator=generator)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
    return mixed, other, (bottom - top) * (right - left) / (height * width)
