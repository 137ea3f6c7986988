"""What is known about a distilled set, as plain values for the `distillation.json` beside it."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from hf_effml.distillation.evaluation.protocols import get_protocol
from hf_effml.distillation.evaluation.students import student_name
from hf_effml.distillation.evaluation.training_sets import as_training_set
from hf_effml.distillation.modeling_distilled_dataset import DistilledDatasetModel
from hf_effml.utils.forms import Form, check_forms, is_count, is_list, is_mapping, is_number, is_text, optional

from .run import DistillationRun


if TYPE_CHECKING:
    from hf_effml.distillation.bank.trajectories import TrajectoryBank
    from hf_effml.distillation.evaluation.report import EvaluationReport


__all__ = ["FORMAT_VERSION", "describe_distillation", "names_of_classes", "read_description"]

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
# What a configuration says about its file, and nothing about the network.
_ABOUT_THE_FILE = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")


def describe_distillation(
    model: DistilledDatasetModel,
    *,
    reports: "Sequence[EvaluationReport]" = (),
    bank: "TrajectoryBank | None" = None,
    license: str | None = None,
    run: DistillationRun | None = None,
) -> dict[str, Any]:
    """Gathers what others need to use a distilled set, to judge it and to make it again.

    What is not known is left out. Paths and tokens in what is passed stay in it; [`~hf_effml.hub.privacy.scrub`] takes
    them out.

    Args:
        model ([`DistilledDatasetModel`]):
            The set.
        reports (`Sequence[EvaluationReport]`, *optional*, defaults to `()`):
            From [`evaluate_distilled`], one per network.
        bank ([`TrajectoryBank`], *optional*):
            The experts.
        license (`str`, *optional*):
            The Hub's keyword for the license of the real images, which holds for those made from them too.
        run ([`DistillationRun`], *optional*):
            How it was made.

    Returns:
        `dict[str, Any]`: plain values for JSON.

    Raises:
        ValueError: If the learned step size is not positive.

    Example:

    ```python
    >>> from hf_effml import DistilledDatasetConfig, DistilledDatasetModel
    >>> from hf_effml.distillation.publishing.description import describe_distillation

    >>> model = DistilledDatasetModel(DistilledDatasetConfig(images_per_class=2, image_size=8))
    >>> info = describe_distillation(model)
    >>> info["image_shape"], info["protocol"]["epochs"], "bank" in info
    ([3, 8, 8], 1001, False)
    ```
    """
    found = {
        **_describe_set(model),
        "dataset": _describe_data(model.config.dataset, bank, license),
        "bank": None if bank is None else bank.repo_id or bank.folder.resolve().name,
        "experts": None if bank is None else _describe_experts(bank),
        **(DistillationRun() if run is None else run).to_dict(),
        "results": [report.to_dict() for report in reports],
    }
    # As the file will hold it, with names as keys and lists instead of tuples.
    return json.loads(json.dumps({key: value for key, value in found.items() if value is not None}, default=str))


def read_description(path: Path) -> dict[str, Any]:
    """Reads the `distillation.json` of a set.

    Args:
        path (`Path`):
            The file.

    Returns:
        `dict[str, Any]`: what [`describe_distillation`] has found, and the files of the set.

    Raises:
        ValueError: If it describes no set, or was written by a later version of this package.
    """
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        number = {name: info[name] for name in _FORMS}["format_version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` does not describe a distilled set ({error!r}). Save the set again.") from error
    if is_count(number) and number > FORMAT_VERSION:
        raise ValueError(
            f"`{path}` was written by a later version of hf-effml ({info.get('hf_effml_version')}). Run `pip install "
            "-U hf-effml`."
        )
    check_forms(info, _FORMS | _OPTIONAL_FORMS, str(path), "Save the set again.")
    return info


def names_of_classes(model: DistilledDatasetModel) -> list[str]:
    """Names of a set's classes, in the order of their numbers.

    Args:
        model ([`DistilledDatasetModel`]):
            The set.

    Returns:
        `list[str]`
    """
    return [str(model.config.id2label[number]) for number in range(model.config.num_labels)]


def _describe_set(model: DistilledDatasetModel) -> dict[str, Any]:
    """What the set knows about itself, and how to train on it."""
    config = model.config
    student = {key: value for key, value in (config.student or {}).items() if key not in _ABOUT_THE_FILE}
    low, high = model.images.detach().aminmax()
    return {
        "format_version": FORMAT_VERSION,
        "hf_effml_version": version("hf-effml"),
        "method": config.method,
        "classes": names_of_classes(model),
        "images_per_class": config.images_per_class,
        "images": config.num_images,
        "image_shape": list(model.images.shape[1:]),
        "value_range": [low.item(), high.item()],
        "soft_labels": "logits",
        "learning_rate": float(model.lr.detach()),
        "preprocessing": config.preprocessing,
        "student": student or None,
        "student_name": student_name(student) if student else None,
        "protocol": get_protocol("tm").for_set(as_training_set(model)).to_dict(),
    }


def _describe_data(
    dataset: Mapping[str, Any] | None, bank: "TrajectoryBank | None", license: str | None
) -> dict[str, Any] | None:
    found = dict(dataset or {})
    experts = {} if bank is None else bank.metadata.get("dataset") or {}
    splits = {name: experts[f"{name}_images"] for name in ("train", "validation") if experts.get(f"{name}_images")}
    if splits:
        found.setdefault("splits", splits)
    if license is not None:
        found["license"] = license
    return {key: value for key, value in found.items() if value is not None} or None


def _describe_experts(bank: "TrajectoryBank") -> dict[str, Any]:
    names = ("training", "augmentation", "curriculum")
    found = {"number": len(bank), "revision": bank.revision, "epochs": [bank.epochs[0], bank.epochs[-1]]}
    found |= {name: bank.metadata.get(name) for name in names}
    return {key: value for key, value in found.items() if value is not None}


def _is_protocol(value: Any) -> bool:
    return is_mapping(value) and is_mapping(value.get("augmentation")) and is_count(value.get("batch_size"))


def _is_report(value: Any) -> bool:
    return is_mapping(value) and is_mapping(value.get("protocol")) and is_mapping(value.get("accuracies"))


# What is read out of a description, and what of it may be missing.
_FORMS: dict[str, Form] = {
    "classes": ("a list of names", lambda value: is_list(value, is_text) and value != []),
    "files": (
        "a mapping from names to digests",
        lambda value: is_mapping(value) and all(map(is_text, value.values())),
    ),
    "format_version": ("a number", is_count),
    "hf_effml_version": ("a text", is_text),
    "image_shape": ("channels, height and width", lambda value: is_list(value, is_count, 3)),
    "images": ("a positive number", is_count),
    "images_per_class": ("a positive number", is_count),
    "learning_rate": ("a positive number", lambda value: is_number(value) and value > 0),
    "protocol": ("a protocol with its `augmentation`", _is_protocol),
    "value_range": ("two numbers", lambda value: is_list(value, is_number, 2)),
}
_OPTIONAL_FORMS: dict[str, Form] = {
    "results": ("a list of reports", optional(lambda value: is_list(value, _is_report))),
    **{name: ("a text", optional(is_text)) for name in ("bank", "method", "preprocessing", "student_name")},
    **{
        name: ("a mapping", optional(is_mapping))
        for name in ("arguments", "dataset", "experts", "selected", "student", "versions")
    },
}
