"""Subsets built from noise: no picture of ImageNet is needed for what is done with them."""

from io import BytesIO

import numpy
import pytest
from hub.conftest import client, hub  # noqa: F401
from PIL import Image

from helpers import require_package
from hf_effml.comp_dd import build_comp_dd, subset_info
from hf_effml.comp_dd.building import PictureSettings


NAMES = ("bird_easy", "fish_hard", "music_hard")


def make_imagenet(folder, names=NAMES, train=4, validation=2, seed=0):
    """Folders by class, with a few small pictures each."""
    dice = numpy.random.default_rng(seed)
    for split, number in (("train", train), ("val", validation)):
        for synset in {synset for name in names for synset in subset_info(name).synsets}:
            (folder / split / synset).mkdir(parents=True)
            for index in range(number):
                data = BytesIO()
                Image.fromarray(dice.integers(0, 256, (20, 24, 3), dtype=numpy.uint8)).save(data, "JPEG")
                (folder / split / synset / f"{synset}_{index}.JPEG").write_bytes(data.getvalue())
    return folder


@pytest.fixture(scope="session")
def noise(tmp_path_factory):
    """A toy ImageNet with the classes of three subsets."""
    require_package("datasets")
    return make_imagenet(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture
def built(noise, tmp_path):
    """A folder of three subsets, of 16 x 16 pixels."""
    build_comp_dd(list(NAMES), str(noise), tmp_path / "comp-dd", pictures=PictureSettings(size=16))
    return tmp_path / "comp-dd"
