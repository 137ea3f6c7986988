"""Whatever layout a copy of ImageNet has, the same folder comes out; kills, broken pictures and gaps lose nothing."""

import hashlib
import io
import json
import random
import shutil
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comp_dd.conftest import LAYOUTS
from PIL import Image

from helpers import require_package
from hf_effml.cli.main import run_command
from hf_effml.comp_dd import build_comp_dd, custom_subset, subset_info
from hf_effml.comp_dd.building import PictureSettings, encode_picture, read_picture, torchvision_decodes
from hf_effml.comp_dd.imagenet import ImageTables
from processes import Job


SUBSETS = ["bird_easy", "music_hard"]
SMALL = PictureSettings(size=32, decoder="pil")


def _files(folder, pattern="*"):
    files = sorted(path for path in folder.rglob(pattern) if path.is_file() and path.name != "README.md")
    return {str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def _digests(folder):
    return _files(folder, "*.parquet")


@pytest.fixture(scope="module")
def built(imagenet, tmp_path_factory):
    """The subsets as they come out of folders of classes."""
    folder = tmp_path_factory.mktemp("built") / "comp-dd"
    return folder, build_comp_dd(SUBSETS, str(imagenet / "folders"), folder, pictures=SMALL)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_files(layout, imagenet, built, tmp_path):
    build_comp_dd(SUBSETS, str(imagenet / layout), tmp_path / "out", pictures=SMALL, num_proc=2)
    assert _digests(tmp_path / "out") == _digests(built[0]) != {}
    assert not (tmp_path / "out" / "_spool").exists()


def test_rows(built):
    folder, loaded = built
    subset, rows = subset_info("music_hard"), loaded["music_hard"]["train"]
    assert rows.features["label"].names == list(subset.names) and len(rows) == 27
    assert rows["label"][:] == [label for label in range(9) for _ in range(3)]
    assert rows["synset"][:] == [synset for synset in subset.synsets for _ in range(3)]
    assert rows["imagenet_label"][:] == [index for index in subset.indices for _ in range(3)]
    names = rows["file_name"][:3]
    assert names == sorted(names) and names[0] == f"{subset.synsets[0]}_0.JPEG"
    assert rows[0]["image"].size == (32, 32) and len(loaded["music_hard"]["validation"]) == 18
    facts = json.loads((folder / "music_hard" / "comp_dd.json").read_text())
    assert facts["splits"]["train"]["per_class"] == [3] * 9 and facts["source"] == "folders"
    assert str(folder) not in json.dumps(facts)


def test_the_folder_is_a_data_set(built):
    load = require_package("datasets").load_dataset
    for name in SUBSETS:
        there = load(str(built[0]), name)
        assert {split: len(rows) for split, rows in there.items()} == {
            split: len(rows) for split, rows in built[1][name].items()
        }
        streamed = next(iter(load(str(built[0]), name, streaming=True)["train"]))
        assert np.array_equal(streamed["image"], there["train"][0]["image"])


def test_it_is_built_once(imagenet, built):
    before = {path: path.stat().st_mtime_ns for path in built[0].rglob("*.parquet")}
    build_comp_dd(SUBSETS, str(imagenet / "folders"), built[0], pictures=SMALL)
    assert {path: path.stat().st_mtime_ns for path in built[0].rglob("*.parquet")} == before
    with pytest.raises(ValueError, match="other settings: `size` is 32 there and 16 here"):
        build_comp_dd(SUBSETS, str(imagenet / "folders"), built[0], pictures=PictureSettings(size=16, decoder="pil"))


def test_a_further_subset_joins(imagenet, built, tmp_path):
    folder = tmp_path / "comp-dd"
    shutil.copytree(built[0], folder)
    own = custom_subset("two", ["n02007558", "banjo"])
    assert build_comp_dd(own, str(imagenet / "hub"), folder, pictures=SMALL)["train"].num_rows == 6
    assert require_package("datasets").load_dataset(str(folder), "two")["validation"].num_rows == 4
    assert _digests(built[0]).items() <= _digests(folder).items()


def test_tables_that_are_done_are_not_read_again(imagenet, tmp_path, monkeypatch):
    shutil.copytree(imagenet / "hub", tmp_path / "hub")
    build_comp_dd("bird_easy", str(tmp_path / "hub"), tmp_path / "out", pictures=SMALL)
    monkeypatch.setattr(ImageTables, "rows", lambda *_: pytest.fail("a table was read"))
    assert build_comp_dd("bird_easy", str(tmp_path / "hub"), tmp_path / "out", pictures=SMALL)["train"].num_rows == 30


def _official(image, size):
    """ToTensor, Normalize and Resize of a tensor, in this order, back as grey levels."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255 - mean) / std
    pixels = F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    return (pixels * std + mean).mul(255).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P"])
def test_pixels_are_the_official_ones(decoder, mode):
    if decoder == "torchvision" and not torchvision_decodes():
        pytest.skip("no torchvision that decodes")
    photograph = require_package("sklearn.datasets").load_sample_image("china.jpg")
    file = io.BytesIO()
    Image.fromarray(photograph).convert(mode).save(file, "PNG" if mode == "P" else "JPEG", quality=90)
    image = read_picture(file.getvalue(), PictureSettings(size=64, decoder=decoder))
    error = np.abs(np.array(image) - _official(Image.open(file), (64, 64)))
    assert error.max() <= 1.01 and error.mean() < 0.35
    cut = read_picture(file.getvalue(), PictureSettings(size=64, decoder=decoder, resize_mode="center_crop"))
    whole = _official(Image.open(file), (64, int(64 * 640 / 427)))
    left = round((whole.shape[1] - 64) / 2)
    assert np.abs(np.array(cut) - whole[:, left : left + 64]).max() <= 1.01


def test_fast_decoding_changes_pixels():
    photograph = require_package("sklearn.datasets").load_sample_image("china.jpg")
    file = io.BytesIO()
    Image.fromarray(photograph).save(file, "JPEG", quality=90)
    exact, fast = (
        np.array(read_picture(file.getvalue(), PictureSettings(size=64, decoder="pil", fast_decode=fast)), dtype=int)
        for fast in (False, True)
    )
    assert 0.1 < np.abs(exact - fast).mean() < 10


@pytest.mark.parametrize("kind", ["webp", "png"])
def test_encoding_loses_nothing(kind):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8))
    data = encode_picture(noise, PictureSettings(size=32, image_format=kind))
    assert np.array_equal(Image.open(io.BytesIO(data)).convert("RGB"), noise)


def test_original_bytes(imagenet, tmp_path):
    settings = PictureSettings(image_format="original")
    build_comp_dd("bird_easy", str(imagenet / "folders"), tmp_path / "out", pictures=settings)
    rows = require_package("pyarrow.parquet").read_table(
        tmp_path / "out" / "bird_easy" / "train-00000-of-00001.parquet"
    )
    row = rows.slice(0, 1).to_pylist()[0]
    file = imagenet / "folders" / "train" / row["synset"] / row["file_name"]
    assert row["image"]["bytes"] == file.read_bytes()


def _copy(imagenet, tmp_path):
    shutil.copytree(imagenet / "folders", tmp_path / "copy")
    return tmp_path / "copy"


def test_missing_classes_and_pictures(imagenet, tmp_path, caplog):
    copy = _copy(imagenet, tmp_path)
    build_comp_dd("bird_easy", str(copy), tmp_path / "out", pictures=SMALL)
    assert "30 train images here, and 13,000 as published" in caplog.text
    with pytest.raises(ValueError, match="30 train images here, and 13,000 as published"):
        build_comp_dd("bird_easy", str(copy), tmp_path / "strict", strict=True)
    shutil.rmtree(copy / "train" / "n02007558")
    with pytest.raises(FileNotFoundError, match="1 classes, the first `n02007558`. It holds n.*Layouts known: `train"):
        build_comp_dd("bird_easy", str(copy), tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no picture of 10 classes, the first `n01440764`"):
        build_comp_dd("imagenette", str(imagenet / "tars"), tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="10 classes, the first `n01440764`"):
        build_comp_dd("imagenette", str(imagenet / "hub"), tmp_path / "tables")
    shutil.rmtree(copy / "val")
    with pytest.raises(FileNotFoundError, match="no images for validation.* it holds train"):
        build_comp_dd("bird_easy", str(copy), tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="No ImageNet at"):
        build_comp_dd("bird_easy", str(tmp_path / "nowhere"), tmp_path / "missing")


def test_a_flat_validation_folder_needs_annotations(imagenet, tmp_path):
    shutil.copytree(imagenet / "flat", tmp_path / "flat")
    (tmp_path / "flat" / "imagenet_2012_validation_synset_labels.txt").unlink()
    with pytest.raises(FileNotFoundError, match="Put one of LOC_val_solution.csv, imagenet_2012_validation_synset_l"):
        build_comp_dd("bird_easy", str(tmp_path / "flat"), tmp_path / "out")


@pytest.mark.parametrize("layout", ["folders", "hub"])
def test_broken_pictures(layout, imagenet, tmp_path, caplog):
    source = tmp_path / "source"
    shutil.copytree(imagenet / layout, source)
    if layout == "folders":
        victim = source / "train" / "n02007558" / "n02007558_37.JPEG"
        victim.write_bytes(victim.read_bytes()[:500])
    else:
        _break_a_row(source / "data")
    with pytest.raises(ValueError, match=r"(n02007558_37.JPEG|row \d+)` cannot be decoded .* `skip_broken`"):
        build_comp_dd("bird_easy", str(source), tmp_path / "out", pictures=SMALL)
    rows = build_comp_dd("bird_easy", str(source), tmp_path / "skipped", pictures=SMALL, skip_broken=True)["train"]
    facts = json.loads((tmp_path / "skipped" / "bird_easy" / "comp_dd.json").read_text())
    assert len(rows) == 29 and facts["skipped"] == ["n02007558_37.JPEG"] and "n02007558_37" in caplog.text


def _break_a_row(folder):
    datasets = require_package("datasets")
    for path in folder.glob("train-*.parquet"):
        rows = datasets.Dataset.from_parquet(str(path)).cast_column("image", datasets.Image(decode=False))
        broken = rows.map(
            lambda row: (
                {"image": row["image"] | {"bytes": row["image"]["bytes"][:500]}}
                if row["image"]["path"].startswith("n02007558_37_")
                else row
            )
        ).cast_column("image", datasets.Image())
        broken.to_parquet(path)


def test_other_numbers_of_classes_are_refused(imagenet, tmp_path):
    datasets = require_package("datasets")
    for split in ("train", "validation"):
        labels = datasets.ClassLabel(names=[f"class {n}" for n in range(1000)])
        features = datasets.Features({"image": datasets.Image(), "label": labels})
        picture = {"bytes": b"", "path": "1.JPEG"}
        table = datasets.Dataset.from_dict({"image": [picture], "label": [130]}, features=features)
        table.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="is 'class 13\\d', and of ImageNet-1K|is 'class \\d+'"):
        build_comp_dd("bird_easy", str(tmp_path), tmp_path / "out")


def test_damaged_archives_are_named(imagenet, tmp_path):
    shutil.copytree(imagenet / "tars", tmp_path / "tars")
    archive = tmp_path / "tars" / "ILSVRC2012_img_train.tar"
    archive.write_bytes(b"\x1f\x8b" + archive.read_bytes()[:5000])
    with pytest.raises(ValueError, match="ILSVRC2012_img_train.tar` is compressed, damaged or cut off"):
        build_comp_dd("bird_easy", str(tmp_path / "tars"), tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 4}, "`size` must be from 8 to 4096"),
        ({"resize_mode": "crop"}, "`resize_mode` must be one of squash, center_crop"),
        ({"image_format": "jpeg"}, "`image_format` must be one of webp, png, original"),
        ({"decoder": "opencv"}, "`decoder` must be one of"),
        ({"image_format": "original", "fast_decode": True}, "`fast_decode` makes no sense"),
        ({"decoder": "torchvision", "fast_decode": True}, "`fast_decode` needs the decoder"),
    ],
)
def test_settings_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PictureSettings(**fields)


def test_wrong_use(imagenet, tmp_path):
    for subsets, message in (("bird_eazy", "Did you mean"), ([], "at least one subset")):
        with pytest.raises(ValueError, match=message):
            build_comp_dd(subsets, str(imagenet / "folders"), tmp_path / "out")
    with pytest.raises(ValueError, match="`num_proc` must be at least 1; got 0"):
        build_comp_dd("bird_easy", str(imagenet / "folders"), tmp_path / "out", num_proc=0)
    with pytest.raises(ValueError, match="Name subsets"):
        run_command(["comp-dd", "build", "--imagenet", str(imagenet / "folders")])
    assert not (tmp_path / "out").exists()


def test_the_program(imagenet, tmp_path, capsys):
    own = ["--classes", "banjo", "n02007558", "--name", "odd", "--size", "16"]
    argv = ["comp-dd", "build", "bird_easy", *own, "--imagenet", str(imagenet / "folders"), "--output_dir"]
    found = run_command([*argv, str(tmp_path / "out")])
    assert found["images"] == {"bird_easy": {"train": 30, "validation": 20}, "odd": {"train": 6, "validation": 4}}
    assert f'load_dataset("{tmp_path / "out"}", "bird_easy")' in capsys.readouterr().out


_BUILD = """
import sys, time
from hf_effml.comp_dd import build_comp_dd, building

building._ROWS_PER_SHARD = 7
convert = building._convert

def slowly(*arguments, **how):
    time.sleep(0.04)
    return convert(*arguments, **how)

building._convert = slowly
settings = building.PictureSettings(size=32, decoder="pil")
build_comp_dd(["bird_easy", "music_hard"], sys.argv[1], sys.argv[2], pictures=settings)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["folders", "tars", "hub"])
def test_killed_builds_are_resumed(layout, imagenet, tmp_path):
    """Killed at ten instants, of a build whose shards hold seven rows."""
    draw = random.Random(layout)

    def build(name):
        return Job(_BUILD, imagenet / layout, tmp_path / name, cwd=tmp_path, package=True)

    assert build("whole").wait() == 0
    for _ in range(10):
        job = build("killed")
        time.sleep(draw.uniform(0.05, 0.6))
        job.kill()
        job.wait()
    job = build("killed")
    assert job.wait() == 0, job.stderr
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole") != {}
