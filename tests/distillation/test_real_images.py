"""Real images in memory: where they come from, how they are split, and what their preprocessing may see."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import assert_close, require_package
from hf_effml.distillation.image_processing_zca import ZCAImageProcessor
from hf_effml.distillation.real_images import RealImages, load_real_images, reload_real_images
from hf_effml.utils.sources.split_files import DATA_VARIABLE


COMMIT = "a1" * 20
NAMES = ["ant", "bee", "cat", "dog"]


def pictures(per_class, seed, noise_seed):
    """Rows of classes 0, 1, 2, ... that are as many as `per_class` says, mixed; brightness tells the class."""
    labels = np.random.RandomState(seed).permutation(np.repeat(np.arange(len(per_class)), per_class))
    noise = np.random.RandomState(noise_seed).randint(0, 40, (len(labels), 6, 5, 3))
    images = (noise + 60 * labels[:, None, None, None]).astype(np.uint8)
    return [{"img": Image.fromarray(image), "label": int(label)} for image, label in zip(images, labels, strict=True)]


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A data set of 20, 10, 5 and 20 images for training and 4 of each class for testing."""
    datasets = require_package("datasets")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name="zoo", train=(20, 10, 5, 20), test=(4, 4, 4, 4), noise_seed=7):
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
        (tmp_path / name).mkdir()
        for seed, (split, counts) in enumerate({"train": train, "test": test}.items()):
            rows = datasets.Dataset.from_list(pictures(counts, seed, noise_seed), features=features)
            rows.to_parquet(tmp_path / name / f"{split}.parquet")
        return name

    write()
    return write


def counts(data):
    return [len(positions) for positions in data.per_class()]


def classes_seen(data, processor):
    """The class of every image by its brightness."""
    return (processor.unwhiten(data.images).mean((1, 2, 3)) * 255 / 60).long()


def test_digits():
    require_package("sklearn")
    data = load_real_images("digits", whiten=False)
    assert data.train.images.shape == (900, 1, 8, 8) and len(data.validation) == 100 and len(data.test) == 797
    assert data.label_names == list("0123456789") and data.hub_id is None and data.name == "digits"
    assert_close(data.train.images.mean(), torch.tensor(0.0), 1e-5)
    assert_close(data.train.images.std(), torch.tensor(1.0), 1e-4)
    pixels = data.processor.unwhiten(data.test.images) * 16
    assert_close(pixels, pixels.round(), 1e-5)
    assert pixels.round().min() == 0 and pixels.round().max() == 16
    original = require_package("sklearn.datasets").load_digits()
    known = {image.tobytes(): label for image, label in zip(original.images, original.target, strict=True)}
    everything = [data.train, data.validation, data.test]
    images = torch.cat([data.processor.unwhiten(part.images) * 16 for part in everything]).round().double()
    labels = torch.cat([part.labels for part in everything])
    assert [known[image.numpy().tobytes()] for image in images] == labels.tolist()
    assert len({image.numpy().tobytes() for image in images}) == len(known) == 1797


def test_whitening_is_fitted_to_the_training_part_alone(zoo):
    data = load_real_images("zoo")
    images = data.processor.unwhiten(data.train.images)
    again = ZCAImageProcessor.from_images(images.clamp(0, 1))
    assert_close(again.matrices, data.processor.matrices, 1e-4)
    # The test images play no part, nor do those cut off for validation.
    zoo("other", test=(9, 1, 1, 1))
    assert load_real_images("other").processor.fingerprint == data.processor.fingerprint
    assert load_real_images("zoo", validation_share=0).processor.fingerprint != data.processor.fingerprint


