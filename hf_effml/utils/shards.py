"""Long work in pieces: a folder of files, each whole or absent, that goes on where a killed run stopped."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .files import remove_leftovers, replacing_file, write_json


__all__ = ["ShardFolder", "differing_settings"]


class ShardFolder:
    """A folder whose files are made one by one, and the settings that they belong to.

    Args:
        path (`str` or `Path`):
            The folder.
        names (`Iterable[str]`):
            Names of all files that it is to hold.
        settings (`Mapping`):
            What all of them are made with, JSON-plain. A folder of other settings is refused.
        description (`str`, *optional*, defaults to `"settings.json"`):
            Name of the file that keeps the settings.

    Example:

    ```python
    >>> from hf_effml.utils.shards import ShardFolder

    >>> shards = ShardFolder("squares", [f"{n}.txt" for n in range(3)], {"power": 2})
    >>> for name in shards.start():
    ...     with shards.writing(name) as path:
    ...         _ = path.write_text(str(int(name[0]) ** 2))
    >>> shards.start()
    []

    ```
    """

    def __init__(
        self,
        path: str | Path,
        names: Iterable[str],
        settings: Mapping[str, Any],
        description: str = "settings.json",
    ):
        self.path, self.names, self.settings = Path(path), list(names), settings
        self.description = self.path / description

    def missing(self) -> list[str]:
        """Says which files are still to be made; changes nothing.

        Returns:
            `list[str]`: their names.

        Raises:
            ValueError: If what is there was made with other settings, or nothing says with which.
        """
        there = [name for name in self.names if (self.path / name).is_file()]
        if self.description.is_file():
            differences = differing_settings(_read(self.description), self.settings)
            if differences:
                raise ValueError(
                    f"`{self.path}` was made with other settings: {'; '.join(differences)}. Choose another folder, or "
                    "delete this one."
                )
        elif there:
            raise ValueError(
                f"`{self.path}` holds `{there[0]}` without a `{self.description.name}`. Choose another folder, or "
                "delete this one."
            )
        return [name for name in self.names if name not in there]

    def start(self) -> list[str]:
        """Makes the folder, writes the settings and removes what a killed run has left.

        Returns:
            `list[str]`: names of the files to make.
        """
        missing = self.missing()
        remove_leftovers(self.path)
        write_json(self.description, dict(self.settings))
        return missing

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """Lends the path of a temporary file that becomes `name` when the block ends well.

        Args:
            name (`str`):
                One of the names.

        Returns:
            `AbstractContextManager[Path]`: see [`~hf_effml.utils.files.replacing_file`].
        """
        return replacing_file(self.path / name)


def differing_settings(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Says in which settings two pieces of work differ.

    Args:
        there (`Mapping`):
            Settings as they were read.
        here (`Mapping`):
            Settings of the moment.

    Returns:
        `list[str]`: one phrase for each difference, such as `` `seed` is 0 there and 1 here``; empty if both fit.
    """
    # As they would be read again, where keys are texts and tuples are lists.
    here = json.loads(json.dumps(here))
    return [f"`{name}` is {_short(old)} there and {_short(new)} here" for name, old, new in _differences(there, here)]


def _differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in dict.fromkeys([*there, *here]):
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}" if name else str(key))
    elif there != here and repr(there) != repr(here):  # NaN is another than itself
        yield name, there, here


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`{path}` is no JSON: {error}. Choose another folder, or delete this one.") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]} ... ({len(text)} characters)"
