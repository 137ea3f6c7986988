"""The training of one expert: an epoch at a time, with all that it needs to go on exactly where it was cut off."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig

from hf_effml.distillation.differentiable_augmentation import AugmentationSettings, augment, draw_augmentation
from hf_effml.distillation.flat_student import build_student, logits_of, seed_from, student_config
from hf_effml.distillation.real_images import RealImageData, RealImages

from .files import read_header, write_tensors


__all__ = ["ExpertRun", "describe_data", "some_images", "trainable_config"]


class ExpertRun:
    """One network in training, its trajectory and its history. An epoch depends on the seed and its number alone.

    Args:
        module (`nn.Module`):
            The network with its first weights, on the device to train on.
        optimizer (`torch.optim.Optimizer`):
            Takes a step from a closure; [`GSAM`] or SGD.
        augmentation ([`AugmentationSettings`]):
            How images are changed.
        batch_size (`int`):
            Images of a step.
        kept_epochs (`list[int]`):
            Epochs whose parameters are kept.
        seed (`int`):
            Seed of batches, augmentation and dropout.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        augmentation: AugmentationSettings,
        batch_size: int,
        kept_epochs: list[int],
        seed: int,
    ):
        self.module, self.optimizer = module.train(), optimizer
        self.augmentation, self.batch_size, self.seed = augmentation, batch_size, seed
        self.kept_epochs = set(kept_epochs)
        self.epoch = 0
        self.trajectory: list[Tensor] = []
        self.history: list[dict[str, Any]] = []

    def train_epoch(self, data: RealImages, shown: Tensor) -> float:
        """Trains once on each of some images.

        Args:
            data ([`RealImages`]):
                The images, on the device of the network.
            shown (`Tensor`):
                Positions of those to show.

        Returns:
            `float`: the mean loss.
        """
        device = data.images.device
        generator = torch.Generator().manual_seed(seed_from(self.seed, "batches", self.epoch))
        shown = shown[torch.randperm(len(shown), generator=generator)].to(device)
        total = torch.zeros((), device=device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # Dropout and the like know the global random state only.
            torch.manual_seed(seed_from(self.seed, "dropout", self.epoch))
            for chosen in shown.split(self.batch_size):
                draw = draw_augmentation(self.augmentation, len(chosen), data.images.shape[2:], generator, device)
                images = augment(data.images[chosen], draw, self.augmentation)
                total += self._step(images, data.labels[chosen]) * len(chosen)
        self.epoch += 1
        return total.item() / len(shown)

    def record(self, **measured: float) -> None:
        """Keeps the parameters as they are, if the epoch is one to keep, and what was measured.

        Args:
            measured (`float`):
                Numbers for the history.
        """
        if self.epoch in self.kept_epochs:
            # A copy: the network goes on to change its own.
            self.trajectory.append(torch.cat([p.detach().reshape(-1).cpu() for p in self.module.parameters()]))
        self.history.append({"epoch": self.epoch, **measured})

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Writes all that the next epoch depends on.

        Args:
            path (`Path`):
                The file.
            settings (`Mapping`):
                What the expert is trained with, JSON-plain.
        """
        state = {f"model.{name}": value for name, value in self.module.state_dict().items()}
        momenta = self.optimizer.state_dict()["state"].items()
        state |= {f"momentum.{index}": each["momentum_buffer"] for index, each in momenta if each}
        state |= {f"trajectory.{row}": value for row, value in enumerate(self.trajectory)}
        tensors = {name: value.detach().cpu().clone() for name, value in state.items()}
        write_tensors(path, tensors, {"epoch": self.epoch, "history": self.history, "settings": dict(settings)})

    def load(self, path: Path) -> None:
        """Goes on from what [`~ExpertRun.save`] wrote.

        Args:
            path (`Path`):
                The file.

        Raises:
            ValueError: If it is damaged.
        """
        header = read_header(path)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "momentum": {}, "trajectory": {}}
        try:
            self.epoch, self.history = header["epoch"], header["history"]
            for name, value in load_file(path).items():
                part, _, key = name.partition(".")
                parts[part][key] = value
                if value.is_floating_point() and not value.isfinite().all():
                    raise ValueError(f"`{name}` is not finite")
            self.trajectory = [parts["trajectory"][str(row)] for row in range(len(parts["trajectory"]))]
            self.module.load_state_dict(parts["model"])
            optimizer = self.optimizer.state_dict()
            optimizer["state"] = {int(index): {"momentum_buffer": value} for index, value in parts["momentum"].items()}
            self.optimizer.load_state_dict(optimizer)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"`{path}` is no state of this expert, or damaged: {reason} Delete it, and the expert starts anew."
            ) from error

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(logits_of(self.module(images)), labels)
            loss.backward()
            return loss

        return self.optimizer.step(closure).detach()


def trainable_config(config: PreTrainedConfig | Mapping[str, Any], data: RealImages) -> PreTrainedConfig:
    """Checks that networks can be trained on images.

    Args:
        config (`PreTrainedConfig` or `Mapping`):
            Configuration of the networks.
        data ([`RealImages`]):
            The images.

    Returns:
        `PreTrainedConfig`: the configuration.

    Raises:
        ValueError: If they cannot; the message says what to change.
    """
    config = student_config(config)
    if config.num_labels != data.num_labels:
        raise ValueError(
            f"`student_config` has {config.num_labels} classes, the data has {data.num_labels}. "
            f"Set `num_labels={data.num_labels}` in the configuration."
        )
    network, images = build_student(config), data.images[:2].cpu()
    name = type(network).__name__
    try:
        with torch.no_grad():
            shape = tuple(logits_of(network(images)).shape)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"The {name} of `student_config` cannot take images of shape {tuple(images.shape[1:])}: {error} "
            "Set `image_size` and `num_channels` in the configuration, or resize the images."
        ) from error
    if shape != (len(images), data.num_labels):
        raise ValueError(f"The {name} must return {data.num_labels} scores for an image; got the shape {shape}.")
    return config


def describe_data(data: RealImageData) -> dict[str, Any]:
    """Says which images experts were trained on, as `bank.json` has it.

    Args:
        data ([`RealImageData`]):
            The images.

    Returns:
        `dict`: where they are from, their fingerprint, numbers, classes and shape; JSON-plain.
    """
    return {
        "name": data.name,
        "hub_id": data.hub_id,
        "revision": data.revision,
        "fingerprint": data.train.fingerprint,
        "train_images": len(data.train),
        "validation_images": 0 if data.validation is None else len(data.validation),
        "label_names": data.label_names,
        "image_shape": list(data.train.images.shape[1:]),
        "arguments": data.arguments,
    }


def some_images(images: RealImages, most: int, seed: int) -> RealImages:
    """Takes at most so many images, all if there are no more.

    Args:
        images ([`RealImages`]):
            The images.
        most (`int`):
            How many.
        seed (`int`):
            Seed of the choice.

    Returns:
        [`RealImages`]: those chosen, in their order.
    """
    if len(images) <= most:
        return images
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:most]
    return images.subset(chosen.sort().values)
