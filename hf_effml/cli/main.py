"""The command `hf-effml`: finds the program that a command names and runs it. Imports nothing heavy."""

import argparse
import ast
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from hf_effml import __version__
from hf_effml.methods import METHODS, VIM, Method, get_method

from .commands import GROUPS, Command, existing_commands, programs_of
from .help_text import help_line
from .parsing import UsageError, did_you_mean, run_script


def main(argv: list[str] | None = None) -> int:
    """Runs `hf-effml`.

    Args:
        argv (`list[str]`, *optional*):
            The arguments; those of the process by default.

    Returns:
        `int`: 0 done, 1 failed, 2 wrong use, 130 interrupted.
    """
    return run_script(run_command, argv)


def run_command(argv: list[str] | None) -> dict[str, Any] | None:
    """Runs a command inside of this process, so that a program can use what another one makes.

    Args:
        argv (`list[str]` or `None`):
            The command and its arguments, for example `["train", "vim", "--recipe", "smoke"]`.

    Returns:
        `dict` or `None`: what the command's program found, JSON-plain.

    Raises:
        UsageError: If there is no such command or program.
    """
    name, *rest = argv or ["--help"]
    commands = existing_commands()
    if name == "help":
        # `help train vim` is `train vim --help`.
        name, *rest = [*rest, "--help"]
    if name in ("--help", "-h"):
        print(_overview(commands))
        return None
    if name == "--version":
        print(__version__)
        return {"version": __version__}
    if name == "methods":
        return _show_methods(rest)
    if name == "env":
        return _show_environment(rest)
    if name not in commands:
        raise UsageError(f"`{name}` is no command{did_you_mean(name, commands)}", "hf-effml")
    script = commands[name].script
    if commands[name].per_method:
        programs = programs_of(script)
        keyword, *rest = rest or [""]
        if keyword in ("--help", "-h"):
            print(_programs_help(name, commands[name].usage, programs))
            return None
        script = _choose(name, commands[name].usage.lower(), keyword, programs).stem
    return import_module(f"hf_effml.scripts.{script}").main(rest)


def _choose(command: str, what: str, keyword: str, programs: dict[str, Path]) -> Path:
    if keyword in programs:
        return programs[keyword]
    prog, known = f"hf-effml {command}", ", ".join(programs)
    if not keyword or keyword.startswith("-"):
        raise UsageError(f"`{prog}` needs {'an' if what[0] in 'aeiou' else 'a'} {what} first: {known}.", prog)
    if any(method.key == keyword and not method.available for method in METHODS):
        raise UsageError(f"`{keyword}` is not in hf-effml {__version__} yet; there are: {known}.", prog)
    raise UsageError(f"`{keyword}` is no {what} of `{prog}` ({known}){did_you_mean(keyword, programs)}", prog)


def _overview(commands: dict[str, Command]) -> str:
    lines = ["usage: hf-effml <command> [options]", "", "Efficient-ML methods as Hugging Face components.", ""]
    for group, members in GROUPS.items():
        lines.append(group)
        for name, command in members.items():
            if name in commands:
                text = command.help
                if command.per_method:
                    text += f": {', '.join(programs_of(command.script))}"
                lines.append(help_line(f"{name} {command.usage}", text))
    lines += ["", "`hf-effml <command> --help` shows the options; every command takes --json."]
    return "\n".join(lines)


def _programs_help(command: str, what: str, programs: dict[str, Path]) -> str:
    lines = [f"usage: hf-effml {command} {what} [options]", ""]
    for keyword, path in programs.items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(help_line(keyword, docstring.partition("\n")[0]))
    return "\n".join([*lines, "", f"`hf-effml {command} {what} --help` shows the options."])


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(f"`{unknown[0]}` is no option of `{parser.prog}`.", parser.prog)
    return arguments


def _show_methods(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser("hf-effml methods", description="The seven methods, or one of them in full.")
    parser.add_argument("method", nargs="?", help="keyword of a method: shows its citation too")
    key = _parse(parser, argv).method
    methods = (get_method(key),) if key else METHODS
    for method in methods:
        print(_describe(method), end="\n\n")
    if key:
        print(methods[0].citation)
    else:
        print(f"{VIM.name} ({VIM.key}), the model DyVM and R-MeeTo start from: {', '.join(VIM.classes)}")
    return {"methods": [asdict(m) | {"available": m.available, "citation": m.citation} for m in methods]}


def _describe(method: Method) -> str:
    status = f"classes: {', '.join(method.classes)}" if method.available else "not in this version yet"
    return "\n".join(
        [f"{method.name} ({method.key})", f"  {method.summary}", f"  {method.title}, {method.url}", f"  {status}"]
    )


def _show_environment(argv: list[str]) -> dict[str, Any]:
    from hf_effml.utils.environment import check_environment, describe_system

    _parse(argparse.ArgumentParser("hf-effml env", description="Imports every package that hf-effml can use."), argv)
    system = describe_system()
    for name, value in system.items():
        print(f"{name:<16} {value}")
    parts = []
    for part in check_environment():
        parts.append(asdict(part))
        needed = f"extra `{part.extra}`" if part.extra else "core"
        advice = " -> ".join(text for text in (part.reason, part.remedy) if text)
        print(f"{part.name:<16} {part.version or '':<16} {needed:<16} {part.state}: {advice}".rstrip(": "), flush=True)
    return {"system": system, "parts": parts}


if __name__ == "__main__":
    sys.exit(main())
