"""Where the pictures of a class lie in a copy of ImageNet: folders, archives read in place, or tables of the Hub."""

import csv
import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from PIL import Image

from hf_effml.utils.imports import require
from hf_effml.utils.sources.split_files import visible_files

from .subsets import Subset, imagenet_classes


__all__ = ["ImageFiles", "ImageTables", "Picture", "find_imagenet", "wanted_synsets"]

_BASES = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", "ILSVRC2012")
_PLACES = {
    "train": ("train", "ILSVRC2012_img_train", "ILSVRC2012_img_train.tar", "train.tar"),
    "validation": ("val", "validation", "ILSVRC2012_img_val", "ILSVRC2012_img_val.tar", "val.tar"),
}
_SYNSET = re.compile(r"n\d{8}")
_LAYOUTS = (
    "`train/SYNSET/*.JPEG` and `val/SYNSET/*.JPEG`; the same with a flat `val` and its annotations; Kaggle's "
    "`ILSVRC/Data/CLS-LOC`; `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar` with the devkit; "
    "`train-*.parquet` and `validation-*.parquet` of the Hub"
)
_ANNOTATIONS = ("LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt", "ILSVRC2012_devkit_t12[.tar.gz]")


@dataclass(frozen=True)
class Picture:
    """A picture that is not read yet.

    Args:
        name (`str`):
            Its file name, without folders.
        path (`str`):
            The file that holds it.
        offset (`int`, *optional*, defaults to 0):
            Where in that file it begins.
        size (`int`, *optional*):
            How many bytes it has; all of the file if unset.
    """

    name: str
    path: str
    offset: int = 0
    size: int | None = None

    @property
    def where(self) -> str:
        """Its place, for messages."""
        return self.path if self.size is None else f"{self.path}: {self.name}"

    def read(self) -> bytes:
        """Its encoded bytes."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)


class ImageFiles:
    """A copy of ImageNet in folders and tar files.

    Args:
        root (`Path`):
            The folder.
    """

    def __init__(self, root: Path):
        self.root = root
        self._places = {split: self._find_place(split) for split in _PLACES}
        tars = any(place.is_file() for place in self._places.values())
        self.description = "tar files" if tars else "folders"

    def pictures(self, split: str, synsets: Sequence[str]) -> dict[str, list[Picture]]:
        """Finds the pictures of some classes.

        Args:
            split (`str`):
                `"train"` or `"validation"`.
            synsets (`Sequence[str]`):
                The classes.

        Returns:
            `dict[str, list[Picture]]`: by class, sorted by name.

        Raises:
            FileNotFoundError: If a class is not there, or nothing says which class a validation image has.
            ValueError: If an archive is damaged.
        """
        place = self._places[split]
        if split == "validation" and self._is_flat(place):
            members = _tar_members(place) if place.is_file() else _files_in(place)
            classes = self._annotations()
            found: dict[str, list[Picture]] = {}
            for picture in members:
                found.setdefault(classes.get(Path(picture.name).stem, ""), []).append(picture)
        elif place.is_file():
            found = dict(_tars_of_classes(place, set(synsets)))
        else:
            found = {synset: list(self._of_class(place, synset)) for synset in synsets}
        missing = [synset for synset in synsets if not found.get(synset)]
        if missing:
            seen = sorted(path.name for path in place.iterdir()) if place.is_dir() else sorted(found)
            raise FileNotFoundError(
                f"`{place}` has no picture of {len(missing)} classes, the first `{missing[0]}`. It holds "
                f"{', '.join(seen[:3]) or 'nothing'}{' and more' if len(seen) > 3 else ''}. Layouts known: {_LAYOUTS}."
            )
        return {synset: sorted(found[synset], key=lambda picture: picture.name) for synset in synsets}

    def _find_place(self, split: str) -> Path:
        tried = [self.root / base / name for base in _BASES for name in _PLACES[split]]
        place = next((path for path in tried if path.exists()), None)
        if place is None:
            there = ", ".join(path.name for path in sorted(self.root.iterdir())[:5]) or "nothing"
            raise FileNotFoundError(
                f"`{self.root}` has no images for {split}: none of {', '.join(_PLACES[split])} is there, nor below "
                f"{', '.join(_BASES[1:])}; it holds {there}. Layouts known: {_LAYOUTS}."
            )
        return place

    def _is_flat(self, place: Path) -> bool:
        return place.is_file() or not any(_SYNSET.match(path.name) for path in place.iterdir())

    def _of_class(self, place: Path, synset: str) -> Iterator[Picture]:
        if (place / synset).is_dir():
            yield from _files_in(place / synset)
        elif (place / f"{synset}.tar").is_file():
            yield from _tar_members(place / f"{synset}.tar")

    def _annotations(self) -> dict[str, str]:
        """Class of every validation image by the stem of its name."""
        place = self._places["validation"]
        folders = [place, *place.parents[: len(place.relative_to(self.root).parts)]]
        for folder in folders:
            table, lines = folder / _ANNOTATIONS[0], folder / _ANNOTATIONS[1]
            devkit = folder / "ILSVRC2012_devkit_t12"
            if table.is_file():
                with table.open(encoding="utf-8", newline="") as file:
                    return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
            if lines.is_file():
                return _numbered(lines.read_text(encoding="utf-8").split())
            if devkit.is_dir():
                return _from_devkit((devkit / "data" / name).read_bytes() for name in _DEVKIT)
            if devkit.with_suffix(".tar.gz").is_file():
                with tarfile.open(devkit.with_suffix(".tar.gz")) as archive:
                    members = [archive.extractfile(f"ILSVRC2012_devkit_t12/data/{name}") for name in _DEVKIT]
                    return _from_devkit(member.read() for member in members if member is not None)
        raise FileNotFoundError(
            f"The validation images in `{place}` do not lie in folders of their classes. Put one of "
            f"{', '.join(_ANNOTATIONS)} beside them or into `{self.root}`."
        )


class ImageTables:
    """A copy of ImageNet in parquet tables, as the Hub has it; those on the Hub are read as a stream.

    Args:
        files (`dict[str, list[str]]`):
            The tables of `train` and `validation`.
        description (`str`):
            What it is, without anything about this machine.
        system (`HfFileSystem`, *optional*):
            Where the tables are; this machine if unset.
    """

    def __init__(self, files: dict[str, list[str]], description: str, system: HfFileSystem | None = None):
        self.files, self.description, self._system = files, description, system

    def rows(self, file: str, indices: set[int]) -> Iterator[tuple[str, int, bytes, str]]:
        """Reads the pictures of some classes from a table, of which only the parts are fetched that hold one.

        Args:
            file (`str`):
                One of the tables.
            indices (`set[int]`):
                Numbers of the classes.

        Yields:
            `tuple[str, int, bytes, str]`: name, class, encoded bytes, and place for messages.

        Raises:
            ValueError: If its columns are others, or its classes have other numbers.
        """
        parquet = import_module("pyarrow.parquet")
        with self._system.open(file) if self._system else open(file, "rb") as opened:
            table = parquet.ParquetFile(opened)
            self._check(file, table.schema_arrow, indices)
            row = 0
            for group in range(table.num_row_groups):
                labels = table.read_row_group(group, ["label"])["label"].to_pylist()
                if indices.intersection(labels):
                    images = table.read_row_group(group, ["image"])["image"]
                    for place, label in enumerate(labels):
                        if label in indices:
                            image = images[place].as_py()
                            stem = Path(image.get("path") or f"{Path(file).stem}_{row + place:06d}.JPEG")
                            # The Hub's copy ends names with the class.
                            name = re.sub(r"(.)_n\d{8}$", r"\1", stem.stem) + stem.suffix
                            yield name, label, image["bytes"], f"{file}: row {row + place}"
                row += len(labels)

    def _check(self, file: str, schema: Any, indices: Iterable[int]) -> None:
        features = require("datasets").Features.from_arrow_schema(schema)
        if "image" not in features or "label" not in features:
            raise ValueError(f"`{file}` must have the columns `image` and `label`; it has {', '.join(features)}.")
        theirs: list[str] | None = getattr(features["label"], "names", None)
        if theirs is None:
            return
        for index in indices:
            synset, names = imagenet_classes()[index]
            found = theirs[index] if index < len(theirs) else "nothing"
            # Where two classes share a name, one of them bears a number.
            first = re.sub(r"\d+$", "", found.partition(",")[0].lower())
            if found != synset and first not in names.lower().split(", "):
                raise ValueError(
                    f"Class {index} of `{file}` is {found!r}, and of ImageNet-1K {names!r}. Its classes must have the "
                    "numbers of the sorted synsets."
                )


def find_imagenet(
    source: str, token: str | bool | None = None, revision: str | None = None
) -> ImageFiles | ImageTables:
    """Finds a copy of ImageNet.

    Args:
        source (`str`):
            A folder, or the id of a data set on the Hub such as `"ILSVRC/imagenet-1k"`, which opens to those who
            accept its terms.
        token (`str` or `bool`, *optional*):
            Access token for the Hub; the stored one if unset.
        revision (`str`, *optional*):
            Commit, tag or branch on the Hub.

    Returns:
        [`ImageFiles`] or [`ImageTables`]

    Raises:
        FileNotFoundError: If there is none, or it has none of the layouts known.
        PermissionError: If the Hub keeps it from you.
    """
    root = Path(source).expanduser()
    if root.is_dir():
        tables = [str(file) for file in visible_files(root) if file.suffix == ".parquet"]
        return ImageTables(_by_split(source, tables), "tables of the Hub") if tables else ImageFiles(root)
    if root.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise FileNotFoundError(f"No ImageNet at `{source}`: it is no folder. Layouts known: {_LAYOUTS}.")
    system = HfFileSystem(token=token)
    try:
        commit = HfApi(token=token).dataset_info(source, revision=revision).sha
        names = HfApi(token=token).list_repo_files(source, repo_type="dataset", revision=commit)
        prefix = f"datasets/{source}@{commit}/"
        files = _by_split(source, [prefix + name for name in names if name.endswith(".parquet")])
        for first in (each[0] for each in files.values()):
            with system.open(first) as opened:
                opened.read(4)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, PermissionError) as error:
        raise PermissionError(
            f"`{source}` is no folder here, and not open to you on the Hub. Ask for access at "
            f"https://huggingface.co/datasets/{source}, and log in with `hf auth login`."
        ) from error
    return ImageTables(files, f"Hub copy `{source}`, commit {commit}", system)


def wanted_synsets(subsets: Iterable[Subset]) -> list[str]:
    """Lists the classes of some subsets, each once.

    Args:
        subsets (`Iterable[Subset]`):
            The subsets.

    Returns:
        `list[str]`: their synsets.
    """
    return list(dict.fromkeys(synset for subset in subsets for synset in subset.synsets))


_DEVKIT = ("ILSVRC2012_validation_ground_truth.txt", "meta.mat")


def _by_split(source: str, files: Sequence[str]) -> dict[str, list[str]]:
    found = {split: sorted(file for file in files if Path(file).name.startswith(f"{split}-")) for split in _PLACES}
    for split, each in found.items():
        if not each:
            raise FileNotFoundError(f"`{source}` has no table `{split}-*.parquet`. Layouts known: {_LAYOUTS}.")
    return found


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in Image.registered_extensions()


def _files_in(folder: Path) -> Iterator[Picture]:
    return (Picture(path.name, str(path)) for path in folder.iterdir() if _is_image(path.name) and path.is_file())


def _tar_members(path: Path, offset: int = 0, end: int | None = None) -> Iterator[Picture]:
    for member in _members(path, offset):
        if end is not None and member.offset_data >= end:
            return
        name = Path(member.name).name
        if member.isfile() and _is_image(name):
            yield Picture(name, str(path), member.offset_data, member.size)


def _tars_of_classes(path: Path, synsets: set[str]) -> Iterator[tuple[str, list[Picture]]]:
    """The archive holds one archive per class; both are looked into where they lie."""
    for member in _members(path, 0):
        synset, start = Path(member.name).stem, member.offset_data
        yield synset, list(_tar_members(path, start, start + member.size)) if synset in synsets else []


def _members(path: Path, offset: int) -> Iterator[tarfile.TarInfo]:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                yield from archive
    except tarfile.TarError as error:
        raise ValueError(
            f"`{path}` is compressed, damaged or cut off ({error}). Fetch it again; what is compressed has to be "
            "unpacked once."
        ) from error


def _numbered(synsets: Sequence[str]) -> dict[str, str]:
    return {f"ILSVRC2012_val_{number:08d}": synset for number, synset in enumerate(synsets, 1)}


def _from_devkit(files: Iterable[bytes]) -> dict[str, str]:
    """The devkit numbers classes in an order of its own."""
    numbers, meta = files
    require("sklearn")  # which brings scipy
    synsets = import_module("scipy.io").loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    by_number = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    return _numbered([by_number[int(number)] for number in numbers.split()])
