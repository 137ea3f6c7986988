"""What a user keeps is written beside and renamed: a kill or a full disk leaves the old file or the new one, whole."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


__all__ = [
    "is_leftover",
    "remove_leftovers",
    "replacing_file",
    "replacing_folder",
    "write_bytes",
    "write_json",
    "write_safetensors",
    "write_text",
]

_ENDING = ".unfinished"
# Ours, those of earlier versions, and what safetensors writes before it renames.
_LEFTOVER = re.compile(r"\..+\.([a-z0-9_]{8}\.unfinished|\d+\.tmp)|\.tmp[A-Za-z0-9]{6}", re.DOTALL)
# So many bytes of a name leave room for what is added to it.
_MAX_NAME = 200
_TRIES = 100


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Lends a file beside `path` that takes its place when the block ends well, and is removed when it does not.

    Args:
        path (`str` or `Path`):
            The file to write; its folder is made if need be. A link stays, and the file that it leads to is replaced.

    Yields:
        `Path`: the file to write into, on the same disk.

    Example:

    ```python
    >>> from hf_effml.utils.files import replacing_file

    >>> with replacing_file("notes.txt") as unfinished:
    ...     _ = unfinished.write_text("all of it")
    >>> open("notes.txt").read()
    'all of it'

    ```
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_beginning(path.name), suffix=_ENDING, dir=path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        # What `mkstemp` makes is for its owner alone.
        unfinished.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        _flush(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Lends a folder beside `path` that takes its place when the block ends well, and is removed when it does not.

    A kill in the instant between the two renames leaves the old folder whole, under the name of a leftover; the next
    call brings it back first.

    Args:
        path (`str` or `Path`):
            The folder to write. What it holds is replaced as a whole. A link stays, and the folder that it leads to is
            replaced.

    Yields:
        `Path`: the empty folder to write into.

    Raises:
        ValueError: If the process works in that folder, which would be gone below it.
    """
    path = Path(os.path.realpath(path))
    if path in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(
            f"`{path}` cannot be replaced while this process works in it. Change to another folder first."
        )
    _bring_back(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Both lie in one folder of their own: a rename needs a name that is free.
    beside = Path(tempfile.mkdtemp(prefix=_beginning(path.name), suffix=_ENDING, dir=path.parent))
    unfinished, old = beside / "new", beside / "old"
    try:
        unfinished.mkdir()
        yield unfinished
        _swap(unfinished, path, old)
    finally:
        if old.exists() and not path.exists():
            with suppress(OSError):  # another was faster
                os.replace(old, path)
        shutil.rmtree(beside, ignore_errors=True)


def write_text(path: str | Path, text: str) -> Path:
    """Writes a text in one go.

    Args:
        path (`str` or `Path`):
            The file; its folder is made if need be.
        text (`str`):
            Its content.

    Returns:
        `Path`: the file.
    """
    # Names of files can hold bytes that are no text; Python keeps them as lone surrogates.
    return write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> Path:
    """Writes a value as JSON in one go.

    Args:
        path (`str` or `Path`):
            The file; its folder is made if need be.
        value (`Any`):
            JSON-plain.
        indent (`int`, *optional*, defaults to 2):
            Spaces per level.

    Returns:
        `Path`: the file.
    """
    return write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Writes bytes in one go.

    Args:
        path (`str` or `Path`):
            The file; its folder is made if need be.
        data (`bytes`):
            Its content.

    Returns:
        `Path`: the file.
    """
    with replacing_file(path) as unfinished:
        unfinished.write_bytes(data)
    return Path(path)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes tensors in one go.

    Args:
        path (`str` or `Path`):
            The file; its folder is made if need be.
        tensors (`Mapping[str, Tensor]`):
            What goes into it, on any device.
        metadata (`Mapping[str, str]`, *optional*):
            What else. More than one entry come in another order in every run, and make other bytes.

    Returns:
        `Path`: the file.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing_file(path) as unfinished:
        save_file(plain, unfinished, metadata=None if metadata is None else dict(metadata))
    return Path(path)


def is_leftover(name: str) -> bool:
    """Says whether a name is one of a temporary file that somebody who was killed has left behind.

    Args:
        name (`str`):
            Name of a file or folder, without its folder.

    Returns:
        `bool`: the answer; also for what safetensors leaves (`.tmpA1b2C3`).
    """
    return _LEFTOVER.fullmatch(name) is not None


def remove_leftovers(folder: str | Path, of: str | None = None) -> None:
    """Removes temporary files that killed processes have left in a folder; call it when nobody else writes there.

    Args:
        folder (`str` or `Path`):
            The folder; its sub-folders are left alone.
        of (`str`, *optional*):
            Name of a file whose leftovers alone are removed, where others may be writing beside it.
    """
    for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
        if is_leftover(path.name) and (of is None or _is_leftover_of(path.name, of)):
            if path.is_file() or path.is_symlink():
                path.unlink()
            elif path.name.endswith(_ENDING):
                # Others do not leave folders.
                shutil.rmtree(path)


def _swap(new: Path, path: Path, old: Path) -> None:
    """Others may be replacing the folder in the same instant; the last one wins."""
    for tries_left in reversed(range(_TRIES)):
        try:
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                new.chmod(path.stat().st_mode & 0o777)
                os.replace(path, old)
            os.replace(new, path)
            return
        except OSError:
            if not tries_left:
                raise


def _bring_back(path: Path) -> None:
    """Puts a folder back in its place that a kill has left beside it."""
    if not path.exists() and path.parent.is_dir():
        for beside in path.parent.iterdir():
            if _is_leftover_of(beside.name, path.name) and (beside / "old").exists():
                with suppress(OSError):  # another was faster
                    os.replace(beside / "old", path)
                return


def _beginning(name: str) -> str:
    return f".{os.fsdecode(os.fsencode(name)[:_MAX_NAME])}."


def _is_leftover_of(name: str, of: str) -> bool:
    return is_leftover(name) and name.startswith(_beginning(of))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    """Brings a file to the disk: a renamed file whose content is still in memory is empty after a power cut."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
