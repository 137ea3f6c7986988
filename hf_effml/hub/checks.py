"""Whether a folder can be published: a look into every file, not at its name."""

import json
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open

from hf_effml.utils.files import is_leftover

from .cards import CARD_NAME
from .kinds import kind_of
from .privacy import find_private, find_private_in_bytes
from .sections import unbalanced_sections


__all__ = ["LEFT_OUT", "check_folder", "files_to_push"]

# What a Trainer leaves behind for its own use: its arguments name the machine's folders and can hold a token.
LEFT_OUT = [
    "_*",
    "checkpoint-*",
    "*/checkpoint-*",
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
_TRACKERS = {
    "wandb",
    "mlruns",
    "mlartifacts",
    "aim",
    ".aim",
    ".neptune",
    ".comet",
    "trackio",
    "dvclive",
    "lightning_logs",
}
_PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
_WEIGHTS = (".safetensors",)
_MAX_REMARKS = 5
# Above this a pickle of the oldest protocol, which has no first bytes of its own, is no longer looked for.
_MAX_PLAIN_PICKLE = 2**20


def check_folder(folder: str | Path) -> None:
    """Checks that a folder can be published, and says everything that speaks against it.

    Every folder needs a finished card. Pickles (by their content too), access tokens and folders of this machine in
    any encoding, damaged or empty weights, files that a killed process has left, logs of trackers, and links that
    lead out of the folder are refused by name. What else it needs depends on its kind. The files that a Trainer keeps
    for itself (its arguments, states and checkpoints) do not count, because [`~hf_effml.hub.push_folder`] leaves them
    out.

    Args:
        folder (`str` or `Path`):
            A folder written by `save_pretrained`, a Trainer or a function of this package.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If something speaks against publishing it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder `{folder}`. Save a model into it first with `save_pretrained`.")
    files, kind = files_to_push(folder), kind_of(folder)
    remarks = kind.remarks(files)
    if CARD_NAME not in files:
        remarks.append(f"no card: write one with `hf_effml.hub.write_card({folder.name!r})`")
    for name in files:
        remarks += [f"`{name}`{remark}" for remark in _remarks_on_file(folder, name)]
    if remarks:
        more = [f"and {len(remarks) - _MAX_REMARKS} more"] if len(remarks) > _MAX_REMARKS else []
        raise ValueError(f"`{folder}` is not ready for the Hub. " + "; ".join(remarks[:_MAX_REMARKS] + more) + ".")


def files_to_push(folder: Path) -> list[str]:
    """Names of the files that an upload takes.

    Args:
        folder (`Path`):
            The folder.

    Returns:
        `list[str]`: sorted, with `/` between folders; a link to a folder is named as it is.
    """
    names = []
    for path, folders, files in os.walk(folder):
        links = [name for name in folders if Path(path, name).is_symlink()]
        names += [Path(path, name).relative_to(folder).as_posix() for name in [*files, *links]]
    names = [name for name in sorted(names) if not name.startswith((".git/", ".cache/"))]
    return list(filter_repo_objects(names, ignore_patterns=[*LEFT_OUT, *kind_of(folder).left_out]))


def _remarks_on_file(folder: Path, name: str) -> Iterator[str]:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        yield " is a link that leads out of the folder: put the file itself there"
    elif path.is_dir() or not path.exists():
        yield " is a link to a folder, or to nothing: put the files themselves there"
    elif is_leftover(path.name):
        yield " was left by a process that was killed while it wrote: delete it"
    elif _TRACKERS & set(Path(name).parts) or ".tfevents" in path.name:
        yield " is a log of an experiment tracker, which holds more than you may want to show: move it away"
    elif path.name == CARD_NAME:
        yield from _remarks_on_card(path)
    elif path.suffix in _WEIGHTS:
        yield from _remarks_on_weights(path)
    elif path.name.lower().endswith(_PICKLES) or _holds_a_pickle(path):
        yield " may be a pickle, which runs code when it is opened: save tensors as safetensors"
    elif path.suffix == ".json" and not _is_json(path):
        yield " is empty or cut off: write it again"
    else:
        yield from (f", {remark}" for remark in find_private_in_bytes(path))


def _remarks_on_card(path: Path) -> Iterator[str]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        yield " is no text in UTF-8: write it again with `hf_effml.hub.write_card`"
        return
    lacks_end = text.startswith("---\n") and not re.search(r"^---\s*$", text[4:], flags=re.MULTILINE)
    body = re.sub(r"\A---\n.*?\n---\s*(\n|\Z)", "", text, flags=re.DOTALL)
    if lacks_end or unbalanced_sections(text) or not body.strip():
        yield " is empty or cut off: write it again with `hf_effml.hub.write_card`"
    if "more information needed" in text.lower():
        yield ' still says "More information needed"'
    yield from (f", {remark}" for remark in find_private(text))


def _remarks_on_weights(path: Path) -> Iterator[str]:
    try:
        with safe_open(path, framework="pt") as file:
            words, empty = json.dumps(file.metadata() or {}), not file.keys()
    except (SafetensorError, OSError) as error:
        yield f" is empty, cut off or no safetensors file ({error}): save the model again"
        return
    if empty:
        yield " holds no tensors: save the model again"
    # The header's text, in which escapes may hide a name, and then the file as it is.
    found = [*find_private(words), *find_private_in_bytes(path)]
    yield from (f", {remark}" for remark in dict.fromkeys(found))


def _holds_a_pickle(path: Path) -> bool:
    """By the first bytes: what `pickle`, `torch.save`, `numpy` with objects and `joblib` write."""
    with path.open("rb") as file:
        start = file.read(512)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [(member, archive.open(member).read(512)) for member in archive.namelist()]
        return any(member.lower().endswith(_PICKLES) or _starts_a_pickle(data) for member, data in members)
    if _starts_a_pickle(start):
        return True
    return path.stat().st_size <= _MAX_PLAIN_PICKLE and _is_plain_pickle(path.read_bytes())


def _starts_a_pickle(start: bytes) -> bool:
    is_binary = len(start) > 1 and start[0] == 0x80 and start[1] in range(2, 6)
    has_objects = start.startswith(b"\x93NUMPY") and re.search(rb"'descr':\s*[^,]*O", start) is not None
    # Compressed by joblib: nobody can see what is inside without opening it.
    return is_binary or has_objects or start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"ZF"))


def _is_plain_pickle(data: bytes) -> bool:
    """Whether all of it is a program of the first protocols that calls something."""
    try:
        with warnings.catch_warnings(action="ignore"):
            codes = {code.name for code, _, _ in pickletools.genops(data)}
    except Exception:  # whatever the bytes are, they are no pickle
        return False
    return bool(codes & {"GLOBAL", "INST", "OBJ", "REDUCE", "STACK_GLOBAL", "BUILD"})


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True
