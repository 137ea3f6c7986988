"""The named rules by which networks are trained when distilled sets are judged."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from hf_effml.distillation.differentiable_augmentation import AugmentationSettings

from .training_sets import TrainingSet


__all__ = ["PROTOCOLS", "EvaluationProtocol", "get_protocol"]


def _check_learning_rate(learning_rate: float) -> None:
    if not 0 < learning_rate < math.inf:
        raise ValueError(
            f"`learning_rate` must be more than 0 and finite; got {learning_rate}. Where a set has learned an "
            "impossible one, name another: `get_protocol(name, learning_rate=0.01)`."
        )


@dataclass(frozen=True)
class EvaluationProtocol:
    """How a network is trained before its accuracy counts. The defaults are those of trajectory matching.

    Args:
        name (`str`, *optional*, defaults to `"tm"`):
            What to call it.
        labels (`str`, *optional*, defaults to `"soft"`):
            `"soft"` trains on the labels of the set, `"hard"` on its classes, `"teacher"` on what a trained network
            says of every augmented image.
        epochs (`int`, *optional*, defaults to 1001):
            Passes over the set.
        batch_size (`int`, *optional*, defaults to 128):
            Images per step.
        optimizer (`str`, *optional*, defaults to `"sgd"`):
            `"sgd"` or `"adamw"`.
        learning_rate (`float`, *optional*):
            Learning rate; that of the set if unset.
        momentum (`float`, *optional*, defaults to 0.9):
            Momentum of SGD.
        weight_decay (`float`, *optional*, defaults to 5e-4):
            Weight decay.
        schedule (`str`, *optional*, defaults to `"step"`):
            `"step"` divides the learning rate by ten once, `"cosine"` takes it down to zero, epoch by epoch.
        drop_epoch (`int`, *optional*, defaults to 501):
            With `"step"`, the epoch, counted from zero, from which on the learning rate is a tenth. Momentum is thrown
            away there. `None` never drops.
        augmentation ([`AugmentationSettings`], *optional*):
            Augmentation of the images. Unset, it is the one that the set was distilled with, and where the set does
            not know, the default of [`AugmentationSettings`].
        all_operations (`bool`, *optional*, defaults to `False`):
            Apply all operations of `augmentation` to every batch, one after the other, instead of one at random.
        cutmix (`bool`, *optional*, defaults to `False`):
            Paste a rectangle of another image of the batch into every image.

    Raises:
        ValueError: If a field has an impossible value.

    Example:

    ```python
    >>> from hf_effml.distillation.evaluation.protocols import get_protocol

    >>> get_protocol("tm").epochs, get_protocol("tm-short", epochs=100).drop_epoch
    (1001, 50)
    ```
    """

    name: str = "tm"
    labels: Literal["soft", "hard", "teacher"] = "soft"
    epochs: int = 1001
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["step", "cosine"] = "step"
    drop_epoch: int | None = 501
    augmentation: AugmentationSettings | None = None
    all_operations: bool = False
    cutmix: bool = False

    def __post_init__(self) -> None:
        choices = {
            "labels": ("soft", "hard", "teacher"),
            "optimizer": ("sgd", "adamw"),
            "schedule": ("step", "cosine"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {getattr(self, name)}.")
        if self.learning_rate is not None:
            _check_learning_rate(self.learning_rate)

    def for_set(self, training_set: TrainingSet) -> "EvaluationProtocol":
        """Fills what the protocol leaves to the set: learning rate and augmentation.

        Args:
            training_set ([`TrainingSet`]):
                The set.

        Returns:
            [`EvaluationProtocol`]: one that leaves nothing open.

        Raises:
            ValueError: If the set has learned a learning rate that is not positive and the protocol names none.
        """
        rate = training_set.learning_rate if self.learning_rate is None else self.learning_rate
        _check_learning_rate(rate)
        return replace(
            self,
            learning_rate=float(rate),
            augmentation=self.augmentation or training_set.augmentation or AugmentationSettings(),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON."""
        return asdict(self)


PROTOCOLS: Mapping[str, EvaluationProtocol] = {
    "tm": EvaluationProtocol("tm"),
    "tm-short": EvaluationProtocol("tm-short", epochs=300, drop_epoch=150),
    "hard": EvaluationProtocol("hard", labels="hard"),
    "kd": EvaluationProtocol(
        "kd",
        labels="teacher",
        epochs=300,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=1e-2,
        schedule="cosine",
        drop_epoch=None,
        augmentation=AugmentationSettings("crop_flip"),
        all_operations=True,
        cutmix=True,
    ),
}


def get_protocol(name: str | EvaluationProtocol, **overrides: Any) -> EvaluationProtocol:
    """Finds a protocol by its name.

    `"tm"` is what published tables of trajectory matching use, `"tm-short"` the same in 300 epochs, `"hard"` is `"tm"`
    with hard labels, and `"kd"` is for comparison with methods that train on a teacher's labels only.

    Args:
        name (`str` or [`EvaluationProtocol`]):
            One of `PROTOCOLS`, or a protocol to change.
        overrides (`dict`, *optional*):
            Fields to change. With another number of `epochs` the drop of the learning rate moves along.

    Returns:
        [`EvaluationProtocol`]

    Raises:
        ValueError: If there is no such protocol.
    """
    if isinstance(name, str) and name not in PROTOCOLS:
        raise ValueError(f"`{name}` is no protocol; choose one of {', '.join(PROTOCOLS)}.")
    protocol = PROTOCOLS[name] if isinstance(name, str) else name
    if "epochs" in overrides and protocol.drop_epoch is not None:
        overrides.setdefault("drop_epoch", (overrides["epochs"] * protocol.drop_epoch) // protocol.epochs)
    return replace(protocol, **overrides)
