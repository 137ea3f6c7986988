"""Comp-DD: subsets of ImageNet of known complexity, built from one's own copy, scored and shared."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .building import *  # noqa: F403
    from .complexity import *  # noqa: F403
    from .publishing import *  # noqa: F403
    from .subsets import *  # noqa: F403

# Where the public names are. They are loaded when asked for: `hf-effml comp-dd list` answers without torch.
_HOMES = {
    "building": ("build_comp_dd",),
    "complexity": (
        "ComplexityScores",
        "MapNetwork",
        "class_complexity",
        "complexity_of_maps",
        "draw_complexity",
        "make_subsets",
        "score_complexity",
        "score_images",
        "subset_complexity",
        "translate_classes",
    ),
    "publishing": ("index_rows", "push_comp_dd", "push_index"),
    "subsets": (
        "OLDER_SUBSETS",
        "SUBSETS",
        "Subset",
        "custom_subset",
        "imagenet_classes",
        "list_subsets",
        "subset_info",
    ),
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
