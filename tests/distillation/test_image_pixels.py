"""Images of every kind and layout as pixels in [0, 1]."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import assert_close, require_package
from hf_effml.distillation.image_pixels import images_to_pixels


COLOURS = np.random.RandomState(0).randint(0, 256, (5, 6, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(COLOURS).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(
    "image",
    [
        COLOURS,
        Image.fromarray(COLOURS),
        torch.from_numpy(COLOURS),
        COLOURS.transpose(2, 0, 1),
        COLOURS[None],
        COLOURS.astype(np.int64),
        COLOURS.astype(np.float32) / 255,
        COLOURS.astype(np.float64) / 255,
        COLOURS.tolist(),
    ],
    ids=["array", "pil", "tensor", "channels first", "batch", "int64", "float32", "float64", "nested list"],
)
def test_kinds_of_images(image):
    images = [image] if isinstance(image, list) else image
    assert_close(images_to_pixels(images), EXPECTED)
    assert_close(images_to_pixels([image, image]), EXPECTED.repeat(2, 1, 1, 1))


def test_colours_and_grey():
    picture = Image.fromarray(COLOURS)
    grey = picture.convert("L")
    for image in (grey, np.array(grey), np.array(grey)[..., None], np.array(grey)[None]):
        pixels = images_to_pixels(image, num_channels=1)
        assert_close(pixels, torch.from_numpy(np.array(grey))[None, None].float() / 255)
        assert_close(images_to_pixels(image), pixels.repeat(1, 3, 1, 1))
    # Pillow rounds to whole numbers.
    assert_close(images_to_pixels(COLOURS, num_channels=1), images_to_pixels(picture, num_channels=1), 0.51 / 255)
    see_through = picture.copy()
    see_through.putalpha(7)
    assert_close(images_to_pixels(see_through), EXPECTED)
    assert_close(images_to_pixels(picture.convert("1")), images_to_pixels(np.array(picture.convert("1"))))
    deep = Image.fromarray(np.full((2, 2), 65535 // 5, dtype=np.uint16))
    assert_close(images_to_pixels(deep, num_channels=1), torch.full((1, 1, 2, 2), 0.2), 1e-6)


def test_file(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    assert_close(images_to_pixels(tmp_path / "a.png"), EXPECTED)
    assert_close(images_to_pixels([str(tmp_path / "a.png")]), EXPECTED)


def test_columns_of_data_sets():
    datasets = require_package("datasets")
    features = datasets.Features({"image": datasets.Image(), "array": datasets.Array3D((5, 6, 3), "float32")})
    rows = [{"image": Image.fromarray(COLOURS), "array": COLOURS / np.float32(255)}] * 2
    data = datasets.Dataset.from_list(rows, features=features)
    assert_close(images_to_pixels(data["image"]), EXPECTED.repeat(2, 1, 1, 1))
    assert_close(images_to_pixels(data["array"]), EXPECTED.repeat(2, 1, 1, 1))
    assert_close(images_to_pixels(data.with_format("torch")["array"]), EXPECTED.repeat(2, 1, 1, 1))


def test_resizing():
    smooth = np.linspace(0, 255, 40 * 60).reshape(40, 60).astype(np.uint8)
    picture = Image.fromarray(smooth)
    squashed = images_to_pixels(picture, 1, (10, 10), "squash")
    by_pillow = np.array(picture.resize((10, 10), Image.Resampling.BILINEAR))
    assert_close(squashed[0, 0], torch.from_numpy(by_pillow).float() / 255, 1 / 255)
    # The middle of a wide image, and nothing else, when the shape is kept.
    bars = np.zeros((8, 20, 3), dtype=np.uint8)
    bars[:, 6:14] = 255
    assert images_to_pixels(bars, size=(4, 4)).eq(1).all()
    assert images_to_pixels(bars.transpose(1, 0, 2), size=(4, 4)).eq(1).all()
    assert images_to_pixels(bars, size=(4, 4), resize_mode="squash").mean().item() == pytest.approx(0.4, abs=0.01)
    assert_close(images_to_pixels(COLOURS, size=(5, 6)), EXPECTED)
    mixed = [Image.new("RGB", (9, 5)), np.zeros((3, 2, 7), dtype=np.uint8)]
    assert images_to_pixels(mixed, size=(4, 6)).shape == (2, 3, 4, 6)


@pytest.mark.parametrize(
    "images, message",
    [
        ([], "`images` is empty"),
        (3, "must be an image or an iterable of images; got int"),
        ({"image": 3}, "got dict"),
        ([COLOURS, COLOURS[:4]], r"different sizes, such as \(4, 6\) and \(5, 6\)"),
        (COLOURS / 200.0, r"must lie in \[0, 1\]; got 0.* to 1.2"),
        (np.full((4, 4), np.nan), r"must lie in \[0, 1\]"),
        (COLOURS.astype(np.int64) + 10, "must lie in 0 to 255; got .* to 26[0-5]"),
        (np.zeros((7, 8, 8)), r"got \(7, 8, 8\). Give grey images in a batch an axis"),
        (np.zeros(8), r"got \(8,\)"),
        (np.zeros((0, 8)), "has no pixels"),
        (Image.new("F", (2, 2)), "mode 'F' has no known range"),
    ],
)
def test_what_is_no_image(images, message):
    with pytest.raises(ValueError, match=message):
        images_to_pixels(images)
