"""The few figures that programs and cards use."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .imports import require


_COLOURS = ("#2a6f97", "#e07a1f", "#5a8f3c", "#8e5ea2", "#b23a48")
_INK, _GRID = "#333333", "#e4e4e4"


def plot_trade_off(
    start: tuple[str, float, float],
    series: Mapping[str, Sequence[tuple[str, float, float]]],
    path: str | Path,
    *,
    title: str,
    note: str = "",
) -> None:
    """Draws accuracy over measured speed: one line per way of saving work, all from one starting point.

    Args:
        start (`tuple[str, float, float]`):
            Name, speed-up and accuracy of the model that all others were made from.
        series (`Mapping[str, Sequence[tuple[str, float, float]]]`):
            By name, the points of a line as short label, speed-up and accuracy from 0 to 1.
        path (`str` or `Path`):
            PNG file to write.
        title (`str`):
            What the picture shows.
        note (`str`, *optional*):
            Small print below it.
    """
    figure, axes = _figure(7.2, 4.6)
    name, *point = start
    for colour, (label, points) in zip(_COLOURS, series.items(), strict=False):
        speeds = [point[0], *(speed for _, speed, _ in points)]
        values = [100 * point[1], *(100 * accuracy for _, _, accuracy in points)]
        axes.plot(
            speeds, values, "-o", color=colour, label=label, linewidth=2, markersize=7, markevery=range(1, len(speeds))
        )
        for text, speed, accuracy in points:
            axes.annotate(text, (speed, 100 * accuracy), (7, 5), textcoords="offset points", fontsize=9)
    axes.plot(point[0], 100 * point[1], "D", color=_INK, markersize=9, label=name)
    axes.axhline(100 * point[1], color=_INK, linewidth=0.8, linestyle=":")
    axes.margins(x=0.08, y=0.18)
    axes.set_xlabel("speed, times that of the starting point (measured)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK)
    axes.legend(frameon=False, loc="best")
    _save(figure, path, note)


def plot_images(
    images: Sequence[Image.Image], captions: Sequence[str], path: str | Path, *, columns: int, title: str
) -> None:
    """Draws pictures in a grid, each with a caption.

    Args:
        images (`Sequence[PIL.Image.Image]`):
            The pictures, row by row, all of one shape.
        captions (`Sequence[str]`):
            What stands above each.
        path (`str` or `Path`):
            PNG file to write.
        columns (`int`):
            Pictures in a row.
        title (`str`):
            What the picture shows.
    """
    rows = -(-len(images) // columns)
    shape = images[0].height / images[0].width
    pyplot = require("matplotlib.pyplot")
    width = 3.4
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(width * columns, (width * shape + 0.35) * rows + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, caption in zip(grid.flat, images, captions, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(caption, fontsize=10, color=_INK)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_INK)
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    figure, axes = require("matplotlib.pyplot").subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: str | Path, note: str = "") -> None:
    if note:
        figure.supxlabel(note, fontsize=8, color="#777777", x=0.01, ha="left")
    figure.savefig(path, dpi=150, facecolor="white")
    require("matplotlib.pyplot").close(figure)
