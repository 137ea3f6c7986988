"""Distilled sets as files that anybody can use: an exact table, its description, its image processor, a picture."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import logging

from hf_effml.distillation.differentiable_augmentation import AugmentationSettings
from hf_effml.distillation.evaluation.training_sets import TrainingSet, as_training_set
from hf_effml.distillation.image_processing_zca import ZCA_WEIGHTS_NAME, ZCAImageProcessor
from hf_effml.distillation.modeling_distilled_dataset import DistilledDatasetModel
from hf_effml.utils.files import is_leftover, remove_leftovers, replacing_folder, write_json

from .description import describe_distillation, read_description
from .pictures import image_grid, map_grid
from .tables import check_distilled, read_table, to_dataset


__all__ = ["DistilledSet", "load_distilled", "save_distilled_dataset"]

logger = logging.get_logger(__name__)

INFO_NAME = "distillation.json"
DATA_NAME = "data/train-00000-of-00001.parquet"
PICTURE_NAME, MAPS_NAME = "images.png", "maps.png"
_PROCESSOR_NAME = "preprocessor_config.json"


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
    with _replacing(folder.resolve()) as new:
        (new / DATA_NAME).parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(new / DATA_NAME)
        files = [DATA_NAME, *_save_processor(processor, new)]
        images, columns = model.images.detach().cpu(), model.config.images_per_class
        image_grid(images, processor, columns).save(new / PICTURE_NAME)
        if maps is not None:
            map_grid(images, maps, processor, columns).save(new / MAPS_NAME)
        described["files"] = {name: _digest(new / name) for name in files}
        # Last, because a folder without it is no set.
        write_json(new / INFO_NAME, described)
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
    for file in read_description(path)["files"]:
        hf_hub_download(name, file, revision=path.parent.name, **where)
    return _read_folder(path.parent)


def _read_folder(folder: Path) -> DistilledSet:
    info = read_description(folder / INFO_NAME)
    if DATA_NAME not in info["files"]:
        raise ValueError(f"`{folder / INFO_NAME}` does not list `{DATA_NAME}`, the set itself. Save the set again.")
    for name, digest in info["files"].items():
        if not (folder / name).is_file() or _digest(folder / name) != digest:
            raise ValueError(
                f"`{folder / name}` is missing or not the file that `{INFO_NAME}` describes: the set is damaged, or "
                "was changed by hand. Load or save it again."
            )
    images, class_ids, soft_labels = read_table(folder / DATA_NAME)
    found = TrainingSet(images, class_ids, soft_labels, info["learning_rate"], _augmentation(info, folder))
    try:
        check_distilled(found, info["classes"], info["images_per_class"])
    except ValueError as error:
        raise ValueError(f"`{folder / DATA_NAME}`: {error}") from error
    has_processor = _PROCESSOR_NAME in info["files"]
    return DistilledSet(found, info, ZCAImageProcessor.from_pretrained(folder) if has_processor else None)


def _augmentation(info: dict[str, Any], folder: Path) -> AugmentationSettings:
    settings = info["protocol"]["augmentation"]
    known = {each.name for each in fields(AugmentationSettings)}
    if settings.keys() - known:
        raise ValueError(
            f"`protocol.augmentation` in `{folder / INFO_NAME}` may hold {', '.join(sorted(known))}; got "
            f"{', '.join(sorted(settings))}. Save the set again."
        )
    return AugmentationSettings(**settings)


def _load_model(name: str, revision: str | None, token: str | bool | None) -> DistilledSet:
    """A set as the model that it was trained as."""
    where = {"revision": revision, "token": token}
    try:
        # A folder without a configuration gives an empty one.
        config, reason = PreTrainedConfig.get_config_dict(name, **where)[0], None
    except (OSError, TypeError) as error:
        config, reason = {}, error
    if not config or not isinstance(config, dict):
        raise FileNotFoundError(
            f"`{name}` holds no distilled set: it is no folder with a `{INFO_NAME}` or a model, and no data set or "
            "model on the Hub that you may read. `hf-effml train pad` makes one."
        ) from reason
    if config.get("model_type") != DistilledDatasetModel.config_class.model_type:
        raise ValueError(f"`{name}` is a model of type `{config.get('model_type')}`, no distilled set.")
    model = _read_model(name, **where)
    try:
        processor = ZCAImageProcessor.from_pretrained(name, **where)
    except OSError:
        processor = None
    return DistilledSet(as_training_set(model), describe_distillation(model), processor)


def _read_model(name: str, **where: Any) -> DistilledDatasetModel:
    """The model, if all of it was in the file and can be trained on."""
    try:
        model, found = DistilledDatasetModel.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, **where
        )
    except (AttributeError, LookupError, RuntimeError, SafetensorError, TypeError) as error:
        raise ValueError(
            f"The weights of `{name}` are damaged, or of another shape than its configuration: {error}"
        ) from error
    if found["missing_keys"]:
        raise ValueError(
            f"The weights of `{name}` lack `{'`, `'.join(sorted(found['missing_keys']))}`. Save it again."
        )
    for parameter, value in model.named_parameters():
        bad = int((~value.isfinite()).sum())
        if bad:
            raise ValueError(
                f"`{parameter}` in the `model.safetensors` of `{name}` holds {bad} value(s) that are not finite. Load "
                "or save it again, or take an earlier checkpoint."
            )
    if not model.lr > 0:
        raise ValueError(f"`lr` in the `model.safetensors` of `{name}` must be positive; got {model.lr.item():.3g}.")
    return model


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


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Lends a folder for a set that takes the place of the old one as a whole; what else lies there comes along."""
    own = {INFO_NAME, MAPS_NAME, PICTURE_NAME, _PROCESSOR_NAME, ZCA_WEIGHTS_NAME, DATA_NAME}
    if folder.is_mount() or folder in (Path.cwd(), *Path.cwd().parents):
        # It cannot be renamed, or nobody would stand in it any more.
        for name in own:
            (folder / name).unlink(missing_ok=True)
        yield folder
        return

    def skipped(parent: str, names: list[str]) -> list[str]:
        place = Path(parent).relative_to(folder)
        return [name for name in names if is_leftover(name) or (place / name).as_posix() in own]

    with replacing_folder(folder) as new:
        if folder.is_dir():
            shutil.copytree(folder, new, symlinks=True, ignore=skipped, copy_function=_link, dirs_exist_ok=True)
        yield new
    remove_leftovers(folder.parent, of=folder.name)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target)


def _save_processor(processor: ZCAImageProcessor | None, folder: Path) -> list[str]:
    """Settings and matrices without the code that a model's folder carries: data sets on the Hub hold no programs."""
    if processor is None:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        processor.save_pretrained(scratch)
        settings = json.loads(Path(scratch, _PROCESSOR_NAME).read_text(encoding="utf-8"))
        settings.pop("auto_map", None)
        write_json(folder / _PROCESSOR_NAME, settings)
        matrices = Path(scratch, ZCA_WEIGHTS_NAME)
        if not matrices.exists():
            return [_PROCESSOR_NAME]
        shutil.copyfile(matrices, folder / ZCA_WEIGHTS_NAME)
    return [_PROCESSOR_NAME, ZCA_WEIGHTS_NAME]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
