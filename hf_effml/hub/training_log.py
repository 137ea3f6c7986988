"""The course of a training, as a table on a card and as a picture beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_effml.utils.report import markdown_table


__all__ = ["CURVE_NAME", "draw_log", "duration", "log_table"]

CURVE_NAME = "training.png"
_MAX_ROWS, _MAX_COLUMNS, _MAX_PANELS = 10, 6, 3
_ABOUT_TIME = ("_runtime", "_per_second", "_time")


def log_table(history: Sequence[Mapping[str, Any]]) -> str:
    """Writes the log of a training as a table of at most ten rows, evenly chosen, the last among them.

    Args:
        history (`Sequence[Mapping]`):
            As `trainer.state.log_history`.

    Returns:
        `str`: Markdown; empty for a training of fewer than two logged steps.
    """
    rows = _by_step(history)
    names = _names(rows)
    if len(rows) < 2 or not names:
        return ""
    steps = list(rows)
    if len(steps) > _MAX_ROWS:
        steps = [steps[round(i * (len(steps) - 1) / (_MAX_ROWS - 1))] for i in range(_MAX_ROWS)]
    head = ["Step", *(_title(name) for name in names)]
    return markdown_table(head, [[f"{step:,}", *(rows[step].get(name) for name in names)] for step in steps])


def duration(history: Sequence[Mapping[str, Any]]) -> str:
    """Says how long a training took.

    Args:
        history (`Sequence[Mapping]`):
            As `trainer.state.log_history`.

    Returns:
        `str`: a sentence; empty where it is not known.
    """
    last = next((entry for entry in reversed(history) if "train_runtime" in entry), None)
    return (
        "" if last is None else f"{last.get('step', 0):,} steps, {last['train_runtime']:,.0f} s since the last start."
    )


def draw_log(history: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> bool:
    """Draws the log of a training: the loss with its terms, and below it what evaluations measured.

    Args:
        history (`Sequence[Mapping]`):
            As `trainer.state.log_history`.
        path (`str` or `Path`):
            PNG file to write.
        title (`str`):
            What the picture shows.

    Returns:
        `bool`: whether there was enough to draw.
    """
    from hf_effml.utils.plotting import plot_curves

    rows = _by_step(history)
    curves = {name: [(float(step), row[name]) for step, row in rows.items() if name in row] for name in _names(rows)}
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, points in curves.items():
        if len(points) > 1:
            panels.setdefault("loss" if "loss" in name else _title(name), {})[_title(name)] = points
    if not panels:
        return False
    plot_curves(dict([*panels.items()][:_MAX_PANELS]), path, title=title)
    return True


def _by_step(history: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """What training and evaluations logged, by step."""
    rows: dict[int, dict[str, float]] = {}
    for entry in history:
        found = {
            name: value
            for name, value in entry.items()
            if isinstance(value, int | float)
            and name not in ("step", "epoch", "grad_norm", "learning_rate", "total_flos")
            and not name.startswith("train_")
            and not name.endswith(_ABOUT_TIME)
        }
        if found:
            rows.setdefault(int(entry.get("step", 0)), {}).update(found)
    return rows


def _names(rows: Mapping[int, Mapping[str, float]]) -> list[str]:
    """The loss first, then what evaluations measured, then what else was logged."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    return sorted(names, key=lambda name: (name != "loss", not name.startswith("eval_")))[:_MAX_COLUMNS]


def _title(name: str) -> str:
    return {"loss": "Training loss", "eval_loss": "Evaluation loss"}.get(
        name, name.removeprefix("eval_").replace("_", " ").capitalize()
    )
