"""Files of a data set, and which split each of them belongs to by the names of folders and files alone."""

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


__all__ = [
    "DATA_VARIABLE",
    "check_overlap",
    "data_name",
    "find_data",
    "lists_files",
    "names_split",
    "recorded_name",
    "split_class_folders",
    "split_folders",
    "split_subset",
    "split_tables",
    "visible_files",
    "which_part",
]

DATA_VARIABLE = "HF_EFFML_DATA"
_SPLIT_OF = dict.fromkeys(("train", "training"), "train")
_SPLIT_OF |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_SPLIT_OF |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
# As `datasets` names the pieces of a split, and what it takes for the end of a word.
_PIECE = re.compile(r"(.+)-\d{5}-of-\d{5}.*", re.DOTALL)
# What macOS and Python leave behind; other names with two underscores may be classes.
_LEFTOVERS = ("__MACOSX", "__pycache__")
_SEPARATORS = re.compile(r"[-._ 0-9]+")


def find_data(name_or_path: str) -> Path | None:
    """Finds a file or folder, here or below the folder that the environment variable `HF_EFFML_DATA` names.

    Args:
        name_or_path (`str`):
            Its path.

    Returns:
        `Path` or `None`: `None` if there is none.

    Raises:
        ValueError: If the path is empty: that would be the folder that the program runs in.
    """
    if not name_or_path.strip():
        raise ValueError("The name of the data is empty. Give a folder, a file or an id on the Hub.")
    candidates = [Path(name_or_path).expanduser()]
    if os.environ.get(DATA_VARIABLE):
        candidates.append(Path(os.environ[DATA_VARIABLE]).expanduser() / name_or_path)
    return next((path for path in candidates if _exists(path)), None)


def split_subset(name_or_path: str) -> tuple[str, str | None]:
    """Separates a data set from the subset of it that is wanted.

    Args:
        name_or_path (`str`):
            As in `"me/flowers:small"`.

    Returns:
        `tuple[str, str | None]`: the data set, and the subset if one is named.
    """
    base, _, subset = name_or_path.rpartition(":")
    return (base, subset) if base and subset and not set(subset) & {"/", "\\"} else (name_or_path, None)


def data_name(name_or_path: str, hub_id: str | None) -> str:
    """What to call a data set where paths of this machine mean nothing.

    Args:
        name_or_path (`str`):
            As it was asked for, with a subset as in `"me/flowers:small"`.
        hub_id (`str`, *optional*):
            Its id on the Hub, if it came from there.

    Returns:
        `str`: as it was asked for on the Hub; else the last part of its path.
    """
    return Path(name_or_path.replace("/:", ":")).name if hub_id is None else name_or_path


def recorded_name(data: Mapping[str, Any]) -> str | None:
    """What to call a data set of which a name and an id on the Hub are recorded.

    Args:
        data (`Mapping`):
            Its `name` and its `hub_id`, if they are known.

    Returns:
        `str` or `None`: its id, with the subset if one was taken; else its name.
    """
    name, hub_id = data.get("name"), data.get("hub_id")
    return hub_id if hub_id and not str(name).startswith(f"{hub_id}:") else name


def visible_files(folder: Path) -> list[Path]:
    """Lists the files below a folder, those behind links too, without what is hidden.

    Args:
        folder (`Path`):
            The folder.

    Returns:
        `list[Path]`: sorted by their paths.
    """
    found: list[Path] = []

    def walk(place: Path, above: tuple[str, ...]) -> None:
        real = os.path.realpath(place)
        # A link to a folder above would lead round in circles.
        if real in above:
            return
        for child in place.iterdir():
            if child.name.startswith(".") or child.name in _LEFTOVERS:
                continue
            if child.is_dir():
                walk(child, (*above, real))
            elif child.is_file():
                found.append(child)

    walk(folder, ())
    return sorted(found, key=str)


def which_part(name: str, error: BaseException) -> str:
    """Says what is wrong with a data set, and how a part of it is named where it has several.

    Args:
        name (`str`):
            Its name.
        error (`BaseException`):
            What `datasets` raised.

    Returns:
        `str`: the sentence.
    """
    said = " ".join(str(error).split())
    part = re.search(r"available configs: \['([^']+)'", said)
    if part is None:
        return said.rstrip(".") + "."
    return f"{said.partition(' Example of usage')[0]}. For example, `{name}:{part[1]}`."


def lists_files(folder: Path) -> bool:
    """Says whether the card of a data set lists which files are which split.

    Args:
        folder (`Path`):
            The data set.

    Returns:
        `bool`: the answer; names of files mean nothing then.
    """
    card = folder / "README.md"
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8-sig", errors="replace")
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    return head is not None and re.search(r"^(configs|data_files):", head[1], re.MULTILINE) is not None


