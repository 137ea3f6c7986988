"""What an evaluation of a distilled set found, as tables, as JSON and as rows of a card."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_effml.utils.plotting import plot_bars
from hf_effml.utils.report import CardResult, Column, Report

from .protocols import EvaluationProtocol
from .ranking import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
)


__all__ = ["EvaluationReport", "MeasuredAccuracy", "draw_accuracies", "evaluation_report"]

_LABELS = {"soft": "soft labels", "hard": "hard labels", "teacher": "labels of a teacher"}


@dataclass(frozen=True)
class MeasuredAccuracy:
    """Accuracies of several trainings, from 0 to 1.

    Args:
        mean (`float`):
            Their average.
        std (`float` or `None`):
            Their standard deviation (of a sample, that is over n - 1); `None` for a single one.
        values (`tuple[float, ...]`):
            Each of them.
    """

    mean: float
    std: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "MeasuredAccuracy":
        """Summarises accuracies.

        Args:
            values (`Sequence[float]`):
                At least one.

        Returns:
            [`MeasuredAccuracy`]
        """
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, tuple(values))

    def __str__(self) -> str:
        return f"{self.mean:.1%}" if self.std is None else f"{100 * self.mean:.1f} ± {100 * self.std:.1f}%"


@dataclass(frozen=True)
class EvaluationReport:
    """Accuracies of one network after training on a distilled set and on what the set is compared with.

    Args:
        student (`str`):
            Name of the network.
        protocol ([`EvaluationProtocol`]):
            How it was trained, with the learning rate and the augmentation that the set brought along.
        split (`str`):
            What the accuracy was measured on, for example `"test"`.
        test_images (`int`):
            Number of those images.
        test_fingerprint (`str`):
            A text that tells them from others.
        images (`int`):
            Images of the distilled set.
        classes (`int`):
            Number of classes.
        learning_rates (`tuple[float, ...]`):
            What every distilled set has learned.
        seeds (`tuple[int, ...]`):
            Seeds of the networks.
        draws (`int`):
            How often random images were drawn.
        accuracies (`dict[str, MeasuredAccuracy]`):
            `"distilled"` is the result; `"distilled_hard"` its images with hard labels; `"random"` random real images
            under the same protocol and `"random_hard"` with hard labels; `"distilled_switched"` and
            `"random_switched"` without augmentation, or with it where the protocol has none; `"initial"` the set
            before it was distilled and `"last"` that of the last step; `"full"` all real images; and what ends in
            `"_calibrated"` with batch statistics of real images. Only those that were measured are there.
        notes (`tuple[str, ...]`, *optional*, defaults to `()`):
            What could not be measured, and why.
        seconds (`float`, *optional*, defaults to 0.0):
            How long it took.
    """

    student: str
    protocol: EvaluationProtocol
    split: str
    test_images: int
    test_fingerprint: str
    images: int
    classes: int
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    draws: int
    accuracies: dict[str, MeasuredAccuracy] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """Mean accuracy after training on the distilled set with its own labels."""
        return self.accuracies["distilled"].mean

    @property
    def std(self) -> float | None:
        """Its standard deviation."""
        return self.accuracies["distilled"].std

    @property
    def scores(self) -> dict[str, float]:
        """Scores of DD-Ranking, as many as what was measured allows: `HLR`, `IOR`, `LRS`, `ARS`."""
        mean = {key: measured.mean for key, measured in self.accuracies.items()}
        hard = mean["distilled"] if self.protocol.labels == "hard" else mean.get("distilled_hard")
        scores = {}
        if "full" in mean and hard is not None:
            scores["HLR"] = hard_label_recovery(mean["full"], hard)
        if "random" in mean:
            scores["IOR"] = improvement_over_random(mean["distilled"], mean["random"])
        if len(scores) == 2:
            scores["LRS"] = label_robust_score(scores["IOR"], scores["HLR"])
        if "random_switched" in mean:
            # The mean of the two counts, so it does not matter which of them is the augmented one.
            switched = improvement_over_random(mean["distilled_switched"], mean["random_switched"])
            scores["ARS"] = augmentation_robust_score(scores["IOR"], switched)
        return scores

    def as_report(self) -> Report:
        """A table of what was trained on, with which labels, and how well it went.

        Returns:
            [`~hf_effml.utils.report.Report`]
        """
        columns = {"accuracy": Column(f"{self.split} accuracy", ".1%"), "trainings": Column("trainings")}
        report = Report(self.student, columns, self.student)
        for name, measured in self._named().items():
            report.add(name, accuracy=list(measured.values), trainings=len(measured.values))
        return report

    def bars(self) -> dict[str, tuple[float, float | None]]:
        """Mean and standard deviation of every row by name.

        Returns:
            `dict[str, tuple[float, float | None]]`: for [`~hf_effml.utils.plotting.plot_bars`].
        """
        return {name: (measured.mean, measured.std) for name, measured in self._named().items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON.

        Returns:
            `dict`
        """
        return {
            "student": self.student,
            "protocol": self.protocol.to_dict(),
            "split": self.split,
            "test_images": self.test_images,
            "test_fingerprint": self.test_fingerprint,
            "images": self.images,
            "classes": self.classes,
            "learning_rates": list(self.learning_rates),
            "seeds": list(self.seeds),
            "draws": self.draws,
            "accuracies": {
                key: {"mean": measured.mean, "std": measured.std, "values": list(measured.values)}
                for key, measured in self.accuracies.items()
            },
            "scores": self.scores,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 1),
        }

    def card_results(self) -> list[CardResult]:
        """Rows of a model card: the set beside its state before distillation, what it is compared with, and scores.

        Returns:
            `list[CardResult]`
        """
        mean = {key: measured.mean for key, measured in self.accuracies.items()}
        how = f"{self.student}, {self.protocol.name}, {self.split}"
        initial = self.accuracies.get("initial")
        results = [CardResult(f"Accuracy ({how})", mean["distilled"], mean.get("initial"), "accuracy")]
        if self.std is not None:
            results.append(CardResult(f"Standard deviation ({how})", self.std, initial.std if initial else None))
        others = {
            "distilled_hard": "Accuracy with hard labels",
            "random": "Accuracy of random real images, labels of the same kind",
            "random_hard": "Accuracy of random real images, hard labels",
        }
        results += [CardResult(f"{text} ({how})", mean[key]) for key, text in others.items() if key in mean]
        return results + [CardResult(f"{name} ({how})", value) for name, value in self.scores.items()]

    def _named(self) -> dict[str, MeasuredAccuracy]:
        """What was trained on with its labels, and the accuracy."""
        own = _LABELS[self.protocol.labels]
        settings = self.protocol.augmentation
        switch = "no augmentation" if settings is None or settings.operations else "with augmentation"
        names = {
            "distilled": f"distilled images, {own}",
            "random": f"random real images, {own}",
            "distilled_hard": "distilled images, hard labels",
            "random_hard": "random real images, hard labels",
            "distilled_switched": f"distilled images, {own}, {switch}",
            "random_switched": f"random real images, {own}, {switch}",
            "initial": f"initial images, {own}",
            "last": f"images of the last step, {own}",
            "full": "all real images, hard labels",
            "distilled_calibrated": f"distilled images, {own}, statistics of real images",
            "random_calibrated": f"random real images, {own}, statistics of real images",
            "random_hard_calibrated": "random real images, hard labels, statistics of real images",
        }
        return {name: self.accuracies[key] for key, name in names.items() if key in self.accuracies}


