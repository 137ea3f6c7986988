"""From dataclasses, YAML and the command line to arguments; from what a program returns or raises to an exit code."""

import argparse
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from hf_effml.utils.imports import explain_failed_import

from .commands import command_line_of
from .help_text import COMMON_OPTIONS, program_help
from .recipes import read_recipes, recipe_file


# Errors that the user can mend; everything else is a failure of the program.
_WRONG_USE = (ValueError, TypeError, ImportError, OSError)


class UsageError(ValueError):
    """Wrong use of a command.

    Args:
        message (`str`):
            What is wrong and what is allowed.
        prog (`str`):
            The command whose `--help` says more.
    """

    def __init__(self, message: str, prog: str):
        super().__init__(f"{message}\n`{prog} --help` shows how to use it.")


def parse_arguments(
    *dataclass_types: type, argv: list[str] | None, program: str, description: str | None
) -> tuple[Any, ...]:
    """Fills dataclasses from their defaults, a recipe, a configuration file and the command line, later ones winning.

    Every field becomes an option with its help text; a field with `metadata={"positional": True}` becomes a positional
    argument. `--help` shows the fields which classes of ours declare, `--help-all` also those inherited from
    `TrainingArguments`. The program's name and its recipes follow from its file, see
    [`~hf_effml.cli.commands.command_line_of`] and [`~hf_effml.cli.recipes.read_recipes`].

    Args:
        dataclass_types (`type`):
            The dataclasses to fill, the program's own first.
        argv (`list[str]` or `None`):
            The arguments; `None` takes those of the process.
        program (`str`):
            The program's `__file__`.
        description (`str`):
            The program's `__doc__`; `--help` begins with it.

    Returns:
        `tuple`: one instance per dataclass, in order.
    """
    prog = command_line_of(program)
    parser = _dataclass_parser(dataclass_types, prog)
    common, arguments = _common_parser(prog).parse_known_args(sys.argv[1:] if argv is None else argv)
    recipes = read_recipes(program)
    if common.help or common.help_all:
        print(program_help(prog, description or "", dataclass_types, recipes, everything=common.help_all))
        raise SystemExit(0)
    fields = {field.name: field for cls in dataclass_types for field in dataclasses.fields(cls) if field.init}
    settings: dict[str, Any] = {}
    if common.recipe is not None:
        if common.recipe not in recipes:
            raise UsageError(f"`{common.recipe}` is no recipe; there are: {', '.join(recipes) or 'none'}.", prog)
        recipe = {name: value for name, value in recipes[common.recipe].items() if name != "about"}
        settings |= _check_settings(recipe, recipe_file(program), fields, prog)
    if common.config is not None:
        settings |= _read_settings(Path(common.config), fields, prog)
    values = _convert(parser, fields, settings, arguments)
    return tuple(cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.init}) for cls in dataclass_types)


