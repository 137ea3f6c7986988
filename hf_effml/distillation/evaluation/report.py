"""What an evaluation of a distilled set found, as tables, as JSON and as rows of a card."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .protocols import EvaluationProtocol
from .ranking import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
)


__all__ = ["EvaluationReport", "MeasuredAccuracy", "comparison_rows"]

_LABELS = {"soft": "soft", "hard": "hard", "teacher": "of a teacher"}


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
            before it was distilled and `"last"` that of the last step; `"full"` all real images. Only those that were
            measured are there.
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

    def rows(self) -> list[dict[str, Any]]:
        """Rows of a table: what was trained on, with which labels, and how well it went.

        Returns:
            `list[dict]`: for [`~hf_effml.utils.benchmark.markdown_table`].
        """
        return [
            {"trained on": images, "labels": labels, self._column: str(measured), "trainings": len(measured.values)}
            for images, labels, measured in self._named()
        ]

    def bars(self) -> dict[str, tuple[float, float | None]]:
        """Mean and standard deviation of every row by name.

        Returns:
            `dict[str, tuple[float, float | None]]`: for [`~hf_effml.utils.plotting.plot_bars`].
        """
        return {f"{images}, {labels}": (measured.mean, measured.std) for images, labels, measured in self._named()}

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

    def card_results(self) -> list[tuple[str, float, float | None, str | None]]:
        """Rows of a model card: name, value, that of the set before distillation, and the Hub's name of the metric.

        Returns:
            `list[tuple]`: arguments of [`~hf_effml.hub.CardResult`].
        """
        mean = {key: measured.mean for key, measured in self.accuracies.items()}
        how = f"{self.student}, {self.protocol.name}, {self.split}"
        results: list[tuple[str, float, float | None, str | None]] = [
            (f"Accuracy ({how})", mean["distilled"], mean.get("initial"), "accuracy")
        ]
        if self.std is not None:
            results.append((f"Standard deviation ({how})", self.std, self._std("initial"), None))
        others = {
            "distilled_hard": "Accuracy with hard labels",
            "random": "Accuracy of random real images, labels of the same kind",
            "random_hard": "Accuracy of random real images, hard labels",
        }
        results += [(f"{text} ({how})", mean[key], None, None) for key, text in others.items() if key in mean]
        return results + [(f"{name} ({how})", value, None, None) for name, value in self.scores.items()]

    @property
    def _column(self) -> str:
        return f"{self.split} accuracy"

    def _std(self, key: str) -> float | None:
        return self.accuracies[key].std if key in self.accuracies else None

    def _named(self) -> list[tuple[str, str, MeasuredAccuracy]]:
        """What was trained on, its labels and its accuracy."""
        own = _LABELS[self.protocol.labels]
        settings = self.protocol.augmentation
        switch = "no augmentation" if settings is None or settings.operations else "with augmentation"
        names = {
            "distilled": ("distilled images", own),
            "random": ("random real images", own),
            "distilled_hard": ("distilled images", "hard"),
            "random_hard": ("random real images", "hard"),
            "distilled_switched": (f"distilled images, {switch}", own),
            "random_switched": (f"random real images, {switch}", own),
            "initial": ("initial images", own),
            "last": ("images of the last step", own),
            "full": ("all real images", "hard"),
        }
        return [(*names[key], self.accuracies[key]) for key in names if key in self.accuracies]


def comparison_rows(reports: Sequence[EvaluationReport]) -> list[Mapping[str, Any]]:
    """Rows of a table of several networks.

    Args:
        reports (`Sequence[EvaluationReport]`):
            One per network.

    Returns:
        `list[Mapping]`: for [`~hf_effml.utils.benchmark.markdown_table`].
    """
    columns = {
        "distilled": "distilled",
        "random": "random real",
        "distilled_hard": "distilled, hard labels",
        "random_hard": "random real, hard labels",
        "initial": "initial",
        "last": "last step",
        "full": "all real",
    }
    return [
        {"network": report.student}
        | {
            title: str(report.accuracies[key]) if key in report.accuracies else None
            for key, title in columns.items()
            if any(key in other.accuracies for other in reports)
        }
        | {name: f"{value:.3f}" for name, value in report.scores.items()}
        for report in reports
    ]
