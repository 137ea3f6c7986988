"""What users' image data mean is what arrives: classes, splits, pixels; what cannot be read is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import require_package
from hf_effml import load_image_data, load_real_images, vim_image_processor
from hf_effml.distillation.image_pixels import images_to_pixels
from hf_effml.utils.image_data import ImageSplit
from hf_effml.utils.sources import class_labels, image_splits
from hf_effml.utils.sources.image_table import image_to_rgb


PROCESSOR = vim_image_processor(8, crop_share=1.0)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes splits of labels as parquet files; every image is as bright as its row's number."""
    datasets = require_package("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(label=None, folder="data", **splits):
        label = label or datasets.Value("int64")
        features = datasets.Features({"image": datasets.Image(), "label": label})
        (tmp_path / folder).mkdir(exist_ok=True, parents=True)
        for split, labels in splits.items():
            images = [Image.new("RGB", (9, 9), (row,) * 3) for row in range(len(labels))]
            rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
            rows.to_parquet(tmp_path / folder / f"{split}.parquet")
        return str(tmp_path / folder)

    return write


@pytest.fixture
def pictures(tmp_path):
    """Writes one image of its own brightness under every name."""

    def write(*names, folder="zoo"):
        for number, name in enumerate(names):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (9, 9), number).save(tmp_path / folder / name)
        return tmp_path / folder

    return write


def numbers(split):
    return [split[index]["labels"] for index in range(len(split))]


def shades(split):
    """The brightness of every image, as `pictures` wrote it."""
    return [int(split.rows[index]["image"].getpixel((0, 0))[0]) for index in range(len(split))]


def test_whole_numbers_stay_what_they_are(table):
    folder = table(train=[*range(12)], test=[*range(1, 12)])
    data = load_image_data(folder, PROCESSOR)
    assert numbers(data.train) == [*range(12)] and numbers(data.test) == [*range(1, 12)]
    assert data.labels == [str(number) for number in range(12)]
    real = load_real_images(folder, classes=[2, 3], validation_share=0, whiten=False)
    assert real.label_names == ["2", "3"] and len(real.train) == len(real.test) == 2
    brightness = (real.processor.unwhiten(real.test.images).mean((1, 2, 3)) * 255).round()
    assert brightness.tolist() == [1, 2] and real.test.labels.tolist() == [0, 1]


def test_whole_numbers_with_gaps_keep_their_order_in_all_splits(table):
    folder = table(train=[30, 4, 100], test=[100, 7])
    data = load_image_data(folder, PROCESSOR)
    assert data.labels == ["4", "7", "30", "100"]
    assert numbers(data.train) == [2, 0, 3] and numbers(data.test) == [3, 1]
    real = load_real_images(folder, classes=[100, 4], validation_share=0, whiten=False)
    assert real.label_names == ["100", "4"] and real.train.labels.tolist() == [1, 0] and len(real.test) == 1
    with pytest.raises(ValueError, match="`classes` must be numbers of .*, which are 4, 7, 30, 100; got 2"):
        load_real_images(folder, classes=[2])


def test_texts_and_truths(table):
    datasets = require_package("datasets")
    data = load_image_data(table(datasets.Value("string"), train=["b", "c", "a"], test=["c", "b"]), PROCESSOR)
    assert data.labels == ["a", "b", "c"] and numbers(data.train) == [1, 2, 0] and numbers(data.test) == [2, 1]
    data = load_image_data(table(datasets.Value("bool"), "truths", train=[True, False], test=[True]), PROCESSOR)
    assert data.labels == ["False", "True"] and numbers(data.train) == [1, 0] and numbers(data.test) == [1]


