"""Data sets of images: folders and tables with odd names, labels, layouts and files; odd arrays and class names."""

import io
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from fuzz.outcomes import Case
from hf_effml import VimConfig, load_image_data, load_real_images, vim_image_processor
from hf_effml.distillation.image_pixels import images_to_pixels
from hf_effml.utils.image_data import ImageSplit
from hf_effml.utils.sources.class_labels import match_classes


PROCESSOR = vim_image_processor(8, crop_share=1.0)
MODES = (*("RGB", "L", "I;16") * 8, "1", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F")
SPLITS = ("train", "test", "val", "validation", "valid", "Train", "TEST", "dev", "all", "", ".hidden", "training")
CLASSES = ("a", "b", "bullet train", "test", "train", "é ü", "1", "-1", "a" * 60, "x/y", "__a", "new\nline", "%s{}")
LABELS = (0, 1, 2, 7, -1, None, 2**31, 2**62, 1.0, float("nan"), True, "a", "", "1", "é", b"a", [0], {"a": 1})
COLUMNS = ("image", "img", "picture", "label", "labels", "fine_label", "text")
NAMES = ("a", "b", "c", "", "LABEL_0", "LABEL_1", "0", 0, 1, None, "a" * 200, "é", "\ud800")


def cases(generator: random.Random, folder: Path) -> Iterator[Case]:
    datasets.disable_progress_bars()
    kinds = (_folder, _folder, _folder, _table, _table, _rows, _classes, _array)
    for number in range(2**31):
        text, run = generator.choice(kinds)(generator, folder / str(number))
        yield Case(text[:600], run)


def _read(path: Path, loader: str, classes: Any) -> Any:
    if loader == "vim":
        data = load_image_data(str(path), PROCESSOR)
        return [split[index] for split in (data.train, data.test) for index in range(len(split))]
    data = load_real_images(str(path), image_size=4, classes=classes, validation_share=0.2, whiten=False)
    return data.train.images, data.test.images


def _image(generator: random.Random) -> Image.Image:
    mode = generator.choice(MODES)
    size = generator.choice([(5, 5), (1, 1), (9, 3), (1, 40)])
    seed = generator.randrange(2**31)
    if mode == "I;16":
        return Image.fromarray(np.random.RandomState(seed).randint(0, 2**16, size).astype(np.uint16))
    colours = Image.fromarray(np.random.RandomState(seed).randint(0, 256, (*size, 3)).astype(np.uint8))
    return (colours.convert("L") if mode in ("I", "F", "LA", "PA") else colours).convert(mode)


def _bytes(generator: random.Random, damaged: bool = False) -> bytes:
    file = io.BytesIO()
    image = _image(generator)
    kind = generator.choice(["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"])
    try:
        image.save(file, kind)
    except (OSError, KeyError, ValueError):  # a mode that this kind of file does not have
        file = io.BytesIO()
        Image.new("RGB", image.size).save(file, "PNG")
    data = file.getvalue()
    damage = generator.random() if damaged else 1
    if damage < 0.06:
        return data[: generator.randrange(len(data) + 1)]
    if damage < 0.12:
        return generator.choice([b"", b"no image", b"\x89PNG\r\n\x1a\n", b"<html>", bytes(64)])
    if damage < 0.18:
        place = generator.randrange(len(data))
        return data[:place] + bytes([generator.randrange(256)]) + data[place + 1 :]
    return data


def _folder(generator: random.Random, path: Path) -> tuple[str, Callable[[], Any]]:
    usual = generator.random() < 0.6
    splits = ("train", "test") if usual else [generator.choice(SPLITS) for _ in range(generator.randint(0, 3))]
    classes = ["a", "b"] if usual else [generator.choice(CLASSES) for _ in range(generator.randint(1, 3))]
    damaged = generator.random() < 0.3
    names = [f"{split}/{name}/{i}.png" for split in splits for name in classes for i in range(2)]
    files = {name: _bytes(generator, damaged) for name in names}
    for _ in range(generator.choice([0, 0, 0, 1, 2])):
        name = generator.choice(["x.png", "train/y.png", "notes.txt", "train/a/deep/z.png", "a/u.JPG", "README.md"])
        files[name] = generator.choice([_bytes(generator), b"---\nconfigs: [\n---\n", b"text"])
    loader, kept = generator.choice(["vim", "real"]), generator.choice([None, None, [0], [1, 0], [5], [-1], []])

    def run() -> Any:
        for name, data in files.items():
            (path / name.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            (path / name.lstrip("/")).write_bytes(data)
        return _read(path, loader, kept)

    return f"{loader} {kept} {[(name, len(data), data[:12]) for name, data in files.items()]}", run


def _table(generator: random.Random, path: Path) -> tuple[str, Callable[[], Any]]:
    usual = generator.random() < 0.5
    names = ("image", "label") if usual else generator.sample(COLUMNS, 2)
    same = generator.choice(LABELS)
    cells = ("struct", "bytes", "none", "path", "text", "number")
    cell = "struct" if usual else generator.choice(cells)
    tables = {}
    for split in ("train.parquet", generator.choice(["test.parquet", "test.parquet", "val.parquet", "more.parquet"])):
        count = generator.choice([3, 5] if usual else [0, 1, 3, 5])
        values = [generator.choice(LABELS[:3]) if usual else generator.choice([same, 0, 1]) for _ in range(count)]
        images = [_cell(cell, _bytes(generator, not usual)) for _ in range(count)]
        tables[split] = {names[0]: images, names[1]: values}
    loader = generator.choice(["vim", "real"])
    cut = generator.choice([None] * 9 + [0, 4, 60])

    def run() -> Any:
        path.mkdir(parents=True)
        for name, table in tables.items():
            try:
                rows = pyarrow.table(table)
            except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):
                return None  # no table at all
            parquet.write_table(rows, path / name)
            if cut is not None:
                (path / name).write_bytes((path / name).read_bytes()[:cut])
        return _read(path, loader, None)

    told = {name: {column: str(values)[:60] for column, values in table.items()} for name, table in tables.items()}
    return f"{loader} cut {cut} {told}", run


def _cell(kind: str, data: bytes) -> Any:
    cells = {
        "struct": {"bytes": data, "path": None},
        "bytes": data,
        "none": None,
        "path": {"bytes": None, "path": "x"},
    }
    return (cells | {"text": "x.png", "number": 3})[kind]


def _rows(generator: random.Random, path: Path) -> tuple[str, Callable[[], Any]]:
    image = generator.choice([_image(generator)] * 4 + [None, "x.png", 3, np.zeros((4, 4, 3), np.uint8), b"x", [1]])
    label = generator.choice((0, 1, *LABELS))
    names = generator.choice([None, ["a", "b"], [], ["a"]])
    known = generator.choice([None, ["b", "a"], ["x"]])

    def run() -> Any:
        split = ImageSplit([{"image": image, "label": label}], PROCESSOR, labels=names)
        if known is not None:
            split = split.aligned_to(VimConfig(id2label=dict(enumerate(known))))
        return split[0]

    return f"row {getattr(image, 'mode', image)} {label!r} of {names}, model {known}", run


def _classes(generator: random.Random, path: Path) -> tuple[str, Callable[[], Any]]:
    ours, theirs = ([generator.choice(NAMES) for _ in range(generator.randint(0, 3))] for _ in range(2))
    if generator.random() < 0.4:
        theirs = generator.sample(ours, len(ours))
    return f"classes {ours} {theirs}", partial(match_classes, "d", ours, theirs)


def _array(generator: random.Random, path: Path) -> tuple[str, Callable[[], Any]]:
    shape = tuple(generator.choice([0, 1, 2, 3, 4, 8]) for _ in range(generator.randint(0, 5)))
    kind = generator.choice(["uint8", "int64", "float32", "float16", "bool", "complex64", "object", "uint16", "U1"])
    fill = generator.choice([0, 1, 0.5, -1, 255, 256, float("nan"), float("inf")])
    size = generator.choice([None, None, (4, 4), (1, 1), (0, 4)])
    channels = generator.choice([1, 3])

    def run() -> Any:
        with np.errstate(all="ignore"):
            try:
                array = np.full(shape, fill).astype(kind)
            except (OverflowError, ValueError):
                return None
        return images_to_pixels(array, channels, size)

    return f"array {shape} {kind} {fill} to {channels} {size}", run
