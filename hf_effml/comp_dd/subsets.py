"""Which classes of ImageNet a subset has: Comp-DD's sixteen, six that distillation papers use, and any others."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any


__all__ = ["OLDER_SUBSETS", "SUBSETS", "Subset", "custom_subset", "imagenet_classes", "list_subsets", "subset_info"]

_VALIDATION_IMAGES = 50
# In the order in which these papers number them.
_OLDER = {
    "imagefruit": (953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
    "imagemeow": (281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
    "imagenette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
    "imagesquawk": (84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
    "imagewoof": (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
    "imageyellow": (309, 986, 954, 951, 987, 779, 599, 291, 72, 11),
}


@dataclass(frozen=True)
class Subset:
    """Some classes of ImageNet-1K, numbered anew.

    Args:
        config (`str`):
            Its name, that of its configuration on the Hub too.
        indices (`tuple[int, ...]`):
            Numbers of the classes in ImageNet-1K, in the order of the new labels.
        synsets, names (`tuple[str, ...]`):
            Their WordNet ids and human names; names differ from one another.
        category, difficulty (`str`, *optional*):
            For Comp-DD, such as `"bird"` and `"easy"`.
        train_images (`int`, *optional*):
            How many images for training its authors counted.
        train_per_class (`tuple[int, ...]`, *optional*):
            The same by class, where it follows: no class of ImageNet has more than 1,300.
        mean_complexity (`float`, *optional*):
            Mean complexity in percent as its authors measured it.
    """

    config: str
    indices: tuple[int, ...]
    synsets: tuple[str, ...]
    names: tuple[str, ...]
    category: str | None = None
    difficulty: str | None = None
    train_images: int | None = None
    train_per_class: tuple[int, ...] | None = None
    mean_complexity: float | None = None

    @property
    def validation_images(self) -> int:
        """Number of validation images: ImageNet has 50 of every class."""
        return _VALIDATION_IMAGES * len(self.indices)

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-plain."""
        return asdict(self) | {"validation_images": self.validation_images}


@cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """The thousand classes of ImageNet-1K in the order of their numbers.

    Returns:
        `tuple[tuple[str, str], ...]`: synset, and names separated by commas.

    Example:

    ```python
    >>> from hf_effml.comp_dd import imagenet_classes

    >>> imagenet_classes()[0]
    ('n01440764', 'tench, Tinca tinca')

    ```
    """
    text = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple((synset, names) for synset, _, names in (line.partition("\t") for line in text.splitlines()))


def custom_subset(config: str, classes: Sequence[str | int]) -> Subset:
    """Makes a subset of any classes.

    Args:
        config (`str`):
            What to call it: letters, digits, `_` and `-`.
        classes (`Sequence[str | int]`):
            Each by its synset, its number in ImageNet-1K, or one of its names.

    Returns:
        [`Subset`]

    Raises:
        ValueError: If a class is unknown, stands for two, or is named twice.

    Example:

    ```python
    >>> from hf_effml.comp_dd import custom_subset

    >>> custom_subset("lakes", ["tench", "n01443537", 391]).names
    ('tench', 'goldfish', 'coho')

    ```
    """
    if not config.replace("_", "").replace("-", "").isalnum() or not config.isascii():
        raise ValueError(f"`config` must consist of letters, digits, `_` and `-`; got {config!r}.")
    if config.lower() in _spellings():
        raise ValueError(f"`config` must be another name than those of known subsets; got {config!r}.")
    indices = [_find_class(each) for each in classes]
    twice = sorted({index for index in indices if indices.count(index) > 1})
    if twice or len(indices) < 2:
        found = f"{imagenet_classes()[twice[0]][1]!r} twice" if twice else f"{len(indices)} of them"
        raise ValueError(f"`classes` must be at least two different classes; got {found}.")
    return _subset(config, indices)


def list_subsets() -> dict[str, Subset]:
    """Lists the sixteen subsets of Comp-DD, then the six older ones.

    Returns:
        `dict[str, Subset]`: by name.
    """
    return SUBSETS | OLDER_SUBSETS


def subset_info(name: str) -> Subset:
    """Finds a subset by its name.

    Args:
        name (`str`):
            As `"bird_easy"` or, as the authors' code has it, `"birds_easy"`; in capitals or not.

    Returns:
        [`Subset`]

    Raises:
        ValueError: If there is none of this name.

    Example:

    ```python
    >>> from hf_effml.comp_dd import subset_info

    >>> subset_info("birds_easy").synsets[:2]
    ('n02007558', 'n02027492')

    ```
    """
    known = _spellings()
    if name.lower() not in known:
        near = get_close_matches(name.lower(), known, n=1)
        hint = f" Did you mean `{known[near[0]].config}`?" if near else ""
        raise ValueError(f"`{name}` is no subset.{hint} There are: {', '.join(list_subsets())}.")
    return known[name.lower()]


def _spellings() -> dict[str, Subset]:
    official = {each["official_key"]: SUBSETS[each["config"]] for each in _published()}
    return official | list_subsets()


def _published() -> list[dict[str, Any]]:
    text = Path(__file__).with_name("subsets.json").read_text(encoding="utf-8")
    return json.loads(text)["subsets"]


def _comp_dd(facts: dict[str, Any]) -> Subset:
    per_class = facts["train_per_class"]
    return Subset(
        config=facts["config"],
        indices=tuple(facts["imagenet_indices"]),
        synsets=tuple(facts["synsets"]),
        names=tuple(facts["names"]),
        category=facts["category"],
        difficulty=facts["difficulty"],
        train_images=facts["train_total"],
        train_per_class=None if per_class is None else tuple(per_class),
        mean_complexity=facts["mean_complexity_percent"],
    )


def _subset(config: str, indices: Sequence[int]) -> Subset:
    classes = [imagenet_classes()[index] for index in indices]
    short = [names.partition(",")[0] for _, names in classes]
    # Two cranes, a bird and a machine, and two bathing suits have one name each.
    names = [name if short.count(name) == 1 else f"{name} ({classes[i][0]})" for i, name in enumerate(short)]
    return Subset(config, tuple(indices), tuple(synset for synset, _ in classes), tuple(names))


def _find_class(wanted: str | int) -> int:
    text, classes = str(wanted).strip().lower(), imagenet_classes()
    if text.lstrip("-").isdigit():
        if not 0 <= int(text) < len(classes):
            raise ValueError(f"`classes` must be numbers from 0 to {len(classes) - 1}; got {wanted}.")
        return int(text)
    by_name: dict[str, list[int]] = {}
    for index, (synset, names) in enumerate(classes):
        for name in {synset, names.lower(), *names.lower().split(", ")}:
            by_name.setdefault(name, []).append(index)
    found = by_name.get(text, [])
    # A name that one class bears first and another as a second one means the first.
    first = [index for index in found if classes[index][1].lower().partition(",")[0] == text]
    found = first if len(first) == 1 else found
    if len(found) != 1:
        near = get_close_matches(text, by_name, n=3)
        meant = [f"{classes[i][0]} ({classes[i][1]})" for i in found] or near
        hint = f"; did you mean {' or '.join(meant)}?" if meant else "."
        raise ValueError(f"`{wanted}` is no class of ImageNet-1K by synset, number or name{hint}")
    return found[0]


SUBSETS = {each["config"]: _comp_dd(each) for each in _published()}
OLDER_SUBSETS = {name: _subset(name, indices) for name, indices in _OLDER.items()}