@pytest.mark.parametrize("loader", [lambda folder: load_image_data(folder, PROCESSOR), load_real_images])
def test_rows_without_a_class_are_named(table, loader):
    datasets = require_package("datasets")
    for name, label, labels in (
        ("negative", None, [0, 1, -1]),
        ("none", None, [0, 1, None]),
        ("names", datasets.ClassLabel(names=["a", "b"]), [0, 1, -1]),
        ("texts", datasets.Value("string"), ["0", "1", None]),
    ):
        train = ["0", "1"] if name == "texts" else [0, 1]
        with pytest.raises(ValueError, match=f"1 images of .*{name}` have no class: .* in row 2 of the split `test`"):
            loader(table(label, name, train=train, test=labels))
    with pytest.raises(ValueError, match="in the column `label`, must be whole numbers.*float64"):
        loader(table(datasets.Value("float64"), "floats", train=[0.0, 1.0], test=[0.0]))
    # A test split without labels does no harm where images are measured on another.
    assert len(loader(table(None, "unused", train=[0, 1], validation=[1, 0], test=[-1, None])).test) == 2


def test_tables_that_number_classes_otherwise_are_refused(table):
    datasets = require_package("datasets")
    table(datasets.ClassLabel(names=["a", "b"]), train=[0, 1])
    folder = table(datasets.ClassLabel(names=["b", "a"]), test=[0, 1])
    with pytest.raises(ValueError, match=r"name the classes of `label` otherwise: \['a', 'b'\] and \['b', 'a'\]"):
        load_image_data(folder, PROCESSOR)


def test_folders_of_splits_alone_decide(pictures):
    require_package("datasets")
    classes = ("car", "bullet train", "test tube", "validation")
    folder = pictures(*[f"{split}/{name}/{i}.png" for split in ("train", "val") for name in classes for i in (1, 2)])
    for found in (load_image_data(str(folder), PROCESSOR), load_real_images(str(folder), validation_share=0)):
        names = found.labels if hasattr(found, "labels") else found.label_names
        assert (len(found.train), len(found.test)) == (8, 8) and names == sorted(classes)
    data = load_image_data(str(folder), PROCESSOR)
    assert sorted(shades(data.train)) == [*range(8)] and sorted(shades(data.test)) == [*range(8, 16)]


def test_an_image_in_two_splits_is_an_error(pictures):
    require_package("datasets")
    folder = pictures("train/a/1.png", "train/b/1.png", "test/a/2.png")
    (folder / "test" / "b").symlink_to(folder / "train" / "b")
    with pytest.raises(ValueError, match="b/1.png` is in the splits `train` and `test` of"):
        load_image_data(str(folder), PROCESSOR)


@pytest.mark.parametrize(
    "train, test",
    [
        ("train.parquet", "test.parquet"),
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("digits-train.parquet", "digits-val.parquet"),
    ],
)
def test_names_of_tables(table, tmp_path, train, test):
    written = tmp_path / "written"
    table(folder="written", train=[0, 1, 2], test=[1, 0])
    for source, target in (("train", train), ("test", test)):
        (tmp_path / "data" / target).parent.mkdir(parents=True, exist_ok=True)
        (written / f"{source}.parquet").rename(tmp_path / "data" / target)
    data = load_image_data(str(tmp_path / "data"), PROCESSOR)
    assert (len(data.train), len(data.test)) == (3, 2)
    (tmp_path / "data" / train).rename(tmp_path / "data" / "train-test.parquet")
    with pytest.raises(ValueError, match="is named after the splits test and train"):
        load_image_data(str(tmp_path / "data"), PROCESSOR)


def test_one_part_is_held_out_of_data_without_splits(pictures, table, caplog, monkeypatch):
    require_package("datasets")
    said = []
    monkeypatch.setattr(image_splits.logger, "warning", said.append)
    folder = pictures(*[f"{name}/{i}.png" for name, count in (("a", 10), ("b", 3), ("c", 1)) for i in range(count)])
    data, again = (load_image_data(str(folder), PROCESSOR, seed=seed) for seed in (0, 7))
    assert numbers(data.test) == [0, 0, 1] and data.labels == ["a", "b", "c"]
    assert sorted(shades(data.train) + shades(data.test)) == [*range(14)]
    assert shades(again.test) == shades(data.test) == shades(load_image_data(str(folder), PROCESSOR).test)
    assert "has no split to test on: 3 of its 14 images are held out, every 5th of a class" in said[0]
    assert len(load_real_images(str(folder), classes=[0, 1]).test) == 3
    data = load_image_data(table(train=[0, 1] * 10), PROCESSOR)
    assert numbers(data.test).count(0) == numbers(data.test).count(1) == 2 and len(data.train) == 16
    with pytest.raises(ValueError, match="one image of each class alone"):
        load_image_data(str(pictures("a/1.png", "b/1.png", folder="few")), PROCESSOR)


