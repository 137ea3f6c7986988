"""Pushes built subsets to private repositories, and the index of facts, which has no picture, to public ones."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from hf_effml.hub import check_folder, write_card
from hf_effml.hub.card_file import read_card, save_card
from hf_effml.hub.cards import CARD_NAME, set_repo_id
from hf_effml.hub.checks import files_to_push
from hf_effml.utils.files import write_bytes
from hf_effml.utils.imports import require

from .building import FACTS_NAME
from .card import INDEX_NAME, TERMS, BuiltSubsets
from .subsets import SUBSETS, subset_info


__all__ = ["index_rows", "push_comp_dd", "push_index"]

_ALL = "all"
_GATE = {
    "extra_gated_prompt": TERMS,
    "extra_gated_fields": {
        "Affiliation": "text",
        "I use the pictures for non-commercial research and education only": "checkbox",
        "I have accepted the terms of access of ImageNet and pass the pictures on to nobody who has not": "checkbox",
    },
}


def push_comp_dd(
    folder: str | Path,
    repo_id: str,
    private: bool = True,
    holds_rights: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Uploads built subsets with their card, in one commit: who is killed before it leaves the old state.

    Subsets that are in the repository and not in the folder stay as they are, on the card too. Of one that is in both,
    files that the folder has no more are deleted. What a person wrote on the card there stays.

    Args:
        folder (`str` or `Path`):
            Where [`build_comp_dd`] wrote them.
        repo_id (`str`):
            Where they go: `namespace/name`. The repository is created when it does not exist.
        private (`bool`, *optional*, defaults to `True`):
            Whether a new repository is private.
        holds_rights (`bool`, *optional*, defaults to `False`):
            States that the caller may redistribute the pictures. A public repository is refused without it; with it,
            access is granted by hand, to who accepts the terms on the card.
        token (`str` or `bool`, *optional*):
            Access token. Defaults to `HF_TOKEN` or the one stored by `hf auth login`.
        commit_message (`str`, *optional*):
            First line of the commit.

    Returns:
        `huggingface_hub.CommitInfo`: the commit.

    Raises:
        FileNotFoundError: If there is no subset in the folder.
        PermissionError: If the repository is or would be public, without `holds_rights`.
        ValueError: If a subset is not complete, or something else speaks against publishing it.

    Example:

    ```python
    >>> from hf_effml.comp_dd import push_comp_dd

    >>> push_comp_dd("comp-dd", "alice/comp-dd-pictures").commit_url  # doctest: +SKIP
    ```
    """
    folder = Path(folder)
    if not private and not holds_rights:
        raise _refusal("would be")
    subsets = BuiltSubsets(folder).subsets
    if not subsets:
        raise FileNotFoundError(
            f"`{folder}` holds no complete subset, a folder with `{FACTS_NAME}`. Build one first, for example with "
            "`hf-effml comp-dd build bird_easy`."
        )
    check_folder(folder)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    info = api.dataset_info(repo_id)
    there = {sibling.rfilename for sibling in info.siblings or ()}
    if not info.private and not holds_rights:
        raise _refusal("is")
    if INDEX_NAME in there:
        raise ValueError(f"`{repo_id}` holds the index of facts. Push pictures to a repository of their own.")
    if not info.private:
        api.update_repo_settings(repo_id, repo_type="dataset", gated="manual")
    names = [name for name in files_to_push(folder) if name != CARD_NAME]
    with tempfile.TemporaryDirectory() as stage:
        for name in there:
            if name.endswith(f"/{FACTS_NAME}") and name.count("/") == 1:
                _fetch(api, info, name, stage)
        for name in subsets:
            write_bytes(Path(stage, name, FACTS_NAME), (folder / name / FACTS_NAME).read_bytes())
        card = _renew_card(api, info, Path(stage), folder / CARD_NAME, {} if info.private else _GATE)
        stale = [name for name in there if name.partition("/")[0] in subsets and name not in names]
        files = {CARD_NAME: card} | {name: folder / name for name in names}
        return _commit(api, info, files, commit_message or f"Upload {', '.join(subsets)} with hf_effml", stale)


