"""Builds subsets of ImageNet as folders that `load_dataset` reads, from any copy, in pieces that survive a kill."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from transformers.utils import logging

from hf_effml.hub.kinds import installed_versions
from hf_effml.utils.files import write_json
from hf_effml.utils.imports import require
from hf_effml.utils.processes import only_run_in
from hf_effml.utils.shards import ShardFolder

from .imagenet import ImageFiles, ImageTables, Picture, find_imagenet, wanted_synsets
from .subsets import SUBSETS, Subset, subset_info


__all__ = [
    "FACTS_NAME",
    "PictureSettings",
    "build_comp_dd",
    "encode_picture",
    "picture_features",
    "read_picture",
    "torchvision_decodes",
]

logger = logging.get_logger(__name__)

FACTS_NAME = "comp_dd.json"
_SETTINGS_NAME, _SPOOL = "_build.json", "_spool"
_ROWS_PER_SHARD = 2000
# Readers that shuffle or look at few rows fetch one group of them at a time.
_ROWS_PER_GROUP = 100
_SPLITS = ("train", "validation")
# A row on its way: file name, class, bytes or nothing for a broken picture.
_Row = tuple[str, int, bytes | None]
# Left, top, right, bottom.
_Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class PictureSettings:
    """How pictures are stored.

    Args:
        size (`int`, *optional*, defaults to 128):
            Side in pixels, as Comp-DD has it.
        resize_mode (`str`, *optional*, defaults to `"squash"`):
            `"squash"` resizes both sides, as its authors do; `"center_crop"` the shorter one, and keeps the middle.
        image_format (`str`, *optional*, defaults to `"webp"`):
            `"webp"` without loss, `"png"`, or `"original"`: the very bytes, in their size.
        decoder (`str`, *optional*):
            `"pil"` or `"torchvision"`, which is faster; both equal the official pixels within one grey level. If
            unset, torchvision where it works.
        fast_decode (`bool`, *optional*, defaults to `False`):
            Decodes JPEG at a lower resolution. Faster, and changes pixels: by 2.3 grey levels on average, at most 72.

    Raises:
        ValueError: If a value makes no sense.
    """

    size: int = 128
    resize_mode: Literal["squash", "center_crop"] = "squash"
    image_format: Literal["webp", "png", "original"] = "webp"
    decoder: Literal["pil", "torchvision"] | None = None
    fast_decode: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "resize_mode": ("squash", "center_crop"),
            "image_format": ("webp", "png", "original"),
            "decoder": ("pil", "torchvision", None),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(str, values))}; got {getattr(self, name)!r}."
                )
        if not 8 <= self.size <= 4096:
            raise ValueError(f"`size` must be from 8 to 4096 pixels; got {self.size}.")
        if self.image_format == "original" and self.fast_decode:
            raise ValueError("`fast_decode` makes no sense with the format `original`, which keeps the bytes.")
        if self.fast_decode and self.decoder == "torchvision":
            raise ValueError("`fast_decode` needs the decoder `pil`.")

    def resolved(self) -> "PictureSettings":
        """The same with a decoder that works here."""
        if self.decoder == "torchvision" and not torchvision_decodes():
            raise ValueError("`decoder` must be `pil` here: torchvision is not installed, or does not fit torch.")
        fast = not self.fast_decode and self.image_format != "original" and torchvision_decodes()
        return PictureSettings(**asdict(self) | {"decoder": self.decoder or ("torchvision" if fast else "pil")})


@cache
def torchvision_decodes() -> bool:
    """Says whether torchvision can decode JPEG here; being installed is not enough."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    try:
        _by_torchvision(file.getvalue(), PictureSettings(size=8))
    # A build for another torch raises what it likes.
    except Exception:
        return False
    return True


def read_picture(data: bytes, settings: PictureSettings) -> Image.Image:
    """Decodes a picture and brings it to its size.

    Args:
        data (`bytes`):
            As the file holds it.
        settings ([`PictureSettings`]):
            Size, way of resizing and decoder.

    Returns:
        `PIL.Image.Image`: in mode `RGB`.
    """
    image = Image.open(io.BytesIO(data))
    # Other kinds, CMYK for example, are converted as the official loader does.
    if settings.decoder == "torchvision" and image.format == "JPEG" and image.mode == "RGB":
        return _by_torchvision(data, settings)
    if settings.fast_decode:
        image.draft("RGB", (settings.size, settings.size))
    size, box = _target(image.width, image.height, settings)
    resized = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    return resized if box is None else resized.crop(box)


