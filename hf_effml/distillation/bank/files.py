"""The files of a bank of trajectories: their names, how they are written, and what must agree in all of them."""

import hashlib
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_effml.utils.files import write_json, write_safetensors
from hf_effml.utils.forms import Form, check_forms, is_count, is_list, is_mapping, is_text, optional
from hf_effml.utils.shards import differing_settings


__all__ = [
    "BANK_NAME",
    "FORMAT_VERSION",
    "bank_fingerprint",
    "different_settings",
    "expert_name",
    "identifying",
    "mean_accuracies",
    "read_bank",
    "read_header",
    "write_bank",
    "write_expert",
    "write_tensors",
]

BANK_NAME = "bank.json"
FORMAT_VERSION = 1
_HEADER = "hf_effml"
# What makes two trajectories members of one bank. Their number is not among it: a bank can grow.
_SETTINGS = (
    "student",
    "parameters",
    "epochs",
    "dtype",
    "seed",
    "dataset",
    "preprocessing",
    "training",
    "augmentation",
    "curriculum",
)
_REQUIRED = ("num_experts", "student", "parameters", "epochs")
# What a name of five digits tells apart.
_MOST_EXPERTS = 10**5
_MOST_PARAMETERS = 10**12


def expert_name(expert: int) -> str:
    """Names the file of an expert.

    Args:
        expert (`int`):
            Its number, from 0.

    Returns:
        `str`: the name.
    """
    return f"expert-{expert:05d}.safetensors"


def bank_fingerprint(metadata: Mapping[str, Any]) -> str:
    """Makes a short text of a bank's settings, which every expert's file carries as well.

    Args:
        metadata (`Mapping`):
            Content of `bank.json`.

    Returns:
        `str`: equal for equal settings.
    """
    # As it is read again, where keys are texts.
    plain = json.loads(json.dumps(identifying(metadata)))
    text = json.dumps(plain, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def identifying(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Takes the settings that tell a bank from others.

    Args:
        metadata (`Mapping`):
            Content of `bank.json`.

    Returns:
        `dict`: without what may change, such as the number of experts.
    """
    return {name: metadata.get(name) for name in _SETTINGS}


def different_settings(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Says in which settings two banks differ.

    Args:
        there (`Mapping`):
            Content of one `bank.json`.
        here (`Mapping`):
            Content of the other.

    Returns:
        `list[str]`: one phrase for each setting; empty if experts of both fit together.
    """
    return differing_settings(identifying(there), identifying(here))


def read_bank(path: str | Path) -> dict[str, Any]:
    """Reads `bank.json`.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `dict`: its content.

    Raises:
        ValueError: If it is none, or made by a newer version of this package.
    """
    try:
        metadata = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"`{path}` is no JSON: {error}. Load the bank again or train it in another folder."
        ) from error
    version: Any = metadata.get("format_version") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not is_count(version):
        raise ValueError(f"`{path}` describes no bank of trajectories: it has no `format_version`.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"`{path}` has the format {version}; this version of hf-effml reads {FORMAT_VERSION}. Upgrade hf-effml."
        )
    missing = [name for name in _REQUIRED if name not in metadata]
    if missing:
        raise ValueError(f"`{path}` is incomplete: `{'`, `'.join(missing)}` is missing.")
    check_forms(metadata, _FORMS, str(path), "Load the bank again or train it in another folder.")
    return metadata


def write_bank(folder: str | Path, metadata: Mapping[str, Any]) -> None:
    """Writes `bank.json` in one go.

    Args:
        folder (`str` or `Path`):
            Folder of the bank; it is made if need be.
        metadata (`Mapping`):
            The content, JSON-plain.
    """
    write_json(Path(folder) / BANK_NAME, {"format_version": FORMAT_VERSION, **metadata}, indent=1)


def write_expert(
    folder: str | Path,
    expert: int,
    trajectory: Tensor,
    metadata: Mapping[str, Any],
    history: list[dict[str, Any]] | None = None,
) -> None:
    """Writes the file of one expert in one go.

    Args:
        folder (`str` or `Path`):
            Folder of the bank.
        expert (`int`):
            Its number.
        trajectory (`Tensor` of shape `(epochs, parameters)`):
            A row for every kept epoch.
        metadata (`Mapping`):
            Content of `bank.json`, to which the file then belongs.
        history (`list[dict]`, *optional*):
            What was measured after its epochs.
    """
    header = {"bank": bank_fingerprint(metadata), "expert": expert, "history": history or []}
    write_tensors(Path(folder) / expert_name(expert), {"trajectory": trajectory}, header)


def read_header(path: str | Path) -> dict[str, Any]:
    """Reads what else a safetensors file of a bank holds.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `dict`: what [`write_tensors`] got as `header`; empty if the file is not from there.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"`{path}` is no file of a bank, or damaged: {error}. Load or train it again.") from error
    if not is_mapping(header):
        raise ValueError(
            f"The header `{_HEADER}` of `{path}` must be a mapping; got {header!r}. Load or train it again."
        )
    forms = {
        "history": ("a list of what was measured", optional(_is_history)),
        "settings": ("a mapping", optional(is_mapping)),
    }
    check_forms(header, forms, str(path), "Load or train it again.")
    return header


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes a safetensors file in one go: whoever is killed meanwhile leaves the file that was there before.

    Args:
        path (`Path`):
            The file.
        tensors (`dict[str, Tensor]`):
            What goes into it.
        header (`dict`):
            What else, JSON-plain.
    """
    # As one text: the order of several would change from run to run, and with it the file.
    write_safetensors(path, tensors, {_HEADER: json.dumps(header)})


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


def _is_parameter(entry: Any) -> bool:
    if not is_mapping(entry) or not is_text(entry.get("name")):
        return False
    return is_list(entry.get("shape"), lambda side: is_count(side, _MOST_PARAMETERS))


def _are_epochs(value: Any) -> bool:
    return is_list(value, lambda epoch: type(epoch) is int and epoch >= 0) and value == sorted(set(value)) != []


def _is_history(value: Any) -> bool:
    return is_list(value, lambda entry: is_mapping(entry) and type(entry.get("epoch")) is int)


_FORMS: dict[str, Form] = {
    "num_experts": (f"a number from 1 to {_MOST_EXPERTS:,}", lambda value: is_count(value, _MOST_EXPERTS)),
    "student": (
        "a configuration with its `model_type`",
        lambda value: is_mapping(value) and is_text(value.get("model_type")),
    ),
    "parameters": ("a list of names and shapes", lambda value: is_list(value, _is_parameter) and value != []),
    "epochs": ("an ascending list of numbers", _are_epochs),
    "dataset": ("a mapping, or null", optional(is_mapping)),
    "training": ("a mapping, or null", optional(is_mapping)),
    "history": ("for every expert a list of what was measured", optional(lambda value: is_list(value, _is_history))),
}
