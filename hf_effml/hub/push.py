"""Pushes a folder with its card, after a look at what is in it: a model, or a distilled data set."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import filter_repo_objects

from .cards import CARD_NAME, is_hub_id, set_model_id
from .dataset_cards import INFO_NAME, is_distilled_set
from .privacy import find_private


__all__ = ["check_folder", "push_folder"]

# What a Trainer leaves behind for its own use: its arguments name the machine's folders and can hold a token.
_LEFT_OUT = [
    "_*",
    "checkpoint-*",
    "*.tfevents.*",
    "*/__pycache__/*",
    "__pycache__/*",
    "optimizer.bin",
    "optimizer.pt",
    "rng_state*.pth",
    "scaler.pt",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
]
_PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
_MAX_REMARKS = 5


def check_folder(folder: str | Path) -> None:
    """Checks that a folder can be published, and says everything that speaks against it.

    A model needs a configuration, safetensors weights and a finished card; pickles, access tokens and paths of this
    machine are refused, and so is a token router whose base model is not on the Hub. The files a Trainer keeps for
    itself (its arguments, states and checkpoints) do not count, because [`push_folder`] leaves them out.

    A distilled data set, which is known by its `distillation.json`, needs a card and the very files that were checked
    when it was saved, and may hold no program.

    Args:
        folder (`str` or `Path`):
            A folder written by `save_pretrained`, a Trainer or [`~hf_effml.save_distilled_dataset`].

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If something speaks against publishing it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder `{folder}`. Save a model into it first with `save_pretrained`.")
    files = _files_to_push(folder)
    is_set = is_distilled_set(folder)
    remarks = _remarks_on_set(folder, files) if is_set else _remarks_on_model(folder, files)
    if CARD_NAME not in files:
        write = f"write_dataset_card({folder.name!r})" if is_set else f"write_model_card({folder.name!r}, ...)"
        remarks.append(f"no card: write one with `hf_effml.hub.{write}`")
    for name in files:
        if name.endswith(_PICKLES):
            remarks.append(f"`{name}` may be a pickle, which runs code when it is opened: save tensors as safetensors")
        elif not name.endswith(".safetensors"):
            remarks += [f"`{name}`, {remark}" for remark in _remarks_on_text(folder / name)]
    if remarks:
        more = [f"and {len(remarks) - _MAX_REMARKS} more"] if len(remarks) > _MAX_REMARKS else []
        raise ValueError(f"`{folder}` is not ready for the Hub. " + "; ".join(remarks[:_MAX_REMARKS] + more) + ".")


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Checks a folder and uploads it with its card; the card's snippet then loads from `repo_id`.

    A distilled data set goes to a repository for data sets, everything else to one for models.

    Args:
        folder (`str` or `Path`):
            The folder, see [`check_folder`].
        repo_id (`str`):
            Where it goes: `namespace/name`. The repository is created when it does not exist.
        private (`bool`, *optional*):
            Whether a new repository is private. Defaults to the namespace's own default.
        revision (`str`, *optional*):
            Branch to commit to; it is created when it does not exist. Defaults to `main`.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request instead of committing.
        commit_message (`str`, *optional*):
            First line of the commit.
        token (`str`, *optional*):
            Access token. Defaults to `HF_TOKEN` or the one stored by `hf auth login`.

    Returns:
        `huggingface_hub.CommitInfo`: the commit, with `commit_url`, `oid` and, for a pull request, `pr_url`.

    Example:

    ```python
    >>> from hf_effml.hub import push_folder

    >>> push_folder("rmeeto-digits", "alice/rmeeto-digits", private=True).commit_url  # doctest: +SKIP
    ```
    """
    check_folder(folder)
    api = HfApi(token=token)
    kind = "dataset" if is_distilled_set(folder) else "model"
    repo_id = api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, repo_type=kind, branch=revision, exist_ok=True)
    set_model_id(folder, repo_id)
    return api.upload_folder(
        repo_id=repo_id,
        repo_type=kind,
        folder_path=folder,
        commit_message=commit_message or f"Upload {repo_id.split('/')[-1]} with hf_effml",
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=_LEFT_OUT,
    )


def _files_to_push(folder: Path) -> list[str]:
    """Names of the files an upload would take, with `/` between folders."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if not name.startswith((".git/", ".cache/"))]
    return list(filter_repo_objects(names, ignore_patterns=_LEFT_OUT))


def _remarks_on_model(folder: Path, files: list[str]) -> list[str]:
    remarks = []
    if not {"config.json", "adapter_config.json"} & set(files):
        remarks.append("no `config.json`: write the folder with `save_pretrained`")
    if not any(name.endswith(".safetensors") for name in files):
        remarks.append("no `.safetensors` weights: write the folder with `save_pretrained`")
    if "config.json" in files:
        remarks += _remarks_on_base_model(folder / "config.json")
    return remarks


def _remarks_on_set(folder: Path, files: list[str]) -> list[str]:
    """A set was checked when it was saved, so it must still be the same."""
    try:
        wanted = dict(json.loads((folder / INFO_NAME).read_text(encoding="utf-8"))["files"])
    except (KeyError, TypeError, ValueError):
        return [f"`{INFO_NAME}` does not list the set's files: write the folder with `save_distilled_dataset`"]
    remarks = []
    for name, digest in wanted.items():
        if name not in files:
            remarks.append(f"no `{name}`: write the folder with `save_distilled_dataset`")
        elif _digest(folder / name) != digest:
            remarks.append(
                f"`{name}` is not as it was checked and saved: write the folder again with `save_distilled_dataset`"
            )
    if not any(name.endswith(".parquet") for name in wanted):
        remarks.append("no table of images: write the folder with `save_distilled_dataset`")
    for name in files:
        if name.endswith(".parquet") and name not in wanted:
            remarks.append(f"`{name}` does not belong to the set: move it away")
        elif name.endswith(".py"):
            remarks.append(f"`{name}` is a program, which data sets on the Hub may not have: move it away")
    return remarks


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remarks_on_base_model(path: Path) -> list[str]:
    """A token router loads the model it belongs to by the name in its configuration."""
    config = json.loads(path.read_text(encoding="utf-8"))
    base_model = config.get("base_model_name_or_path")
    if config.get("model_type") != "token_router" or is_hub_id(base_model):
        return []
    return [
        f"the router's base model `{base_model}` is not one on the Hub: push that first and write its id into "
        "`base_model_name_or_path` of `config.json`, or push both in one with `model.to_full_checkpoint()`"
    ]


def _remarks_on_text(path: Path) -> list[str]:
    """What is private in a file, or unfinished in a card; files that are no text have nothing to say."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []
    remarks = find_private(text)
    if path.name == CARD_NAME and "more information needed" in text.lower():
        remarks.append('it still says "More information needed"')
    return remarks
