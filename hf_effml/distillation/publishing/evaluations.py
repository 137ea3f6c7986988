"""Results of distilled sets on their cards: accuracies beside their baselines, and the rules they were measured by."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_effml.utils.report import markdown_table


_COLUMNS = {
    "distilled": "this set",
    "random": "random real",
    "distilled_hard": "this set, hard labels",
    "random_hard": "random real, hard labels",
    "distilled_switched": "this set, augmentation switched",
    "random_switched": "random real, augmentation switched",
    "initial": "before distillation",
    "last": "last step",
    "full": "all real, hard labels",
    "distilled_calibrated": "this set, calibrated",
    "random_calibrated": "random real, calibrated",
    "random_hard_calibrated": "random real, hard labels, calibrated",
}
_SCORES = ("HLR", "IOR", "LRS", "ARS")


def merge_evaluations(known: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Adds reports to others.

    Args:
        known (`Sequence[Mapping]`):
            Reports of evaluations.
        new (`Sequence[Mapping]`):
            Further ones. One of the same network, protocol and images replaces a known one.

    Returns:
        `list[dict]`: all of them.
    """
    return list({_identity(report): dict(report) for report in [*known, *new]}.values())


def evaluations_section(info: Mapping[str, Any]) -> str:
    """Writes the results of a distilled set, each with the rules it was measured by.

    Args:
        info (`Mapping`):
            Content of `distillation.json`.

    Returns:
        `str`: Markdown; a sentence that says so if there are none.
    """
    reports = info.get("results") or []
    if not reports:
        return (
            "It has not been evaluated yet. `hf-effml evaluate distillation` trains networks on it and, by the same "
            "rules, on as many random real images."
        )
    rules = [_rules(report["protocol"]) for report in reports]
    names = {rule: report["protocol"]["name"] for rule, report in zip(rules, reports, strict=True)}
    # The same name with other numbers is another protocol.
    marks = {rule: f"{name} ({number})" for number, (rule, name) in enumerate(names.items(), start=1)}
    measured = [key for key in _COLUMNS if any(key in report["accuracies"] for report in reports)]
    scores = [name for name in _SCORES if any(name in report["scores"] for report in reports)]
    header = ["network", "protocol", "measured on", *(_COLUMNS[key] for key in measured), *scores]
    rows = [
        [
            report["student"],
            marks[rule],
            f"{report['test_images']:,} {report['split']} images",
            *(_accuracy(report["accuracies"].get(key)) for key in measured),
            *(report["scores"].get(name) for name in scores),
        ]
        for rule, report in zip(rules, reports, strict=True)
    ]
    notes = dict.fromkeys(note for report in reports for note in report.get("notes", ()))
    return "\n\n".join(
        [
            "Accuracy in per cent at the end of training, mean and standard deviation over the trainings. Random real "
            "images are as many of every class, trained on by the same rules, with labels of the same kind.",
            markdown_table(header, rows),
            "\n".join(f"- {mark}: {rule}." for rule, mark in marks.items()),
            *([_EXPLAINED] if scores else []),
            *notes,
        ]
    )


_EXPLAINED = (
    "HLR is the accuracy of all real images less that of these, both with hard labels (less is better), IOR what "
    "these gain on random real ones; LRS and ARS, from 0 to 1, combine them over labels and over augmentation (more "
    "is better)."
)


def _identity(report: Mapping[str, Any]) -> tuple[str, ...]:
    return report["student"], _rules(report["protocol"]), report["split"], str(report.get("test_fingerprint"))


def _rules(protocol: Mapping[str, Any]) -> str:
    """A protocol in words."""
    augmentation = protocol.get("augmentation") or {}
    strategy = augmentation.get("strategy") or "none"
    parts = [
        f"labels {protocol['labels']}",
        f"{protocol['epochs']} epochs",
        f"batches of {protocol['batch_size']}",
        f"{protocol['optimizer']} with learning rate {protocol['learning_rate']:.4g}",
        f"momentum {protocol['momentum']}" if protocol["optimizer"] == "sgd" else "",
        f"weight decay {protocol['weight_decay']}",
        "cosine schedule" if protocol["schedule"] == "cosine" else "",
        f"learning rate divided by ten at epoch {protocol['drop_epoch']}"
        if protocol["schedule"] == "step" and protocol.get("drop_epoch") is not None
        else "",
        f"augmentation {strategy}"
        + (
            ""
            if strategy == "none"
            else f" (crop {augmentation['crop_ratio']}, cutout {augmentation['cutout_ratio']}"
            f"{', all operations at once' if protocol.get('all_operations') else ''})"
        ),
        "cutmix" if protocol.get("cutmix") else "",
    ]
    return ", ".join(part for part in parts if part)


def _accuracy(measured: Mapping[str, Any] | None) -> str | None:
    if measured is None:
        return None
    mean, std, count = 100 * measured["mean"], measured.get("std"), len(measured["values"])
    return f"{mean:.1f} (1 training)" if std is None else f"{mean:.1f} ± {100 * std:.1f} ({count})"
