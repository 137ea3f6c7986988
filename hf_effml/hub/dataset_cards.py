"""Cards of distilled data sets: rendered from what lies in a folder, renewed when there are new results."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from hf_effml.methods import METHODS, Method
from hf_effml.utils.report import markdown_table

from .cards import CARD_NAME
from .distillation_results import merge_results, results_section
from .privacy import scrub
from .results import arguments_table


__all__ = ["INFO_NAME", "add_evaluations", "is_distilled_set", "render_dataset_card", "write_dataset_card"]

INFO_NAME = "distillation.json"
_TAGS = ("dataset-distillation", "synthetic", "image-classification")
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
# What all methods here stand on.
_MATCHING = (
    Method(
        key="mtt",
        name="MTT",
        title="Dataset Distillation by Matching Training Trajectories",
        paper="2203.11932",
        authors="Cazenavette, George and Wang, Tongzhou and Torralba, Antonio and Efros, Alexei A. and Zhu, Jun-Yan",
        year=2022,
        summary="Makes a student that trains on synthetic images go where experts went.",
        tags=(),
    ),
    Method(
        key="datm",
        name="DATM",
        title="Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching",
        paper="2310.05773",
        authors="Guo, Ziyao and Wang, Kai and Cazenavette, George and Li, Hui and Zhang, Kaipeng and You, Yang",
        year=2023,
        summary="Matches trajectories from their easy beginning on, with soft labels that are learned.",
        tags=(),
    ),
)


def is_distilled_set(folder: str | Path) -> bool:
    """Says whether a folder holds a published distilled set rather than a model.

    Args:
        folder (`str` or `Path`):
            The folder.

    Returns:
        `bool`: whether there is a `distillation.json`.
    """
    return Path(folder, INFO_NAME).is_file()


def render_dataset_card(folder: str | Path, dataset_id: str | None = None) -> DatasetCard:
    """Renders the card of a distilled set from its `distillation.json` and the files beside it.

    Args:
        folder (`str` or `Path`):
            A folder written by [`~hf_effml.save_distilled_dataset`].
        dataset_id (`str`, *optional*):
            Hub id the set goes to. Defaults to the name of the folder, until a push knows better.

    Returns:
        `huggingface_hub.DatasetCard`: the card.

    Raises:
        FileNotFoundError: If the folder holds no distilled set.
    """
    folder = Path(folder)
    info = _read_info(folder)
    dataset_id = dataset_id or folder.resolve().name
    papers = _papers(info.get("method"))
    source = info.get("dataset") or {}
    channels, height, width = info["image_shape"]
    processor = _read_json(folder / "preprocessor_config.json")
    low, high = info["value_range"]
    data = DatasetCardData(
        license=source.get("license"),
        task_categories=["image-classification"],
        source_datasets=[source["hub_id"]] if source.get("hub_id") else None,
        size_categories=[next((name for most, name in _SIZES if info["images"] < most), "1M<n<10M")],
        tags=list(
            dict.fromkeys(
                [*_TAGS, *(tag for paper in papers for tag in paper.tags), *(f"arxiv:{each.paper}" for each in papers)]
            )
        ),
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    )
    return DatasetCard.from_template(
        data,
        template_str=resources.files("hf_effml.hub_cards")
        .joinpath("distilled_dataset_card.md")
        .read_text(encoding="utf-8"),
        title=dataset_id.split("/")[-1],
        dataset_id=dataset_id,
        summary=_summary(info, papers[0]),
        picture="images.png",
        maps=_if_there(folder, "maps.png"),
        curves=_if_there(folder, "curves.png"),
        channels=channels,
        height=height,
        width=width,
        mode="L" if channels == 1 else "RGB",
        num_classes=len(info["classes"]),
        low=f"{low:.3g}",
        high=f"{high:.3g}",
        preprocessing=None if processor is None else "whiten" if processor.get("do_whiten") else "normalise",
        crops=processor is not None and processor.get("resize_mode") == "crop",
        how_previewed="every one stretched to its own range" if processor is None else "with the preprocessing undone",
        results=results_section(info),
        facts_table=_facts_table(info),
        command=info.get("command"),
        arguments_table=arguments_table(
            {name: value for name, value in (info.get("arguments") or {}).items() if value is not None}
        ),
        limits=_limits(info),
        versions=_versions(info),
        citations="\n\n".join(paper.citation for paper in papers),
    )


def write_dataset_card(folder: str | Path, dataset_id: str | None = None) -> Path:
    """Writes the card of a distilled set into its folder, in place of one that is there.

    Args:
        folder (`str` or `Path`):
            A folder written by [`~hf_effml.save_distilled_dataset`].
        dataset_id (`str`, *optional*):
            Hub id the set goes to. Defaults to the name of the folder.

    Returns:
        `Path`: the file written.

    Example:

    ```python
    >>> from hf_effml import save_distilled_dataset
    >>> from hf_effml.hub import push_folder, write_dataset_card

    >>> folder = save_distilled_dataset(model, "digits-distilled", processor)  # doctest: +SKIP
    >>> write_dataset_card(folder)  # doctest: +SKIP
    >>> push_folder(folder, "alice/digits-distilled")  # doctest: +SKIP
    ```
    """
    path = Path(folder) / CARD_NAME
    render_dataset_card(folder, dataset_id).save(path)
    return path


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
    folder = Path(folder)
    info = _read_info(folder)
    info["results"] = merge_results(info.get("results", []), scrub(list(reports)))
    text = json.dumps(info, indent=2, ensure_ascii=False)
    (folder / INFO_NAME).write_text(text + "\n", encoding="utf-8")
    path = folder / CARD_NAME
    if not path.exists():
        return write_dataset_card(folder)
    card = path.read_text(encoding="utf-8")
    section = f"## Results\n\n{results_section(info)}\n\n"
    renewed, found = re.subn(r"^## Results\n.*?(?=^## |\Z)", lambda _: section, card, count=1, flags=re.M | re.S)
    path.write_text(renewed if found else f"{card.rstrip()}\n\n{section}", encoding="utf-8")
    return path


def _read_info(folder: Path) -> dict[str, Any]:
    info = _read_json(folder / INFO_NAME)
    if info is None:
        raise FileNotFoundError(
            f"`{folder}` holds no distilled set: it has no `{INFO_NAME}`. Write it with `save_distilled_dataset`."
        )
    return info


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _if_there(folder: Path, name: str) -> str | None:
    return name if (folder / name).is_file() else None


def _papers(method: str | None) -> list[Method]:
    """The method's own paper first, then those it stands on."""
    return [*(each for each in METHODS if each.key == method), *_MATCHING]


def _base(info: Mapping[str, Any]) -> str | None:
    """The real data, linked where they are on the Hub."""
    source = info.get("dataset") or {}
    if source.get("hub_id"):
        return f"[`{source['hub_id']}`](https://huggingface.co/datasets/{source['hub_id']})"
    return f"`{source['name']}`" if source.get("name") else None


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
            f"`{info['bank']}`" if info.get("bank") else None,
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
    versions.setdefault("datasets", _installed("datasets"))
    made = f", {info['date']}" if info.get("date") else ""
    return ", ".join(f"{name} {number}" for name, number in versions.items() if number) + made


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _settings(values: Mapping[str, Any] | None) -> str:
    """Settings in one line; what is long, such as an order of images, is left out."""
    plain = {name: value for name, value in (values or {}).items() if isinstance(value, str | int | float | bool)}
    return ", ".join(f"{name} {value}" for name, value in plain.items())


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)
