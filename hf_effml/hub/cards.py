"""Cards: rendered from what a folder is, written beside it, renewed without touching what a person wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, ModelCard, ModelCardData, RepoCard

from hf_effml.utils.files import write_text
from hf_effml.utils.report import CardResult

from .card_file import read_card, read_text, save_card
from .kinds import FolderKind, kind_of
from .model_folder import ModelFolder
from .results import merge_index, merge_results
from .sections import mark_sections, renew_sections, replace_in_sections
from .snippets import output_of, with_id, with_value


__all__ = ["CARD_NAME", "add_results", "render_card", "renew_results", "set_license", "set_repo_id", "write_card"]

CARD_NAME = "README.md"
# The variable that a snippet keeps the repository's id in.
_VARIABLE = {"model": "model_id", "dataset": "dataset_id"}
# Metadata that people add to.
_LISTS = ("tags", "datasets", "source_datasets", "task_categories")
# What the Trainer of Transformers and PEFT write of themselves.
_WRITTEN_BY_NOBODY = ("generated automatically according to the information the Trainer", "# Model Card for Model ID")


def render_card(folder: str | Path, repo_id: str | None = None, **facts: Any) -> RepoCard:
    """Renders the card of a folder, whatever it is.

    Args:
        folder (`str` or `Path`):
            A folder of a model, or of another kind that a subject knows by its files.
        repo_id (`str`, *optional*):
            Hub id the folder goes to. Defaults to the name of the folder, until a push knows better.
        facts (`dict`, *optional*):
            For a model, what is not in its files: see [`~hf_effml.hub.model_folder.ModelFolder`].

    Returns:
        `huggingface_hub.ModelCard` or `huggingface_hub.DatasetCard`: the card.

    Raises:
        TypeError: If facts are given for a kind whose files hold them.
    """
    return _render(kind_of(folder, **facts), repo_id)


def write_card(folder: str | Path, repo_id: str | None = None, **facts: Any) -> Path:
    """Writes the card of a folder into it. What a person wrote on a card that is there stays, also on another's.

    Args:
        folder (`str` or `Path`):
            The folder.
        repo_id (`str`, *optional*):
            Hub id the folder goes to. Defaults to the name of the folder.
        facts (`dict`, *optional*):
            As for [`render_card`].

    Returns:
        `Path`: the file written.

    Example:

    ```python
    >>> from hf_effml.hub import CardResult, write_card

    >>> accuracy = CardResult("Accuracy", 0.93, starting_point=0.95, metric="accuracy")
    >>> write_card("my-model", results=[accuracy], evaluated_on="digits")  # doctest: +SKIP
    ```
    """
    kind, path = kind_of(folder, **facts), Path(folder) / CARD_NAME
    old, earlier = _load(path) if path.exists() else None, []
    if isinstance(kind, ModelFolder) and kind.results is not None:
        earlier = merge_results(folder, kind.results, kind.evaluated_on, replace=True)
    card = _render(kind, repo_id, with_output=True)
    if old is None or ("<!-- hf-effml: " not in old.text and any(words in old.text for words in _WRITTEN_BY_NOBODY)):
        write_text(path, card.content)
        return path
    for name, value in vars(card.data).items():
        if name in _LISTS and isinstance(value, list):
            old.data[name] = list(dict.fromkeys([*_as_list(old.data.get(name)), *value]))
        elif value is not None and name not in ("model_name", "eval_results"):
            old.data[name] = value
    if isinstance(old.data, ModelCardData):
        merge_index(old.data, card.data, earlier)
    old.text = renew_sections(old.text, card.text, keep=kind.unknown_sections)
    save_card(path, old)
    return path


def add_results(folder: str | Path, results: Sequence[CardResult], evaluated_on: str) -> Path:
    """Adds results to a model and its card, or renews them, and leaves everything else on it as it is.

    Args:
        folder (`str` or `Path`):
            A model folder with its card.
        results (`Sequence[CardResult]`):
            What was measured. One of the same name on the same data replaces the earlier one.
        evaluated_on (`str`):
            Name of the data it was measured on.

    Returns:
        `Path`: the card.

    Raises:
        FileNotFoundError: If there is no card.
        ValueError: If the results that are kept there cannot be read.
    """
    path = Path(folder) / CARD_NAME
    if not path.exists():
        raise FileNotFoundError(f"There is no card in `{folder}`. Write one first with `write_card`.")
    merge_results(folder, results, evaluated_on)
    return renew_results(folder)


def renew_results(folder: str | Path) -> Path:
    """Brings the results on a card up to date with those that are kept beside it, and changes nothing else.

    Args:
        folder (`str` or `Path`):
            A folder; it gets a card if it has none.

    Returns:
        `Path`: the card.
    """
    path = Path(folder) / CARD_NAME
    if not path.exists():
        return write_card(folder)
    kind = kind_of(folder)
    card = _load(path)
    fresh = _render(kind, getattr(card.data, "model_name", None))
    if isinstance(card.data, ModelCardData):
        merge_index(card.data, fresh.data)
    card.text = renew_sections(card.text, fresh.text, only={"results"})
    save_card(path, card)
    return path


def set_repo_id(folder: str | Path, repo_id: str) -> None:
    """Makes the snippet on a folder's card load `repo_id`. A card without our snippet stays as it is.

    Args:
        folder (`str` or `Path`):
            A folder with its card.
        repo_id (`str`):
            The Hub id the folder is pushed to.
    """
    path = Path(folder) / CARD_NAME
    variable, here = _VARIABLE[kind_of(folder).repo_type], Path(folder).resolve().name
    text = replace_in_sections(read_text(path), rf"^{variable} = .*$", with_value(variable, repo_id))
    # Wherever else the folder is loaded: in a section with a person's words, on a card of the version before.
    write_text(path, text.replace(f"\n{with_value(variable, here)}\n", f"\n{with_value(variable, repo_id)}\n"))


def set_license(folder: str | Path, license: str) -> None:
    """Names a license on a folder's card.

    Args:
        folder (`str` or `Path`):
            A folder with its card.
        license (`str`):
            The Hub's keyword, for example `"apache-2.0"`.
    """
    card = _load(Path(folder) / CARD_NAME)
    card.data.license = license
    save_card(Path(folder) / CARD_NAME, card)


def _render(kind: FolderKind, repo_id: str | None, with_output: bool = False) -> RepoCard:
    # A folder may be called anything; it is shown as one line, and is a literal where it is code.
    repo_id = " ".join((repo_id or kind.folder.resolve().name).split())
    title = repo_id.split("/")[-1]
    values, variable = kind.values(repo_id), _VARIABLE[kind.repo_type]
    here = with_id(kind.snippet(), variable, str(kind.folder.resolve()))
    card_type = ModelCard if kind.repo_type == "model" else DatasetCard
    card = card_type.from_template(
        kind.metadata(title),
        template_str=kind.read_template(),
        title=title.replace("<", "&lt;"),
        snippet=with_id(kind.snippet(), variable, repo_id),
        output=output_of(here) if with_output and kind.shows_output else None,
        **values,
    )
    card.text = mark_sections(card.text)
    return card


def _load(path: Path) -> RepoCard:
    return read_card(path, kind_of(path.parent).repo_type)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
