"""Figures are written, in the size and with the lines asked for."""

from PIL import Image

from helpers import require_package
from hf_effml.utils.plotting import plot_images, plot_trade_off


def test_trade_off(tmp_path):
    require_package("matplotlib")
    series = {"merged": [("r=1", 1.1, 0.8), ("r=2", 1.3, 0.6)], "re-trained": [("r=2", 1.3, 0.9)]}
    plot_trade_off(("start", 1.0, 0.95), series, tmp_path / "a.png", title="Digits", note="two threads")
    picture = Image.open(tmp_path / "a.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(2**20)}
    assert {(42, 111, 151), (224, 122, 31)} <= colours and picture.width > picture.height > 500


def test_images(tmp_path):
    require_package("matplotlib")
    images = [Image.new("RGB", (64, 32), colour) for colour in ("red", "lime", "blue")]
    plot_images(images, ["one", "two", "three"], tmp_path / "b.png", columns=2, title="Three")
    colours = {colour for _, colour in Image.open(tmp_path / "b.png").convert("RGB").getcolors(2**20)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= colours
