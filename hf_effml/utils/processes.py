"""Processes that work together: which of them still run, and plain words when one of them has ended."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]


__all__ = ["explaining_lost_processes", "holding", "is_held"]

# How gloo and NCCL say that the other side is gone or silent.
_LOST = re.compile(
    r"closed by peer|connection (reset|closed|refused)|broken pipe|timed? ?out|remote process exited|socket", re.I
)


@contextmanager
def holding(path: str | Path) -> Iterator[None]:
    """Holds a file, so that others can see that this process runs. The system lets go of it however the process ends.

    Args:
        path (`str` or `Path`):
            The file; it is made if need be.

    Example:

    ```python
    >>> from hf_effml.utils.processes import holding, is_held

    >>> with holding("work.lock"):
    ...     print(is_held("work.lock"))
    True
    >>> is_held("work.lock")
    False

    ```
    """
    with Path(path).open("a+b") as file:
        _try_to_lock(file)
        yield


def is_held(path: str | Path) -> bool:
    """Says whether some process holds a file by [`holding`].

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `bool`: the answer; `False` where there is no such file, `True` where the system cannot tell.
    """
    try:
        with Path(path).open("r+b") as file:
            return not _try_to_lock(file)
    except FileNotFoundError:
        return False


@contextmanager
def explaining_lost_processes(meanwhile: str) -> Iterator[None]:
    """Says in words what it means when a collective operation fails because another process has ended.

    Args:
        meanwhile (`str`):
            What this process waited for.

    Raises:
        RuntimeError: In place of the error of the communication library.
    """
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise RuntimeError(
            f"Another process of this run has ended, or does not answer, while this one waited {meanwhile}, and it "
            "gives up. The error that the other one ended with comes first in the output; start all processes again."
        ) from error


def _try_to_lock(file: IO[bytes]) -> bool:
    """Whether the lock is ours now, until the file is closed. Disks that know no locks never grant one."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
