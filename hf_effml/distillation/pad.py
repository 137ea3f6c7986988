"""PAD (https://huggingface.co/papers/2408.03360): its schedule of images, and the cut through the parameters.

Experts see easy images first and lose the easiest at the end, and matching leaves out shallow layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .difficulty import check_order


__all__ = [
    "CurriculumPhase",
    "DataCurriculum",
    "depth_report",
    "describe_depth",
]


class CurriculumPhase(NamedTuple):
    """Which images an epoch uses: of every class, sorted from easy to hard, those from one share to another.

    Args:
        name (`str`):
            `"add"` while harder images join, `"all"`, or `"remove"` when the easiest are left out.
        first (`float`):
            Share of the easiest images that is left out.
        last (`float`):
            Share up to which images are used.
    """

    name: Literal["add", "all", "remove"]
    first: float
    last: float


@dataclass(frozen=True)
class DataCurriculum:
    """Which images experts see in which epoch: PAD's filter of information extraction (section 3.1).

    It starts with the easiest images of every class, adds harder ones evenly, uses all for a while and then leaves out
    the easiest. The defaults are the paper's for CIFAR-10; for CIFAR-100 and Tiny ImageNet it ends adding at 40. The
    epochs and shares of removal are those of the official example, as the paper names none.

    Args:
        initial_ratio (`float`, *optional*, defaults to 0.75):
            Share of images in epoch 0.
        add_end_epoch (`int`, *optional*, defaults to 20):
            Epoch from which all images are used; 0 uses all from the start.
        remove (`tuple[tuple[int, float], ...]`, *optional*, defaults to `((40, 0.1), (60, 0.2))`):
            Pairs of an epoch and a share: after that epoch so many of the easiest are left out; `()` leaves out none.

    Raises:
        ValueError: If a share is out of range, or epochs or shares of removal fall.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.distillation.pad import DataCurriculum

    >>> curriculum = DataCurriculum(initial_ratio=0.5, add_end_epoch=2, remove=((4, 0.25),))
    >>> order = [torch.tensor([3, 1, 0, 2]), torch.tensor([4, 5])]
    >>> [curriculum.indices(order, epoch).tolist() for epoch in (0, 1, 2, 5)]
    [[3, 1, 4], [3, 1, 0, 4], [3, 1, 0, 2, 4, 5], [1, 0, 2, 4, 5]]

    ```
    """

    initial_ratio: float = 0.75
    add_end_epoch: int = 20
    remove: tuple[tuple[int, float], ...] = ((40, 0.1), (60, 0.2))

    def __post_init__(self):
        object.__setattr__(self, "remove", tuple((epoch, share) for epoch, share in self.remove))
        if not 0 < self.initial_ratio <= 1:
            raise ValueError(f"`initial_ratio` must be more than 0 and at most 1; got {self.initial_ratio}.")
        if self.add_end_epoch < 0:
            raise ValueError(f"`add_end_epoch` must be at least 0; got {self.add_end_epoch}.")
        previous = (self.add_end_epoch, 0.0)
        for epoch, share in self.remove:
            if not 0 <= share < 1:
                raise ValueError(f"Shares in `remove` must be at least 0 and less than 1; got {share}.")
            if epoch < previous[0] or share < previous[1]:
                raise ValueError(
                    "`remove` must have epochs that do not fall, from `add_end_epoch` on, and shares that do not "
                    f"fall; got {self.remove} with `add_end_epoch` {self.add_end_epoch}."
                )
            previous = (epoch, share)

    def phase(self, epoch: int) -> CurriculumPhase:
        """Says which share of every class an epoch uses.

        Args:
            epoch (`int`):
                Number of the epoch, from 0.

        Returns:
            [`CurriculumPhase`]: the images of a class are those from `int(first * n)` to `int(last * n)`.
        """
        if epoch < 0:
            raise ValueError(f"`epoch` must be at least 0; got {epoch}.")
        if epoch <= self.add_end_epoch:
            grown = (1 - self.initial_ratio) * epoch
            last = 1.0 if epoch == self.add_end_epoch else self.initial_ratio + grown / self.add_end_epoch
            return CurriculumPhase("add", 0.0, last)
        removed = [share for after, share in self.remove if epoch > after]
        return CurriculumPhase("remove", removed[-1], 1.0) if removed else CurriculumPhase("all", 0.0, 1.0)

    def indices(self, order: Sequence[Tensor], epoch: int) -> Tensor:
        """Lists the training images of an epoch; shuffle them before training.

        Args:
            order (`Sequence[Tensor]`):
                For each class the positions of its images, the easiest first, as [`easy_to_hard`] makes it.
            epoch (`int`):
                Number of the epoch, from 0.

        Returns:
            `Tensor`: positions of images, class by class, the easiest first.

        Raises:
            ValueError: If the order does not list every training image once, or a class would be left without images.
        """
        return torch.cat(self._rows(check_order(order), epoch))

    def validate(self, order: Sequence[Tensor], epochs: int, labels: Tensor | None = None) -> None:
        """Makes sure that [`~DataCurriculum.indices`] will work in every epoch.

        Args:
            order (`Sequence[Tensor]`):
                For each class the positions of its images, the easiest first.
            epochs (`int`):
                Number of epochs.
            labels (`Tensor` of shape `(images,)`, *optional*):
                Classes of the training images, to be compared with the order.

        Raises:
            ValueError: As [`~DataCurriculum.indices`], and if the order has an image under another class.
        """
        rows = check_order(order, labels)
        for epoch in range(epochs):
            self._rows(rows, epoch)

    def _rows(self, order: list[Tensor], epoch: int) -> list[Tensor]:
        phase = self.phase(epoch)
        rows = [row[int(phase.first * len(row)) : int(phase.last * len(row))] for row in order]
        for label, (row, whole) in enumerate(zip(rows, order, strict=True)):
            if not len(row):
                raise ValueError(
                    f"The curriculum leaves no image of class {label}, which has {len(whole)}, in epoch {epoch}. "
                    "Raise `initial_ratio`."
                )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data for JSON."""
        return asdict(self) | {"remove": [list(step) for step in self.remove]}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "DataCurriculum":
        """Makes a curriculum of what [`~DataCurriculum.to_dict`] returned.

        Args:
            settings (`Mapping[str, Any]`):
                The settings.

        Returns:
            [`DataCurriculum`]: the curriculum.

        Raises:
            ValueError: If a setting is unknown.
        """
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(names))
        if unknown:
            raise ValueError(f"Settings of a curriculum are {', '.join(names)}; got {', '.join(unknown)}.")
        return cls(**settings)


def depth_report(names: Sequence[str], shapes: Sequence[Sequence[int]], drop_ratio: float) -> list[tuple[str, float]]:
    """Says how much of each parameter tensor matching leaves out, if it drops the first share of all parameters.

    Args:
        names (`Sequence[str]`):
            Names of the parameters, in their order.
        shapes (`Sequence[Sequence[int]]`):
            Their shapes.
        drop_ratio (`float`):
            Share of all entries, counted from the first, that is left out.

    Returns:
        `list[tuple[str, float]]`: for each parameter its name and the share of it that is left out.

    Raises:
        ValueError: If the ratio is outside [0, 1).

    Example:

    ```python
    >>> from hf_effml.distillation.pad import depth_report

    >>> depth_report(["conv.weight", "conv.bias", "head.weight"], [(3, 2), (2,), (4, 2)], 0.45)
    [('conv.weight', 1.0), ('conv.bias', 0.5), ('head.weight', 0.0)]

    ```
    """
    sizes = [math.prod(shape) for shape in shapes]
    left = _dropped(sizes, drop_ratio)
    report = []
    for name, size in zip(names, sizes, strict=True):
        taken = min(left, size)
        left -= taken
        report.append((name, taken / size if size else 0.0))
    return report


def describe_depth(names: Sequence[str], shapes: Sequence[Sequence[int]], drop_ratio: float) -> str:
    """Says in one line what matching leaves out, for logs and cards.

    Args:
        names, shapes, drop_ratio:
            See [`depth_report`].

    Returns:
        `str`: the line.

    Example:

    ```python
    >>> from hf_effml.distillation.pad import describe_depth

    >>> describe_depth(["conv.weight", "conv.bias", "head.weight"], [(3, 2), (2,), (4, 2)], 0.7)
    '11 of 16 parameters are not matched: conv.weight to conv.bias and 38 % of head.weight'

    ```
    """
    sizes = [math.prod(shape) for shape in shapes]
    dropped, total = _dropped(sizes, drop_ratio), sum(sizes)
    if not dropped:
        return f"all {total:,} parameters are matched"
    report = depth_report(names, shapes, drop_ratio)
    whole = [name for name, share in report if share == 1]
    parts = [whole[0] if len(whole) == 1 else f"{whole[0]} to {whole[-1]}"] if whole else []
    parts += [f"{share:.0%} of {name}".replace("%", " %") for name, share in report if 0 < share < 1]
    return f"{dropped:,} of {total:,} parameters are not matched: {' and '.join(parts)}"


def _dropped(sizes: Sequence[int], drop_ratio: float) -> int:
    if not 0 <= drop_ratio < 1:
        raise ValueError(f"`drop_ratio` must be at least 0 and less than 1; got {drop_ratio}.")
    return int(drop_ratio * sum(sizes))
