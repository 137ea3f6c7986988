"""What a published set was made of, found again for its evaluation: experts, real images, the network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_effml.distillation.bank.trajectories import TrajectoryBank
from hf_effml.distillation.real_images import RealImageData, RealImages, reload_real_images
from hf_effml.utils.sources.class_labels import check_same_classes

from .sets import DistilledSet


__all__ = ["find_bank", "find_images", "find_student", "images_to_measure_on"]

logger = logging.get_logger(__name__)


def find_bank(info: Mapping[str, Any], beside: str | Path) -> TrajectoryBank | None:
    """Opens the bank that a set names, if it can be found.

    Args:
        info (`Mapping`):
            What is known about the set.
        beside (`str` or `Path`):
            Where the set is: a bank is recorded by its folder's name alone, and may lie here or beside the set.

    Returns:
        [`TrajectoryBank`] or `None`: the bank; `None`, with a warning, where it is not to be found.
    """
    recorded = info.get("bank")
    if recorded is None:
        return None
    near = next((path for path in (Path(recorded), Path(beside).parent / recorded) if path.is_dir()), None)
    reason = ""
    try:
        if near is not None or "/" in recorded:
            return TrajectoryBank.from_pretrained(near or recorded)
    except (OSError, ValueError) as error:
        reason = f" ({error})"
    logger.warning(f"The set names the bank `{recorded}`, which is not here{reason}. Say where it is with `--bank`.")
    return None


def find_images(
    found: DistilledSet, bank: TrajectoryBank | None, name: str | None = None, where: str = ""
) -> RealImageData:
    """Loads the real images of a set, preprocessed as the distilled ones and with the set's numbers of classes.

    Args:
        found ([`DistilledSet`]):
            The set.
        bank ([`TrajectoryBank`], *optional*):
            Its experts.
        name (`str`, *optional*):
            Where the data set is now, in place of what is recorded.
        where (`str`, *optional*, defaults to `""`):
            What to call the set in messages.

    Returns:
        [`RealImageData`]

    Raises:
        ValueError: If nothing says which data or how images were preprocessed, the experts saw others, or the set
            does not know a class of the data.
    """
    processor = found.processor or (bank.image_processor if bank is not None else None)
    if processor is None:
        raise ValueError(
            f"`{where}` does not say how its images were preprocessed. Give its experts with `--bank`: they know."
        )
    if bank is not None:
        bank.check_preprocessing(processor.fingerprint)
        check_same_classes("The set and its experts", found.label_names, bank.label_names or found.label_names)
    data = reload_real_images((found.info.get("dataset") or {}).get("arguments"), processor, name)
    return data.aligned_to(found.label_names)


def find_student(info: Mapping[str, Any], bank: TrajectoryBank | None) -> Any:
    """Says with which network a set was made.

    Args:
        info (`Mapping`):
            What is known about the set.
        bank ([`TrajectoryBank`], *optional*):
            Its experts.

    Returns:
        `dict` or `PreTrainedConfig`: the network's configuration.

    Raises:
        ValueError: If nothing says it.
    """
    if info.get("student"):
        return info["student"]
    if bank is not None:
        return bank.student_config
    raise ValueError(
        "The set does not say with which network it was made. Name one, for example `--students convnet`."
    )


def images_to_measure_on(data: RealImageData, split: str, info: Mapping[str, Any]) -> RealImages:
    """Takes the images of a split, if a set has not seen them.

    Args:
        data ([`RealImageData`]):
            The real images.
        split (`str`):
            `"test"` or `"validation"`.
        info (`Mapping`):
            What is known about the set.

    Returns:
        [`RealImages`]

    Raises:
        ValueError: If validation images are wanted that may be among those that the set was made of.
    """
    if split == "test":
        return data.test
    if data.validation is None:
        raise ValueError(f"`{data.name}` was used without validation images. Measure with `--split test`.")
    if data.train.fingerprint != (info.get("dataset") or {}).get("fingerprint"):
        raise ValueError(
            f"The training images of `{data.name}` are not those that the set was made of, which may have seen the "
            "validation images. Measure with `--split test`."
        )
    return data.validation