def encode_picture(image: Image.Image, settings: PictureSettings) -> bytes:
    """Encodes a picture without loss.

    Args:
        image (`PIL.Image.Image`):
            The picture.
        settings ([`PictureSettings`]):
            The format.

    Returns:
        `bytes`: the content of an image file.
    """
    file = io.BytesIO()
    # Method 4, the default, takes seventeen times as long for a tenth of the bytes less.
    how: dict[str, Any] = {"lossless": True, "method": 0} if settings.image_format == "webp" else {"compress_level": 6}
    image.save(file, settings.image_format.upper(), **how)
    return file.getvalue()


def build_comp_dd(
    subsets: str | Subset | Sequence[str | Subset],
    imagenet: str,
    output_dir: str | Path = "comp-dd",
    *,
    pictures: PictureSettings | None = None,
    num_proc: int = 1,
    strict: bool = False,
    skip_broken: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
) -> Any:
    """Builds subsets from a copy of ImageNet, in a folder that `load_dataset` and `hf-effml train expert` take.

    Rows, order and names are the same whatever layout the copy has. A killed build goes on where it stopped when it is
    started again, and gives the same files.

    Args:
        subsets (`str`, [`Subset`] or a sequence of them):
            Names as [`subset_info`] takes them, `"all"` for the sixteen of Comp-DD, or subsets of one's own.
        imagenet (`str`):
            The copy: a folder with `train/SYNSET` and `val/SYNSET`, or a flat `val` with annotations, Kaggle's folder,
            the two tar files, which are read where they lie, or tables of the Hub; or the id of a data set on the Hub,
            of which only the parts are fetched that hold a wanted class.
        output_dir (`str` or `Path`, *optional*, defaults to `"comp-dd"`):
            Where to build; further subsets may be built into the same folder later.
        pictures ([`PictureSettings`], *optional*):
            How pictures are stored; 128 pixels, squashed, lossless WebP if unset.
        num_proc (`int`, *optional*, defaults to 1):
            Pictures decoded at a time, on as many cores.
        strict (`bool`, *optional*, defaults to `False`):
            Whether another number of images than was published is an error instead of a warning.
        skip_broken (`bool`, *optional*, defaults to `False`):
            Whether pictures that cannot be decoded are left out and listed instead of an error.
        token (`str` or `bool`, *optional*):
            Access token for the Hub.
        revision (`str`, *optional*):
            Commit, tag or branch on the Hub.

    Returns:
        `datasets.DatasetDict`: splits `train` and `validation`; for several subsets a `dict` of them by name.

    Raises:
        FileNotFoundError: If a class or an annotation is not there; the message lists the layouts that are known.
        PermissionError: If the copy on the Hub is not open to you.
        ValueError: If an argument makes no sense, a picture is broken, or the folder was built with other settings.

    Example:

    ```python
    >>> from hf_effml.comp_dd import build_comp_dd

    >>> build_comp_dd("bird_easy", imagenet="/data/imagenet")["train"].num_rows  # doctest: +SKIP
    13000
    ```
    """
    if num_proc < 1:
        raise ValueError(f"`num_proc` must be at least 1; got {num_proc}.")
    asked = _choose(subsets)
    settings = (pictures or PictureSettings()).resolved()
    source = find_imagenet(imagenet, token, revision)
    folder = Path(output_dir)
    with only_run_in(folder), _one_thread_of_torch(settings), ThreadPoolExecutor(num_proc) as pool:
        convert = partial(_convert, settings=settings, skip_broken=skip_broken)
        rows: Any
        chosen = asked
        if isinstance(source, ImageFiles):
            rows = _FileRows(source, chosen, convert, pool)
        else:
            # Tables are long to read, and a commit never changes.
            described = asdict(settings) | {"source": source.description}
            chosen = [each for each in asked if not _is_complete(folder / each.config, _facts_of(each, described))]
            rows = _TableRows(source, chosen, convert, pool, folder / _SPOOL, asdict(settings))
        _check_counts(chosen, rows, strict)
        plans = [_Plan(folder, subset, rows, settings, source.description, skip_broken) for subset in chosen]
        for plan in plans:
            plan.shards.missing()
        total = sum(plan.to_do for plan in plans)
        with logging.tqdm(total=total, desc="pictures", unit="picture", disable=not total) as bar:
            for plan in plans:
                plan.build(bar.update)
        shutil.rmtree(folder / _SPOOL, ignore_errors=True)
        from hf_effml.hub import write_card

        write_card(folder)
    loaded = {subset.config: _load(folder, subset.config) for subset in asked}
    return loaded[asked[0].config] if isinstance(subsets, str | Subset) and len(asked) == 1 else loaded


