"""Folders of distilled data on the Hub: a published set, the model that a set is trained as, and a bank of experts."""

from collections.abc import Mapping, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import DatasetCardData

from hf_effml.hub import FolderKind, ModelFolder, add_results, renew_results
from hf_effml.hub.kinds import installed_versions, size_category
from hf_effml.hub.privacy import scrub
from hf_effml.hub.results import arguments_table
from hf_effml.methods import Method, get_papers
from hf_effml.utils.files import write_json
from hf_effml.utils.report import as_code, markdown_table
from hf_effml.utils.sources.split_files import recorded_name

from .bank.card import TrajectoryBankFolder
from .publishing.description import read_description
from .publishing.evaluations import evaluations_section, merge_evaluations
from .publishing.sets import INFO_NAME
from .publishing.snippet import training_snippet


if TYPE_CHECKING:
    from .evaluation.report import EvaluationReport


__all__ = ["KINDS", "DistilledModelFolder", "DistilledSetFolder", "add_evaluations", "add_to_card"]

_TAGS = ("dataset-distillation", "synthetic", "image-classification")


def add_evaluations(folder: str | Path, reports: Sequence[Mapping[str, Any]]) -> Path:
    """Adds results to a distilled set and renews them on its card, which otherwise stays as it is.

    Args:
        folder (`str` or `Path`):
            A folder with a distilled set; it gets a card if it has none.
        reports (`Sequence[Mapping]`):
            What [`~hf_effml.evaluate_distilled`] found, as its reports' `to_dict` returns it. One of the same network,
            protocol and images as an earlier one replaces that.

    Returns:
        `Path`: the card.

    Raises:
        FileNotFoundError: If the folder holds no distilled set.
    """
    info = DistilledSetFolder(Path(folder)).info
    results = merge_evaluations(info.get("results", []), scrub(list(reports)))
    write_json(Path(folder) / INFO_NAME, info | {"results": results})
    return renew_results(folder)


def add_to_card(folder: str | Path, reports: "Sequence[EvaluationReport]", data: str) -> Path:
    """Adds results to a distilled set or to the model that it was trained as, and renews its card.

    Args:
        folder (`str` or `Path`):
            The folder; that of a model has a card.
        reports (`Sequence[EvaluationReport]`):
            From [`~hf_effml.evaluate_distilled`], one per network.
        data (`str`):
            Name of the data they were measured on.

    Returns:
        `Path`: the card.
    """
    if (Path(folder) / INFO_NAME).is_file():
        return add_evaluations(folder, [report.to_dict() for report in reports])
    results = [result for report in reports for result in report.card_results()]
    return add_results(folder, results, f"{data}, {reports[0].split} images")


