"""The sections of a card that this package renews, and what a person wrote between and into them, which stays."""

import hashlib
import re
from collections.abc import Collection, Iterator

from transformers.utils import logging


__all__ = ["mark_sections", "renew_sections", "replace_in_sections", "unbalanced_sections"]

logger = logging.get_logger(__name__)

_TEMPLATE_MARK = re.compile(r"^<!-- section: (\w+) -->\n", re.MULTILINE)
# The digest tells whether a section is still as it was written.
_SECTION = re.compile(r"<!-- hf-effml: (\w+) ([0-9a-f]{8}) -->[ \t]*\n(?:(.*?)\n)??<!-- end of \1 -->", re.DOTALL)
_MARK = re.compile(r"<!-- (hf-effml: \w+ [0-9a-f]{8}|end of \w+) -->")
# Numbers are always brought up to date; a person's version of them stands below.
_ALWAYS_RENEWED = "results"


def mark_sections(rendered: str) -> str:
    """Sets marks around the sections of a rendered template, in which `<!-- section: NAME -->` begins each.

    Args:
        rendered (`str`):
            The text of a card, without its metadata.

    Returns:
        `str`: the text with a mark before and after every section; empty sections are left out.
    """
    _, *parts = _TEMPLATE_MARK.split(rendered)
    found = zip(parts[::2], parts[1::2], strict=True)
    blocks = [_marked(name, re.sub(r"\n{3,}", "\n\n", text).strip()) for name, text in found if text.strip()]
    return "\n\n".join(blocks) + "\n"


def renew_sections(old: str, new: str, only: Collection[str] | None = None, keep: Collection[str] = ()) -> str:
    """Brings the sections of a card up to date; everything that a person wrote stays.

    Text between sections stays where it is. A section that was changed by hand stays as it is, but for the results,
    which are renewed above the changed ones.

    Args:
        old (`str`):
            The text of the card that is there.
        new (`str`):
            That of a new one, with marks.
        only (`Collection[str]`, *optional*):
            Names of the sections to renew; all by default.
        keep (`Collection[str]`, *optional*, defaults to `()`):
            Names of sections that stay as they are where they are there.

    Returns:
        `str`: the text.
    """
    fresh = {name: block for name, block, _ in _sections(new) if only is None or name in only}
    parts: list[tuple[str | None, str]] = []
    position = 0
    for match in _SECTION.finditer(old):
        parts += [(None, old[position : match.start()]), (match[1], match[0])]
        position = match.end()
    parts.append((None, old[position:]))
    kept = {name for name, _ in parts if name in keep or (only is not None and name not in only)}
    result = [part for name, text in parts for part in _renewed(name, text, fresh, kept)]
    names = [name for name, _, _ in _sections(new)]
    for name in (name for name in fresh if name not in {part[0] for part in result}):
        before = names[: names.index(name)]
        place = max((i for i, part in enumerate(result) if part[0] in before), default=len(result) - 1)
        if place == len(result) - 1 and result[place][0] is None:
            result[place] = (None, f"{result[place][1].rstrip()}\n\n")
            result.append((name, f"{fresh[name]}\n"))
        else:
            result.insert(place + 1, (name, f"\n\n{fresh[name]}"))
    return "".join(text for _, text in result)


def replace_in_sections(text: str, pattern: str, replacement: str) -> str:
    """Replaces lines in the sections of a card that are as they were written.

    Args:
        text (`str`):
            The text of the card.
        pattern (`str`):
            A regular expression that a line matches.
        replacement (`str`):
            What stands there instead, as it is.

    Returns:
        `str`: the text, its marks still true.
    """

    def changed(match: re.Match) -> str:
        if _digest(match[3] or "") != match[2]:
            return match[0]
        return _marked(match[1], re.sub(pattern, lambda _: replacement, match[3], flags=re.MULTILINE))

    return _SECTION.sub(changed, text)


def unbalanced_sections(text: str) -> bool:
    """Says whether a card was cut off within a section.

    Args:
        text (`str`):
            The text of the card.

    Returns:
        `bool`: whether there is a mark without its other half.
    """
    return len(_MARK.findall(text)) != 2 * len(_SECTION.findall(text))


def _renewed(
    name: str | None, text: str, fresh: dict[str, str], kept: Collection[str | None]
) -> Iterator[tuple[str | None, str]]:
    if name is None or name in kept:
        yield name, text
        return
    _, digest, content = _SECTION.fullmatch(text).groups()  # type: ignore[union-attr]
    if _digest(content or "") == digest:
        yield name, fresh.get(name, "")
    elif name == _ALWAYS_RENEWED and name in fresh:
        yield name, fresh[name]
        yield None, f"\n\n{content.strip()}" if content else ""
    else:
        logger.warning(f"The section `{name}` of the card was changed by hand and stays as it is.")
        yield name, text


def _sections(text: str) -> Iterator[tuple[str, str, str]]:
    """Name, section with its marks, and content."""
    for match in _SECTION.finditer(text):
        yield match[1], match[0], match[3] or ""


def _marked(name: str, content: str) -> str:
    # Names of data and classes can be anything, but no mark.
    content = _MARK.sub(lambda match: f"&lt;{match[0][1:]}", content)
    return f"<!-- hf-effml: {name} {_digest(content)} -->\n{content}\n<!-- end of {name} -->"


def _digest(content: str) -> str:
    # Editors set empty lines around comments.
    return hashlib.sha256(content.strip().encode(errors="backslashreplace")).hexdigest()[:8]
