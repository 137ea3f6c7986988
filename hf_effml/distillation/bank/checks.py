"""Whether a student can follow the trajectories of a bank."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from hf_effml.distillation.flat_student import FlatStudent, student_config


__all__ = ["compare_student"]

# A student that differs in one of these is another network, whatever the shapes of its parameters.
_DECISIVE = ("model_type", "num_labels", "image_size", "num_channels")
_IRRELEVANT = {"architectures", "dtype", "id2label", "label2id", "problem_type", "transformers_version"}
_MOST_PARAMETERS = 2


def compare_student(metadata: Mapping[str, Any], student: FlatStudent) -> tuple[list[str], list[str]]:
    """Compares a student with the networks of a bank.

    Args:
        metadata (`Mapping`):
            Content of `bank.json`.
        student ([`FlatStudent`]):
            The student.

    Returns:
        `tuple[list[str], list[str]]`: differences that make it another architecture, and those that only might.
    """
    wrong, doubtful = _compare_configs(student_config(metadata["student"]), getattr(student.module, "config", None))
    ours = {entry["name"]: tuple(entry["shape"]) for entry in metadata["parameters"]}
    theirs = dict(zip(student.names, student.shapes, strict=True))
    differing = [name for name in dict.fromkeys([*ours, *theirs]) if ours.get(name) != theirs.get(name)]
    wrong += [
        f"`{name}` {_shape(ours.get(name))} in the bank, {_shape(theirs.get(name))} in the student"
        for name in differing[:_MOST_PARAMETERS]
    ]
    if not differing and list(ours) != student.names:
        wrong.append("their parameters have another order")
    if wrong:
        length = sum(math.prod(shape) for shape in ours.values())
        wrong.append(f"{length} parameters in the bank, {student.numel} in the student")
    return wrong, doubtful


def _compare_configs(ours: PreTrainedConfig, theirs: Any) -> tuple[list[str], list[str]]:
    if not isinstance(theirs, PreTrainedConfig):
        return [], []
    fields = [name for name in sorted(ours.to_dict()) if name not in _IRRELEVANT and not name.startswith("_")]
    wrong: list[str] = []
    doubtful: list[str] = []
    for name in dict.fromkeys([*_DECISIVE, *fields]):
        here, there = getattr(ours, name, None), getattr(theirs, name, None)
        if here != there:
            remarks = wrong if name in _DECISIVE else doubtful
            remarks.append(f"`{name}` {here} in the bank, {there} in the student")
    return wrong, doubtful


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {shape}"
