"""Whether a student can follow the trajectories of a bank, and whether they are long enough."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from hf_effml.distillation.flat_student import FlatStudent, student_config


__all__ = ["check_range", "compare_student", "in_words"]

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


def check_range(epochs: Sequence[int], max_start_epoch: int, expert_epochs: int, min_start_epoch: int) -> None:
    """Checks that there are parameters for every start that can be drawn and for its target.

    Args:
        epochs (`Sequence[int]`):
            Epochs that the bank keeps, ascending.
        max_start_epoch, expert_epochs, min_start_epoch (`int`):
            As for [`TrajectoryBank.check_range`].

    Raises:
        ValueError: If there are not.
    """
    if expert_epochs < 1:
        raise ValueError(f"`expert_epochs` must be at least 1; got {expert_epochs}.")
    if not 0 <= min_start_epoch < max_start_epoch:
        raise ValueError(
            f"`min_start_epoch` must be from 0 to below `max_start_epoch`; got {min_start_epoch} and "
            f"{max_start_epoch}."
        )
    last, kept = epochs[-1], set(epochs)
    starts = range(min_start_epoch, max_start_epoch)
    broken = next((t for t in starts if not {t, t + expert_epochs} <= kept), max_start_epoch)
    largest = min(broken, last - expert_epochs)
    if largest >= max_start_epoch:
        return
    wanted = f"`max_start_epoch` {max_start_epoch} with `expert_epochs` {expert_epochs}"
    what = f"It ends with epoch {last}" if broken > largest else f"A start at epoch {broken} cannot be matched"
    if largest <= min_start_epoch:
        remedy = f"No start from `min_start_epoch` {min_start_epoch} on is possible; the bank keeps {in_words(epochs)}"
    else:
        remedy = f"The largest possible `max_start_epoch` is {largest}"
    raise ValueError(f"{wanted} goes beyond the bank. {what}. {remedy}.")


def in_words(epochs: Sequence[int]) -> str:
    """Writes epochs for people.

    Args:
        epochs (`Sequence[int]`):
            Ascending.

    Returns:
        `str`: for example `"epochs 0 to 5"`.
    """
    if list(epochs) == list(range(epochs[0], epochs[-1] + 1)):
        return f"epochs {epochs[0]} to {epochs[-1]}" if len(epochs) > 1 else f"epoch {epochs[0]}"
    return f"epochs {', '.join(map(str, epochs))}"


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
