"""Whether a folder can be published: a look into every file, not at its name."""

import bz2
import glob
import json
import lzma
import mmap
import os
import pickletools
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from safetensors import SafetensorError, safe_open

from hf_effml.utils.files import is_leftover

from .card_file import read_card, read_text
from .cards import CARD_NAME
from .kinds import is_known, kind_of
from .privacy import find_private, find_private_in_bytes, scrub
from .sections import unbalanced_sections


__all__ = ["LEFT_OUT", "check_folder", "files_to_push", "what_stays_here"]

# What a Trainer leaves behind for its own use: its arguments name the machine's folders and can hold a token.
LEFT_OUT = [
    "_*",
    "checkpoint-*",
    "*/checkpoint-*",
    ".run.lock",
    "*/.run.lock",
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
_PICTURES = (".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")
# How a whole file of a kind begins, and what its last bytes hold.
_WHOLE = {".parquet": (b"PAR1", b"PAR1"), ".png": (b"\x89PNG", b"IEND")}
_MAX_REMARKS = 5
_CALLS = {"GLOBAL", "INST", "OBJ", "REDUCE", "STACK_GLOBAL", "BUILD"}
# So many bytes tell what a file is, also of one that is compressed by blocks.
_START = 2**20


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
        # A name may be a secret itself.
        remarks += [f"`{scrub(name)}`{remark}" for remark in _remarks_on_file(folder, name)]
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
    ignored = [*DEFAULT_IGNORE_PATTERNS, *LEFT_OUT, *kind_of(folder).left_out, *_not_of_it(folder)]
    return list(filter_repo_objects(_all_files(folder), ignore_patterns=ignored))


def what_stays_here(folder: str | Path) -> dict[str, int]:
    """Says what an upload leaves out.

    Args:
        folder (`str` or `Path`):
            The folder.

    Returns:
        `dict[str, int]`: bytes by name; of a folder that stays here as a whole, its own name.
    """
    folder = Path(folder)
    uploaded, found = set(files_to_push(folder)), dict[str, int]()
    known = {name.partition("/")[0] for name in uploaded}
    for name in filter_repo_objects(_all_files(folder), ignore_patterns=DEFAULT_IGNORE_PATTERNS):
        if name not in uploaded:
            first, slash, _ = name.partition("/")
            shown = name if first in known else f"{first}{slash}"
            path = folder / name
            found[shown] = found.get(shown, 0) + (path.stat().st_size if path.is_file() else 0)
    return found


def _all_files(folder: Path) -> list[str]:
    names = []
    for path, folders, files in os.walk(folder):
        found = (Path(path, name) for name in [*files, *folders])
        names += [each.relative_to(folder).as_posix() for each in found if each.is_symlink() or each.is_file()]
    return sorted(names)


def _not_of_it(folder: Path) -> list[str]:
    """Patterns of nested folders of another kind, which are repositories of their own, and of pictures nobody sees."""
    nested = [
        path.relative_to(folder).as_posix()
        for path in (Path(found) for found, _, _ in os.walk(folder))
        if path != folder and is_known(path) and type(kind_of(path)) is not type(kind_of(folder))
    ]
    card = folder / CARD_NAME
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    unseen = [
        name for name in _all_files(folder) if "/" in name and name.lower().endswith(_PICTURES) and name not in text
    ]
    return [glob.escape(name) for name in unseen] + [f"{glob.escape(name)}/*" for name in nested]


def _remarks_on_file(folder: Path, name: str) -> Iterator[str]:
    path = folder / name
    if find_private(name):
        yield " has a name that looks like an access token or a folder of this machine: rename it"
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        yield " is a link that leads out of the folder: put the file itself there"
    elif not path.is_file():
        yield " is a link to a folder, or to nothing: put the files themselves there"
    elif is_leftover(path.name):
        yield " was left by a process that was killed while it wrote: delete it"
    elif _TRACKERS & set(Path(name).parts) or ".tfevents" in path.name:
        yield " is a log of an experiment tracker, which holds more than you may want to show: move it away"
    else:
        try:
            yield from _remarks_on_content(path)
        except OSError as error:
            yield f" cannot be read ({error.strerror}): make it readable, or move it away"


def _remarks_on_content(path: Path) -> Iterator[str]:
    if path.name == CARD_NAME:
        yield from _remarks_on_card(path)
    elif path.suffix in _WEIGHTS:
        yield from _remarks_on_weights(path)
    elif path.name.lower().endswith(_PICKLES) or _holds_a_pickle(path):
        yield " may be a pickle, which runs code when it is opened: save tensors as safetensors"
    else:
        if _is_cut(path):
            yield " is empty or cut off: write it again"
        yield from (f", {remark}" for remark in find_private_in_bytes(path))


def _remarks_on_card(path: Path) -> Iterator[str]:
    try:
        text = read_text(path)
    except UnicodeDecodeError:
        yield " is no text in UTF-8: write it again with `hf_effml.hub.write_card`"
        return
    lacks_end = text.startswith("---\n") and not re.search(r"^---\s*$", text[4:], flags=re.MULTILINE)
    body = re.sub(r"\A---\n.*?\n---\s*(\n|\Z)", "", text, flags=re.DOTALL)
    if lacks_end or unbalanced_sections(text) or not body.strip():
        yield " is empty or cut off: write it again with `hf_effml.hub.write_card`"
    try:
        read_card(path, kind_of(path.parent).repo_type)
    except ValueError as error:
        yield f": {str(error).removesuffix('.')}"
    if "more information needed" in text.lower():
        yield ' still says "More information needed"'
    yield from (f", {remark}" for remark in find_private(text))


def _remarks_on_weights(path: Path) -> Iterator[str]:
    try:
        with safe_open(path, framework="pt") as file:
            empty = not file.keys()
    except SafetensorError as error:
        yield f" is empty, cut off or no safetensors file ({error}): save the model again"
        return
    if empty:
        yield " holds no tensors: save the model again"
    # The header's text, in which escapes may hide a name, and then the file as it is.
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little")).decode("utf-8")
    found = [*find_private(header), *find_private_in_bytes(path)]
    yield from (f", {remark}" for remark in dict.fromkeys(found))


def _holds_a_pickle(path: Path) -> bool:
    """By the first bytes: what `pickle`, `torch.save`, `numpy` with objects and `joblib` write."""
    with path.open("rb") as file:
        start = file.read(_START)
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                members = [(name, archive.open(name).read(_START)) for name in archive.namelist()]
        except (zipfile.BadZipFile, RuntimeError, zlib.error, lzma.LZMAError, EOFError):
            # Encrypted or packed in a way that nobody can look into.
            return True
        return any(name.lower().endswith(_PICKLES) or _starts_a_pickle(data) for name, data in members)
    return _starts_a_pickle(start) or any(map(_starts_a_pickle, _unpacked(start))) or _is_plain_pickle(path)


def _starts_a_pickle(start: bytes) -> bool:
    is_binary = len(start) > 1 and start[0] == 0x80 and start[1] in range(2, 6)
    has_objects = start.startswith(b"\x93NUMPY") and re.search(rb"'\|O\d?'", start.partition(b"\n")[0]) is not None
    # Of joblib, compressed in a way that cannot be looked into.
    return is_binary or has_objects or start.startswith((b"\x04\x22\x4d\x18", b"ZF"))


def _unpacked(start: bytes) -> Iterator[bytes]:
    """The first bytes of what joblib may have compressed."""
    for unpacker in (zlib.decompressobj(47), bz2.BZ2Decompressor(), lzma.LZMADecompressor()):
        try:
            yield unpacker.decompress(start, 512)
        except (zlib.error, lzma.LZMAError, OSError, EOFError):
            continue


def _is_plain_pickle(path: Path) -> bool:
    """Whether all of a file is a program of the first protocols, which have no first bytes, that calls something."""
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            with warnings.catch_warnings(action="ignore"):
                codes = {code.name for code, _, _ in pickletools.genops(data)}  # type: ignore[arg-type]
        except Exception:  # whatever the bytes are, they are no pickle
            return False
        return not data.read().strip() and bool(codes & _CALLS)


def _is_cut(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(max(path.stat().st_size - 16, 0))
        end = file.read()
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return True
    first, last = _WHOLE.get(path.suffix.lower(), (b"", b""))
    if not start.startswith(first) or last not in end:
        return True
    # Archives list their members at the end, where `zipfile` looks for them.
    return start.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path)