class DistilledSetFolder(FolderKind):
    """A distilled set as [`~hf_effml.save_distilled_dataset`] writes it; its card follows from `distillation.json`.

    Args:
        folder (`Path`):
            The folder.
    """

    noun = "distilled data set"
    repo_type = "dataset"
    template = "distilled_dataset_card.md"
    written_by = "save_distilled_dataset"

    @classmethod
    def recognises(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """By its description."""
        return (folder / INFO_NAME).is_file()

    @property
    def info(self) -> dict[str, Any]:
        """The set's description."""
        if not (self.folder / INFO_NAME).is_file():
            raise FileNotFoundError(
                f"`{self.folder}` holds no distilled set: it has no `{INFO_NAME}`. Write it with "
                "`save_distilled_dataset`."
            )
        return read_description(self.folder / INFO_NAME)

    def metadata(self, name: str) -> DatasetCardData:
        """The card's metadata."""
        info, source = self.info, self.info.get("dataset") or {}
        papers = self._papers(info)
        return DatasetCardData(
            license=source.get("license"),
            task_categories=["image-classification"],
            source_datasets=[source["hub_id"]] if source.get("hub_id") else None,
            size_categories=[size_category(info["images"])],
            tags=list(
                dict.fromkeys(
                    [*_TAGS, *(tag for each in papers for tag in each.tags), *(f"arxiv:{p.paper}" for p in papers)]
                )
            ),
            configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
        )

    def snippet(self) -> str:
        """Trains networks on the set and on as many real images, and measures both on real ones."""
        return training_snippet(self.info, self.read_json("preprocessor_config.json"))

    def values(self, repo_id: str) -> dict[str, Any]:
        """What the template shows."""
        info = self.info
        papers = self._papers(info)
        channels, height, width = info["image_shape"]
        processor = self.read_json("preprocessor_config.json")
        low, high = info["value_range"]
        return {
            "summary": _summary(info, papers[0]),
            "picture": "images.png",
            "maps": self.if_there("maps.png"),
            "curves": self.if_there("curves.png"),
            "channels": channels,
            "height": height,
            "width": width,
            "num_classes": len(info["classes"]),
            "low": f"{low:.3g}",
            "high": f"{high:.3g}",
            "preprocessing": None if processor is None else "whitened" if processor.get("do_whiten") else "normalised",
            "how_previewed": "every one stretched to its own range"
            if processor is None
            else "with the preprocessing undone",
            "results": evaluations_section(info),
            "facts_table": _facts_table(info),
            "command": info.get("command"),
            "arguments_table": arguments_table(
                {name: value for name, value in (info.get("arguments") or {}).items() if value is not None}
            ),
            "limits": _limits(info),
            "versions": _versions(info),
            "citations": "\n\n".join(paper.citation for paper in papers),
        }

    def remarks(self, files: Sequence[str]) -> list[str]:
        """A set was checked when it was saved, so it must still be the same."""
        try:
            wanted = dict(self.info["files"])
        except (KeyError, TypeError, ValueError):
            return [f"`{INFO_NAME}` does not list the set's files: write the folder with `save_distilled_dataset`"]
        remarks = []
        for name, digest in wanted.items():
            if name not in files:
                remarks.append(f"no `{name}`: write the folder with `save_distilled_dataset`")
            elif _digest(self.folder / name) != digest:
                remarks.append(
                    f"`{name}` is not as it was checked and saved: write the folder again with "
                    "`save_distilled_dataset`"
                )
        if not any(name.endswith(".parquet") for name in wanted):
            remarks.append("no table of images: write the folder with `save_distilled_dataset`")
        for name in files:
            if name.endswith(".parquet") and name not in wanted:
                remarks.append(f"`{name}` does not belong to the set: move it away")
            elif name.endswith(".py"):
                remarks.append(f"`{name}` is a program, which data sets on the Hub may not have: move it away")
        return remarks

    def _papers(self, info: Mapping[str, Any]) -> list[Method]:
        """The method's own paper first, then those it stands on."""
        known = info.get("method")
        return get_papers(known) if known in ("edf", "pad") else get_papers("datm")


class DistilledModelFolder(ModelFolder):
    """A synthetic set as the model that it is trained as. Arguments are those of [`~hf_effml.hub.ModelFolder`]."""

    # Experts and the published set are folders of their own.
    left_out = ("bank/*", "dataset/*", "pictures/*")

    @classmethod
    def recognises(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """By the type of the model."""
        return config.get("model_type") == "distilled_dataset"

    def described(self) -> str:
        """How many images it is."""
        classes, per_class = len(self.config.get("id2label") or (0, 1)), self.config.get("images_per_class", 1)
        return f", a distilled data set as a model ({classes * per_class:,} images of {classes} classes),"

    def snippet(self) -> str:
        """Takes images and labels out of the model."""
        return (
            "from transformers import AutoModel\n\n"
            f"model = AutoModel.from_pretrained(model_id{self.remote_code})\n"
            "images, soft_labels = model.images.detach(), model.labels.detach().softmax(-1)\n"
            'print(f"{len(images)} images, to train on with a learning rate of {model.lr.item():.3g}")'
        )

    def limits(self) -> list[str]:
        """It is no classifier."""
        return [
            "It is no classifier: its parameters are images, soft labels and a step size that networks are trained "
            "with.",
            "It is the state of a distillation, to go on from. To share the images, publish them as a data set with "
            "`trainer.save_dataset()` or `save_distilled_dataset` of `hf_effml`.",
            "Synthetic images start from real ones and may show traces of them; the terms of the real data apply.",
            *([f"The results above hold for {self.evaluated_on}."] if self.entries and self.evaluated_on else []),
        ]


KINDS = (DistilledSetFolder, DistilledModelFolder, TrajectoryBankFolder)


def _base(info: Mapping[str, Any]) -> str | None:
    """The real data, linked where they are on the Hub."""
    source = info.get("dataset") or {}
    if source.get("hub_id"):
        return f"[`{recorded_name(source)}`](https://huggingface.co/datasets/{source['hub_id']})"
    return as_code(source["name"]) if source.get("name") else None


def _summary(info: Mapping[str, Any], method: Method) -> str:
    images, classes, ipc = info["images"], len(info["classes"]), info["images_per_class"]
    channels, height, width = info["image_shape"]
    each = f"{ipc} for each of {classes} classes"
    network = f" like {info['student_name']}" if info.get("student_name") else ""
    return (
        f"{images:,} synthetic images ({each}, {channels} x {height} x {width} values) with soft labels, distilled "
        f"from {_base(info) or 'a data set of images'} with [{method.name}]({method.url}): a small network{network} "
        "that is trained on them is to become what it would on all the real images."
    )


def _facts_table(info: Mapping[str, Any]) -> str:
    source, experts = info.get("dataset") or {}, info.get("experts") or {}
    splits = source.get("splits") or {}
    memory, seconds, steps = info.get("peak_memory_bytes"), info.get("seconds"), info.get("steps")
    facts = {
        "Real images": _joined(
            _base(info),
            f"revision `{source['revision']}`" if source.get("revision") else None,
            *(f"{number:,} for {name}" for name, number in splits.items()),
        ),
        "Network it was made with": info.get("student_name"),
        "Experts": _joined(
            as_code(info["bank"]) if info.get("bank") else None,
            f"{experts['number']} networks" if experts.get("number") else None,
            f"epochs {experts['epochs'][0]} to {experts['epochs'][1]}" if experts.get("epochs") else None,
            _settings(experts.get("training")),
            f"curriculum ({_settings(experts['curriculum'])})" if experts.get("curriculum") else None,
        ),
        "Steps": f"{steps:,}" if steps else None,
        "Chosen": _selection(info.get("selected")),
        "Learned learning rate": f"{info['learning_rate']:.4g}",
        "Augmentation": _settings(info["protocol"].get("augmentation")),
        "Seed": info.get("seed"),
        "Computed on": _joined(
            info.get("device"),
            f"{info['processes']} processes" if info.get("processes", 1) > 1 else None,
            f"{seconds:,.0f} s since its last start" if seconds else None,
            f"at most {memory / 2**20:,.0f} MiB of memory" if memory else None,
        ),
    }
    return markdown_table(["", ""], [[name, value] for name, value in facts.items() if value not in (None, "")])


def _selection(selected: Mapping[str, Any] | None) -> str | None:
    if not selected:
        return None
    chosen = f"step {selected['step']:,}: {selected['rule']}"
    if selected.get("accuracy") is None:
        return chosen
    rules = selected["protocol"]
    return (
        f"{chosen} ({selected['accuracy']:.1%} of {selected['images']:,} images, protocol `{rules['name']}`, "
        f"{rules['epochs']} epochs, {selected['seeds']} network(s))"
    )


def _limits(info: Mapping[str, Any]) -> list[str]:
    _, height, width = info["image_shape"]
    network = info.get("student_name")
    made_for = f"It was made with {network}" if network else "It was made with one kind of network"
    source = info.get("dataset") or {}
    return [
        f"{made_for} at {height} x {width} pixels; other architectures and resolutions gain less from it.",
        f"It knows its {len(info['classes'])} classes only, and what is trained on it inherits their biases.",
        "The images are no photographs: they are optimised to train networks and say little about what objects look "
        "like. Values that no picture has are part of them, so train on `image`, not on `preview`.",
        "They start from real training images and may show traces of them. A distilled set is no protection of "
        "privacy.",
        f"The real images have the license `{source['license']}`, whose terms hold for what is made from them too."
        if source.get("license")
        else "The license of the real images is not stated here, and its terms hold for what is made from them too: "
        "look it up before you use this set. A base that is for research only stays so.",
    ]


def _versions(info: Mapping[str, Any]) -> str:
    versions = {"hf-effml": info["hf_effml_version"]} | info.get("versions", {})
    versions.setdefault("datasets", installed_versions("datasets").get("datasets"))
    made = f", {info['date']}" if info.get("date") else ""
    return ", ".join(f"{name} {number}" for name, number in versions.items() if number) + made


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _settings(values: Mapping[str, Any] | None) -> str:
    """Settings in one line; what is long, such as an order of images, is left out."""
    plain = {name: value for name, value in (values or {}).items() if isinstance(value, str | int | float | bool)}
    return ", ".join(f"{name} {value}" for name, value in plain.items())


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)
