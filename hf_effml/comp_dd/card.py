"""Cards of built subsets and of the public index of facts, rendered from the JSON files beside the tables alone."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from hf_effml.hub import FolderKind
from hf_effml.hub.kinds import size_category
from hf_effml.methods import get_papers
from hf_effml.utils.forms import check_forms, is_count, is_list, is_mapping, is_text
from hf_effml.utils.imports import require
from hf_effml.utils.report import as_code, markdown_table

from .building import FACTS_NAME, picture_features
from .subsets import SUBSETS, list_subsets


__all__ = ["INDEX_NAME", "KINDS", "TERMS", "BuiltSubsets", "SubsetIndex"]

INDEX_NAME = "metadata.json"
TERMS = (
    "The pictures are those of ImageNet, also where they are smaller. ImageNet is for non-commercial research and "
    "education: who has it may pass copies on to research associates who have first accepted its terms "
    "(https://www.image-net.org/download.php), and to nobody else. Share them in private repositories, or where you "
    "hold the right to redistribute them."
)
_TAGS = ("dataset-distillation", "comp-dd", "imagenet", "arxiv:2410.17193")
_COLUMNS = ("subset", "classes", "training", "published", "validation", "mean complexity")
_MOST_NAMES = 10


def _are_splits(value: Any) -> bool:
    return is_mapping(value) and all(
        is_mapping(each) and is_count(each.get("images")) and is_list(each.get("files"), is_text) and "bytes" in each
        for each in value.values()
    )


_FORMS = {
    "classes": ("a list of names", lambda value: is_list(value, is_text) and value != []),
    "splits": ("splits with their `images`, `bytes` and `files`", _are_splits),
}


class BuiltSubsets(FolderKind):
    """A folder of subsets as [`build_comp_dd`] writes it; its card follows from every subset's `comp_dd.json`.

    Args:
        folder (`Path`):
            The folder.
    """

    noun = "set of pictures of ImageNet"
    repo_type = "dataset"
    template = "comp_dd_card.md"
    written_by = "build_comp_dd"
    left_out = ("*/_*",)
    pushed_with = "hf-effml comp-dd push"

    @classmethod
    def recognises(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """By the facts of a subset, in it or a folder below."""
        return (folder / FACTS_NAME).is_file() or any(folder.glob(f"*/{FACTS_NAME}"))

    @cached_property
    def subsets(self) -> dict[str, dict[str, Any]]:
        """The facts of every complete subset, by its name; Comp-DD's come first."""
        known = list(list_subsets())
        names = [path.parent.name for path in self.folder.glob(f"*/{FACTS_NAME}")]
        found = {}
        for name in sorted(names, key=lambda each: (known.index(each) if each in known else len(known), each)):
            facts = self.read_json(f"{name}/{FACTS_NAME}")
            check_forms(facts or {}, _FORMS, f"{name}/{FACTS_NAME}", "Build the subset again.")
            found[name] = facts or {}
        return found

    def metadata(self, name: str) -> DatasetCardData:
        """The card's metadata, with the features and sizes that the library checks."""
        data = DatasetCardData(
            pretty_name="Comp-DD" if self._of_comp_dd else "Subsets of ImageNet-1K",
            license="other",
            license_name="imagenet",
            license_link="https://www.image-net.org/download.php",
            task_categories=["image-classification"],
            size_categories=[size_category(sum(_count(facts) for facts in self.subsets.values()))],
            source_datasets=["extended|imagenet-1k"],
            tags=list(_TAGS if self._of_comp_dd else (_TAGS[0], *_TAGS[2:])),
            configs=[
                _config(name, {split: f"{split}-*" for split in f["splits"]}) for name, f in self.subsets.items()
            ],
        )
        infos = require("datasets").info.DatasetInfosDict({n: _info(n, f) for n, f in self.subsets.items()})
        infos.to_dataset_card_data(data)
        return data

    def snippet(self) -> str:
        """Reads a subset and a row of it."""
        return (
            "from datasets import load_dataset\n\n"
            f'data = load_dataset(dataset_id, "{next(iter(self.subsets))}")\n'
            'row, names = data["train"][0], data["train"].features["label"].names\n'
            "print(f\"{data.num_rows}, the first a {names[row['label']]} of {row['image'].size} pixels\")"
        )

    def values(self, repo_id: str) -> dict[str, Any]:
        """What the template shows."""
        subsets = self.subsets
        fast = [name for name, facts in subsets.items() if facts.get("fast_decode")]
        return {
            "summary": f"{sum(map(_count, subsets.values())):,} pictures of ImageNet-1K (ILSVRC 2012): "
            f"{', '.join(map(as_code, subsets))}, built from a copy of ImageNet with hf-effml.",
            "paper": get_papers("edf")[0],
            "example": f"{repo_id}:{next(iter(subsets))}",
            "counts_table": markdown_table(_COLUMNS, [_counts(name, facts) for name, facts in subsets.items()]),
            "subsets": {name: ", ".join(facts["classes"]) for name, facts in subsets.items()},
            "making_table": markdown_table(
                ["subset", "pixels", "resized", "stored as", "decoded by", "from"],
                [[as_code(name), *_making(facts)] for name, facts in subsets.items()],
            ),
            "fast": ", ".join(map(as_code, fast)),
            "skipped": {name: _shortened(facts["skipped"]) for name, facts in subsets.items() if facts.get("skipped")},
            "terms": TERMS,
            "versions": "; ".join(
                dict.fromkeys(
                    ", ".join(map(" ".join, (facts.get("versions") or {}).items())) for facts in subsets.values()
                )
            ),
        }

    def remarks(self, files: Sequence[str]) -> list[str]:
        """Every subset is complete, and every table belongs to one."""
        begun = {
            path.parent.name for path in self.folder.glob("*/*") if path.name.endswith((".parquet", "_build.json"))
        }
        unfinished = sorted(begun - set(self.subsets))
        remarks = [f"`{name}` is not complete (no `{FACTS_NAME}`): build it again or delete it" for name in unfinished]
        whole = set[str]()
        for name, facts in self.subsets.items():
            for split, about in facts["splits"].items():
                tables = [f"{name}/{file}" for file in about["files"]]
                whole |= set(tables)
                there = [self.folder / table for table in tables if table in files]
                if len(there) < len(tables) or sum(path.stat().st_size for path in there) != about["bytes"]:
                    remarks.append(f"the {split} pictures of `{name}` are not as they were built: build them again")
        for name in files:
            if name.endswith(".parquet") and name not in whole and name.partition("/")[0] not in unfinished:
                remarks.append(f"`{name}` belongs to no subset: delete it")
        return remarks

    @property
    def _of_comp_dd(self) -> bool:
        return any(name in SUBSETS for name in self.subsets)


