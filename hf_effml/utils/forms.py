"""What fields of a JSON file must be, in words and as a test, so that a wrong one is named when the file is read."""

import math
from collections.abc import Callable, Mapping
from typing import Any


__all__ = ["Form", "check_forms", "is_count", "is_list", "is_mapping", "is_number", "is_text", "optional"]

Form = tuple[str, Callable[[Any], bool]]


def check_forms(values: Mapping[str, Any], forms: Mapping[str, Form], where: str, remedy: str) -> None:
    """Checks the fields of a file.

    Args:
        values (`Mapping`):
            What was read.
        forms (`Mapping[str, tuple[str, Callable]]`):
            For each name what its value must be: words that follow "must be", and a function that says whether it is.
        where (`str`):
            Name of the file.
        remedy (`str`):
            What to do about a wrong one: a sentence.

    Raises:
        ValueError: If one is wrong.

    Example:

    ```python
    >>> from hf_effml.utils.forms import check_forms, is_count

    >>> check_forms({"images": 3}, {"images": ("a positive number", is_count)}, "set.json", "Save it again.")

    ```
    """
    for name, (wanted, fits) in forms.items():
        if not fits(values.get(name)):
            text = repr(values.get(name))
            short = text if len(text) <= 80 else f"{text[:60]} ... ({len(text)} characters)"
            raise ValueError(f"`{name}` in `{where}` must be {wanted}; got {short}. {remedy}")


def is_count(value: Any, most: int = 10**9) -> bool:
    """Whether it is a whole number from 1 to `most`."""
    return type(value) is int and 0 < value <= most


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def is_text(value: Any) -> bool:
    """Whether it is a text."""
    return isinstance(value, str)


def is_mapping(value: Any) -> bool:
    """Whether it is a JSON object."""
    return isinstance(value, dict)


def is_list(value: Any, fits: Callable[[Any], bool], length: int | None = None) -> bool:
    """Whether it is a list of `length` items, or of any, that all fit."""
    return isinstance(value, list) and length in (None, len(value)) and all(map(fits, value))


def optional(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A test that `null` and an absent field pass, too."""
    return lambda value: value is None or fits(value)