_COMPARED = {
    "distilled": Column("distilled", ".1%"),
    "random": Column("random real", ".1%"),
    "distilled_hard": Column("distilled, hard labels", ".1%"),
    "random_hard": Column("random real, hard labels", ".1%"),
    "initial": Column("initial", ".1%"),
    "last": Column("last step", ".1%"),
    "full": Column("all real", ".1%"),
    "distilled_calibrated": Column("distilled, calibrated", ".1%"),
    "random_calibrated": Column("random real, calibrated", ".1%"),
    "random_hard_calibrated": Column("random real, hard labels, calibrated", ".1%"),
    **{score: Column(score, ".3f") for score in ("HLR", "IOR", "LRS", "ARS")},
}
_EXPLAINED = (
    "HLR: accuracy of all real images less that of the distilled ones, both with hard labels; less is better. "
    "IOR: gain on random real images under the same protocol. LRS and ARS: from 0 to 1, more is better."
)


def evaluation_report(
    reports: Sequence[EvaluationReport], data: str, facts: Mapping[str, Any] | None = None
) -> Report:
    """Puts the evaluations of several networks into one report: a table of each, and one of all of them.

    Args:
        reports (`Sequence[EvaluationReport]`):
            One per network.
        data (`str`):
            Name of the data.
        facts (`Mapping`, *optional*):
            What else has to be known, JSON-plain.

    Returns:
        [`~hf_effml.utils.report.Report`]: `reports` among its facts holds all that was measured.
    """
    first = reports[0]
    everything = Report("evaluation", facts={**(facts or {}), "reports": [report.to_dict() for report in reports]})
    everything.parts = [report.as_report() for report in reports]
    if len(reports) > 1 or first.scores:
        networks = everything.add_part("networks", _COMPARED, "Networks and scores")
        for report in reports:
            measured = {key: list(found.values) for key, found in report.accuracies.items() if key in _COMPARED}
            networks.add(report.student, **measured, **report.scores)
    rules = first.protocol
    everything.notes = [
        f"{first.images} images for {first.classes} classes, accuracy on {first.test_images} {first.split} images of "
        f"{data} at the end of training. Protocol `{rules.name}`: {rules.epochs} epochs, learning rate "
        f"{rules.learning_rate:.3g}, {len(first.seeds)} seed(s), {first.draws} draw(s) of random images.",
        *([_EXPLAINED] if first.scores else []),
        *dict.fromkeys(note for report in reports for note in report.notes),
    ]
    return everything


def draw_accuracies(reports: Sequence[EvaluationReport], path: str | Path, data: str) -> Path:
    """Draws the accuracies of every network as bars.

    Args:
        reports (`Sequence[EvaluationReport]`):
            One per network.
        path (`str` or `Path`):
            PNG file to write.
        data (`str`):
            Name of the data.

    Returns:
        `Path`: the file.
    """
    first = reports[0]
    per_class = first.images / first.classes
    how = f"protocol {first.protocol.name}, {len(first.seeds)} seed(s), {first.draws} draw(s) of random images"
    plot_bars(
        {report.student: report.bars() for report in reports},
        path,
        title=f"{data}, {per_class:.3g} distilled image{'' if per_class == 1 else 's'} per class",
        label=f"{first.split} accuracy (%)",
        note=f"{how}; mean and standard deviation",
    )
    return Path(path)
