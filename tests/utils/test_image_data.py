"""Image data from where it may come, as what a model takes."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import require_package, run_python
from hf_effml import Augmentation, load_image_data, load_image_processor, vim_image_processor
from hf_effml.utils import image_data
from hf_effml.utils.image_data import ImageSplit
from hf_effml.utils.sources.image_splits import column_of
from hf_effml.utils.sources.split_files import DATA_VARIABLE


def pictures(count=6, size=(10, 12)):
    pixels = np.random.RandomState(0).randint(0, 255, (count, *size, 3), dtype=np.uint8)
    return [{"image": Image.fromarray(image), "label": index % 3} for index, image in enumerate(pixels)]


def write_folders(folder, splits=("train", "test")):
    for split in splits:
        for index, row in enumerate(pictures()):
            place = folder / split / ["ant", "bee", "cat"][row["label"]]
            place.mkdir(parents=True, exist_ok=True)
            row["image"].save(place / f"{index}.png")
    return folder


def test_digits_are_always_the_same():
    require_package("sklearn")
    one, two = (load_image_data("digits", vim_image_processor(16, crop_share=1.0)) for _ in range(2))
    assert (len(one.train), len(one.test)) == (898, 899) and one.labels == list("0123456789")
    assert all(torch.equal(one.test[i]["pixel_values"], two.test[i]["pixel_values"]) for i in (0, 500, -1))
    assert one.hub_id is None and one.name == "digits"
    assert one.label_fields["id2label"][3] == "3" and one.label_fields["label2id"]["3"] == 3


def test_digits_need_no_datasets(tmp_path):
    require_package("sklearn")
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from hf_effml import vim_image_processor, load_image_data\n"
        "print(load_image_data('digits', vim_image_processor(16, crop_share=1.0)).train[0]['pixel_values'].shape)"
    )
    assert "[3, 16, 16]" in run_python(code, cwd=tmp_path)


def test_folder_of_images(tmp_path):
    require_package("datasets")
    data = load_image_data(str(write_folders(tmp_path / "zoo")), vim_image_processor(8, crop_share=1.0))
    assert data.name == "zoo" and data.labels == ["ant", "bee", "cat"] and len(data.train) == 6
    assert data.test[0]["pixel_values"].shape == (3, 8, 8)


def test_parquet_below_the_data_variable(tmp_path, monkeypatch):
    datasets = require_package("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = [{"img": row["image"], "label": row["label"]} for row in pictures()]
    (tmp_path / "small").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "small" / f"{split}.parquet")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    data = load_image_data("small", vim_image_processor(8, crop_share=1.0))
    assert data.labels == ["a", "b", "c"] and data.train[4]["labels"] == 1


def test_photographs(shared_data, monkeypatch):
    require_package("datasets")
    monkeypatch.setenv(DATA_VARIABLE, str(shared_data))
    data = load_image_data("images/clothing_small", vim_image_processor(32, crop_share=1.0))
    assert (len(data.train), len(data.test)) == (1000, 347) and data.labels[0] == "dress"


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    require_package("datasets")
    monkeypatch.setattr("datasets.load_dataset", lambda name: (_ for _ in ()).throw(FileNotFoundError("gone")))
    with pytest.raises(FileNotFoundError, match="No data `nothing`: it is no folder, not below"):
        load_image_data("nothing", vim_image_processor(8, crop_share=1.0))
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match="must have a split `train` and a split `validation` or `test`; it has `test`"
    ):
        load_image_data(str(write_folders(tmp_path / "half", ("test",))), vim_image_processor(8, crop_share=1.0))
    with pytest.raises(ValueError, match="must have a column `image` or `img`; it has `text`"):
        column_of("words", {"text": None}, ("image", "img"))


def test_rows_equal_the_saved_processors_result(tmp_path):
    processor = vim_image_processor(8, crop_share=0.8)
    processor.save_pretrained(tmp_path)
    loaded, row = load_image_processor(tmp_path), pictures()[2]
    expected = loaded(row["image"], return_tensors="pt")["pixel_values"][0]
    split = ImageSplit(pictures(), processor)
    for _ in range(2):  # the second time from the cache
        assert torch.equal(split[2]["pixel_values"], expected) and split[2]["labels"] == 2
    assert processor.size["shortest_edge"] == 10


def test_augmentation_goes_with_seed_epoch_and_index():
    def pixels(seed=0, epoch=0, index=0):
        split = ImageSplit(
            pictures(),
            vim_image_processor(8, crop_share=1.0),
            Augmentation(max_shift=3, horizontal_flip=True),
            seed=seed,
        )
        split.set_epoch(epoch)
        return split[index]["pixel_values"]

    assert torch.equal(pixels(1, 2, 3), pixels(1, 2, 3)) and torch.equal(pixels(index=-1), pixels(index=5))
    assert any(not torch.equal(pixels(0, epoch), pixels(0, 0)) for epoch in range(1, 5))
    assert any(not torch.equal(pixels(seed), pixels(0)) for seed in range(1, 5))


def test_index_past_the_end_ends_iteration():
    split = ImageSplit(pictures(2), vim_image_processor(8, crop_share=1.0))
    assert len(list(split)) == 2
    with pytest.raises(IndexError):
        split[2]


def test_large_splits_are_not_kept(monkeypatch):
    monkeypatch.setattr(image_data, "_CACHE_BYTES", 100)
    split = ImageSplit(pictures(2), vim_image_processor(8, crop_share=1.0))
    assert split[0]["pixel_values"] is not split[0]["pixel_values"]


def test_persistent_workers_see_the_epoch():
    split = ImageSplit(pictures(2), vim_image_processor(8, crop_share=1.0), Augmentation(max_shift=3))
    loader = torch.utils.data.DataLoader(split, 2, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in range(4):
        split.set_epoch(epoch)
        seen += [batch["pixel_values"] for batch in loader]
    assert any(not torch.equal(seen[0], other) for other in seen[1:])


def test_without_augmentation():
    processor = vim_image_processor(16, crop_share=1.0)
    augmented = ImageSplit(pictures(), processor, Augmentation(max_shift=4, horizontal_flip=True))
    plain, expected = augmented.without_augmentation(), ImageSplit(pictures(), processor)
    for index in range(len(expected)):
        assert torch.equal(plain[index]["pixel_values"], expected[index]["pixel_values"])
    augmented.set_epoch(3)
    assert any(not torch.equal(augmented[i]["pixel_values"], expected[i]["pixel_values"]) for i in range(6))
