"""A bank of trajectories on the Hub: its card, what must hold of its files, and how it is pushed."""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, DatasetCardData
from transformers import PreTrainedConfig

from hf_effml.hub import FolderKind, push_folder, write_card
from hf_effml.utils.report import Column, Report, as_code
from hf_effml.utils.sources.split_files import recorded_name

from .files import BANK_NAME, expert_name, mean_accuracies, read_bank
from .trajectories import PROCESSOR_FILES, TrajectoryBank


__all__ = ["TrajectoryBankFolder", "push_bank"]

_TAGS = ("dataset-distillation", "trajectory-matching", "expert-trajectories", "image-classification")
_PAPERS = ("2203.11932", "2310.05773")
_MOST_ROWS = 12


class TrajectoryBankFolder(FolderKind):
    """A bank as [`ExpertTrainer`] writes it; its card follows from `bank.json`.

    Args:
        folder (`Path`):
            The folder.
    """

    noun = "bank of trajectories"
    repo_type = "dataset"
    template = "trajectory_bank_card.md"
    written_by = "ExpertTrainer"
    # Data sets on the Hub hold no programs.
    left_out = ("unfinished/*", "*.py")

    @classmethod
    def recognises(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """By its description."""
        return (folder / BANK_NAME).is_file()

    def metadata(self, name: str) -> DatasetCardData:
        """The card's metadata."""
        source = self._bank.get("dataset") or {}
        return DatasetCardData(
            task_categories=["image-classification"],
            tags=[*_TAGS, *(f"arxiv:{paper}" for paper in _PAPERS)],
            source_datasets=[source["hub_id"]] if source.get("hub_id") else None,
            viewer=False,
        )

    def snippet(self) -> str:
        """Reads a start and its target, and a network."""
        epochs = self._bank["epochs"]
        lines = [
            "from hf_effml import TrajectoryBank\n",
            "bank = TrajectoryBank.from_pretrained(dataset_id)  # fetches an expert's file when it is first read",
            f"start, target = bank.pair(expert=0, start_epoch={epochs[0]}, expert_epochs={epochs[1] - epochs[0]})"
            if len(epochs) > 1
            else "",
            "network = bank.network(expert=0)  # with the parameters of its last epoch",
            'print(f"{len(bank)} experts of {bank.num_parameters:,} parameters")',
        ]
        return "\n".join(line for line in lines if line)

    def values(self, repo_id: str) -> dict[str, Any]:
        """What the template shows."""
        bank = self._bank
        data = _data_name(bank)
        origin = f" on {as_code(data)}" if data else ""
        return {
            "summary": f"Trajectories of {bank['num_experts']} expert networks ({bank['student']['model_type']}) that "
            f"were trained{origin}: the parameters of each after {_epochs(bank['epochs'])}, for dataset distillation "
            "by trajectory matching with hf-effml.",
            "accuracy": _accuracy(bank),
            "facts_table": _facts_table(bank),
            "versions": ", ".join(f"{name} {number}" for name, number in (bank.get("versions") or {}).items()),
        }

    def remarks(self, files: Sequence[str]) -> list[str]:
        """A bank is complete, and every file of it is one of its trajectories."""
        try:
            bank = TrajectoryBank.from_pretrained(self.folder)
            for expert in range(len(bank)):
                bank.check_expert(expert)
        except (OSError, ValueError) as error:
            return [str(error).removesuffix(".")]
        return []

    @property
    def _bank(self) -> dict[str, Any]:
        return read_bank(self.folder / BANK_NAME)


def push_bank(bank: TrajectoryBank, repo_id: str, **options: Any) -> CommitInfo:
    """Uploads a bank with its card, as one commit to a data set repository.

    Args:
        bank ([`TrajectoryBank`]):
            The bank; what is still on the Hub is fetched first.
        repo_id (`str`):
            Where it goes: `namespace/name`.
        options (`dict`, *optional*):
            Further arguments of [`~hf_effml.hub.push_folder`].

    Returns:
        `huggingface_hub.CommitInfo`: the commit.

    Raises:
        ValueError: If something speaks against publishing it, such as a damaged file.
    """
    for expert in range(len(bank)):
        bank.check_expert(expert)
    with _as_folder(bank) as folder:
        write_card(folder, repo_id)
        return push_folder(folder, repo_id, **options)


@contextmanager
def _as_folder(bank: TrajectoryBank) -> Iterator[Path]:
    """Lends a folder of plain files: the Hub's cache holds links, and belongs to the cache."""
    if bank.repo_id is None:
        yield bank.folder
        return
    names = [BANK_NAME, *(expert_name(expert) for expert in range(len(bank)))]
    if bank.image_processor is not None:
        names += [name for name in PROCESSOR_FILES if (bank.folder / name).is_file()]
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            source = (bank.folder / name).resolve()
            try:
                os.link(source, Path(scratch, name))
            except OSError:
                shutil.copy2(source, Path(scratch, name))
        yield Path(scratch)


def _data_name(bank: Mapping[str, Any]) -> str | None:
    source = bank.get("dataset") or {}
    return recorded_name(source)


def _epochs(epochs: list[int]) -> str:
    if epochs == list(range(epochs[0], epochs[-1] + 1)):
        return f"epochs {epochs[0]} to {epochs[-1]}" if len(epochs) > 1 else f"epoch {epochs[0]}"
    return f"{len(epochs)} of the epochs {epochs[0]} to {epochs[-1]}"


def _accuracy(bank: Mapping[str, Any]) -> str:
    parts = {split: mean_accuracies(bank, split) for split in ("train", "validation")}
    epochs = sorted(parts["train"].keys() | parts["validation"].keys())
    if not epochs:
        return "It was not measured."
    if len(epochs) > _MOST_ROWS:
        step = (len(epochs) - 1) / (_MOST_ROWS - 1)
        epochs = [epochs[round(index * step)] for index in range(_MOST_ROWS)]
    report = Report("accuracy", {"train": Column("training images"), "validation": Column("validation images")})
    for epoch in epochs:
        report.add(f"epoch {epoch}", **{split: _percent(found.get(epoch)) for split, found in parts.items()})
    measured = bank.get("measured_images") or {}
    what = " and ".join(f"{count:,} {split} images" for split, count in measured.items())
    report.notes.append(f"Mean and standard deviation over the experts, in per cent{f', on {what}' if what else ''}.")
    return report.as_markdown()


def _percent(value: tuple[float, float] | None) -> str | None:
    return None if value is None else f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"


def _facts_table(bank: Mapping[str, Any]) -> str:
    source = bank.get("dataset") or {}
    data = _data_name(bank)
    # What every configuration has tells nothing about this one.
    own = {k: v for k, v in bank["student"].items() if k not in PreTrainedConfig().to_dict()}
    plain = {k: v for k, v in own.items() if isinstance(v, str | int | float | list) and k != "model_type"}
    parameters = sum(math.prod(entry["shape"]) for entry in bank["parameters"])
    facts = {
        "Network": f"{bank['student']['model_type']}, {parameters:,} parameters; {_settings(plain)}",
        "Data": ", ".join(
            part
            for part in (
                as_code(data) if data else "",
                f"revision `{source['revision']}`" if source.get("revision") else "",
                f"{source['train_images']:,} training images" if source.get("train_images") else "",
            )
            if part
        ),
        "Training": _settings(bank.get("training")),
        "Augmentation": _settings(bank.get("augmentation")) or "none",
        "Curriculum": _settings(bank.get("curriculum")) or "none: every epoch shows all images",
        "Seed": "" if bank.get("seed") is None else str(bank["seed"]),
        "Stored as": f"{bank.get('dtype', 'float32')}, {bank['num_experts']} files of {len(bank['epochs'])} x "
        f"{parameters:,} numbers",
    }
    report = Report("facts", {"value": Column("")})
    for name, value in facts.items():
        if value:
            report.add(name, value=value)
    return report.as_markdown()


def _settings(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (values or {}).items() if value is not None)
