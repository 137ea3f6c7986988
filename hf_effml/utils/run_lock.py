"""One run per folder: two that write the same checkpoints would destroy each other's work."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


__all__ = ["only_run_in"]

_NAME = ".run.lock"


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
    >>> from hf_effml.utils.run_lock import only_run_in

    >>> with only_run_in("experiment"):
    ...     pass

    ```
    """
    path = Path(folder) / _NAME
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
