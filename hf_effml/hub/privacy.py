"""What must not reach the Hub: access tokens and the paths of somebody's machine."""

import re
import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any


# `hf_effml` and the like are no tokens: those are long and have neither underscores nor dots.
_TOKEN = re.compile(r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}\b")
_HOME = re.compile(r"(?<![\w.-])(?:/home/|/Users/|/root/|[A-Za-z]:\\+Users\\+)[\w.-]+")
_SECRET_NAME = re.compile(r"(?:^|_)(?:token|password|secret|api_key)$")


def scrub(value: Any) -> Any:
    """Shortens absolute paths to their last part and blanks tokens, also inside lists and mappings.

    Args:
        value (`Any`):
            A JSON-plain value, for example that of a training argument.

    Returns:
        `Any`: the same value without what is private; mappings lose the entries that are named like a secret.

    Example:

    ```python
    >>> from hf_effml.hub.privacy import scrub

    >>> scrub({"data": "/home/alice/photos", "hub_token": "x", "epochs": 3})
    {'data': 'photos', 'epochs': 3}

    ```
    """
    if isinstance(value, dict):
        return {key: scrub(item) for key, item in value.items() if not _SECRET_NAME.search(str(key))}
    if isinstance(value, list | tuple):
        return [scrub(item) for item in value]
    if not isinstance(value, str):
        return value
    value = _TOKEN.sub("<token>", value)
    for path in (PurePosixPath(value), PureWindowsPath(value)):
        if path.is_absolute() or value.startswith("~"):
            return path.name or "."
    return value


def scrub_command(argv: Sequence[str]) -> str:
    """Writes a command line that can be shown: without tokens, passwords and absolute paths.

    Args:
        argv (`Sequence[str]`):
            Program and arguments, as in `sys.argv`.

    Returns:
        `str`: the command, quoted for a shell.

    Example:

    ```python
    >>> from hf_effml.hub.privacy import scrub_command

    >>> scrub_command(["/usr/bin/hf-effml", "train", "rmeeto", "--hub_token", "abc", "--data=/home/alice/photos"])
    'hf-effml train rmeeto --data=photos'

    ```
    """
    kept: list[str] = []
    skip_value = False
    for argument in argv:
        is_option = argument.startswith("-")
        if skip_value and not is_option:
            skip_value = False
            continue
        name, equals, value = argument.partition("=")
        skip_value = is_option and bool(_SECRET_NAME.search(name.lstrip("-").replace("-", "_")))
        if skip_value:
            skip_value = not equals
        elif is_option and equals:
            kept.append(f"{name}={scrub(value)}")
        else:
            kept.append(scrub(argument))
    return shlex.join(kept)


def find_private(text: str) -> list[str]:
    """Finds what looks like a token or a home folder.

    Args:
        text (`str`):
            Content of a file.

    Returns:
        `list[str]`: one remark per finding, with its line number; the secret itself is not repeated.
    """
    remarks = []
    for number, line in enumerate(text.splitlines(), start=1):
        if _TOKEN.search(line):
            remarks.append(f"line {number} holds what looks like an access token")
        if match := _HOME.search(line):
            remarks.append(f"line {number} names a folder of this machine (`{match.group()}`)")
    return remarks
