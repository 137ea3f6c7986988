"""What may import what, and which imports let a saved model load where this package is not installed."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FOLDERS = ("hf_effml", "trainers", "scripts", "hub_cards")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SUBJECTS = {"comp_dd", "distillation", "token_router", "vim"}
# Files that a saved model, configuration or image processor carries along begin with these, and import siblings.
CARRIED = ("backbone_", "configuration_", "image_processing_", "modeling_")
# A room of distillation may import those before it; what lies flat imports none of them.
DISTILLATION_ROOMS = ("bank", "evaluation", "publishing")
PORTABLE_PACKAGES = {"PIL", "huggingface_hub", "numpy", "safetensors", "torch", "transformers"}
# `vision` is what the trainers of image models share beyond the card: mixup, moving average; PAD and EDF are
# trajectory matching with a filter more.
TRAINER_BASES = {
    f"hf_effml.trainers.{name}"
    for name in ("arguments", "base", "trajectory_matching", "trajectory_matching_arguments", "vision")
}
# From plain settings to a result, with the trainers of others on the way: what programs share.
WHOLE_ROADS = ("distillation", "expert_bank")
# layer -> the layers it may import besides itself; `scripts` may import anything public.
MAY_IMPORT = {
    "utils": set(),
    "methods": set(),
    # Of them, only what is not carried along by a saved model.
    **dict.fromkeys(SUBJECTS, {"hub", "methods", "utils"}),
    # A benchmark for distillation, which gives it the maps and the measurements.
    "comp_dd": {"distillation", "hub", "methods", "utils"},
    "hub": {"utils", "methods"},
    "hub_cards": set(),
    "trainers": SUBJECTS | {"hub", "methods", "utils"},
    "cli": {"__init__", "methods", "utils"},
    "__init__": SUBJECTS | {"trainers", "utils"},
    "__main__": {"cli"},
}


def _module(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "hf_effml" else ["hf_effml", *parts]
    return ".".join(parts)


def _layer(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


def _imports(path: Path) -> Iterator[tuple[str, list[str], ast.stmt]]:
    """The absolute name of each imported module, the names taken from it, and the statement."""
    package = _module(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, [], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name, [alias.name for alias in node.names], node


def _portable() -> list[Path]:
    """What saved folders carry along, siblings of siblings too."""
    found = [path for path in FILES if path.parent.name in SUBJECTS and path.name.startswith(CARRIED)]
    for path in found:
        siblings = {
            path.parent / f"{node.module}.py" for _, _, node in _imports(path) if getattr(node, "level", 0) == 1
        }
        found += sorted(siblings - {*found})
    return found


def _identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=_identifier)
def test_layers(path):
    layer = _layer(_module(path))
    for name, taken, _ in _imports(path):
        if name.partition(".")[0] != "hf_effml":
            continue
        if layer == "scripts":
            # What programs share stands in a private file of their own folder.
            name = name.removeprefix("hf_effml.scripts._")
            assert not any(part.startswith("_") for part in [*name.split("."), *taken]), f"private: {name} {taken}"
            continue
        assert _layer(name) in MAY_IMPORT[layer] | {layer}, f"{layer} may not import {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "trainers").glob("*.py")), ids=_identifier)
def test_trainers_share_only_their_bases(path):
    others = {name for name, _, _ in _imports(path) if name.startswith("hf_effml.trainers")}
    assert path.stem in ("__init__", *WHOLE_ROADS) or others <= TRAINER_BASES, others


@pytest.mark.parametrize("path", sorted((ROOT / "hf_effml" / "distillation").rglob("*.py")), ids=_identifier)
def test_rooms_of_distillation(path):
    room = path.parent.name
    order = ("distillation", *DISTILLATION_ROOMS)
    later = set(order[order.index(room) + 1 :])
    imported = {name.split(".")[2] for name, _, _ in _imports(path) if name.startswith("hf_effml.distillation.")}
    # The front door lists what all of them offer.
    assert path.name in ("__init__.py", "card.py") or not imported & later, imported


@pytest.mark.parametrize("path", sorted((ROOT / "hf_effml" / "hub").glob("*.py")), ids=_identifier)
def test_hub_names_no_subject(path):
    """A subject says in its `card.py` what its folders are."""
    named = re.findall(
        r"\b(?:\w*(?:distill|router|convnet|vim|rmeeto|dyvm)\w*|pad|edf)\b", path.read_text(), re.IGNORECASE
    )
    assert not named, named


@pytest.mark.parametrize("path", sorted((ROOT / "hf_effml" / "cli").glob("*.py")), ids=_identifier)
def test_cli_imports_nothing_heavy(path):
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            assert name.partition(".")[0] in sys.stdlib_module_names | {"hf_effml"}, name


@pytest.mark.parametrize("path", _portable(), ids=_identifier)
def test_portable_folders(path):
    source = path.read_text()
    tree = ast.parse(source)
    guarded = {
        (child.lineno, child.col_offset)
        for node in tree.body
        if isinstance(node, ast.Try)
        for statement in node.body
        for child in ast.walk(statement)
        if isinstance(child, ast.stmt)
    }
    siblings = set()
    for name, _, node in _imports(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, "only `from .file import name`"
            assert (path.parent / f"{node.module}.py").is_file(), node.module
            siblings.add(node.module)
        elif name.partition(".")[0] not in PORTABLE_PACKAGES | sys.stdlib_module_names:
            assert (node.lineno, node.col_offset) in guarded, f"{name} must be inside a module-level try"
    # transformers finds siblings with this pattern, in docstrings too.
    assert set(re.findall(r"^\s*from\s+\.(\S+)\s+import", source, re.MULTILINE)) == siblings


def test_every_layer_has_a_rule():
    layers = {_layer(_module(path)) for path in FILES}
    assert layers - {"scripts"} == set(MAY_IMPORT)