class SubsetIndex(FolderKind):
    """The public index: tables of classes without a picture, and `metadata.json`.

    Args:
        folder (`Path`):
            The folder.
    """

    noun = "index of Comp-DD"
    repo_type = "dataset"
    template = "comp_dd_index_card.md"
    written_by = "push_index"

    @classmethod
    def recognises(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """By its facts and a table of the classes of all subsets."""
        return (folder / INDEX_NAME).is_file() and (folder / "all/classes.parquet").is_file()

    def metadata(self, name: str) -> DatasetCardData:
        """The card's metadata."""
        return DatasetCardData(
            pretty_name="Comp-DD: index of classes",
            size_categories=["n<1K"],
            tags=list(_TAGS),
            configs=[_config(each, {"classes": "classes.parquet"}) for each in (*SUBSETS, "all")],
        )

    def snippet(self) -> str:
        """Reads the classes of a subset."""
        return (
            "from datasets import load_dataset\n\n"
            'classes = load_dataset(dataset_id, "bird_easy", split="classes")\n'
            'print(classes["name"][:], classes["synset"][:])'
        )

    def values(self, repo_id: str) -> dict[str, Any]:
        """What the template shows."""
        rows = [
            [as_code(name), len(each.indices), f"{each.train_images:,}", each.validation_images, each.mean_complexity]
            for name, each in SUBSETS.items()
        ]
        return {
            "paper": get_papers("edf")[0],
            "counts_table": markdown_table(["subset", "classes", "training", "validation", "mean complexity"], rows),
        }


KINDS = (BuiltSubsets, SubsetIndex)


def _config(name: str, files: Mapping[str, str]) -> dict[str, Any]:
    listed = [{"split": split, "path": f"{name}/{pattern}"} for split, pattern in files.items()]
    return {"config_name": name, "data_files": listed}


def _info(name: str, facts: Mapping[str, Any]) -> Any:
    """What the library knows of a subset before it reads it, and checks when it has."""
    datasets = require("datasets")
    sizes = {split: (about["images"], about["bytes"]) for split, about in facts["splits"].items()}
    splits = {split: datasets.SplitInfo(split, size, images) for split, (images, size) in sizes.items()}
    total = sum(size for _, size in sizes.values())
    return datasets.DatasetInfo(
        features=picture_features(facts["classes"]),
        splits=datasets.SplitDict(splits),
        config_name=name,
        download_size=total,
        dataset_size=total,
    )


def _count(facts: Mapping[str, Any]) -> int:
    return sum(about["images"] for about in facts["splits"].values())


def _counts(name: str, facts: Mapping[str, Any]) -> list[Any]:
    train, test = (facts["splits"].get(split, {}).get("images") for split in ("train", "validation"))
    published, complexity = facts.get("published_train_images"), facts.get("mean_complexity_percent")
    counts = [None if each is None else f"{each:,}" for each in (train, published, test)]
    return [as_code(name), len(facts["classes"]), *counts, complexity and f"{complexity:.1f}"]


def _making(facts: Mapping[str, Any]) -> list[Any]:
    size, form = facts.get("size"), facts.get("image_format")
    how = [f"{size} x {size}", facts.get("resize_mode"), f"{form}, without loss"] if size else ["all", "no", form]
    return [*how, facts.get("decoder"), facts.get("source")]


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(map(as_code, names[:_MOST_NAMES])) + more
