"""Settings from YAML files: what may stand in one, and how a value becomes what a field of a dataclass takes."""

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_origin


__all__ = ["as_options", "check_device", "check_least", "check_plain", "check_type", "read_settings", "read_yaml"]

# Far above what any recipe needs; nine lines with aliases can stand for a billion values.
_MOST_BYTES, _MOST_VALUES, _MOST_LEVELS = 2**20, 100_000, 40


def read_yaml(path: Path) -> Any:
    """Reads a YAML file of plain values as YAML 1.2 has them: `1e-6` is a number, and `no` and `off` are texts.

    Args:
        path (`Path`):
            The file.

    Returns:
        What it holds.

    Raises:
        ValueError: If it is not YAML, says a key twice, or stands for more values than settings can have.
        OSError: If it cannot be read.
    """
    import yaml

    raw = path.read_bytes()
    if len(raw) > _MOST_BYTES:
        raise ValueError(f"`{path}` is no file of settings: it has {len(raw):,} bytes.")
    try:
        text = raw.decode()
        _check_depth(text)
        loader = _loader()(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count_values(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise ValueError(f"`{path}` is no file of settings: its values are nested too deeply.") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"`{path}` is not valid YAML: {' '.join(str(error).split())}") from error


@cache
def _loader() -> Any:
    """The loader in C, where there is one: it takes a tenth of the time."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        yaml_implicit_resolvers: dict[str, Any] = {}

    for kind, pattern, firsts in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
        (
            "float",
            r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf))|\.(?:nan|NaN)",
            list("-+0123456789."),
        ),
        ("merge", "<<", ["<"]),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), firsts)
    return Loader


def _check_depth(text: str) -> None:
    """Refuses nesting before it is composed, which the parser in C does recursively."""
    import yaml

    depth = 0
    for event in yaml.parse(text, _loader()):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS:
            raise ValueError(f"more than {_MOST_LEVELS} levels of nesting{event.start_mark}")


def _count_values(node: Any, known: dict[int, int]) -> int:
    """How many values a node stands for once its aliases are written out."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError(f"a value that contains itself{node.start_mark}")
        return known[id(node)]
    known[id(node)] = 0
    count = 1 + sum(_count_values(child, known) for child in _children(node))
    if count > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES:,} values, once its aliases are written out")
    known[id(node)] = count
    return count


def _children(node: Any) -> Iterator[Any]:
    if isinstance(node.value, str):
        return
    seen = set()
    for child in node.value:
        if not isinstance(child, tuple):
            yield child
            continue
        key, value = child
        if isinstance(key.value, str) and key.value in seen and key.value != "<<":
            raise ValueError(f"`{key.value}` is there twice{key.start_mark}")
        seen.add(key.value if isinstance(key.value, str) else None)
        yield from (key, value)


def read_settings(path: Path) -> dict[str, Any]:
    """Reads a file that maps names of options to values.

    Args:
        path (`Path`):
            The file.

    Returns:
        `dict`: the values by name.

    Raises:
        ValueError: If it is no such file.
    """
    try:
        settings = read_yaml(path)
    except OSError as error:
        raise ValueError(f"`--config {path}` cannot be read: {error.strerror or error}.") from error
    if settings is None:
        raise ValueError(f"`{path}` is empty. Write one option a line, as `learning_rate: 1e-3`.")
    if not isinstance(settings, dict):
        raise ValueError(f"`{path}` must map names of options to values; got a {type(settings).__name__}.")
    return {str(key): value for key, value in settings.items()}


def check_type(name: str, value: Any, action: argparse.Action, kinds: Sequence[Any]) -> None:
    """Refuses a value that would become something else on its way to a field.

    Args:
        name (`str`):
            Name of the field.
        value (`Any`):
            As it stands in the file.
        action (`argparse.Action`):
            The field's option.
        kinds (`Sequence[type]`):
            What the field may be.

    Raises:
        ValueError: If it would.
    """
    takes_many = action.nargs in ("+", "*") or any(get_origin(kind) is list for kind in kinds)
    items = value if isinstance(value, list) else [value]
    if value is None and NoneType not in kinds:
        raise ValueError("it is empty, and must have a value. Write one, or leave the line out.")
    if isinstance(value, list) and not takes_many:
        raise ValueError(f"it is a list, and must be one value; got {value}.")
    if value is not None and any(item is None or isinstance(item, list) for item in items):
        raise ValueError(f"it must be a list of plain values; got {value}.")
    if isinstance(value, dict) and action.type is not str:
        raise ValueError(f"it is a mapping, and must be a plain value; got {value}.")
    if action.type is str and any(isinstance(item, float) for item in items):
        raise ValueError(f"it is the number {value}, and must be a text. Write it in quotes.")
    check_plain(name, value)


def check_plain(name: str, value: Any) -> None:
    """Refuses numbers that are none and texts that no file can be called, also inside of lists and mappings.

    Args:
        name (`str`):
            What they are called.
        value (`Any`):
            The value.

    Raises:
        ValueError: If it is, or holds, NaN, an infinite number or a text with a NUL.
    """
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"`{name}` must not hold the character NUL; got {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number; got {value}.")
    if isinstance(value, list | tuple):
        for item in value:
            check_plain(name, item)
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(f"{name}.{key}", item)


def check_device(device: str | None) -> None:
    """Refuses a device that this machine does not have.

    Args:
        device (`str`, *optional*):
            Its name; a program chooses one if unset.

    Raises:
        ValueError: If nothing can be computed there.
    """
    if device is None or device == "cpu":
        return
    import torch

    try:
        torch.empty(1, device=device)
    # A torch without CUDA asserts.
    except (RuntimeError, AssertionError) as error:
        others = " or `cuda`" if torch.cuda.is_available() else ""
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"`--device {device}` cannot be used: {reason}. Here is `cpu`{others}.") from error


def check_least(options: Any, **bounds: float) -> None:
    """Refuses fields that are below what they must be.

    Args:
        options (`Any`):
            An instance of a dataclass.
        bounds (`dict`):
            The least value of each field.

    Raises:
        ValueError: If a field is below its least value.
    """
    for name, bound in bounds.items():
        value = getattr(options, name)
        if not value >= bound:
            raise ValueError(f"`{name}` must be at least {bound}; got {value}.")


def as_options(name: str, value: Any) -> list[str]:
    """Writes a value as it stands on a command line: lists keep their items apart, mappings travel as JSON.

    Args:
        name (`str`):
            Name of the field.
        value (`Any`):
            What is neither `None` nor an empty list.

    Returns:
        `list[str]`: the words.
    """
    if isinstance(value, list):
        return [f"--{name}", *map(_as_text, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else _as_text(value)}"]


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
