"""Classes of images: their numbers and names, the same in all splits, and their place among those of a model."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging


__all__ = [
    "ClassNumbers",
    "are_names",
    "check_same_classes",
    "in_order",
    "known_classes",
    "match_classes",
    "number_classes",
]

logger = logging.get_logger(__name__)

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
        ValueError: If a row has no class, the column holds no classes, or two splits spell a class otherwise.
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
        found = {each for rows in values.values() for each in rows if each is not None}
        order = sorted(each for each in found if each >= 0) if kind == "int" else in_order(found)
        names = [str(each) for each in order]
    numbers = {each: number for number, each in enumerate(order)}
    for split in used:
        _check(name, split, values[split], numbers)
    ids = order if kind == "int" else list(range(len(order)))
    found_numbers = {split: np.array([numbers[each] for each in values[split]], dtype=np.int64) for split in used}
    _check_taught(name, names, found_numbers)
    return ClassNumbers(names, ids, found_numbers)


def in_order(names: Iterable[str]) -> list[str]:
    """Sorts names of classes, as numbers if all of them are some: `"10"` is one that somebody has saved as a text.

    Args:
        names (`Iterable[str]`):
            The names.

    Returns:
        `list[str]`: sorted.
    """
    names = list(names)
    return sorted(names, key=int if all(re.fullmatch("0|[1-9][0-9]*", each) for each in names) else None)


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
    names, known = ([_composed(each) for each in some] for some in (names, known_classes(config)))
    if names == known:
        return list(range(len(names)))
    # `LABEL_10` may stand before `LABEL_2` where names are sorted, and is the same class in both.
    if not set(names) <= set(known) and not (are_names(names) and are_names(known)):
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
    ours, theirs = ([_composed(each) for each in some] for some in (ours, theirs))
    if ours != theirs and (set(ours) == set(theirs) or (are_names(ours) and are_names(theirs))):
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


def _check_taught(name: str, names: Sequence[str], numbers: Mapping[str, np.ndarray]) -> None:
    """Classes to test on need images to train on; where those are spelled otherwise, two names are one class."""
    train, *tests = numbers
    taught = set(numbers[train].tolist())
    for test in tests:
        met = set(numbers[test].tolist())
        twins = {_spelling(names[number]): names[number] for number in taught - met}
        for number in sorted(met - taught):
            twin = twins.get(_spelling(names[number]))
            if twin is not None:
                raise ValueError(
                    f"The split `{test}` of `{name}` has a class {names[number]!r} where `{train}` has {twin!r}: "
                    "nothing would be trained on the one or tested on the other. Spell both alike."
                )
        if met - taught:
            logger.warning(
                f"The split `{train}` of `{name}` has no image of classes that `{test}` has: "
                f"{_listed([names[number] for number in sorted(met - taught)])}."
            )


def _composed(name: Any) -> str:
    """The same letters may be written in two ways."""
    return unicodedata.normalize("NFC", str(name))


def _spelling(name: str) -> str:
    """What is left of a name without capitals, spaces and hyphens."""
    return re.sub(r"[\s_]+|(?<=\w)-(?=\w)", "", unicodedata.normalize("NFKC", name).casefold())


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{each[:40]}`" for each in names[:_SHOWN]) or "none"
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
