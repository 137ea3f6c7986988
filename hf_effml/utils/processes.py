"""Processes that work together: which of them still run, and plain words when one of them has ended."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


__all__ = ["explaining_lost_processes", "holding", "is_held", "only_run_in"]

_LOCK_NAME = ".run.lock"
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
    with FileLock(path, timeout=0):
        yield


def is_held(path: str | Path) -> bool:
    """Says whether some process holds a file by [`holding`].

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `bool`: the answer; `False` where there is no such file, `True` where the system cannot tell.
    """
    if not Path(path).exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except (Timeout, NotImplementedError):
        return True


@contextmanager
def only_run_in(folder: str | Path) -> Iterator[None]:
    """Keeps other runs out of a folder while the block runs. The end of a process, also a killed one, opens it again.

    Args:
        folder (`str` or `Path`):
            What the run writes; it is made if there is none.

    Raises:
        ValueError: If another run is at work there.

    Example:

    ```python
    >>> from hf_effml.utils.processes import only_run_in

    >>> with only_run_in("experiment"):
    ...     pass

    ```
    """
    path = Path(folder) / _LOCK_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"Another run is at work in `{folder}`, and both would write the same files. Wait for its end, or choose "
            "another `output_dir`."
        ) from None
    try:
        yield
    finally:
        # While it is still ours: who gets hold of a removed file notices, and makes a new one.
        path.unlink(missing_ok=True)
        lock.release()


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