def picture_features(classes: Sequence[str]) -> Any:
    """Says which columns the tables of a subset have.

    Args:
        classes (`Sequence[str]`):
            Names of its classes.

    Returns:
        `datasets.Features`
    """
    datasets = require("datasets")
    return datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(classes)),
            "synset": datasets.Value("string"),
            "imagenet_label": datasets.Value("int16"),
            "file_name": datasets.Value("string"),
        }
    )


class _FileRows:
    """Pictures that are read where they lie, in their final order."""

    def __init__(self, source: ImageFiles, subsets: Sequence[Subset], convert: Callable, pool: ThreadPoolExecutor):
        self._convert, self._pool = convert, pool
        self._found = {split: source.pictures(split, wanted_synsets(subsets)) for split in _SPLITS}

    def names(self, split: str, subset: Subset) -> list[list[str]]:
        return [[picture.name for picture in self._found[split][synset]] for synset in subset.synsets]

    def rows(self, split: str, subset: Subset, part: slice) -> Iterator[_Row]:
        pairs = zip(subset.synsets, subset.indices, strict=True)
        listed = [(each, index) for synset, index in pairs for each in self._found[split][synset]]
        return iter(self._pool.map(self._one, listed[part]))

    def _one(self, item: tuple[Picture, int]) -> _Row:
        picture, index = item
        return picture.name, index, self._convert(picture.read(), picture.where)


class _TableRows:
    """Pictures that lie mixed in tables: each table is read once and left sorted in a folder for the moment."""

    def __init__(
        self,
        source: ImageTables,
        subsets: Sequence[Subset],
        convert: Callable,
        pool: ThreadPoolExecutor,
        folder: Path,
        settings: Mapping[str, Any],
    ):
        self._source, self._convert, self._folder = source, convert, folder
        self._indices = {index for subset in subsets for index in subset.indices}
        self._files = {
            f"{split}-{number:05d}.arrow": file for split in _SPLITS for number, file in enumerate(source.files[split])
        }
        if not subsets:
            return
        asked = {"indices": sorted(self._indices), "source": source.description, "files": len(self._files), **settings}
        shards = ShardFolder(folder, self._files, asked)
        missing = shards.start()
        bar = logging.tqdm(total=len(missing), desc="tables", unit="table", disable=not missing)
        with bar:
            for _ in pool.map(lambda name: self._spool(name, shards), missing):
                bar.update()

    def _spool(self, name: str, shards: ShardFolder) -> None:
        pyarrow, feather = import_module("pyarrow"), import_module("pyarrow.feather")
        rows = [
            (file_name, index, self._convert(data, where))
            for file_name, index, data, where in self._source.rows(self._files[name], self._indices)
        ]
        columns = zip(*rows, strict=True) if rows else ((), (), ())
        types = (pyarrow.string(), pyarrow.int16(), pyarrow.large_binary())
        arrays = [pyarrow.array(column, kind) for column, kind in zip(columns, types, strict=True)]
        with shards.writing(name) as path:
            feather.write_feather(pyarrow.table(arrays, names=["name", "index", "data"]), str(path), "uncompressed")

    @cached_property
    def _tables(self) -> dict[str, Any]:
        join, read = import_module("pyarrow").concat_tables, import_module("pyarrow.feather").read_table
        paths = {split: [self._folder / name for name in self._files if name.startswith(split)] for split in _SPLITS}
        return {split: join([read(str(path), memory_map=True) for path in each]) for split, each in paths.items()}

    @cached_property
    def _places(self) -> dict[str, dict[int, list[tuple[str, int]]]]:
        """Name and row of every picture by split and class, sorted."""
        found: dict[str, dict[int, list[tuple[str, int]]]] = {}
        for split, table in self._tables.items():
            found[split] = {index: [] for index in self._indices}
            pairs = zip(table["name"].to_pylist(), table["index"].to_pylist(), strict=True)
            for row, (name, index) in enumerate(pairs):
                found[split][index].append((name, row))
            for each in found[split].values():
                each.sort()
        return found

    def names(self, split: str, subset: Subset) -> list[list[str]]:
        return [[name for name, _ in self._places[split][index]] for index in subset.indices]

    def rows(self, split: str, subset: Subset, part: slice) -> Iterator[_Row]:
        places = [row for index in subset.indices for _, row in self._places[split][index]]
        for row in self._tables[split].take(places[part]).to_pylist():
            yield row["name"], row["index"], row["data"]


