"""Uploads a folder with its card, after a look at what is in it."""

import glob
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from .cards import set_license, set_repo_id
from .checks import check_folder, files_to_push
from .kinds import kind_of


__all__ = ["push_folder"]


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    license: str | None = None,
) -> CommitInfo:
    """Checks a folder and uploads it with its card; the card's snippet then loads from `repo_id`.

    Models go to a repository for models, data sets and banks of experts to one for data sets. Only what the folder is
    for goes along: checkpoints, nested folders of another kind (experts, a published set) and pictures in sub-folders
    that the card does not show stay here, see [`~hf_effml.hub.checks.what_stays_here`].

    Args:
        folder (`str` or `Path`):
            The folder, see [`~hf_effml.hub.check_folder`].
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
        token (`str` or `bool`, *optional*):
            Access token. Defaults to `HF_TOKEN` or the one stored by `hf auth login`.
        license (`str`, *optional*):
            Names a license on the card, a keyword of the Hub. Without it the card says what it said.

    Returns:
        `huggingface_hub.CommitInfo`: the commit, with `commit_url`, `oid` and, for a pull request, `pr_url`.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If something speaks against publishing it, or another command pushes such a folder.

    Example:

    ```python
    >>> from hf_effml.hub import push_folder

    >>> push_folder("my-model", "alice/my-model", private=True).commit_url  # doctest: +SKIP
    ```
    """
    kind = kind_of(folder)
    if kind.pushed_with is not None:
        raise ValueError(f"`{folder}` holds a {kind.noun}, which goes to the Hub with `{kind.pushed_with}`.")
    check_folder(folder)
    api, repo_type = HfApi(token=token), kind.repo_type
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
    set_repo_id(folder, repo_id)
    if license is not None:
        set_license(folder, license)
    return api.upload_folder(
        repo_id=repo_id,
        repo_type=repo_type,
        folder_path=folder,
        commit_message=commit_message or f"Upload {repo_id.split('/')[-1]} with hf_effml",
        revision=revision,
        create_pr=create_pr,
        allow_patterns=[glob.escape(name) for name in files_to_push(Path(folder))],
    )
