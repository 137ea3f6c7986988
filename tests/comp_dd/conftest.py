"""A toy ImageNet in every layout that is known."""

import csv
import io
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import require_package
from hf_effml.comp_dd import imagenet_classes, subset_info


SUBSETS = ("bird_easy", "music_hard")
_SAMPLE = "images/imagenet_samples/comp_dd_classes.parquet"
LAYOUTS = ("folders", "flat", "kaggle", "tars", "half_tars", "hub")


def _pictures(data: Path | None) -> dict[int, bytes]:
    """One real picture of every class where there are some, and pieces of photographs elsewhere."""
    wanted = [index for name in SUBSETS for index in subset_info(name).indices]
    if data is not None:
        rows = require_package("pyarrow.parquet").read_table(data).select(["image", "label"]).to_pylist()
        return {row["label"]: row["image"]["bytes"] for row in rows if row["label"] in wanted}
    photograph = require_package("sklearn.datasets").load_sample_image("flower.jpg")
    found = {}
    for number, index in enumerate(wanted):
        file = io.BytesIO()
        Image.fromarray(photograph[number * 8 : number * 8 + 200, 100:400]).save(file, "JPEG", quality=90)
        found[index] = file.getvalue()
    return found


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            _add(archive, name, data)
    return buffer.getvalue()


def _write_devkit(folder: Path, synsets: list[str]) -> None:
    known = [synset for synset, _ in imagenet_classes()]
    table = np.zeros(len(known), dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    # Its numbers are not those of the sorted synsets.
    numbers = {synset: (place + 500) % 1000 + 1 for place, synset in enumerate(known)}
    table[:] = [(numbers[synset], synset) for synset in known]
    require_package("scipy.io").savemat(folder / "meta.mat", {"synsets": table})
    lines = "\n".join(str(numbers[synset]) for synset in synsets)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(lines + "\n")


def _write_tables(folder: Path, rows: list[tuple[str, str, bytes]], split: str, count: int) -> None:
    datasets = require_package("datasets")
    short = [names.partition(",")[0] for _, names in imagenet_classes()]
    names = [name if short.index(name) == place else f"{name}2" for place, name in enumerate(short)]
    index_of = {synset: index for index, (synset, _) in enumerate(imagenet_classes())}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    random.Random(1).shuffle(rows)
    for number in range(count):
        part = rows[number::count]
        images = [{"bytes": data, "path": f"{Path(name).stem}_{synset}.JPEG"} for synset, name, data in part]
        labels = [index_of[synset] for synset, _, _ in part]
        table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        table.to_parquet(folder / f"{split}-{number:05d}-of-{count:05d}.parquet", batch_size=7)


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory) -> Path:
    """A folder with one of each of `LAYOUTS`: three training and two validation images of the classes of `SUBSETS`."""
    data = Path(os.environ.get("HF_EFFML_DATA", Path(__file__).parents[2].parent / "shared" / "data"), _SAMPLE)
    pictures = _pictures(data if data.is_file() else None)
    synsets = [synset for synset, _ in imagenet_classes()]
    train = [(synsets[i], f"{synsets[i]}_{n * 37}.JPEG", data) for i, data in pictures.items() for n in range(3)]
    shuffled = [(synsets[i], data) for i, data in pictures.items() for _ in range(2)]
    random.Random(0).shuffle(shuffled)
    held = [(synset, f"ILSVRC2012_val_{n:08d}.JPEG", data) for n, (synset, data) in enumerate(shuffled, 1)]
    root = tmp_path_factory.mktemp("imagenet")
    inner = {
        f"{synset}.tar": _tar({name: data for each, name, data in train if each == synset})
        for synset in sorted({synset for synset, _, _ in train})
    }
    kaggle = root / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    for synset, name, data in train:
        for place in (root / "folders", root / "flat", kaggle):
            _write(place / "train" / synset / name, data)
    for synset, name, data in held:
        _write(root / "folders" / "val" / synset / name, data)
        _write(root / "half_tars" / "val" / synset / name, data)
        _write(root / "flat" / "val" / name, data)
        _write(kaggle / "val" / name, data)
    # What macOS leaves beside pictures is none.
    _write(root / "folders" / "train" / held[0][0] / "._1.JPEG", b"x")
    for name, data in inner.items():
        _write(root / "half_tars" / "train" / name, data)
    _write(root / "tars" / "ILSVRC2012_img_train.tar", _tar(inner))
    _write(root / "tars" / "ILSVRC2012_img_val.tar", _tar({name: data for _, name, data in held}))
    devkit = root / "tars" / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    _write_devkit(devkit, [synset for synset, _, _ in held])
    lines = "\n".join(synset for synset, _, _ in held)
    (root / "flat" / "imagenet_2012_validation_synset_labels.txt").write_text(lines)
    with (root / "kaggle" / "LOC_val_solution.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["ImageId", "PredictionString"])
        table.writerows([Path(name).stem, f"{synset} 1 2 3 4 "] for synset, name, _ in held)
    (root / "hub" / "data").mkdir(parents=True)
    _write_tables(root / "hub" / "data", list(train), "train", 3)
    _write_tables(root / "hub" / "data", list(held), "validation", 2)
    return root
