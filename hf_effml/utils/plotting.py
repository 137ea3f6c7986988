"""The few figures that programs and cards use."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .files import replacing_file
from .imports import require


_COLOURS = ("#2a6f97", "#e07a1f", "#5a8f3c", "#8e5ea2", "#b23a48")
_INK, _FAINT, _GRID, _SKIPPED = "#333333", "#777777", "#e4e4e4", "#dfe7ec"
# Of the small print below a figure.
_LETTERS_PER_INCH = 15
# More tokens than that cannot be read side by side, nor can more blocks one above the other.
_MOST_LABELS, _MOST_BLOCKS, _LONGEST_LABEL = 64, 48, 14


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


def plot_bars(
    groups: Mapping[str, Mapping[str, tuple[float, float | None]]],
    path: str | Path,
    *,
    title: str,
    label: str = "test accuracy (%)",
    note: str = "",
) -> None:
    """Draws accuracies as horizontal bars with their standard deviations, one panel per group.

    Args:
        groups (`Mapping[str, Mapping[str, tuple[float, float | None]]]`):
            By the name of a panel, the bars as name, accuracy from 0 to 1, and its standard deviation or `None`. The
            first bar of a panel is the one that the others are compared with.
        path (`str` or `Path`):
            PNG file to write.
        title (`str`):
            What the picture shows.
        label (`str`, *optional*, defaults to `"test accuracy (%)"`):
            What the bars measure.
        note (`str`, *optional*):
            Small print below it.

    Raises:
        ValueError: If there is nothing to draw.

    Example:

    ```python
    >>> from hf_effml.utils.plotting import plot_bars

    >>> bars = {"distilled": (0.84, 0.01), "random": (0.58, 0.04), "all": (0.99, None)}
    >>> plot_bars({"ConvNet": bars}, "bars.png", title="Digits")  # doctest: +SKIP
    ```
    """
    if not groups or not all(groups.values()):
        raise ValueError("`groups` must hold at least one panel, and every panel at least one bar.")
    counts = [len(bars) for bars in groups.values()]
    figure, panels = require("matplotlib.pyplot").subplots(
        len(groups),
        1,
        figsize=(7.2, 0.34 * sum(counts) + 0.5 * len(groups) + 1.0),
        sharex=True,
        squeeze=False,
        height_ratios=counts,
        layout="constrained",
    )
    for axes, (name, bars) in zip(panels[:, 0], groups.items(), strict=True):
        _bars_of_panel(axes, bars)
        if len(groups) > 1:
            axes.set_title(name, loc="left", fontsize=10, color=_INK)
    # Room for the numbers beside the bars.
    panels[-1, 0].set_xlim(0, 112)
    panels[-1, 0].set_xticks(range(0, 101, 20))
    panels[-1, 0].set_xlabel(label)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_INK)
    _save(figure, path, note)


def plot_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    path: str | Path,
    *,
    title: str,
    label: str = "step",
    note: str = "",
) -> None:
    """Draws curves over a common axis, one panel below the other.

    Args:
        panels (`Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]`):
            By what a panel measures, its curves: by name, points of the common axis and a value. A single curve needs
            no name.
        path (`str` or `Path`):
            PNG file to write.
        title (`str`):
            What the picture shows.
        label (`str`, *optional*, defaults to `"step"`):
            What the common axis measures.
        note (`str`, *optional*):
            Small print below it.

    Raises:
        ValueError: If there is nothing to draw.

    Example:

    ```python
    >>> from hf_effml.utils.plotting import plot_curves

    >>> loss = {"exact": [(0, 1.0), (50, 0.6)], "first order": [(0, 1.0), (50, 0.7)]}
    >>> plot_curves({"matching loss": loss}, "loss.png", title="Digits")  # doctest: +SKIP
    ```
    """
    if not panels or not all(panels.values()):
        raise ValueError("`panels` must hold at least one panel, and every panel at least one curve.")
    figure, grid = require("matplotlib.pyplot").subplots(
        len(panels), 1, figsize=(7.2, 1.9 * len(panels) + 1.0), sharex=True, squeeze=False, layout="constrained"
    )
    for axes, (name, curves) in zip(grid[:, 0], panels.items(), strict=True):
        for number, (curve, points) in enumerate(curves.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            # Few points are seen as such; one alone has no line.
            axes.plot(*zip(*points, strict=True), color=colour, label=curve, marker="o" if len(points) < 30 else "")
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=9)
        axes.set_ylabel(name, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    grid[-1, 0].set_xlabel(label)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_INK)
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


def plot_routing(keep_masks: Any, tokens: Sequence[str], path: str | Path, *, title: str) -> None:
    """Draws which tokens of a prompt each block of a language model processed: tokens across, the first block below.

    Args:
        keep_masks (`Tensor` or array of shape `(blocks, tokens)`):
            `True` where a block processed a token.
        tokens (`Sequence[str]`):
            The text of each token. Up to 64 of them stand below the picture, the numbers of longer prompts instead.
        path (`str` or `Path`):
            PNG file to write.
        title (`str`):
            What the picture shows.

    Raises:
        ValueError: If there is not one text per column.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_effml.utils.plotting import plot_routing

    >>> plot_routing(np.eye(3, dtype=bool), ["Once", " upon", " a"], "kept.png", title="Kept")  # doctest: +SKIP
    ```
    """
    kept = np.asarray(keep_masks, dtype=bool)
    if kept.ndim != 2 or kept.shape[1] != len(tokens):
        raise ValueError(
            f"`keep_masks` must have the shape (blocks, tokens), with {len(tokens)} tokens; got {kept.shape}. Choose "
            "one prompt of a batch: `report.keep_masks[:, 0]`."
        )
    blocks, count = kept.shape
    labelled = count <= _MOST_LABELS
    width = max(7.0, 0.19 * count + 1.6) if labelled else 12.0
    height = max(1.0, min(0.19 * blocks, 8.0)) + 1.6
    pyplot, colors = require("matplotlib.pyplot"), require("matplotlib.colors")
    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.pcolormesh(
        np.arange(count + 1) - 0.5,
        np.arange(blocks + 1) - 0.5,
        kept,
        cmap=colors.ListedColormap([_SKIPPED, _COLOURS[0]]),
        vmin=0,
        vmax=1,
        edgecolors="white",
        linewidth=0.6 if labelled else 0,
    )
    # Lines between blocks only, where columns are narrow.
    axes.hlines(np.arange(1, blocks) - 0.5, -0.5, count - 0.5, color="white", linewidth=0.6)
    _label_tokens(axes, tokens, labelled)
    _label_blocks(axes, kept.mean(1))
    patches = require("matplotlib.patches")
    meanings = ((_COLOURS[0], "processed"), (_SKIPPED, "skipped"))
    handles = [patches.Patch(facecolor=colour, label=meaning) for colour, meaning in meanings]
    figure.legend(handles=handles, loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_INK)
    _save(figure, path)


def _bars_of_panel(axes: Any, bars: Mapping[str, tuple[float, float | None]]) -> None:
    """Bars from top to bottom, the first in colour, each with its number."""
    places = range(len(bars))
    for place, (mean, std) in zip(places, bars.values(), strict=True):
        spread = 100 * (std or 0.0)
        axes.barh(place, 100 * mean, height=0.7, color=_COLOURS[0] if place == 0 else _FAINT, xerr=spread or None)
        text = f"{100 * mean:.1f}" + (f" \u00b1 {spread:.1f}" if std is not None else "")
        axes.text(100 * mean + spread + 1, place, text, va="center", fontsize=8, color=_INK)
    axes.set_yticks(places, labels=list(bars), fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _label_blocks(axes: Any, processed: Any) -> None:
    """Numbers on the left, the share that each block processed on the right."""
    step = 1 if len(processed) <= _MOST_BLOCKS else 4
    ticks = range(0, len(processed), step)
    axes.set_yticks(ticks, labels=[str(block) for block in ticks], fontsize=8)
    axes.set_ylabel("block", fontsize=9)
    shares = axes.secondary_yaxis("right")
    shares.set_yticks(ticks, labels=[f"{processed[block]:.0%}" for block in ticks], fontsize=8, color=_FAINT)
    shares.set_ylabel("processed", fontsize=8, color=_FAINT)
    for side in (axes, shares):
        side.tick_params(length=0)
        side.spines[:].set_visible(False)


def _label_tokens(axes: Any, tokens: Sequence[str], labelled: bool) -> None:
    """The tokens themselves where they can be read, their numbers otherwise."""
    if not labelled:
        axes.set_xlabel("token of the prompt", fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        return
    texts = [token.replace("\n", "\\n").strip() or "\u2423" for token in tokens]
    texts = [text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}\u2026" for text in texts]
    axes.set_xticks(range(len(tokens)), labels=texts, rotation=90, fontsize=8, parse_math=False)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    figure, axes = require("matplotlib.pyplot").subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: str | Path, note: str = "") -> None:
    if note:
        lines = textwrap.fill(note, int(_LETTERS_PER_INCH * figure.get_figwidth()))
        figure.supxlabel(lines, fontsize=8, color=_FAINT, x=0.01, ha="left")
    with replacing_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=150, facecolor="white")
    require("matplotlib.pyplot").close(figure)
