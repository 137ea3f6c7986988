"""A card as a file: read whatever editor it comes from, and written so that a person's lines stay as they are."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, ModelCard, RepoCard
from huggingface_hub.utils import yaml_dump

from hf_effml.utils.files import write_text


__all__ = ["read_card", "read_text", "save_card"]

_HEADER = re.compile(r"\A\s*---\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)
# Where an entry of the header begins, or a remark on one.
_ENTRY = re.compile(r"^(?=[^\s\-\]}])", re.MULTILINE)


def read_text(path: Path) -> str:
    """Reads a text, without the mark and the line ends of Windows.

    Args:
        path (`Path`):
            The file.

    Returns:
        `str`: its content.
    """
    return path.read_text(encoding="utf-8-sig")


def read_card(path: Path, repo_type: str) -> RepoCard:
    """Reads a card.

    Args:
        path (`Path`):
            The file.
        repo_type (`str`):
            `"model"` or `"dataset"`.

    Returns:
        `huggingface_hub.ModelCard` or `huggingface_hub.DatasetCard`

    Raises:
        ValueError: If its metadata cannot be read.
    """
    try:
        return (ModelCard if repo_type == "model" else DatasetCard)(read_text(path))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The metadata of `{path}` cannot be read ({reason}). Mend them, or move it away.") from error


def save_card(path: Path, card: RepoCard) -> None:
    """Writes a card in place of the one that is there. Of its metadata, what did not change stays as it is written.

    Args:
        path (`Path`):
            The file.
        card (`RepoCard`):
            Its new content.
    """
    new = yaml.safe_load(card.data.to_yaml())
    match = _HEADER.match(read_text(path)) if path.exists() else None
    header = _edited(match[1], new) if match else yaml_dump(new)
    write_text(path, f"---\n{header.strip()}\n---\n{card.text}" if new else card.text)


def _edited(header: str, new: dict[str, Any]) -> str:
    """A header with new values; remarks, order and spelling of the others stay."""
    old, parts = yaml.safe_load(header) or {}, [""]
    for part in _ENTRY.split(f"{header}\n"):
        # An item that follows a remark belongs to the list above it.
        if part.startswith("#") and re.search(r"^\s*-", part, flags=re.MULTILINE):
            parts[-1] += part
        else:
            parts.append(part)
    text = ""
    try:
        for part in parts:
            name = next(iter(yaml.safe_load(part) or ()), None)
            if name is None or (name in new and new[name] == old[name]):
                text += part
            elif name in new:
                remarks = re.findall(r"^\s*#.*\n", part, flags=re.MULTILINE)
                text += "".join([*remarks, yaml_dump({name: new[name]})])
        text += "".join(yaml_dump({name: value}) for name, value in new.items() if name not in old)
        if yaml.safe_load(text) == new:
            return text
    except (TypeError, yaml.YAMLError):
        pass  # entries that refer to one another cannot be taken apart
    return yaml_dump(new)