def test_validation_takes_its_share_of_every_class(zoo):
    data = load_real_images("zoo", validation_share=0.2, seed=3)
    assert counts(data.validation) == [4, 2, 1, 4] and counts(data.train) == [16, 8, 4, 16]
    assert counts(data.test) == [4, 4, 4, 4]
    for part in (data.train, data.validation, data.test):
        assert torch.equal(classes_seen(part, data.processor), part.labels)
    whole = load_real_images("zoo", validation_share=0, seed=3, processor=data.processor)
    assert whole.validation is None
    together = torch.cat([data.train.images, data.validation.images]).flatten(1)
    distances = torch.cdist(together, whole.train.images.flatten(1))
    assert sorted(distances.argmin(1).tolist()) == list(range(55)) and distances.amin(1).max() < 1e-2

    def split(**options):
        return load_real_images("zoo", validation_share=0.2, **options).validation.fingerprint

    assert split(seed=3) == data.validation.fingerprint != split(seed=4)
    # A class with one image keeps it, a class with two gives one, however small the share.
    zoo("few", train=(1, 2, 3, 50))
    data = load_real_images("few", validation_share=0.01)
    assert counts(data.validation) == [0, 1, 1, 1] and counts(data.train) == [1, 1, 2, 49]


def test_some_classes(zoo):
    data = load_real_images("zoo", classes=[3, 1], validation_share=0, whiten=False)
    assert data.label_names == ["dog", "bee"] and data.num_labels == 2
    assert counts(data.train) == [20, 10] and counts(data.test) == [4, 4]
    for part in (data.train, data.test):
        assert torch.equal(classes_seen(part, data.processor), torch.tensor([3, 1])[part.labels])


def test_some_images(zoo):
    data = load_real_images("zoo", max_train=24, max_test=6, validation_share=0)
    assert sum(counts(data.train)) == 24 and min(counts(data.train)) == 5 and max(counts(data.train)) <= 7
    assert sum(counts(data.test)) == 6 and min(counts(data.test)) == 1
    assert len(load_real_images("zoo", max_train=999, validation_share=0).train) == 55
    seeds = ({"seed": 0}, {"seed": 0}, {"seed": 1})
    parts = [load_real_images("zoo", max_train=24, validation_share=0, **seed).train.fingerprint for seed in seeds]
    assert parts[0] == parts[1] != parts[2]


def test_sizes_and_channels(zoo):
    data = load_real_images("zoo", image_size=(4, 7), num_channels=1, resize_mode="squash", whiten=False)
    assert data.train.images.shape[1:] == data.test.images.shape[1:] == (1, 4, 7)
    assert data.processor.size == {"height": 4, "width": 7} and data.processor.resize_mode == "squash"
    assert load_real_images("zoo").train.images.shape[1:] == (3, 6, 5)


def test_a_fitted_processor_is_used_as_it_is(zoo):
    processor = load_real_images("zoo", image_size=4).processor
    before = processor.fingerprint
    data = load_real_images("zoo", classes=[0, 1], processor=processor)
    assert data.processor is processor and processor.fingerprint == before


def test_of_a_processor_that_is_not_fitted_a_copy_is(zoo):
    processor = ZCAImageProcessor(size={"height": 4, "width": 4})
    before = processor.to_dict()
    data = load_real_images("zoo", processor=processor)
    assert data.processor.is_fitted and not processor.is_fitted and processor.to_dict() == before
    assert data.train.images.shape[1:] == (3, 4, 4)


def test_fingerprints_are_of_the_source(zoo):
    one, two = load_real_images("zoo"), load_real_images("zoo", whiten=False, image_size=4)
    assert one.train.fingerprint == two.train.fingerprint != one.test.fingerprint
    zoo("noisier", noise_seed=8)
    assert load_real_images("noisier").train.fingerprint != one.train.fingerprint
    assert one.train.to("cpu").fingerprint == one.train.fingerprint
    assert one.train.subset(range(5)).fingerprint != one.train.fingerprint
    images, labels = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    parts = ((images, labels, ["a", "b"]), (images + 1, labels, ["a", "b"]), (images, 1 - labels, ["a", "b"]))
    found = {RealImages(*part).fingerprint for part in (*parts, (images, labels, ["a", "c"]))}
    assert len(found) == 4 and RealImages(images.clone(), labels.clone(), ["a", "b"]).fingerprint in found