def split_class_folders(name: str, folder: Path, files: Iterable[Path]) -> dict[str, list[tuple[Path, str]]]:
    """Splits files that lie in folders of their classes; a folder `train`, `val` or `test` around those decides.

    Args:
        name (`str`):
            What to call the data set in messages.
        folder (`Path`):
            The data set.
        files (`Iterable[Path]`):
            Its files.

    Returns:
        `dict[str, list[tuple[Path, str]]]`: by split, every file with the name of its class; everything is `train`
        where no folder says otherwise.

    Raises:
        ValueError: If a file lies in no folder of a class, or the folders of classes differ in depth.
    """
    placed: dict[str, list[tuple[Path, str]]] = {}
    stray: list[Path] = []
    for file in files:
        above = file.relative_to(folder).parts[:-1]
        # The last one is the class, whatever it is called.
        split = next((_SPLIT_OF[part.lower()] for part in above[:-1] if part.lower() in _SPLIT_OF), None)
        if split is None:
            stray.append(file)
        else:
            placed.setdefault(split, []).append((file, _class_of(file)))
    if placed:
        # What lies beside the splits belongs to none, but directly in one of them a class is missing.
        bare = [file for file in stray if file.parent.name.lower() in _SPLIT_OF]
    else:
        placed = {"train": [(file, _class_of(file)) for file in stray]}
        bare = [file for file in stray if file.parent == folder]
        if all(label.lower() in _SPLIT_OF for _, label in placed["train"]):
            bare = stray
    if bare:
        raise ValueError(
            f"`{bare[0]}` lies in no folder that names its class. Images of `{name}` lie as in "
            "`train/CLASS/1.png` and `test/CLASS/2.png`, or as in `CLASS/1.png`; or a file `metadata.csv` beside them "
            "has the columns `file_name` and `label`."
        )
    _check_depths(name, folder, placed)
    return _train_first(placed)


def split_tables(name: str, folder: Path, files: Iterable[Path]) -> dict[str, list[Path]]:
    """Splits files of many rows as `datasets` does: by a folder named after a split, or else by a word of their name.

    Args:
        name (`str`):
            What to call the data set in messages.
        folder (`Path`):
            The data set.
        files (`Iterable[Path]`):
            Its files.

    Returns:
        `dict[str, list[Path]]`: the files by split; everything is `train` where no name says otherwise.

    Raises:
        ValueError: If a file belongs to two splits.
    """
    files = list(files)
    placed: dict[str, list[Path]] = {}
    for file in files:
        found = _splits_of(folder, file)
        if len(found) > 1:
            raise ValueError(
                f"`{file}` of `{name}` is named after the splits {' and '.join(sorted(found))}. Name it after one."
            )
        for split in found:
            placed.setdefault(split, []).append(file)
    return _train_first(placed) or {"train": files}


def names_split(folder: Path, file: Path) -> bool:
    """Says whether a file of many rows is named after a split, as [`split_tables`] sees it.

    Args:
        folder (`Path`):
            The data set.
        file (`Path`):
            The file.

    Returns:
        `bool`: the answer.
    """
    return bool(_splits_of(folder, file))


def split_folders(folder: Path, files: Iterable[Path]) -> dict[str, list[Path]]:
    """Splits files by the outermost folder that is called like a split.

    Args:
        folder (`Path`):
            The data set.
        files (`Iterable[Path]`):
            Its files.

    Returns:
        `dict[str, list[Path]]`: the files by split; everything is `train` where no folder says otherwise.
    """
    files = list(files)
    placed: dict[str, list[Path]] = {}
    for file in files:
        above = [part.lower() for part in file.relative_to(folder).parts[:-1]]
        split = next((_SPLIT_OF[part] for part in above if part in _SPLIT_OF), None)
        if split is not None:
            placed.setdefault(split, []).append(file)
    return _train_first(placed) or {"train": files}


def check_overlap(name: str, splits: Mapping[str, Iterable[str | Path]]) -> None:
    """Checks that no file belongs to two splits.

    Args:
        name (`str`):
            What to call the data set in messages.
        splits (`Mapping[str, Iterable[str | Path]]`):
            The files by split.

    Raises:
        ValueError: If one does.
    """
    seen: dict[str, str] = {}
    for split, files in splits.items():
        for file in {os.path.realpath(file): file for file in files}.items():
            other = seen.setdefault(file[0], split)
            if other != split:
                raise ValueError(
                    f"`{file[1]}` is in the splits `{other}` and `{split}` of `{name}`. Images to test on must not be "
                    "trained on: give every file one place."
                )


def _train_first(placed: Mapping[str, list]) -> dict[str, list]:
    order = list(dict.fromkeys(_SPLIT_OF.values()))
    return {split: placed[split] for split in sorted(placed, key=lambda each: (order + [each]).index(each))}


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _splits_of(folder: Path, file: Path) -> set[str]:
    above = _words(file.relative_to(folder).parts[:-1])
    piece = _PIECE.fullmatch(file.stem)
    if above:
        return set(above[:1])
    if piece is not None:
        return {_SPLIT_OF.get(piece[1].lower(), piece[1])}
    return set(_words((file.stem,)))


def _class_of(file: Path) -> str:
    """The name of its folder; macOS and archives write the same letters in two ways."""
    return unicodedata.normalize("NFC", file.parent.name)


def _words(parts: Iterable[str]) -> list[str]:
    """The splits that names contain as words."""
    words = (word for part in parts for word in _SEPARATORS.split(part.lower()))
    return [_SPLIT_OF[word] for word in words if word in _SPLIT_OF]


def _check_depths(name: str, folder: Path, placed: Mapping[str, list[tuple[Path, str]]]) -> None:
    for files in placed.values():
        if len({label for _, label in files}) == 1 and len({file.parent for file, _ in files}) > 1:
            raise ValueError(
                f"All images of `{name}`, as `{files[0][0]}`, would be of one class, `{files[0][1]}`: the folder of "
                "an image names its class. Move the images up into the folders of their classes."
            )
        depths = {len(file.relative_to(folder).parts): file for file, _ in files}
        if len(depths) > 1:
            first, second = sorted(depths.values(), key=lambda file: len(file.parts))[:2]
            raise ValueError(
                f"The folders of the classes of `{name}` differ in depth: `{first}` and `{second}`. The folder of an "
                "image names its class; put all of them side by side."
            )
