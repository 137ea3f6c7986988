"""What a folder is, by what its files declare: how its card is written and what it needs on the Hub."""

import json
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module, metadata, resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import DatasetCardData, ModelCardData


__all__ = ["FolderKind", "installed_versions", "is_known", "kind_of", "size_category"]

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


class FolderKind:
    """A kind of folder that goes to the Hub. Subjects describe theirs in `card.py`, listed there as `KINDS`.

    A kind costs a subclass and a template. Its class attributes say what it is: `noun` names it in messages,
    `repo_type` is where it goes, `template` the file in `hub_cards/`, `written_by` the call that writes such a folder,
    `left_out` patterns of files that stay here, `pushed_with` the command for it where `push_folder` refuses it.

    Args:
        folder (`Path`):
            The folder.
    """

    noun: ClassVar[str]
    repo_type: ClassVar[str] = "model"
    template: ClassVar[str]
    written_by: ClassVar[str] = "save_pretrained"
    left_out: ClassVar[Sequence[str]] = ()
    pushed_with: ClassVar[str | None] = None

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def recognises(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """Says whether a folder is of this kind.

        Args:
            folder (`Path`):
                The folder.
            config (`Mapping`):
                Its `config.json`; empty where there is none that can be read.

        Returns:
            `bool`: the answer.
        """
        raise NotImplementedError

    def metadata(self, name: str) -> ModelCardData | DatasetCardData:
        """The card's metadata.

        Args:
            name (`str`):
                The last part of the repository's id.

        Returns:
            `ModelCardData` or `DatasetCardData`
        """
        raise NotImplementedError

    def snippet(self) -> str:
        """Code that loads the folder, called `model_id` or `dataset_id`, and prints something; imports come first."""
        raise NotImplementedError

    @property
    def shows_output(self) -> bool:
        """Whether the snippet runs in seconds here, so that the card can show what it prints."""
        return False

    def values(self, repo_id: str) -> dict[str, Any]:
        """What the template needs besides `title`, `snippet` and `output`.

        Args:
            repo_id (`str`):
                Where the folder goes, or its name.

        Returns:
            `dict`: the values by name.
        """
        raise NotImplementedError

    @property
    def unknown_sections(self) -> set[str]:
        """Sections of the card about which nothing is known here; those that are there stay."""
        return set()

    def remarks(self, files: Sequence[str]) -> list[str]:
        """What speaks against publishing, apart from what holds for every folder.

        Args:
            files (`Sequence[str]`):
                Names of the files that would be uploaded, with `/` between folders.

        Returns:
            `list[str]`: one phrase each.
        """
        return []

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Reads a file of the folder.

        Args:
            name (`str`):
                Its name.

        Returns:
            `dict` or `None`: the content; `None` where there is no such file.

        Raises:
            ValueError: If it is no JSON.
        """
        path = self.folder / name
        try:
            return json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else None
        except ValueError as error:
            raise ValueError(f"`{path}` is no JSON ({error}). Mend it, or write the {self.noun} again.") from error

    def if_there(self, name: str) -> str | None:
        """The name of a file where it exists, for what a card only shows then."""
        return name if (self.folder / name).is_file() else None

    def read_template(self) -> str:
        """The template's text."""
        return resources.files("hf_effml.hub_cards").joinpath(self.template).read_text(encoding="utf-8")


def kind_of(folder: str | Path, **facts: Any) -> FolderKind:
    """Finds out what a folder is.

    Args:
        folder (`str` or `Path`):
            The folder. What no subject knows is a model.
        facts (`dict`, *optional*):
            What only the caller knows, for kinds that take facts.

    Returns:
        [`FolderKind`]

    Raises:
        TypeError: If the kind does not take such facts, because its own files hold them.
    """
    from .model_folder import ModelFolder

    folder = Path(folder)
    config = facts.get("config") or read_config(folder)
    kind = next((kind for kind in _kinds_of_subjects() if kind.recognises(folder, config)), ModelFolder)
    if facts and not issubclass(kind, ModelFolder):
        raise TypeError(
            f"The card of a {kind.noun} is made from its own files; got `{'`, `'.join(facts)}`. Leave them out."
        )
    return kind(folder, **facts)


def is_known(folder: str | Path) -> bool:
    """Says whether a subject knows a folder by its files as one of its kinds.

    Args:
        folder (`str` or `Path`):
            The folder.

    Returns:
        `bool`: the answer; any other folder can only be a plain model.
    """
    config = read_config(Path(folder))
    return any(kind.recognises(Path(folder), config) for kind in _kinds_of_subjects())


def installed_versions(*further: str) -> dict[str, str]:
    """Versions of the packages that a card names.

    Args:
        further (`str`):
            Other packages, which may be absent.

    Returns:
        `dict[str, str]`: by name.
    """
    packages = ("hf-effml", "transformers", "torch", "accelerate", "huggingface-hub", "safetensors", *further)
    return {name: version for name in packages if (version := _version(name)) is not None}


def size_category(rows: int) -> str:
    """Says how large a data set is, as the Hub has it.

    Args:
        rows (`int`):
            Number of its rows.

    Returns:
        `str`: a value of `size_categories`.
    """
    return next((size for most, size in _SIZES if rows < most), "1M<n<10M")


@cache
def _kinds_of_subjects() -> list[type[FolderKind]]:
    """A subject that has kinds of its own has a `card.py`; none is named here."""
    package = str(Path(__file__).parents[1])
    names = [module.name for module in pkgutil.iter_modules([package], "hf_effml.") if module.ispkg]
    cards = [f"{name}.card" for name in names if find_spec(f"{name}.card") is not None]
    return [kind for card in cards for kind in import_module(card).KINDS]


def read_config(folder: Path) -> dict[str, Any]:
    """Reads a model's configuration.

    Args:
        folder (`Path`):
            The folder.

    Returns:
        `dict`: content of `config.json`; empty where there is none that can be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