def test_subsets():
    data = RealImages(torch.arange(4.0).view(4, 1, 1, 1), torch.tensor([2, 0, 2, 0]), ["a", "b", "c"])
    assert len(data) == 4 and data.num_labels == 3
    assert [positions.tolist() for positions in data.per_class()] == [[1, 3], [], [0, 2]]
    for indices in ([3, 0, 0], torch.tensor([3, 0, 0])):
        part = data.subset(indices)
        assert part.images.flatten().tolist() == [3, 0, 0] and part.labels.tolist() == [0, 2, 2]
    for images, labels, message in (
        (torch.zeros(2, 1, 1, 1).double(), torch.zeros(2).long(), "`images` must be float32"),
        (torch.zeros(2, 1, 1), torch.zeros(2).long(), "`images` must be float32"),
        (torch.zeros(2, 1, 1, 1), torch.zeros(3).long(), "one int64 class number for each of the 2 images"),
        (torch.zeros(2, 1, 1, 1), torch.zeros(2), "one int64 class number"),
        (torch.zeros(2, 1, 1, 1), torch.tensor([0, 3]), "must lie in 0 to 2.*got 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            RealImages(images, labels, ["a", "b", "c"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"classes": [0, 4]}, "`classes` must be numbers of classes of `zoo`, which are 0 to 3; got 4"),
        ({"classes": []}, "which are 0 to 3; got none"),
        ({"classes": [1, 1]}, "must name every class once"),
        ({"max_train": 2}, "2 of 4 classes of `zoo` have no image for training.*raise `max_train`"),
        ({"max_test": 0}, "`max_test` must be at least 1; got 0"),
        ({"validation_share": 1.0}, r"`validation_share` must be in \[0, 1\); got 1.0"),
    ],
)
def test_impossible_requests(zoo, options, message):
    with pytest.raises(ValueError, match=message):
        load_real_images("zoo", **options)


def test_impossible_data(zoo):
    zoo("bare", train=(3, 0, 3, 3))
    with pytest.raises(ValueError, match=r"1 of 4 classes of `bare` have no image for training, such as \['bee'\]"):
        load_real_images("bare")
    assert load_real_images("bare", classes=[0, 2]).num_labels == 2
    zoo("untested", test=(4, 0, 0, 4))
    with pytest.raises(ValueError, match="`untested` has no test image of the classes that are kept"):
        load_real_images("untested", classes=[1, 2])


def test_data_of_the_hub(monkeypatch, tmp_path):
    datasets = require_package("datasets")

    def without_server(name):
        raise datasets.exceptions.DatasetNotFoundError(f"no {name}")

    monkeypatch.setattr(datasets, "load_dataset", without_server)
    with pytest.raises(FileNotFoundError, match="No data `no-such`.*not found on the Hub"):
        load_real_images("no-such")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"image": Image.new("L", (2, 2)), "label": number % 2} for number in range(4)]
    rows = datasets.Dataset.from_list(images, features=features)
    hidden = datasets.Dataset.from_list([{"image": Image.new("L", (2, 2)), "label": -1}], features=features)
    splits = datasets.DatasetDict({"train": rows, "test": hidden})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)
    with pytest.raises(ValueError, match="1 images of `alice/secret` have no class: -1 is not in 0 to 1"):
        load_real_images("alice/secret")
    open_splits = datasets.DatasetDict({"train": rows, "test": rows})
    # A copy of the data set as the cache holds it, in a folder named after the commit.
    rows.save_to_disk(tmp_path / COMMIT)
    cached = datasets.load_from_disk(tmp_path / COMMIT)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: open_splits | {"train": cached})
    data = load_real_images("alice/open", whiten=False, revision="v1")
    assert (data.name, data.hub_id, data.revision) == ("alice/open", "alice/open", COMMIT)


def test_reading_again(zoo, tmp_path):
    data = load_real_images("zoo", classes=[3, 0, 1], max_train=30, max_test=5, validation_share=0.2, seed=5)
    for arguments, name in ((data.arguments, None), ({**data.arguments, "name": None}, str(tmp_path / "zoo"))):
        again = reload_real_images(arguments, data.processor, name)
        for part in ("train", "validation", "test"):
            ours, theirs = getattr(again, part), getattr(data, part)
            assert ours.fingerprint == theirs.fingerprint and torch.equal(ours.images, theirs.images)
    # A path of this machine is not kept.
    assert load_real_images(str(tmp_path / "zoo")).arguments["name"] is None
    with pytest.raises(ValueError, match="not recorded which images were used"):
        reload_real_images(None, data.processor)
