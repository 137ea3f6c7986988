"""The commands of `hf-effml` as plain data, and the way from a command to its program and back."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """One line of the help.

    Args:
        usage (`str`):
            What follows the command's name.
        help (`str`):
            What it does.
        script (`str`, *optional*, defaults to `""`):
            The program's file name, or its beginning when there is one per method. Empty for what needs no program.
    """

    usage: str
    help: str
    script: str = ""

    @property
    def per_method(self) -> bool:
        """Whether the command has a program for every method, or for every action."""
        return self.script.endswith("_")


GROUPS = {
    "look": {
        "methods": Command("[METHOD]", "the seven methods: what each does, its classes, its paper"),
        "env": Command("", "versions, optional parts, what is missing or broken"),
    },
    "use": {
        "demo": Command("", "train, merge and compare on this machine, without a download", "demo"),
        "train": Command("METHOD", "train or re-train", "train_"),
        "evaluate": Command("METHOD", "accuracy, size and speed next to the starting point", "evaluate_"),
        "bench": Command("METHOD", "time, memory and FLOPs on this machine", "bench_"),
    },
    "data and sharing": {
        "comp-dd": Command("ACTION", "subsets of ImageNet by complexity", "comp_dd_"),
        "convert": Command("SOURCE OUT", "official checkpoint -> folder for from_pretrained", "convert_vim"),
        "push": Command("FOLDER REPO", "upload a folder with its card", "push"),
    },
}


def existing_commands() -> dict[str, Command]:
    """Lists the built-in commands and those with a program in the scripts folder.

    Returns:
        `dict[str, Command]`: by name.
    """
    commands = {name: command for group in GROUPS.values() for name, command in group.items()}
    folder = scripts_folder()
    return {n: c for n, c in commands.items() if not c.script or any(folder.glob(f"{c.script}*.py"))}


def programs_of(prefix: str) -> dict[str, Path]:
    """Lists the programs of a command that has one per method.

    Args:
        prefix (`str`):
            How their files begin, for example `"train_"`.

    Returns:
        `dict[str, Path]`: their files by the method's keyword.
    """
    paths = sorted(scripts_folder().glob(f"{prefix}*.py"))
    return {path.stem.removeprefix(prefix).replace("_", "-"): path for path in paths}


def command_line_of(program: str | Path) -> str:
    """Says how a program is run.

    Args:
        program (`str` or `Path`):
            Its file.

    Returns:
        `str`: the command as typed, for example `"hf-effml train rmeeto"`; the file where no command runs it.

    Example:

    ```python
    >>> from hf_effml.cli.commands import command_line_of

    >>> command_line_of("scripts/train_token_router.py"), command_line_of("scripts/experiment_dyvm.py")
    ('hf-effml train token-router', 'python scripts/experiment_dyvm.py')

    ```
    """
    stem = Path(program).stem
    for name, command in ((n, c) for group in GROUPS.values() for n, c in group.items()):
        if command.per_method and stem.startswith(command.script):
            return f"hf-effml {name} {stem.removeprefix(command.script).replace('_', '-')}"
        if stem == command.script:
            return f"hf-effml {name}"
    return f"python scripts/{stem}.py"


def scripts_folder() -> Path:
    """Says where the programs and their recipes are installed.

    Returns:
        `Path`: the folder of `hf_effml.scripts`.
    """
    return Path(str(import_module("hf_effml.scripts").__file__)).parent
