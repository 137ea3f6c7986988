"""Cards: rendered from what a folder is, written beside it, renewed without touching what a person wrote."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, ModelCard, RepoCard

from hf_effml.utils.files import write_text
from hf_effml.utils.report import CardResult

from .kinds import FolderKind, kind_of
from .model_folder import ModelFolder
from .results import merge_results
from .sections import mark_sections, renew_sections, replace_in_sections
from .snippets import output_of, with_id


__all__ = ["CARD_NAME", "add_results", "render_card", "renew_results", "set_license", "set_repo_id", "write_card"]

CARD_NAME = "README.md"
# The variable that a snippet keeps the repository's id in.
_VARIABLE = {"model": "model_id", "dataset": "dataset_id"}


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
    """Writes the card of a folder into it. Of a card of ours that is there, what a person wrote stays.

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
    kind = kind_of(folder, **facts)
    if isinstance(kind, ModelFolder) and kind.results is not None:
        merge_results(folder, kind.results, kind.evaluated_on, replace=True)
    card, path = _render(kind, repo_id, with_output=True), Path(folder) / CARD_NAME
    if path.exists():
        _renew(path, card, kind.unknown_sections)
    else:
        write_text(path, card.content)
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
    title = getattr(card.data, "model_name", None) or Path(folder).resolve().name
    fresh = _render(kind, title)
    if isinstance(kind, ModelFolder):
        card.data.model_name, card.data.eval_results = title, fresh.data.eval_results or card.data.eval_results
        if not card.data.eval_results:
            card.data.model_name = None
    card.text = renew_sections(card.text, fresh.text, only={"results"})
    write_text(path, card.content)
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
    variable = _VARIABLE[kind_of(folder).repo_type]
    text = path.read_text(encoding="utf-8")
    write_text(path, replace_in_sections(text, rf"^{variable} = .*$", f"{variable} = {json.dumps(repo_id)}"))


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
    write_text(Path(folder) / CARD_NAME, card.content)


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
        title=title,
        snippet=with_id(kind.snippet(), variable, repo_id),
        output=output_of(here) if with_output and kind.shows_output else None,
        **values,
    )
    card.text = mark_sections(card.text)
    return card


def _renew(path: Path, fresh: RepoCard, unknown: set[str]) -> None:
    """A card that is not ours, such as the one that Transformers writes, is replaced."""
    old = _load(path)
    if "<!-- hf-effml: " not in old.text:
        write_text(path, fresh.content)
        return
    known = old.data.to_dict()
    for name, value in fresh.data.to_dict().items():
        known[name] = list(dict.fromkeys([*known.get(name, []), *value])) if name == "tags" else value
    if "model-index" in known and "model-index" not in fresh.data.to_dict():
        del known["model-index"]
    old.data = type(fresh.data)(**known)
    old.text = renew_sections(old.text, fresh.text, keep=unknown)
    write_text(path, old.content)


def _load(path: Path) -> RepoCard:
    kind = kind_of(path.parent)
    return (ModelCard if kind.repo_type == "model" else DatasetCard).load(path)
