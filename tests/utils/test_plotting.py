"""Figures are written, in the size and with the lines asked for."""

import pytest
import torch
from PIL import Image

from helpers import require_package
from hf_effml.utils.plotting import plot_bars, plot_images, plot_routing, plot_trade_off


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


def test_bars(tmp_path, monkeypatch):
    pyplot = require_package("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    bars = {"distilled": (0.84, 0.012), "random": (0.58, 0.04), "all": (0.99, None)}
    plot_bars({"ConvNet": bars, "MLP": {"distilled": (0.5, None)}}, tmp_path / "f.png", title="Digits", note="3 seeds")
    first, second = figures[0].axes
    assert [bar.get_width() for bar in first.patches] == pytest.approx([84, 58, 99]) and len(second.patches) == 1
    assert [text.get_text() for text in first.texts] == ["84.0 \u00b1 1.2", "58.0 \u00b1 4.0", "99.0"]
    assert [label.get_text() for label in first.get_yticklabels()] == list(bars) and first.yaxis_inverted()
    assert first.patches[0].get_facecolor() != first.patches[1].get_facecolor() == first.patches[2].get_facecolor()
    (spread,) = first.containers[0].lines[2]
    assert spread.get_segments()[0][:, 0].tolist() == pytest.approx([82.8, 85.2])
    assert Image.open(tmp_path / "f.png").width > 1000
    monkeypatch.undo()
    pyplot.close(figures[0])
    for nothing in ({}, {"ConvNet": {}}):
        with pytest.raises(ValueError, match="at least one panel, and every panel at least one bar"):
            plot_bars(nothing, tmp_path / "g.png", title="Digits")


@pytest.mark.parametrize("blocks, tokens", [(1, 1), (5, 40), (64, 300)])
def test_routing(tmp_path, blocks, tokens):
    require_package("matplotlib")
    kept = torch.rand(blocks, tokens, generator=torch.Generator().manual_seed(0)) < 0.7
    kept[0, 0] = True
    plot_routing(
        kept, ["\n", " $a", "", "<s>", "extraordinarily"] * tokens, tmp_path / "c.png", title="Kept"
    ) if False else None
    plot_routing(kept, [" $word\n"] * tokens, tmp_path / "c.png", title="Kept")
    picture = Image.open(tmp_path / "c.png").convert("RGB")
    counts = {colour: count for count, colour in picture.getcolors(2**20)}
    processed, skipped = counts[42, 111, 151], counts.get((223, 231, 236), 0)
    # The legend has a patch of either colour, and white lines run between the fields.
    assert processed / (processed + skipped) == pytest.approx(kept.float().mean().item(), abs=0.1)
    assert picture.width > 900


def test_labels_of_routing(tmp_path, monkeypatch):
    pyplot = require_package("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    plot_routing(torch.ones(2, 4), ["<s>", " extraordinarily", "\n", " "], tmp_path / "d.png", title="Kept")
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["<s>", "extraordinari…", "\\n", "\u2423"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]
    plot_routing(torch.ones(2, 65), ["x"] * 65, tmp_path / "d.png", title="Kept")
    assert "x" not in [label.get_text() for label in figures[1].axes[0].get_xticklabels()]
    monkeypatch.undo()
    for figure in figures:
        pyplot.close(figure)


def test_routing_of_a_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"with 4 tokens; got \(2, 3, 4\). Choose one prompt"):
        plot_routing(torch.ones(2, 3, 4), ["x"] * 4, tmp_path / "e.png", title="Kept")
