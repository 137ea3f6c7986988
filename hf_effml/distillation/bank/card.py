"""The card of a bank of trajectories on the Hub."""

import statistics
from collections.abc import Mapping
from typing import Any

from huggingface_hub import DatasetCardData
from transformers import PreTrainedConfig


__all__ = ["bank_card", "mean_accuracies"]

_TAGS = ("dataset-distillation", "trajectory-matching", "expert-trajectories", "image-classification")
_PAPERS = ("2203.11932", "2310.05773")
_MAX_ROWS = 12


def mean_accuracies(metadata: Mapping[str, Any], split: str) -> dict[int, tuple[float, float]]:
    """Averages over the experts what was measured.

    Args:
        metadata (`Mapping`):
            Content of `bank.json`.
        split (`str`):
            `"train"` or `"validation"`.

    Returns:
        `dict[int, tuple[float, float]]`: mean and standard deviation for every epoch that was measured.
    """
    values: dict[int, list[float]] = {}
    for history in metadata.get("history") or []:
        for entry in history:
            if entry.get(f"{split}_accuracy") is not None:
                values.setdefault(entry["epoch"], []).append(entry[f"{split}_accuracy"])
    return {epoch: (statistics.mean(each), statistics.pstdev(each)) for epoch, each in sorted(values.items())}


def bank_card(metadata: Mapping[str, Any], name: str, parameters: int) -> str:
    """Writes the card.

    Args:
        metadata (`Mapping`):
            Content of `bank.json`.
        name (`str`):
            Hub id or folder that the snippet loads.
        parameters (`int`):
            Number of parameters of one network.

    Returns:
        `str`: YAML header and Markdown.
    """
    dataset, training = metadata.get("dataset") or {}, metadata.get("training") or {}
    experts, epochs = metadata["num_experts"], metadata["epochs"]
    data_name = dataset.get("hub_id") or dataset.get("name")
    student = metadata["student"]
    header = DatasetCardData(
        task_categories=["image-classification"],
        tags=[*_TAGS, *(f"arxiv:{paper}" for paper in _PAPERS)],
        source_datasets=[dataset["hub_id"]] if dataset.get("hub_id") else None,
        viewer=False,
    )
    origin = f" on `{data_name}`" if data_name else ""
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {name.split('/')[-1]}",
        f"Trajectories of {experts} expert networks ({student['model_type']}) that were trained{origin}: the "
        f"parameters of each after {_epochs(epochs)}, for dataset distillation by trajectory matching with hf-effml.",
        "```python\nfrom hf_effml import TrajectoryBank\n\n"
        f'bank = TrajectoryBank.from_pretrained("{name}")  # fetches an expert\'s file when it is first read\n'
        f"start, target = bank.pair(expert=0, start_epoch={epochs[0]}, expert_epochs={epochs[1] - epochs[0]})\n"
        "network = bank.network(expert=0)  # with the parameters of its last epoch\n```"
        if len(epochs) > 1
        else "",
        "## Accuracy of the experts\n\n" + _accuracy(metadata),
        "## How it was made\n\n" + _facts(metadata, parameters, data_name, training),
        "## Limits\n\n"
        "- It holds parameters only, no running statistics: where a network normalises by batches, use those of the "
        "batch.\n"
        "- The training is kept plain on purpose, so that synthetic data can imitate it; these are not the best "
        "networks for the data.\n"
        "- A student must have the same architecture and take images preprocessed in the same way "
        "(`bank.check_student`, `bank.check_preprocessing`).\n"
        "- Parameters can hold traces of training images; the terms of the training data apply.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _epochs(epochs: list[int]) -> str:
    if epochs == list(range(epochs[0], epochs[-1] + 1)):
        return f"epochs {epochs[0]} to {epochs[-1]}" if len(epochs) > 1 else f"epoch {epochs[0]}"
    return f"{len(epochs)} of the epochs {epochs[0]} to {epochs[-1]}"


def _accuracy(metadata: Mapping[str, Any]) -> str:
    train, validation = (mean_accuracies(metadata, split) for split in ("train", "validation"))
    epochs = sorted(train.keys() | validation.keys())
    if not epochs:
        return "It was not measured."
    if len(epochs) > _MAX_ROWS:
        step = (len(epochs) - 1) / (_MAX_ROWS - 1)
        epochs = [epochs[round(index * step)] for index in range(_MAX_ROWS)]
    rows = [f"| {epoch} | {_percent(train.get(epoch))} | {_percent(validation.get(epoch))} |" for epoch in epochs]
    measured = metadata.get("measured_images") or {}
    what = " and ".join(f"{count:,} {split} images" for split, count in measured.items())
    note = f"\n\nMean and standard deviation over the experts, in percent{f', on {what}' if what else ''}."
    return "\n".join(["| epoch | training images | validation images |", "|---|---|---|", *rows]) + note


def _percent(value: tuple[float, float] | None) -> str:
    return "-" if value is None else f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"


def _facts(metadata: Mapping[str, Any], parameters: int, data_name: str | None, training: Mapping[str, Any]) -> str:
    dataset = metadata.get("dataset") or {}
    # What every configuration has tells nothing about this one.
    own = {k: v for k, v in metadata["student"].items() if k not in PreTrainedConfig().to_dict()}
    plain = {k: v for k, v in own.items() if isinstance(v, str | int | float | list) and k != "model_type"}
    augmentation, curriculum = metadata.get("augmentation"), metadata.get("curriculum")
    facts = {
        "Network": f"{metadata['student']['model_type']}, {parameters:,} parameters; {_settings(plain)}",
        "Data": ", ".join(
            part
            for part in (
                f"`{data_name}`" if data_name else "",
                f"revision `{dataset['revision']}`" if dataset.get("revision") else "",
                f"{dataset['train_images']:,} training images" if dataset.get("train_images") else "",
            )
            if part
        ),
        "Training": _settings(training),
        "Augmentation": _settings(augmentation) if augmentation else "none",
        "Curriculum": _settings(curriculum) if curriculum else "none: every epoch shows all images",
        "Seed": str(metadata.get("seed")) if metadata.get("seed") is not None else "",
        "Stored as": f"{metadata.get('dtype', 'float32')}, "
        f"{metadata['num_experts']} files of {len(metadata['epochs'])} x {parameters:,} numbers",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items() if value)])


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
