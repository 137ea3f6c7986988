"""Classes of images: their numbers and names, the same in all splits, and their place among those of a model."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


__all__ = ["ClassNumbers", "are_names", "check_same_classes", "known_classes", "match_classes", "number_classes"]

_SHOWN = 12


class ClassNumbers(NamedTuple):
    """The classes of a data set.

    Args:
        names (`list[str]`):
            Their names, in the order of their numbers.
        ids (`list[int]`):
            What data of whole numbers call them; their numbers in all other data.
        numbers (`dict[str, np.ndarray]`):
            By split, the class number of every row.
    """

    names: list[str]
    ids: list[int]
    numbers: dict[str, np.ndarray]


def number_classes(name: str, splits: Mapping[str, Any], column: str, used: Sequence[str]) -> ClassNumbers:
    """Numbers the classes of all splits at once.

    Whole numbers stay what they are where they are 0 to n - 1, and otherwise keep their order; `False` is 0 and `True`
    is 1; texts are sorted, as numbers if all of them are some.

    Args:
        name (`str`):
            What to call the data set in messages.
        splits (`Mapping[str, datasets.Dataset]`):
            The rows.
        column (`str`):
            Where they have their labels.
        used (`Sequence[str]`):
            Splits whose rows must all have a class.

    Returns:
        [`ClassNumbers`]: with the numbers of the splits used.

    Raises:
        ValueError: If a row has no class, or the column holds no classes.
    """
    feature = splits[used[0]].features[column]
    values = {split: list(rows[column]) for split, rows in splits.items()}
    kind = _kind(name, column, feature)
    if kind == "names":
        names = [str(each) for each in feature.names]
        order: list[Any] = list(range(len(names)))
    elif kind == "bool":
        names, order = ["False", "True"], [False, True]
    else:
        negative = kind == "int"
        found = {each for rows in values.values() for each in rows if each is not None}
        # Texts such as "10" are numbers that somebody has saved as texts.
        as_number = kind != "int" and all(re.fullmatch("0|[1-9][0-9]*", str(each)) for each in found)
        order = sorted((each for each in found if not negative or each >= 0), key=int if as_number else None)
        names = [str(each) for each in order]
    numbers = {each: number for number, each in enumerate(order)}
    for split in used:
        _check(name, split, values[split], numbers)
    ids = order if kind == "int" else list(range(len(order)))
    found_numbers = {split: np.array([numbers[each] for each in values[split]], dtype=np.int64) for split in used}
    return ClassNumbers(names, ids, found_numbers)


def known_classes(config: Any) -> list[str]:
    """The classes of a model.

    Args:
        config (`PreTrainedConfig` or `Sequence[str]`):
            The model's configuration, or the names themselves.

    Returns:
        `list[str]`: their names, in the order of their numbers.
    """
    if isinstance(config, Sequence):
        return [str(name) for name in config]
    return [str(config.id2label[number]) for number in sorted(config.id2label)]


def match_classes(name: str, names: Sequence[str], config: Any) -> list[int]:
    """Finds the classes of a data set among those of a model, by their names.

    Where the names are `LABEL_0` and so on, of the data or of the model, numbers count.

    Args:
        name (`str`):
            What to call the data set in messages.
        names (`Sequence[str]`):
            Names of its classes.
        config (`PreTrainedConfig` or `Sequence[str]`):
            The model's configuration, or names of its classes.

    Returns:
        `list[int]`: the model's number of every class of the data.

    Raises:
        ValueError: If the model does not know a class, or another number of classes where it names none.
    """
    names, known = [str(each) for each in names], known_classes(config)
    if names == known:
        return list(range(len(names)))
    if not (are_names(names) and are_names(known)):
        if len(names) == len(known):
            return list(range(len(names)))
        raise ValueError(
            f"`{name}` has {len(names)} classes, {_listed(names)}; the model tells {len(known)} apart, "
            f"{_listed(known)}. Set `id2label` of its configuration to those of the data."
        )
    unknown = [each for each in names if each not in known]
    twice = [each for each in names if known.count(each) > 1]
    if unknown or twice:
        what = f"does not know `{unknown[0]}`" if unknown else f"has two classes `{twice[0]}`"
        raise ValueError(
            f"The model {what}: `{name}` has the classes {_listed(names)}; the model has {_listed(known)}. Take data "
            "of the model's classes, name those of the data as the model does, or train a model on these data."
        )
    places = {each: number for number, each in enumerate(known)}
    return [places[each] for each in names]


def check_same_classes(what: str, first: Any, second: Any) -> None:
    """Checks that two number their classes alike, where both have names for them.

    Args:
        what (`str`):
            Who they are, for messages.
        first, second (`PreTrainedConfig` or `Sequence[str]`):
            The configurations of two models, or the names of their classes.

    Raises:
        ValueError: If they do not.
    """
    ours, theirs = known_classes(first), known_classes(second)
    if ours != theirs and are_names(ours) and are_names(theirs):
        raise ValueError(
            f"{what} must number the same classes alike; got {_listed(ours)} and {_listed(theirs)}. Take one that was "
            "trained on the classes of the other."
        )


def are_names(names: Sequence[str]) -> bool:
    """Says whether names of classes say more than their numbers do.

    Args:
        names (`Sequence[str]`):
            The names.

    Returns:
        `bool`: `False` of `LABEL_0`, `LABEL_1` and so on, as configurations have them by default.
    """
    return any(name != f"LABEL_{number}" for number, name in enumerate(names))


def _kind(name: str, column: str, feature: Any) -> str:
    if hasattr(feature, "names"):
        return "names"
    held = str(getattr(feature, "dtype", feature))
    if re.fullmatch(r"u?int\d+", held):
        return "int"
    if held == "bool":
        return "bool"
    if held in ("string", "large_string", "string_view"):
        return "text"
    raise ValueError(
        f"The labels of `{name}`, in the column `{column}`, must be whole numbers, texts, booleans or a ClassLabel; "
        f"they are {held[:200]}. Turn them into whole numbers first."
    )


def _check(name: str, split: str, values: Sequence[Any], numbers: Mapping[Any, int]) -> None:
    wrong = [row for row, value in enumerate(values) if value not in numbers]
    if wrong:
        raise ValueError(
            f"{len(wrong)} images of `{name}` have no class: {values[wrong[0]]} is not in 0 to {len(numbers) - 1}, "
            f"first in row {wrong[0]} of the split `{split}`. Take a data set whose {split} images are labelled, or "
            "leave those rows out."
        )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{each[:40]}`" for each in names[:_SHOWN]) or "none"
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
