"""What the domains of recipes and command lines share: programs that stop once their arguments are read."""

import dataclasses
import io
import random
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any
from unittest.mock import patch

from hf_effml.cli.commands import command_line_of, scripts_folder
from hf_effml.cli.main import run_command
from hf_effml.cli.parsing import parse_arguments
from hf_effml.cli.recipes import read_recipes


PROGRAMS = [
    path
    for path in sorted(scripts_folder().glob("[!_]*.py"))
    # The list of subsets has a parser of its own, which needs no transformers.
    if not path.stem.startswith("experiment_") and path.stem != "comp_dd_list"
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3.5, -0.5, 1e-6, 1e300, 2**31, 2**63, -(2**63)),
    *(
        float("nan"),
        float("inf"),
        "",
        " ",
        "no",
        "off",
        "on",
        "null",
        "none",
        "all",
        "true",
        "1e-6",
        "nan",
        "\u00e9\u4e2d",
        "\x00",
    ),
    *("\x00", "--seed", "-1", "../x", "/", "smoke", "digits", "a" * 5000, "{", "[1, 2]", '{"a": 1}', "steps", "epoch"),
    *([], [1], [None], [[1]], [1, "a"], {}, {"a": 1}, {"min_lr": "x"}, {"a": float("nan")}, [0.1, 0.2, 0.3]),
]


class Parsed(Exception):
    """Carries what a program would have worked with."""


def _parse_and_stop(*types: type, **options: Any) -> Any:
    raise Parsed(parse_arguments(*types, **options))


def fields_of(program: Any) -> list[str]:
    """Names of the options of a program."""
    found: list[str] = []

    def collect(*types: type, **_: Any) -> Any:
        found.extend(field.name for cls in types for field in dataclasses.fields(cls) if field.init)
        raise Parsed

    module = import_module(f"hf_effml.scripts.{program.stem}")
    with patch.object(module, "parse_arguments", collect):
        try:
            module.main([])
        except Parsed:
            return found
    raise AssertionError(program)


def read_command(argv: list[str]) -> Any:
    """What a command line comes to; no program goes further than its arguments."""
    modules = [import_module(f"hf_effml.scripts.{path.stem}") for path in PROGRAMS]
    patches = [patch.object(module, "parse_arguments", _parse_and_stop) for module in modules]
    for each in patches:
        each.start()
    try:
        with redirect_stdout(io.StringIO()):
            return run_command(argv)
    except Parsed as parsed:
        return [vars(options) for options in parsed.args[0]]
    except SystemExit as end:
        assert end.code == 0, "only help ends a program before it starts"
        return None
    finally:
        for each in patches:
            each.stop()


def some_program(generator: random.Random) -> tuple[list[str], dict[str, Any], list[str]]:
    """The words that run a program, some of its options with values, many of which fit, and its recipes."""
    path = generator.choice(PROGRAMS)
    recipes, names = read_recipes(path), fields_of(path)
    fitting = {name: value for recipe in recipes.values() for name, value in recipe.items() if name != "about"}
    options = {}
    for _ in range(generator.choice((0, 1, 1, 2, 3))):
        if fitting and generator.random() < 0.5:
            name = generator.choice(list(fitting))
            options[name] = fitting[name]
        else:
            options[generator.choice(names)] = generator.choice(VALUES)
    return command_line_of(path).split()[1:], options, list(recipes)