def run_script(main: Callable[[list[str] | None], dict[str, Any] | None], argv: list[str] | None = None) -> int:
    """Runs a program's `main` and turns its outcome into output and an exit code.

    With `--json` what the program prints goes to stderr, and the dictionary it returns is the one object on stdout.

    Args:
        main (`Callable`):
            Takes the arguments, prints for people and returns its results as a JSON-plain dictionary.
        argv (`list[str]`, *optional*):
            The arguments; those of the process by default.

    Returns:
        `int`: 0 done, 1 failed, 2 wrong use.
    """
    argv = sys.argv[1:] if argv is None else argv
    as_json = "--json" in argv
    results: dict[str, Any] | None
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            results, code = main(argv), 0
    except BrokenPipeError:
        # The reader, `head` for example, has enough. Python flushes stdout at exit; that must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        results, code = {"error": "interrupted"}, 1
        print("interrupted", file=sys.stderr)
    except Exception as error:
        results, code = {"error": str(error)}, 2 if _is_wrong_use(error) else 1
        _report(error, debug="--debug" in argv)
    if as_json:
        print(json.dumps(results or {}))
    return code


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Ends a sentence about a wrong name with the valid one that is nearest.

    Args:
        name (`str`):
            What was typed.
        valid (`Iterable[str]`):
            What could have been meant.

    Returns:
        `str`: the end of the sentence; a full stop when nothing is near.
    """
    matches = get_close_matches(name, valid, n=1)
    return f"; did you mean `{matches[0]}`?" if matches else "."


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, knows positional fields and leaves missing values to its caller."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}.", self.prog)

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        if kwargs.pop("required", False):
            kwargs["default"] = dataclasses.MISSING
        if kwargs.pop("positional", False):
            names, kwargs["nargs"] = (names[0].removeprefix("--"),), "?"
        return super().add_argument(*names, **kwargs)


def _dataclass_parser(dataclass_types: tuple[type, ...], prog: str) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    parser_class = type("Parser", (HfArgumentParser, _Parser), {})
    return parser_class(dataclass_types, prog=prog, add_help=False, allow_abbrev=False)


def _common_parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    parser.add_argument("--config")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--help-all", "--help_all", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--debug", action="store_true")
    return parser


def _read_settings(path: Path, fields: dict[str, dataclasses.Field], prog: str) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"`{path}` is not valid YAML: {' '.join(str(error).split())}", prog) from error
    if not isinstance(settings, dict):
        raise UsageError(f"`{path}` must map names of options to values; got a {type(settings).__name__}.", prog)
    return _check_settings(settings, path, fields, prog)


def _check_settings(
    settings: dict[str, Any], path: Path, fields: dict[str, dataclasses.Field], prog: str
) -> dict[str, Any]:
    for key in map(str, settings):
        if key not in fields:
            raise UsageError(f"`{key}` in `{path.name}` is no option{did_you_mean(key, fields)}", prog)
    return settings


def _convert(
    parser: argparse.ArgumentParser,
    fields: dict[str, dataclasses.Field],
    settings: dict[str, Any],
    arguments: list[str],
) -> dict[str, Any]:
    """Sends the settings and then the command line through the same conversions."""
    positional = {key for key, field in fields.items() if field.metadata.get("positional")}
    parser.set_defaults(**{key: str(value) for key, value in settings.items() if key in positional})
    namespace = parser.parse_args(_as_options({k: v for k, v in settings.items() if k not in positional}))
    for key in (key for key, value in settings.items() if value is None):
        setattr(namespace, key, None)
    namespace, unknown = parser.parse_known_args(arguments, namespace)
    if unknown:
        name = unknown[0].partition("=")[0]
        options = [*COMMON_OPTIONS, *(f"--{key}" for key in fields if key not in positional)]
        if not name.startswith("-"):
            raise UsageError(f"`{name}` is one argument too many.", parser.prog)
        raise UsageError(f"`{name}` is no option{did_you_mean(name, options)}", parser.prog)
    values = vars(namespace)
    missing = [
        key.upper() if key in positional else f"--{key}" for key in fields if values[key] is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(f"`{'`, `'.join(missing)}` must be given.", parser.prog)
    return values


def _as_options(settings: dict[str, Any]) -> list[str]:
    """Lists keep their items apart, mappings travel as JSON, and null has no spelling on a command line."""
    options: list[str] = []
    for key, value in settings.items():
        if isinstance(value, list):
            options += [f"--{key}", *map(str, value)]
        elif value is not None:
            options.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return options


def _is_wrong_use(error: Exception) -> bool:
    # What a configuration with an impossible value raises; by name, because huggingface_hub is slow to import.
    strict = any(base.__name__ == "StrictDataclassError" for base in type(error).__mro__)
    return strict or isinstance(error, _WRONG_USE)


def _report(error: Exception, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    if isinstance(error, UsageError):
        print(f"error: {error}", file=sys.stderr)
        return
    message = " ".join((explain_failed_import(error) or str(error)).split())
    if not _is_wrong_use(error):
        message = f"{type(error).__name__}: {message}"
    print(f"error: {message or type(error).__name__}", file=sys.stderr)
    if not debug:
        print("--debug shows the traceback.", file=sys.stderr)