class _Plan:
    """What a subset's folder is to hold."""

    def __init__(
        self, folder: Path, subset: Subset, rows: Any, settings: PictureSettings, source: str, skip_broken: bool
    ):
        self.subset, self._rows, self._folder = subset, rows, folder / subset.config
        self._names = {split: rows.names(split, subset) for split in _SPLITS}
        digest = hashlib.blake2b(repr(self._names).encode(), digest_size=16).hexdigest()
        self._parts: dict[str, tuple[str, slice]] = {}
        for split, names in self._names.items():
            count = sum(map(len, names))
            number = -(-count // _ROWS_PER_SHARD)
            for shard in range(number):
                part = slice(shard * _ROWS_PER_SHARD, min((shard + 1) * _ROWS_PER_SHARD, count))
                self._parts[f"{split}-{shard:05d}-of-{number:05d}.parquet"] = split, part
        self._facts = _facts_of(subset, asdict(settings) | {"source": source})
        asked = self._facts | {"names": digest, "skip_broken": skip_broken, "rows_per_shard": _ROWS_PER_SHARD}
        self.shards = ShardFolder(self._folder, self._parts, asked, description=_SETTINGS_NAME)

    @property
    def to_do(self) -> int:
        """Pictures that are not built yet."""
        missing = self.shards.missing()
        return sum(part.stop - part.start for name, (_, part) in self._parts.items() if name in missing)

    def build(self, progress: Callable[[int], Any]) -> None:
        """Writes what is missing, and the facts last."""
        features = picture_features(self.subset.names)
        for name in self.shards.start():
            split, part = self._parts[name]
            table = _as_table(self._watched(split, part, progress), self.subset, features)
            with self.shards.writing(name) as path:
                import_module("pyarrow.parquet").write_table(table, path, row_group_size=_ROWS_PER_GROUP)
        write_json(self._folder / FACTS_NAME, self._facts | self._counted())

    def _watched(self, split: str, part: slice, progress: Callable[[int], Any]) -> Iterator[_Row]:
        for row in self._rows.rows(split, self.subset, part):
            progress(1)
            yield row

    def _counted(self) -> dict[str, Any]:
        splits, skipped = {}, list[str]()
        for split, names in self._names.items():
            files = [name for name, (each, _) in self._parts.items() if each == split]
            read = partial(import_module("pyarrow.parquet").read_table, columns=["label", "file_name"])
            rows = [row for name in files for row in read(self._folder / name).to_pylist()]
            counts = [0] * len(self.subset.names)
            for row in rows:
                counts[row["label"]] += 1
            if not all(counts):
                empty = self.subset.synsets[counts.index(0)]
                raise ValueError(f"No {split} picture of `{empty}` can be decoded. Fetch the images again.")
            there = {row["file_name"] for row in rows}
            skipped += [name for each in names for name in each if name not in there]
            size = sum((self._folder / name).stat().st_size for name in files)
            splits[split] = {"images": len(rows), "bytes": size, "per_class": counts, "files": files}
        if skipped:
            logger.warning(f"{self.subset.config}: left out {len(skipped)} broken pictures: {', '.join(skipped[:5])}.")
        packages = ("hf-effml", "pillow", *(["torchvision"] if self._facts["decoder"] == "torchvision" else []))
        versions = installed_versions("pillow", "torchvision")
        return {"splits": splits, "skipped": skipped, "versions": {name: versions[name] for name in packages}}


def _facts_of(subset: Subset, how: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a subset's folder before it is built."""
    return {
        "config": subset.config,
        "category": subset.category,
        "difficulty": subset.difficulty,
        "classes": list(subset.names),
        "synsets": list(subset.synsets),
        "imagenet_indices": list(subset.indices),
        "mean_complexity_percent": subset.mean_complexity,
        "published_train_images": subset.train_images,
        **how,
        "size": None if how["image_format"] == "original" else how["size"],
    }


def _is_complete(folder: Path, facts: Mapping[str, Any]) -> bool:
    path = folder / FACTS_NAME
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    files = [name for each in found.get("splits", {}).values() for name in each["files"]]
    return facts.items() <= found.items() and all((folder / name).is_file() for name in files)


def _choose(subsets: str | Subset | Sequence[str | Subset]) -> list[Subset]:
    asked = [subsets] if isinstance(subsets, str | Subset) else list(subsets)
    named = [name for each in asked for name in (SUBSETS if each == "all" else [each])]
    chosen = [subset_info(each) if isinstance(each, str) else each for each in named]
    if not chosen:
        raise ValueError("`subsets` must name at least one subset, such as `bird_easy`.")
    return list({subset.config: subset for subset in chosen}.values())


def _check_counts(subsets: Iterable[Subset], rows: Any, strict: bool) -> None:
    for subset in subsets:
        found = {split: [len(names) for names in rows.names(split, subset)] for split in _SPLITS}
        for split, counts in found.items():
            empty = [synset for synset, count in zip(subset.synsets, counts, strict=True) if not count]
            if empty:
                raise FileNotFoundError(
                    f"There is no {split} picture of {len(empty)} classes, the first `{empty[0]}`."
                )
        wanted = {"train": subset.train_images, "validation": subset.validation_images}
        for split, number in wanted.items():
            if number is not None and number != sum(found[split]):
                text = f"`{subset.config}` has {sum(found[split]):,} {split} images here, and {number:,} as published."
                if strict:
                    raise ValueError(text)
                logger.warning(text)


def _convert(data: bytes, where: str, settings: PictureSettings, skip_broken: bool) -> bytes | None:
    try:
        if settings.image_format == "original":
            image = Image.open(io.BytesIO(data))
            # Enough to see that nothing is missing.
            image.draft("RGB", (1, 1))
            image.load()
            return data
        return encode_picture(read_picture(data, settings), settings)
    # Decoders raise what they like: OSError, SyntaxError, struct.error, RuntimeError, ...
    except Exception as error:
        if skip_broken:
            return None
        raise ValueError(
            f"`{where}` cannot be decoded ({error}). Fetch it again, or leave such pictures out with `skip_broken`."
        ) from error


def _target(
    width: int, height: int, settings: PictureSettings
) -> tuple[tuple[int, int], tuple[int, int, int, int] | None]:
    """Size to resize to, and what is cut out of that."""
    side = settings.size
    if settings.resize_mode == "squash":
        return (side, side), None
    short = min(width, height)
    wide, high = (int(side * length / short) for length in (width, height))
    left, top = round((wide - side) / 2), round((high - side) / 2)
    return (wide, high), (left, top, left + side, top + side)


def _by_torchvision(data: bytes, settings: PictureSettings) -> Image.Image:
    import torch

    io_of = require("torchvision.io")
    resize = require("torchvision.transforms.v2.functional").resize
    pixels = io_of.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=io_of.ImageReadMode.RGB)
    (wide, high), box = _target(pixels.shape[2], pixels.shape[1], settings)
    image = Image.fromarray(resize(pixels, [high, wide], antialias=True).permute(1, 2, 0).numpy())
    return image if box is None else image.crop(box)


def _as_table(rows: Iterable[_Row], subset: Subset, features: Any) -> Any:
    label_of = {index: label for label, index in enumerate(subset.indices)}
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for name, index, data in rows:
        if data is None:
            continue
        label = label_of[index]
        values = ({"bytes": data, "path": name}, label, subset.synsets[label], index, name)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return import_module("pyarrow").table(columns, schema=features.arrow_schema)


def _load(folder: Path, config: str) -> Any:
    datasets = require("datasets")
    files = {split: str(folder / config / f"{split}-*.parquet") for split in _SPLITS}
    return datasets.load_dataset("parquet", data_files=files)


@contextmanager
def _one_thread_of_torch(settings: PictureSettings) -> Iterator[None]:
    """Every picture has its own thread; torch must not start others for each of them."""
    if settings.decoder != "torchvision":
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
