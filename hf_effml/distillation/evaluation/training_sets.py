"""Small sets of images to train on: distilled ones in whichever form they come, and random real ones."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_effml.distillation.differentiable_augmentation import AugmentationSettings
from hf_effml.distillation.flat_student import seed_from
from hf_effml.utils.sources.class_labels import known_classes


if TYPE_CHECKING:
    from hf_effml.distillation.real_images import RealImages


__all__ = ["TrainingSet", "as_training_set", "class_names", "random_real_images"]

_COLUMNS = ("image", "label", "soft_label")


class TrainingSet(NamedTuple):
    """Images to train on, with their labels.

    Args:
        images (`Tensor` of shape `(images, channels, height, width)`):
            Preprocessed images, float32.
        class_ids (`Tensor` of shape `(images,)`):
            Their classes, int64.
        soft_labels (`Tensor` of shape `(images, classes)`, *optional*):
            Logits of their classes.
        learning_rate (`float`, *optional*, defaults to 0.01):
            Learning rate to train with; a distilled set has learned its own.
        augmentation ([`AugmentationSettings`], *optional*):
            The augmentation it was distilled with, if known.
    """

    images: Tensor
    class_ids: Tensor
    soft_labels: Tensor | None = None
    learning_rate: float = 0.01
    augmentation: AugmentationSettings | None = None


def as_training_set(dataset: Any, learning_rate: float | None = None) -> TrainingSet:
    """Takes what is trained on out of a distilled set, in whichever form it is.

    Args:
        dataset ([`TrainingSet`], [`DistilledDatasetModel`] or `datasets.Dataset`):
            The set; a `datasets.Dataset` has the columns `image`, `label` and `soft_label`.
        learning_rate (`float`, *optional*):
            Learning rate to train with. A `datasets.Dataset` holds none.

    Returns:
        [`TrainingSet`]

    Raises:
        TypeError: If it is no distilled set.
        ValueError: If a column or the learning rate is missing.
    """
    if isinstance(dataset, TrainingSet):
        found = dataset
    elif hasattr(dataset, "class_ids") and hasattr(dataset, "lr"):
        found = TrainingSet(
            dataset.images.detach().float(),
            dataset.class_ids.detach(),
            dataset.labels.detach().float(),
            float(dataset.lr.detach()),
            dataset.config.augmentation,
        )
    elif hasattr(dataset, "column_names") and hasattr(dataset, "with_format"):
        found = _from_columns(dataset, learning_rate)
    else:
        raise TypeError(
            "`dataset` must be a TrainingSet, a DistilledDatasetModel or a datasets.Dataset; got a "
            f"{type(dataset).__name__}."
        )
    return found if learning_rate is None else found._replace(learning_rate=learning_rate)


def class_names(dataset: Any) -> list[str] | None:
    """The classes of a distilled set, as far as it says what they are.

    Args:
        dataset ([`TrainingSet`], [`DistilledDatasetModel`] or `datasets.Dataset`):
            The set.

    Returns:
        `list[str]` or `None`: their names, in the order of their numbers.
    """
    if hasattr(dataset, "class_ids") and hasattr(dataset, "lr"):
        return known_classes(dataset.config)
    return getattr((getattr(dataset, "features", None) or {}).get("label"), "names", None)


def random_real_images(real: "RealImages", class_ids: Tensor, seed: int = 0) -> Tensor:
    """Draws as many real images of every class as a distilled set has.

    Args:
        real ([`RealImages`]):
            The real images.
        class_ids (`Tensor` of shape `(images,)`):
            The classes of the distilled set.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draw.

    Returns:
        `Tensor` of shape `(images,)`: positions in `real`, in the order of `class_ids`.

    Raises:
        ValueError: If a class has too few.
    """
    generator = torch.Generator().manual_seed(seed_from(seed, "random real images"))
    chosen = torch.empty_like(class_ids, device="cpu")
    for label, positions in enumerate(real.per_class()):
        wanted = (class_ids == label).cpu()
        count = int(wanted.sum())
        if count > len(positions):
            raise ValueError(
                f"The class `{real.label_names[label]}` has {len(positions)} real images and {count} distilled ones. "
                "Give all training images as `real`."
            )
        chosen[wanted] = positions.cpu()[torch.randperm(len(positions), generator=generator)[:count]]
    return chosen


def _from_columns(dataset: Any, learning_rate: float | None) -> TrainingSet:
    missing = [name for name in _COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(f"`dataset` must have the columns {', '.join(_COLUMNS)}; it lacks {', '.join(missing)}.")
    if learning_rate is None:
        raise ValueError(
            "`learning_rate` is needed with a datasets.Dataset, which does not hold the learned one: it is in the "
            "`distillation.json` beside the set."
        )
    rows = dataset.with_format("numpy", columns=list(_COLUMNS))[:]
    images, class_ids, soft_labels = (torch.tensor(rows[name]) for name in _COLUMNS)
    if images.dim() != 4:
        raise ValueError(
            f"The column `image` must hold exact float images (channels, height, width); got {tuple(images.shape)}."
        )
    return TrainingSet(images.float(), class_ids.long(), soft_labels.float(), learning_rate)
