"""The `--help` of a program, written from the dataclasses it fills: its own options first, the inherited on demand."""

import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin


_MOST_RECIPES = 8

COMMON_OPTIONS = ("--recipe", "--config", "--json", "--debug", "--help", "--help-all")

_COMMON_HELP = (
    "Every program takes --recipe NAME, --config FILE (YAML; overrides the recipe, the command line overrides both), "
    "--json (print one JSON object), --debug (show the traceback of an error), --help and --help-all."
)


def program_help(
    prog: str,
    description: str,
    dataclass_types: tuple[type, ...],
    recipes: dict[str, dict[str, Any]],
    everything: bool,
) -> str:
    """Writes the help of a program.

    Args:
        prog (`str`):
            The command as typed.
        description (`str`):
            The program's docstring.
        dataclass_types (`tuple[type, ...]`):
            The dataclasses it fills, their field types resolved.
        recipes (`dict[str, dict]`):
            Its recipes by name.
        everything (`bool`):
            Whether to show the inherited fields too.

    Returns:
        `str`: the text, without a newline at its end.
    """
    options = {cls: _options(cls) for cls in dataclass_types}
    positional = [f.name.upper() for fields in options.values() for f in fields if f.metadata.get("positional")]
    sections = [" ".join(["usage:", prog, *positional, "[options]"]), inspect.cleandoc(description)]
    sections += [_group_help(cls, fields, everything) for cls, fields in options.items()]
    if recipes:
        sections.append(_recipes_help(recipes))
    sections.append(textwrap.fill(_COMMON_HELP, _width(), break_on_hyphens=False))
    hidden = sum(len(_inherited(cls)) for cls in dataclass_types)
    if hidden and not everything:
        sections.append(
            f"`{prog} --help-all` adds {hidden} inherited options: --seed, --save_strategy, --logging_steps ..."
        )
    return "\n\n".join(sections)


def _recipes_help(recipes: dict[str, dict[str, Any]]) -> str:
    """One line per recipe with what it is for, or the names alone where they are many."""
    if len(recipes) > _MOST_RECIPES:
        return "\n".join(["Recipes", textwrap.indent(textwrap.fill(_joined(recipes), _width() - 2), "  ")])
    short = {
        name: textwrap.shorten(recipe.get("about", ""), _width() - 26, placeholder=" ...")
        for name, recipe in recipes.items()
    }
    return "\n".join(["Recipes", *(help_line(name, text) for name, text in short.items())])


def _joined(names: Iterable[str]) -> str:
    """Names in one line; those that differ in a number at their end alone as `name{1,10,50}`."""
    numbers: dict[str, list[str]] = {}
    for name in names:
        stem = name.rstrip("0123456789")
        numbers.setdefault(stem, []).append(name.removeprefix(stem))
    return ", ".join(
        f"{stem}{{{','.join(ends)}}}" if len(ends) > 1 else f"{stem}{ends[0]}" for stem, ends in numbers.items()
    )


def help_line(label: str, text: str) -> str:
    """Sets a label and its wrapped text in two columns.

    Args:
        label (`str`):
            What is explained.
        text (`str`):
            The explanation.

    Returns:
        `str`: one or more lines.
    """
    first, *rest = textwrap.wrap(text, max(_width() - 26, 40), break_on_hyphens=False) or [""]
    head = f"  {label:<23} {first}" if len(label) < 24 else f"  {label}\n{'':26}{first}"
    return "\n".join([head.rstrip(), *(f"{'':26}{line}" for line in rest)])


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 119)


def _options(cls: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if field.init and f"--{field.name}" not in COMMON_OPTIONS]


def _declared(cls: type, by_transformers: bool) -> set[str]:
    bases = (base for base in cls.__mro__ if base.__module__.startswith("transformers.") == by_transformers)
    return {name for base in bases for name in inspect.get_annotations(base)}


def _inherited(cls: type) -> set[str]:
    """What `--help-all` adds; where a program writes is for everybody."""
    return {field.name for field in _options(cls)} & _declared(cls, by_transformers=True) - {"output_dir"}


def _group_help(cls: type, fields: list[dataclasses.Field], everything: bool) -> str:
    inherited = set() if everything else _inherited(cls)
    lines = [(cls.__doc__ or cls.__name__).splitlines()[0]]
    # What hardly anybody changes is named with its default only.
    rare = [field for field in fields if field.name in getattr(cls, "rarely_changed", ()) and not everything]
    shown = [field for field in fields if field.name not in inherited and field not in rare]
    lines += [help_line(_label(field), _describe(field)) for field in shown]
    if rare:
        lines.append(help_line("(rarely changed)", ", ".join(f"--{field.name} {_default(field)}" for field in rare)))
    changed = inherited & _declared(cls, by_transformers=False)
    if changed:
        defaults = (f"--{field.name} {_default(field)}" for field in fields if field.name in changed)
        lines.append(help_line("(other defaults)", ", ".join(defaults)))
    return "\n".join(lines)


def _label(field: dataclasses.Field) -> str:
    return field.name.upper() if field.metadata.get("positional") else f"--{field.name}"


def _describe(field: dataclasses.Field) -> str:
    text = "Folder to write." if field.name == "output_dir" else field.metadata.get("help", "")
    if get_origin(field.type) is Literal:
        text += f" One of: {', '.join(map(str, get_args(field.type)))}."
    default = _default(field)
    if default is dataclasses.MISSING:
        return text if field.metadata.get("positional") else f"{text} (required)"
    return text if default in (None, "", []) or default is False else f"{text} (default: {default})"


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return getattr(field.default, "value", field.default)
