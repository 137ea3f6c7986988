"""What must not reach the Hub: access tokens and the paths of somebody's machine."""

import mmap
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


__all__ = ["find_private", "find_private_in_bytes", "scrub", "scrub_command"]

# Of Hugging Face, GitHub, Amazon and model providers. `hf_effml` and the like are none: tokens are long.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:hf_|api_org_)[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[A-Z0-9]{16}"
    r"|sk-(?=[\w-]*\d)[\w-]{20,})(?![A-Za-z0-9])"
)
_HOME = re.compile(
    r"(?<![\w.-])(?:(?:/var|/export)?/home/|/root/|(?:(?:/mnt)?/[a-z])?/Users/|[A-Za-z]:(?:\\+|/)[Uu]sers(?:\\+|/))"
    r"[\w.-]+"
)
# What a finding holds near its beginning, and the pattern that tells whether it is one.
_BEGINNINGS = {
    **dict.fromkeys(("hf_", "api_org_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "AKIA", "sk-"), _TOKEN),
    **dict.fromkeys(("/home/", "/root/", "/Users/", "/users/", "Users\\", "users\\"), _HOME),
}
_WIDE_ENCODINGS = {"utf-16-le": 2, "utf-16-be": 2, "utf-32-le": 4, "utf-32-be": 4}
# Characters before such a beginning (a drive's letter, and what must not be a part of it) and in all.
_BEFORE, _LONGEST = 12, 300
_CHUNK = 2**24
# JSON's ways to write a slash or a letter otherwise.
_ESCAPE = re.compile(r"\\u00([0-7][0-9a-fA-F])|\\(/)")
_MAX_ESCAPED = 2**26
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

    >>> scrub_command(["/usr/bin/hf-effml", "train", "METHOD", "--hub_token", "abc", "--data=/home/alice/photos"])
    'hf-effml train METHOD --data=photos'

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
            Content of a file; what JSON escapes in it is found as well.

    Returns:
        `list[str]`: one remark per finding, with its line number; the secret itself is not repeated.
    """
    remarks = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = _ESCAPE.sub(lambda match: match[2] or chr(int(match[1], 16)), line)
        if _TOKEN.search(line):
            remarks.append(f"line {number} holds what looks like an access token")
        if match := _HOME.search(line):
            remarks.append(f"line {number} names a folder of this machine (`{match.group()}`)")
    return remarks


def find_private_in_bytes(path: str | Path) -> list[str]:
    """Finds what looks like a token or a home folder in a file of any kind, as UTF-8, UTF-16 or UTF-32.

    Args:
        path (`str` or `Path`):
            The file. What is compressed in it stays unseen.

    Returns:
        `list[str]`: one remark per finding, without the secret; with line numbers where all of it is a text.
    """
    if not Path(path).stat().st_size:
        return []
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        remarks = list(dict.fromkeys(_findings(data)))
        is_escaped = len(data) <= _MAX_ESCAPED and (data.find(b"\\u00") >= 0 or data.find(b"\\/") >= 0)
    if not remarks and not is_escaped:
        return []
    try:
        return find_private(Path(path).read_text(encoding="utf-8")) or remarks
    except UnicodeDecodeError:
        return remarks


def _findings(data: mmap.mmap) -> Iterator[str]:
    yield from _findings_in(data, "utf-8", 1)
    if _may_hold_wide_text(data):
        for encoding, width in _WIDE_ENCODINGS.items():
            yield from _findings_in(data, encoding, width)


def _may_hold_wide_text(data: mmap.mmap) -> bool:
    """Without its zeros a text in UTF-16 or UTF-32 is a plain one, which is found in a fraction of the time."""
    rest = b""
    for start in range(0, len(data), _CHUNK):
        plain = rest + data[start : start + _CHUNK].translate(None, b"\0")
        for beginning, pattern in _BEGINNINGS.items():
            place = plain.find(beginning.encode())
            while place >= 0:
                text = plain[max(place - _BEFORE, 0) : place + _LONGEST].decode("ascii", errors="replace")
                if pattern.search(text) or pattern.match(text[min(place, _BEFORE) :]):
                    return True
                place = plain.find(beginning.encode(), place + 1)
        rest = plain[-_LONGEST:]
    return False


def _findings_in(data: mmap.mmap, encoding: str, width: int) -> Iterator[str]:
    for beginning, pattern in _BEGINNINGS.items():
        needle = beginning.encode(encoding)
        place = data.find(needle)
        while place >= 0:
            before = min(place // width, _BEFORE) * width
            text = data[place - before : place + _LONGEST * width].decode(encoding, errors="replace")
            match = pattern.search(text)
            if match and match.start() <= before // width:
                where = f"byte {place}" + ("" if width == 1 else f" ({encoding.upper()})")
                yield (
                    f"{where} begins what looks like an access token"
                    if pattern is _TOKEN
                    else f"{where} names a folder of this machine (`{match.group()}`)"
                )
            place = data.find(needle, place + len(needle))
