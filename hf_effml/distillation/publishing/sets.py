"""Distilled sets as files that anybody can use: an exact table, its description, its image processor, a picture."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import logging

from hf_effml.distillation.differentiable_augmentation import AugmentationSettings
from hf_effml.distillation.evaluation.training_sets import TrainingSet, as_training_set
from hf_effml.distillation.image_processing_zca import ZCA_WEIGHTS_NAME, ZCAImageProcessor
from hf_effml.distillation.modeling_distilled_dataset import DistilledDatasetModel
from hf_effml.utils.imports import require

from .description import FORMAT_VERSION, describe_distillation, names_of_classes
from .pictures import image_grid, map_grid, to_pictures


if TYPE_CHECKING:
    from datasets import Dataset


__all__ = ["DistilledSet", "check_distilled", "load_distilled", "save_distilled_dataset", "to_dataset"]

logger = logging.get_logger(__name__)

INFO_NAME = "distillation.json"
DATA_NAME = "data/train-00000-of-00001.parquet"
PICTURE_NAME, MAPS_NAME = "images.png", "maps.png"
_PROCESSOR_NAME = "preprocessor_config.json"
# What reading a set takes out of its description.
_NEEDED = ("classes", "files", "format_version", "images_per_class", "learning_rate", "protocol")


class DistilledSet(NamedTuple):
    """A distilled set with what is known about it.

    Args:
        training_set ([`TrainingSet`]):
            Images and labels, with the learned learning rate and the augmentation.
        info (`dict[str, Any]`):
            See [`describe_distillation`].
        processor ([`ZCAImageProcessor`], *optional*):
            What preprocesses real images as the synthetic ones are.
    """

    training_set: TrainingSet
    info: dict[str, Any]
    processor: ZCAImageProcessor | None

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        return list(self.info["classes"])


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


def save_distilled_dataset(
    model: DistilledDatasetModel,
    folder: str | Path,
    processor: ZCAImageProcessor | None = None,
    *,
    info: Mapping[str, Any] | None = None,
    maps: Tensor | None = None,
) -> Path:
    """Writes a synthetic set as a data set that loads with `datasets` alone.

    The folder gets a table, `distillation.json`, the image processor and a picture. Its card is written by
    [`~hf_effml.hub.write_card`], and [`~hf_effml.hub.push_folder`] (`hf-effml push`) pushes it.

    Args:
        model ([`DistilledDatasetModel`]):
            The synthetic set.
        folder (`str` or `Path`):
            Folder to write.
        processor ([`ZCAImageProcessor`], *optional*):
            What preprocessed the real images. Without it nobody can preprocess images for a network that was trained
            on the set.
        info (`Mapping`, *optional*):
            What is known about the set; what the model knows by itself if unset. See [`describe_distillation`].
        maps (`Tensor` of shape `(images, height, width)`, *optional*):
            Activation maps to draw over the images, in a picture of their own.

    Returns:
        `Path`: the folder.

    Raises:
        TypeError: If the processor is another kind of image processor.
        ValueError: If the set has values that are not finite, or the processor is not the one it was made with.

    Example:

    ```python
    >>> from hf_effml import load_distilled, save_distilled_dataset

    >>> save_distilled_dataset(model, "digits-distilled", processor)  # doctest: +SKIP
    >>> load_distilled("digits-distilled").training_set.images.shape  # doctest: +SKIP
    torch.Size([10, 1, 8, 8])
    ```
    """
    folder = Path(folder)
    _check_processor(model.config.preprocessing, processor)
    described = describe_distillation(model) if info is None else dict(info)
    table = to_dataset(model, processor)
    for name in (INFO_NAME, MAPS_NAME, _PROCESSOR_NAME, ZCA_WEIGHTS_NAME):
        (folder / name).unlink(missing_ok=True)
    (folder / DATA_NAME).parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / DATA_NAME)
    files = [DATA_NAME, *_save_processor(processor, folder)]
    images, columns = model.images.detach().cpu(), model.config.images_per_class
    image_grid(images, processor, columns).save(folder / PICTURE_NAME)
    if maps is not None:
        map_grid(images, maps, processor, columns).save(folder / MAPS_NAME)
    described["files"] = {name: _digest(folder / name) for name in files}
    # Last, because a folder without it is no set.
    text = json.dumps(described, indent=2, ensure_ascii=False)
    (folder / INFO_NAME).write_text(text + "\n", encoding="utf-8")
    return folder


def load_distilled(
    folder_or_hub_id: str | Path, revision: str | None = None, token: str | bool | None = None
) -> DistilledSet:
    """Loads a distilled set that was published as a data set, or the model that it was trained as.

    Args:
        folder_or_hub_id (`str` or `Path`):
            A folder, or an id on the Hub. Of a data set and a model with the same id, the data set is taken.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*):
            Access token; the stored one by default.

    Returns:
        [`DistilledSet`]: what to train on, what is known about it, and the image processor if there is one.

    Raises:
        FileNotFoundError: If there is no distilled set of that name.
        ValueError: If it is damaged, or made by a later version of this package.

    Example:

    ```python
    >>> from hf_effml import load_distilled

    >>> training_set, info, processor = load_distilled("alice/cifar10-pad-ipc10")  # doctest: +SKIP
    ```
    """
    name = str(folder_or_hub_id)
    if Path(name).is_dir():
        if Path(name, INFO_NAME).is_file():
            return _read_folder(Path(name))
        return _load_model(name, None, None)
    where = {"repo_type": "dataset", "token": token}
    try:
        path = Path(hf_hub_download(name, INFO_NAME, revision=revision, **where))
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError):
        return _load_model(name, revision, token)
    # The folder of a file in the cache is named by the commit; all other files come from the same one.
    for file in _read_info(path)["files"]:
        hf_hub_download(name, file, revision=path.parent.name, **where)
    return _read_folder(path.parent)


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version = {name: info[name] for name in _NEEDED}["format_version"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`{path}` does not describe a distilled set ({error!r}). Save the set again.") from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"`{path}` was written by a later version of hf-effml ({info.get('hf_effml_version')}). Run `pip install "
            "-U hf-effml`."
        )
    return info


def _read_folder(folder: Path) -> DistilledSet:
    info = _read_info(folder / INFO_NAME)
    for name, digest in info["files"].items():
        if not (folder / name).is_file() or _digest(folder / name) != digest:
            raise ValueError(
                f"`{folder / name}` is missing or not the file that `{INFO_NAME}` describes: the set is damaged, or "
                "was changed by hand. Load or save it again."
            )
    images, class_ids, soft_labels = _read_table(folder / DATA_NAME)
    augmentation = AugmentationSettings(**info["protocol"]["augmentation"])
    found = TrainingSet(images, class_ids, soft_labels, info["learning_rate"], augmentation)
    check_distilled(found, info["classes"], info["images_per_class"])
    has_processor = _PROCESSOR_NAME in info["files"]
    return DistilledSet(found, info, ZCAImageProcessor.from_pretrained(folder) if has_processor else None)


def _read_table(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    datasets = require("datasets")
    # It comes with datasets; used by itself, it copies nothing into a cache.
    read_table = import_module("pyarrow.parquet").read_table
    table = datasets.Dataset(read_table(path, columns=["image", "label", "soft_label"])).with_format("numpy")[:]
    images, class_ids, soft_labels = (torch.tensor(table[name]) for name in ("image", "label", "soft_label"))
    return images, class_ids, soft_labels


def _load_model(name: str, revision: str | None, token: str | bool | None) -> DistilledSet:
    """A set as the model that it was trained as."""
    where = {"revision": revision, "token": token}
    try:
        # A folder without a configuration gives an empty one.
        fields, reason = PreTrainedConfig.get_config_dict(name, **where)[0], None
    except OSError as error:
        fields, reason = {}, error
    if not fields:
        raise FileNotFoundError(
            f"`{name}` holds no distilled set: it is no folder with a `{INFO_NAME}` or a model, and no data set or "
            "model on the Hub that you may read. `hf-effml train pad` makes one."
        ) from reason
    if fields.get("model_type") != DistilledDatasetModel.config_class.model_type:
        raise ValueError(f"`{name}` is a model of type `{fields.get('model_type')}`, no distilled set.")
    model = DistilledDatasetModel.from_pretrained(name, use_safetensors=True, **where)
    try:
        processor = ZCAImageProcessor.from_pretrained(name, **where)
    except OSError:
        processor = None
    return DistilledSet(as_training_set(model), describe_distillation(model), processor)


def _check_processor(preprocessing: str | None, processor: ZCAImageProcessor | None) -> None:
    if processor is None:
        logger.warning(
            "The set is saved without an image processor: nobody can preprocess real images for what is trained on "
            "it. Pass `processor`, for example `bank.image_processor`."
        )
        return
    if not isinstance(processor, ZCAImageProcessor):
        raise TypeError(
            f"`processor` must be a ZCAImageProcessor, which can undo what it does; got a {type(processor).__name__}. "
            "With `do_whiten=False` it normalises as others do."
        )
    if preprocessing is not None and processor.fingerprint != preprocessing:
        raise ValueError(
            f"The set was distilled from images preprocessed in another way (`{preprocessing}`) than `processor` does "
            f"(`{processor.fingerprint}`). Pass the one of its bank, `bank.image_processor`."
        )


def _save_processor(processor: ZCAImageProcessor | None, folder: Path) -> list[str]:
    """Settings and matrices without the code that a model's folder carries: data sets on the Hub hold no programs."""
    if processor is None:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        processor.save_pretrained(scratch)
        settings = json.loads(Path(scratch, _PROCESSOR_NAME).read_text(encoding="utf-8"))
        settings.pop("auto_map", None)
        (folder / _PROCESSOR_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        matrices = Path(scratch, ZCA_WEIGHTS_NAME)
        if not matrices.exists():
            return [_PROCESSOR_NAME]
        (folder / ZCA_WEIGHTS_NAME).write_bytes(matrices.read_bytes())
    return [_PROCESSOR_NAME, ZCA_WEIGHTS_NAME]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
