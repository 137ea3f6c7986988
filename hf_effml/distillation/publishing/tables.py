"""Distilled sets as tables: exact images and labels, and what must hold of them."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_effml.distillation.evaluation.training_sets import TrainingSet, as_training_set
from hf_effml.distillation.image_processing_zca import ZCAImageProcessor
from hf_effml.distillation.modeling_distilled_dataset import DistilledDatasetModel
from hf_effml.utils.imports import require

from .description import names_of_classes
from .pictures import to_pictures


if TYPE_CHECKING:
    from datasets import Dataset


__all__ = ["check_distilled", "read_table", "to_dataset"]


def to_dataset(
    model: DistilledDatasetModel, processor: ZCAImageProcessor | None = None, preview: bool = True
) -> "Dataset":
    """Makes a data set of a synthetic one, exact to the last bit.

    Args:
        model ([`DistilledDatasetModel`]):
            The synthetic set.
        processor ([`ZCAImageProcessor`], *optional*):
            What preprocessed the real images; it turns the synthetic ones into pictures.
        preview (`bool`, *optional*, defaults to `True`):
            Whether to add those pictures. They are for looking at: bytes cannot hold what the images hold.

    Returns:
        `datasets.Dataset`: columns `image` (float32, what networks take), `preview`, `soft_label` (logits) and
        `label`.

    Raises:
        ValueError: If a value is not finite.

    Example:

    ```python
    >>> from hf_effml import DistilledDatasetConfig, DistilledDatasetModel, to_dataset

    >>> model = DistilledDatasetModel(DistilledDatasetConfig(images_per_class=2, image_size=8))
    >>> to_dataset(model).features["image"], to_dataset(model)["label"][:]
    (Array3D(shape=(3, 8, 8), dtype='float32'), [0, 0, 1, 1])
    ```
    """
    datasets = require("datasets")
    names, found = names_of_classes(model), as_training_set(model)
    check_distilled(found, names, model.config.images_per_class)
    images, class_ids, soft_labels = (part.cpu() for part in found[:3] if part is not None)
    features = {"image": datasets.Array3D(tuple(images.shape[1:]), "float32")}
    columns: dict[str, Any] = {"image": images.numpy()}
    if preview:
        features["preview"] = datasets.Image()
        columns["preview"] = to_pictures(images, processor)
    features["soft_label"] = datasets.List(datasets.Value("float32"), length=len(names))
    features["label"] = datasets.ClassLabel(names=names)
    columns |= {"soft_label": soft_labels.numpy(), "label": class_ids.numpy()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def check_distilled(training_set: TrainingSet, label_names: list[str], images_per_class: int) -> None:
    """Checks that a set can be published, or used when it comes from elsewhere.

    Args:
        training_set ([`TrainingSet`]):
            Images and labels.
        label_names (`list[str]`):
            Names of the classes.
        images_per_class (`int`):
            How many images every class is to have.

    Raises:
        ValueError: If a value is not finite, a shape does not fit or a class has more or fewer images.
    """
    images, class_ids, soft_labels, learning_rate, _ = training_set
    if images.dim() != 4 or images.dtype != torch.float32:
        raise ValueError(
            "Images of a set must be float32 of shape (images, channels, height, width); got "
            f"{images.dtype} of shape {tuple(images.shape)}."
        )
    wanted = (len(images), len(label_names))
    if soft_labels is None or tuple(soft_labels.shape) != wanted:
        given = "none" if soft_labels is None else tuple(soft_labels.shape)
        raise ValueError(f"Soft labels of a set must be logits of shape {wanted}, one per class; got {given}.")
    for name, values in (("images", images), ("soft labels", soft_labels)):
        bad = int((~values.isfinite()).flatten(1).any(1).sum())
        if bad:
            raise ValueError(
                f"The {name} of {bad} of {len(images)} images hold values that are not finite: the distillation has "
                "failed. Take an earlier checkpoint and lower its learning rates."
            )
    if not 0 < learning_rate < float("inf"):
        raise ValueError(
            f"The step size of a set must be positive and finite; got {learning_rate}. Take an earlier checkpoint and "
            "lower `lr_lr`."
        )
    counts = torch.bincount(class_ids, minlength=len(label_names)).tolist()
    wrong = [f"{count} of class {number}" for number, count in enumerate(counts) if count != images_per_class]
    if len(counts) > len(label_names) or wrong:
        raise ValueError(
            f"Every one of the {len(label_names)} classes must have {images_per_class} image(s), as the set's "
            f"configuration says; there are {', '.join(wrong[:5])}."
        )


def read_table(path: str | Path) -> tuple[Tensor, Tensor, Tensor]:
    """Reads images, classes and soft labels of a table, exact to the last bit.

    Args:
        path (`str` or `Path`):
            The parquet file.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: images of shape `(images, channels, height, width)`, class numbers of shape
        `(images,)` and logits of shape `(images, classes)`.

    Raises:
        ValueError: If it is damaged, or no such table.
    """
    datasets = require("datasets")
    # It comes with datasets; used by itself, it copies nothing into a cache.
    read_table = import_module("pyarrow.parquet").read_table
    names = ["image", "label", "soft_label"]
    try:
        table = datasets.Dataset(read_table(path, columns=names)).with_format("numpy")[:]
        images, class_ids, soft_labels = (torch.tensor(table[name]) for name in names)
    # Of Arrow, datasets and NumPy.
    except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"`{path}` is damaged, or no table of a distilled set: {error!r}. Load or save the set again."
        ) from error
    return images, class_ids, soft_labels
