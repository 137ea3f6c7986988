"""How training changes images: shifts and flips in plain torch, everything further through timm, and mixup."""

import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import default_data_collator

from .imports import require


__all__ = ["Augmentation", "MixupCollator"]


@dataclass
class Augmentation:
    """How training changes the images.

    Without the options that need timm, images pass through the image processor once and are then shifted and flipped.
    With them timm's training transform takes over, whose random crop replaces the shift.
    """

    max_shift: int = field(default=0, metadata={"help": "Shift by up to this many pixels, filled with black."})
    horizontal_flip: bool = field(default=False, metadata={"help": "Mirror every second image."})
    auto_augment: str | None = field(default=None, metadata={"help": "timm's policy, such as rand-m9-mstd0.5-inc1."})
    color_jitter: float = field(default=0.0, metadata={"help": "Strength of timm's colour jitter."})
    random_erasing: float = field(default=0.0, metadata={"help": "Share of images that timm erases a part of."})
    mixup: float = field(default=0.0, metadata={"help": "Alpha of timm's mixup; 0 switches it off."})
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of timm's cutmix; 0 switches it off."})

    @property
    def needs_timm(self) -> bool:
        """Whether images go through timm's training transform."""
        return bool(self.auto_augment or self.color_jitter or self.random_erasing)

    def collator(self, num_labels: int, label_smoothing: float = 0.0) -> "MixupCollator | None":
        """Makes the collator that mixes batches.

        Args:
            num_labels (`int`):
                Number of classes.
            label_smoothing (`float`, *optional*, defaults to 0.0):
                Share of every label that is spread over all classes.

        Returns:
            [`MixupCollator`] or `None`: `None` if neither mixup nor cutmix is on.
        """
        if not self.mixup and not self.cutmix:
            return None
        return MixupCollator(num_labels, self.mixup, self.cutmix, label_smoothing)

    def transform(self, processor: Any) -> Callable[[Any, int], Tensor] | None:
        """Builds the random part of the training transform.

        Args:
            processor (`BaseImageProcessor`):
                Gives size, interpolation and statistics.

        Returns:
            `Callable` or `None`: takes a seed and, with timm, a PIL image, else pixels; returns pixels. `None` if
            nothing changes.
        """
        if self.needs_timm:
            return _timm_transform(self, processor)
        if not self.max_shift and not self.horizontal_flip:
            return None
        black = -torch.tensor(processor.image_mean) / torch.tensor(processor.image_std)
        return _ShiftAndFlip(self.max_shift, self.horizontal_flip, black)


class MixupCollator:
    """Makes a batch and mixes its images and labels with timm's mixup and cutmix; the labels come out soft.

    What is drawn depends on the batch alone: a resumed run repeats it, and so does any number of workers. In a batch
    of odd size the last image stays as it is. Trainers of this package mix for training only.

    Args:
        num_labels (`int`):
            Number of classes.
        mixup (`float`, *optional*, defaults to 0.8):
            Alpha of mixup; 0 switches it off.
        cutmix (`float`, *optional*, defaults to 1.0):
            Alpha of cutmix; 0 switches it off. With both on, each takes half of the batches.
        label_smoothing (`float`, *optional*, defaults to 0.1):
            Share of every label that is spread over all classes. Leave the Trainer's `label_smoothing_factor` at 0.

    Example:

    ```python
    >>> from hf_effml import MixupCollator

    >>> collator = MixupCollator(num_labels=10)  # doctest: +SKIP
    ```
    """

    def __init__(self, num_labels: int, mixup: float = 0.8, cutmix: float = 1.0, label_smoothing: float = 0.1):
        timm_data = require("timm.data")
        if mixup <= 0 and cutmix <= 0:
            raise ValueError(f"`mixup` or `cutmix` must be above 0; got {mixup} and {cutmix}.")
        self._mix = timm_data.Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_labels)
        self._num_labels, self._smoothing = num_labels, label_smoothing

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Makes one batch of rows with `pixel_values` and `labels`."""
        batch = default_data_collator(rows)
        pixels, labels = batch["pixel_values"], batch["labels"]
        even = len(labels) - len(labels) % 2
        targets = F.one_hot(labels, self._num_labels) * (1 - self._smoothing) + self._smoothing / self._num_labels
        if even:
            # In place on the slice: timm mixes only batches of even size.
            with seeded(zlib.crc32(pixels.numpy().tobytes())):
                _, targets[:even] = self._mix(pixels[:even], labels[:even])
        batch["labels"] = targets
        return batch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's generator for a block of code and puts their states back afterwards.

    Args:
        seed (`int`):
            Any integer.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class _ShiftAndFlip:
    """Moves pixels by a random whole number each way, the gap black, and mirrors every second image."""

    def __init__(self, max_shift: int, flip: bool, black: Tensor):
        self.max_shift, self.flip, self.black = max_shift, flip, black.view(-1, 1, 1)

    def __call__(self, pixels: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        top, left, mirrored = torch.randint(2**31, (3,), generator=generator).tolist()
        if self.max_shift:
            places, (height, width) = 2 * self.max_shift + 1, pixels.shape[-2:]
            padded = F.pad(pixels - self.black, [self.max_shift] * 4)
            top, left = top % places, left % places
            pixels = padded[:, top : top + height, left : left + width] + self.black
        return pixels.flip(-1) if self.flip and mirrored % 2 else pixels


def _timm_transform(augmentation: Augmentation, processor: Any) -> Callable[[Any, int], Tensor]:
    transform = require("timm.data").create_transform(
        (3, processor.crop_size["height"], processor.crop_size["width"]),
        is_training=True,
        hflip=0.5 if augmentation.horizontal_flip else 0.0,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        interpolation="bicubic",
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        re_prob=augmentation.random_erasing,
        re_mode="pixel",
    )

    def augment(image: Any, seed: int) -> Tensor:
        with seeded(seed):
            return transform(image.convert("RGB"))

    return augment
