"""Pictures show what they say: the right images in the right places, maps in colours, curves through their points."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import require_package
from hf_effml import ZCAImageProcessor
from hf_effml.distillation.publishing.pictures import image_grid, map_grid, save_curves, to_pictures
from hf_effml.utils.plotting import plot_curves


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_pictures_undo_the_preprocessing(channels, mode):
    pixels = torch.randint(0, 256, (12, channels, 6, 5)) / 255
    processor = ZCAImageProcessor.from_images(pixels, num_channels=channels)
    pictures = to_pictures(processor.whiten(pixels), processor)
    assert {(picture.mode, picture.size) for picture in pictures} == {(mode, (5, 6))}
    for picture, wanted in zip(pictures, pixels, strict=True):
        shown = torch.tensor(np.array(picture)).view(6, 5, channels).permute(2, 0, 1)
        assert torch.equal(shown, wanted.mul(255).round().byte())


def test_values_beyond_white_and_black_are_cut_off():
    processor = ZCAImageProcessor.from_images(torch.rand(9, 1, 4, 4), num_channels=1, do_whiten=False)
    low, high = to_pictures(torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4), processor)
    assert (low.getextrema(), high.getextrema()) == ((0, 0), (255, 255))


def test_without_a_processor_images_are_stretched():
    (picture,) = to_pictures(torch.tensor([-5.0, 0.0, 5.0, 15.0]).view(1, 1, 2, 2))
    assert np.array(picture).ravel().tolist() == [0, 64, 128, 255]
    assert to_pictures(torch.ones(1, 3, 2, 2))[0].getextrema() == ((0, 0),) * 3


def plain(*colours):
    """Images of one colour each, in the space of a processor that changes nothing."""
    images = torch.tensor(colours, dtype=torch.float32).view(-1, 3, 1, 1).expand(-1, 3, 8, 8)
    processor = ZCAImageProcessor(8, do_whiten=False, image_mean=0.0, image_std=1.0)
    return images, processor


def test_grid_has_every_image_in_its_place():
    images, processor = plain((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1))
    grid = image_grid(images, processor, columns=2)
    # Six times enlarged, two pixels between.
    assert grid.size == (2 * 50 + 2, 3 * 50 + 2)
    centres = [grid.getpixel((27 + 50 * (number % 2), 27 + 50 * (number // 2))) for number in range(6)]
    assert centres == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 255, 255)]
    assert image_grid(images, processor, columns=1).size == (5 * 50 + 2, 52)
    assert image_grid(images, processor, columns=2, most_rows=1).size == (102, 52)


def test_maps_are_colours_over_grey_images():
    images, processor = plain((1, 1, 1), (0, 0, 0), (1, 0, 0))
    maps = torch.stack([torch.zeros(8, 8), torch.ones(8, 8), torch.full((8, 8), 0.5)])
    grid = map_grid(images, maps, processor, columns=3, strength=1.0)
    assert [grid.getpixel((27 + 50 * number, 27)) for number in range(3)] == [
        (42, 111, 151),
        (178, 58, 72),
        (242, 232, 201),
    ]
    grid = map_grid(images, maps, processor, columns=3, strength=0.0)
    assert [grid.getpixel((27 + 50 * number, 27)) for number in range(3)] == [(255,) * 3, (0,) * 3, (76,) * 3]
    # A map lies on its image as it is, not mirrored or turned.
    maps[0, 1, 6] = 1.0
    assert map_grid(images, maps, processor, columns=3, strength=1.0).getpixel((5 + 36, 5 + 6)) == (178, 58, 72)
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\), one map per image; got \(3, 4, 4\)"):
        map_grid(images, maps[:, ::2, ::2], processor)


LOG = [
    {"loss": 1.0, "synthetic_lr": 0.01, "step": 10},
    {"eval_accuracy": 0.5, "step": 10},
    {"loss": 0.6, "synthetic_lr": 0.02, "step": 20},
    {"eval_accuracy": 0.75, "step": 20},
    {"train_runtime": 3.0, "step": 20},
]


def test_curves(tmp_path, monkeypatch):
    pyplot = require_package("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    assert save_curves(LOG, tmp_path / "a.png") == tmp_path / "a.png"
    found = {axes.get_ylabel(): axes.lines[0].get_xydata().tolist() for axes in figures[0].axes}
    assert found == {
        "matching loss": [[10, 1.0], [20, 0.6]],
        "accuracy (%)": [[10, 50.0], [20, 75.0]],
        "step size of students": [[10, 0.01], [20, 0.02]],
    }
    assert figures[0].axes[-1].get_xlabel() == "step"
    two = {"exact": [(0, 1.0), (1, 0.5)], "first order": [(0, 1.0)]}
    plot_curves({"loss": two}, tmp_path / "b.png", title="Both")
    assert [text.get_text() for text in figures[1].axes[0].get_legend().get_texts()] == list(two)
    monkeypatch.undo()
    for figure in figures:
        pyplot.close(figure)
    assert Image.open(tmp_path / "a.png").height > Image.open(tmp_path / "b.png").height


def test_nothing_to_draw(tmp_path):
    assert save_curves([{"train_runtime": 3.0, "step": 20}], tmp_path / "a.png") is None
    for panels in ({}, {"loss": {}}):
        with pytest.raises(ValueError, match="at least one panel, and every panel at least one curve"):
            plot_curves(panels, tmp_path / "a.png", title="Empty")
    assert not (tmp_path / "a.png").exists()
