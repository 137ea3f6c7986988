"""From dataclasses, YAML and the command line to arguments; from what a program returns or raises to an exit code."""

import argparse
import dataclasses
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from .commands import command_line_of
from .errors import INTERRUPTED, exit_code, explain, explain_interruption
from .help_text import COMMON_OPTIONS, program_help
from .recipes import read_recipes, recipe_file
from .settings import as_options, check_device, check_plain, check_type, read_settings


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
    kinds = _kinds_of_fields(dataclass_types)
    parser = _dataclass_parser(dataclass_types, prog)
    common, arguments = _common_parser(prog).parse_known_args(sys.argv[1:] if argv is None else argv)
    recipes = read_recipes(program)
    if common.help or common.help_all:
        print(program_help(prog, description or "", dataclass_types, recipes, everything=common.help_all))
        raise SystemExit(0)
    fields = {field.name: field for cls in dataclass_types for field in dataclasses.fields(cls) if field.init}
    files = _settings_of(common, program, recipes, prog)
    values = _convert(parser, fields, kinds, files, arguments)
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
        `int`: 0 done, 1 failed, 2 wrong use, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    as_json = "--json" in argv
    results: dict[str, Any] | None
    last_words = None
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            results, code = main(argv), 0
    except BrokenPipeError:
        # The reader, `head` for example, has enough. Python flushes stdout at exit; that must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as error:
        results, code, last_words = {"error": "interrupted"}, INTERRUPTED, explain_interruption(error)
    except Exception as error:
        results, code = {"error": str(error)}, exit_code(error)
        _report(error, argv)
    if last_words is not None:
        # Progress bars write a last time when what was interrupted goes; this comes below them.
        gc.collect()
        print(last_words, file=sys.stderr)
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
            # Whatever is missing is for the caller to say.
            nargs = "*" if kwargs.get("nargs") == "+" else "?"
            names, kwargs["nargs"] = (names[0].removeprefix("--"),), nargs
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


def _settings_of(
    common: argparse.Namespace, program: str, recipes: dict[str, dict[str, Any]], prog: str
) -> list[tuple[Path, dict[str, Any]]]:
    """The settings of the recipe and of the configuration file, each with the file they stand in."""
    found = []
    if common.recipe is not None:
        if common.recipe not in recipes:
            raise UsageError(f"`{common.recipe}` is no recipe; there are: {', '.join(recipes) or 'none'}.", prog)
        recipe = {name: value for name, value in recipes[common.recipe].items() if name != "about"}
        found.append((recipe_file(program), recipe))
    if common.config is not None:
        path = Path(common.config)
        try:
            found.append((path, read_settings(path)))
        except ValueError as error:
            raise UsageError(str(error), prog) from error
    return found


def _convert(
    parser: argparse.ArgumentParser,
    fields: dict[str, dataclasses.Field],
    kinds: dict[str, tuple[Any, ...]],
    files: list[tuple[Path, dict[str, Any]]],
    arguments: list[str],
) -> dict[str, Any]:
    """Sends the settings and then the command line through the same conversions."""
    positional = {key for key, field in fields.items() if field.metadata.get("positional")}
    namespace = parser.parse_args([])
    actions = {action.dest: action for action in parser._actions}
    for path, settings in files:
        for key, value in settings.items():
            if key not in fields:
                raise UsageError(f"`{key}` in `{path.name}` is no option{did_you_mean(key, fields)}", parser.prog)
            try:
                check_type(key, value, actions[key], kinds[key])
                if key in positional:
                    parser.set_defaults(**{key: value if isinstance(value, list) else str(value)})
                elif value is None or value == [] or (isinstance(value, list) and actions[key].nargs is None):
                    setattr(namespace, key, value)
                else:
                    parser.parse_args(as_options(key, value), namespace)
            except ValueError as error:
                message = str(error).partition("\n")[0]
                raise UsageError(f"`{key}` in `{path.name}`: {message}", parser.prog) from error
    namespace, unknown = parser.parse_known_args(arguments, namespace)
    _refuse_unknown(unknown, [key for key in fields if key not in positional], parser.prog)
    values = vars(namespace)
    missing = [
        key.upper() if key in positional else f"--{key}" for key in fields if values[key] is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(f"`{'`, `'.join(missing)}` must be given.", parser.prog)
    for key in fields:
        try:
            check_plain(key, values[key])
            if key == "device":
                check_device(values[key])
        except ValueError as error:
            raise UsageError(str(error), parser.prog) from error
    return values


def _refuse_unknown(words: list[str], options: list[str], prog: str) -> None:
    if words:
        name = words[0].partition("=")[0]
        if not name.startswith("-"):
            raise UsageError(f"`{name}` is one argument too many.", prog)
        known = [*COMMON_OPTIONS, *(f"--{key}" for key in options)]
        raise UsageError(f"`{name}` is no option{did_you_mean(name, known)}", prog)


def _kinds_of_fields(dataclass_types: tuple[type, ...]) -> dict[str, tuple[Any, ...]]:
    """What each field may be. To be asked before the parser is made, which changes the types of fields."""
    kinds = {}
    for cls in dataclass_types:
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            union = get_origin(hints[field.name]) in (Union, UnionType)
            found = get_args(hints[field.name]) if union else (hints[field.name],)
            kinds[field.name] = (*found, NoneType) if field.default is None else found
    return kinds


def _report(error: Exception, argv: list[str]) -> None:
    debug = "--debug" in argv
    if debug:
        traceback.print_exception(error)
    message = str(error) if isinstance(error, UsageError) else explain(error, argv)
    print(f"error: {message}", file=sys.stderr)
    if not debug and not isinstance(error, UsageError):
        print("--debug shows the traceback.", file=sys.stderr)