def index_rows(name: str) -> list[dict[str, Any]]:
    """Lists the classes of a subset, as the public index has them.

    Args:
        name (`str`):
            A subset as [`subset_info`] takes it, or `"all"` for Comp-DD's sixteen.

    Returns:
        `list[dict[str, Any]]`: a row per class: `label`, `synset`, `imagenet_index`, `name`, `category`,
        `difficulty`, `train_images` and `validation_images` of the class, `mean_complexity_percent` of the subset;
        `None` where it is not published.

    Raises:
        ValueError: If there is no such subset.

    Example:

    ```python
    >>> from hf_effml.comp_dd import index_rows

    >>> index_rows("bird_easy")[0]["name"], len(index_rows("all"))
    ('flamingo', 159)

    ```
    """
    if name == _ALL:
        return [row for each in SUBSETS for row in index_rows(each)]
    subset = subset_info(name)
    return [
        {
            "label": label,
            "synset": subset.synsets[label],
            "imagenet_index": index,
            "name": subset.names[label],
            "category": subset.category,
            "difficulty": subset.difficulty,
            "train_images": None if subset.train_per_class is None else subset.train_per_class[label],
            "validation_images": subset.validation_images // len(subset.indices),
            "mean_complexity_percent": subset.mean_complexity,
        }
        for label, index in enumerate(subset.indices)
    ]


def push_index(
    repo_id: str, private: bool = False, token: str | bool | None = None, commit_message: str | None = None
) -> CommitInfo:
    """Uploads the index of Comp-DD: classes, counts and complexities, and no picture. Everybody may have it.

    Args:
        repo_id (`str`):
            Where it goes: `namespace/name`. The repository is created when it does not exist.
        private (`bool`, *optional*, defaults to `False`):
            Whether a new repository is private.
        token (`str` or `bool`, *optional*):
            Access token. Defaults to `HF_TOKEN` or the one stored by `hf auth login`.
        commit_message (`str`, *optional*):
            First line of the commit.

    Returns:
        `huggingface_hub.CommitInfo`: the commit.

    Raises:
        ValueError: If the repository holds pictures.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    info = api.dataset_info(repo_id)
    if any(sibling.rfilename.endswith(f"/{FACTS_NAME}") for sibling in info.siblings or ()):
        raise ValueError(f"`{repo_id}` holds pictures. Push the index to a repository of its own.")
    with tempfile.TemporaryDirectory() as stage:
        write_bytes(Path(stage, INDEX_NAME), Path(__file__).with_name("subsets.json").read_bytes())
        for name in (*SUBSETS, _ALL):
            path = Path(stage, name, "classes.parquet")
            path.parent.mkdir()
            require("datasets").Dataset.from_list(index_rows(name)).to_parquet(path)
        _renew_card(api, info, Path(stage))
        check_folder(stage)
        files = {name: Path(stage, name) for name in files_to_push(Path(stage))}
        return _commit(api, info, files, commit_message or "Upload the index of Comp-DD with hf_effml")


def _refusal(is_it: str) -> PermissionError:
    return PermissionError(
        f"The repository {is_it} public, and ImageNet's terms do not allow its pictures there. Push to a private one, "
        "or state with `holds_rights` (`--i_hold_the_rights`) that you may redistribute them. `push_index` "
        "(`--index`) shares the facts, which are free."
    )


def _fetch(api: HfApi, info: Any, name: str, folder: str | Path) -> None:
    api.hf_hub_download(info.id, name, repo_type="dataset", revision=info.sha, local_dir=folder)


def _renew_card(
    api: HfApi, info: Any, stage: Path, first: Path | None = None, more: Mapping[str, Any] | None = None
) -> Path:
    """Renews the card of the repository, or else the `first` one; subsets of others on it stay."""
    card = stage / CARD_NAME
    if CARD_NAME in {sibling.rfilename for sibling in info.siblings or ()}:
        _fetch(api, info, CARD_NAME, stage)
        before = read_card(card, "dataset").data.to_dict()
    else:
        before = {}
        if first is not None:
            write_bytes(card, first.read_bytes())
    write_card(stage, info.id)
    set_repo_id(stage, info.id)
    renewed = read_card(card, "dataset")
    for entry in ("configs", "dataset_info"):
        ours = _entries(renewed.data.get(entry))
        known = {each.get("config_name") for each in ours}
        others = [each for each in _entries(before.get(entry)) if each.get("config_name") not in known]
        if others:
            renewed.data[entry] = [*ours, *others]
    for name, value in (more or {}).items():
        renewed.data[name] = value
    save_card(card, renewed)
    return card


def _entries(value: Any) -> list[dict[str, Any]]:
    return [value] if isinstance(value, dict) else list(value or ())


def _commit(api: HfApi, info: Any, files: Mapping[str, Path], message: str, stale: Iterable[str] = ()) -> CommitInfo:
    """All of it at once, and only on what was looked at."""
    operations = [
        *(CommitOperationAdd(name, path) for name, path in files.items()),
        *(CommitOperationDelete(name) for name in stale),
    ]
    return api.create_commit(info.id, operations, commit_message=message, repo_type="dataset", parent_commit=info.sha)