def test_what_is_named(pictures, tmp_path):
    require_package("datasets")
    good = ("train/a/1.png", "train/b/1.png", "test/a/1.png")
    for folder, more in (("bare", ["train/x.png"]), ("no_classes", None)):
        made = pictures(*((*good, *more) if more else ("train/x.png", "val/y.png")), folder=folder)
        with pytest.raises(ValueError, match=r"train/x.png` lies in no folder that names its class.*`CLASS/1.png`"):
            load_image_data(str(made), PROCESSOR)
    with pytest.raises(ValueError, match="differ in depth"):
        load_image_data(str(pictures(*good, "train/a/b/1.png", folder="deep")), PROCESSOR)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no file"):
        load_image_data(str(tmp_path / "empty"), PROCESSOR)
    made = pictures(*good, folder="zero")
    (made / "train" / "b" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b/1.png` is empty"):
        load_image_data(str(made), PROCESSOR)
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64), np.uint8)).save(tmp_path / "whole.jpg")
    half = (tmp_path / "whole.jpg").read_bytes()
    for content in (half[: len(half) // 2], b"no image"):
        (made / "train" / "b" / "1.png").write_bytes(content)
        message = r"Image 1 of the split `train` of `.*`, `.*b/1.png`, cannot be read: .* Replace it"
        with pytest.raises(ValueError, match=message):
            load_image_data(str(made), PROCESSOR).train[1]
        with pytest.raises(ValueError, match=message):
            load_real_images(str(made), image_size=8, validation_share=0)


def test_tables_of_other_writers(tmp_path, pictures):
    require_package("datasets")
    pyarrow, parquet = require_package("pyarrow"), require_package("pyarrow.parquet")
    file = (pictures("1.png", "2.png") / "2.png").read_bytes()
    for name, cell in (("struct", {"bytes": file, "path": None}), ("bytes", file), ("short", {"bytes": file})):
        (tmp_path / name).mkdir()
        rows = pyarrow.table({"image": [cell] * 5, "label": [0, 1, 2, 1, 0]})
        for split in ("train", "test"):
            parquet.write_table(rows, tmp_path / name / f"{split}.parquet")
        data = load_image_data(str(tmp_path / name), PROCESSOR)
        assert shades(data.train) == [1] * 5 and numbers(data.test) == [0, 1, 2, 1, 0]
        assert load_real_images(str(tmp_path / name), whiten=False, validation_share=0).train.images.shape[0] == 5
    rows = pyarrow.table({"image": ["a.png"] * 2, "label": [0, 1]})
    parquet.write_table(rows, tmp_path / "short" / "train.parquet")
    parquet.write_table(rows, tmp_path / "short" / "test.parquet")
    with pytest.raises(ValueError, match="must hold images: bytes of image files, or `bytes` and `path`; it holds"):
        load_image_data(str(tmp_path / "short"), PROCESSOR)


def test_classes_and_splits_of_a_list_of_files(pictures):
    require_package("datasets")
    folder = pictures("train/test 1.png", "train/b.png", "val/bullet train/c.png")
    (folder / "train" / "metadata.csv").write_text("file_name,label\ntest 1.png,cat\nb.png,car\n")
    (folder / "val" / "metadata.csv").write_text("file_name,label\nbullet train/c.png,cat\n")
    data = load_image_data(str(folder), PROCESSOR)
    assert data.labels == ["car", "cat"] and (numbers(data.train), numbers(data.test)) == ([1, 0], [1])


def test_rows_of_users_are_checked():
    image = Image.new("L", (9, 9))
    for row, message in (
        ({"image": "x.png", "label": 0}, "The image of row 0 must be a PIL image, an array or a tensor; it is a str"),
        ({"image": image, "label": 0.5}, "The label of row 0 must be a class number; it is '0.5'"),
        ({"image": image, "label": -1}, "The label of row 0 must be in 0 to 1, the classes of `labels`; it is -1"),
        ({"image": image, "label": 2}, "it is 2"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ImageSplit([row], PROCESSOR, labels=["a", "b"])[0]


def test_both_loaders_read_every_kind_of_pixels_alike(tmp_path):
    require_package("datasets")
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colours = Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], -1))
    made = {"deep": Image.fromarray(ramp.astype(np.uint16) * 257)}
    made |= {mode: colours.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")}
    for number, (name, image) in enumerate(made.items()):
        for split in ("train", "test"):
            for label in ("a", "b"):
                (tmp_path / split / label).mkdir(parents=True, exist_ok=True)
                image.save(tmp_path / split / label / f"{number}.{'tif' if name == 'CMYK' else 'png'}")
    vim = load_image_data(str(tmp_path), vim_image_processor(16, crop_share=1.0))
    real = load_real_images(str(tmp_path), whiten=False, validation_share=0)
    pixels = real.processor.unwhiten(real.test.images)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (PROCESSOR.image_mean, PROCESSOR.image_std))
    for index, (name, image) in enumerate(made.items()):
        seen = vim.test[index]["pixel_values"] * std + mean
        assert (seen - pixels[index]).abs().max() < 1e-5, name
        assert (seen - images_to_pixels(image, size=(16, 16))[0]).abs().max() < 1e-5, name
    assert (pixels[0] * 255 - torch.from_numpy(ramp)).abs().max() < 1e-3
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"mode '{mode}' has no known range. Save it with 8 or 16 bits"):
            image_to_rgb(colours.convert("L").convert(mode))
        with pytest.raises(ValueError, match="no known range"):
            ImageSplit([{"image": colours.convert("L").convert(mode), "label": 0}], PROCESSOR)[0]
        colours.convert("L").convert(mode).save(tmp_path / "test" / "a" / "0.tif")
        for read in (
            lambda: load_image_data(str(tmp_path), PROCESSOR).test[1],
            lambda: load_real_images(str(tmp_path)),
        ):
            with pytest.raises(ValueError, match=f"a/0.tif`, cannot be read: An image of mode '{mode}' has no known"):
                read()


def test_animated_and_large_images(pictures):
    require_package("datasets")
    folder = pictures("train/a/1.png", "train/a/2.png", "train/b/3.png", "test/a/1.png", "test/b/1.png")
    frames = [Image.new("L", (9, 9), shade) for shade in (7, 200)]
    frames[0].save(folder / "train" / "a" / "1.gif", save_all=True, append_images=frames[1:])
    Image.new("L", (6000, 2000), 9).save(folder / "train" / "a" / "2.png")
    # In the order of their names: 1.gif, 1.png, 2.png, 3.png.
    data = load_image_data(str(folder), PROCESSOR)
    assert shades(data.train) == [7, 0, 9, 2] and data.train[2]["pixel_values"].shape == (3, 8, 8)


def test_names_of_folders(pictures, tmp_path):
    names = [f"{split}/{number}/1.png" for split in ("train", "val") for number in (0, 2, 10)]
    data = load_image_data(str(pictures(*names)), PROCESSOR)
    assert data.labels == ["0", "2", "10"]
    assert dict(zip(numbers(data.test), shades(data.test), strict=True)) == {0: 3, 1: 4, 2: 5}
    # The same letters, as archives of macOS write them, and a class with underscores.
    names = ["train/caf\u00e9/1.png", "train/__other__/1.png", "__MACOSX/train/x/1.png"]
    data = load_image_data(
        str(pictures(*names, "val/cafe\u0301/1.png", "val/__other__/2.png", folder="mac")), PROCESSOR
    )
    assert data.labels == ["__other__", "caf\u00e9"] and numbers(data.test) == [0, 1]


@pytest.mark.parametrize("twin", ["Guinea Pig", "guinea_pig", "guinea-pig", "guinea pig "])
def test_classes_that_splits_spell_otherwise(pictures, twin, monkeypatch):
    names = ["train/guinea pig/1.png", "train/c/1.png", f"val/{twin}/1.png", "val/c/1.png"]
    with pytest.raises(ValueError, match="nothing would be trained on the one .* Spell both alike"):
        load_image_data(str(pictures(*names)), PROCESSOR)
    # Capitals may tell classes apart.
    names = [f"{split}/{letter}/1.png" for split in ("train", "val") for letter in "aA"]
    assert load_image_data(str(pictures(*names, folder="letters")), PROCESSOR).labels == ["A", "a"]
    said = []
    monkeypatch.setattr(class_labels.logger, "warning", said.append)
    names = ["train/c/1.png", "val/c/1.png", "val/c++/1.png"]
    assert load_image_data(str(pictures(*names, folder="more")), PROCESSOR).labels == ["c", "c++"]
    assert said == [
        f"The split `train` of `{pictures(folder='more')}` has no image of classes that `validation` has: `c++`."
    ]


def test_folders_that_name_no_class_and_pictures_that_nothing_reads(pictures, tmp_path, monkeypatch):
    names = [f"{split}/{label}/images/1.png" for split in ("train", "val") for label in ("n01", "n02")]
    with pytest.raises(ValueError, match="would be of one class, `images`.* Move the images up"):
        load_image_data(str(pictures(*names)), PROCESSOR)
    with pytest.raises(ValueError, match="has one class, `pictures`: there is nothing to tell apart"):
        load_image_data(str(pictures("train/pictures/1.png", "val/pictures/1.png", folder="one")), PROCESSOR)
    said = []
    monkeypatch.setattr(image_splits.logger, "warning", said.append)
    folder = pictures("train/a/1.png", "train/b/1.png", "val/a/1.png", folder="phone")
    (folder / "train" / "a" / "2.HEIC").write_bytes(b"ftyp")
    assert len(load_image_data(str(folder), PROCESSOR).train) == 2 and "1 pictures" in said[0] and "2.HEIC" in said[0]
    (tmp_path / "raw" / "a").mkdir(parents=True)
    (tmp_path / "raw" / "a" / "1.heic").write_bytes(b"ftyp")
    with pytest.raises(ValueError, match="1.heic`, are of a kind that Pillow does not read. Convert them"):
        load_image_data(str(tmp_path / "raw"), PROCESSOR)


def test_images_to_test_on_are_enough_for_an_evaluation(pictures):
    folder = str(pictures("val/a/1.png", "val/b/1.png"))
    with pytest.raises(ValueError, match="must have a split `train`"):
        load_image_data(folder, PROCESSOR)
    data = load_image_data(folder, PROCESSOR, only_test=True)
    assert len(data.train) == 0 and numbers(data.test) == [0, 1] and data.labels == ["a", "b"]
    with pytest.raises(ValueError, match="name of the data is empty"):
        load_image_data("", PROCESSOR)


def test_parts_that_a_card_lists(table, tmp_path):
    folder = tmp_path / "parts"
    for name in ("first", "second"):
        table(folder=f"parts/{name}", a=[0, 1], b=[1, 0] if name == "first" else [0, 0])
    files = "- config_name: {0}\n  data_files:\n  - {{split: train, path: {0}/a.parquet}}\n"
    files += "  - {{split: test, path: {0}/b.parquet}}\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{files.format('first')}{files.format('second')}---\n")
    with pytest.raises(ValueError, match="pick one among .*'first', 'second'.* For example, `.*parts:first`"):
        load_image_data(str(folder), PROCESSOR)
    data = load_image_data(f"{folder}:second", PROCESSOR)
    assert numbers(data.test) == [0, 0] and data.hub_id is None
