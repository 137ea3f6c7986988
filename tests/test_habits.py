"""Habits that keep the house in order: small folders, short programs, one home for a name."""

import ast
from pathlib import Path

import pytest

import hf_effml


ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "hf_effml").rglob("*.py")) + sorted((ROOT / "trainers").glob("*.py"))
# A saved folder carries the files of a model side by side, so these folders stay flat.
FLAT = ("distillation", "token_router", "vim")
PROGRAMS = sorted(path for path in (ROOT / "scripts").glob("*.py") if path.name != "__init__.py")
# Two experiments are longer than the 160 lines of a program still; they may only shrink.
LONGER = {"experiment_distillation.py": 172, "experiment_token_router.py": 191}


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _defined(path: Path) -> set[str]:
    names = {node.name for node in _tree(path).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assigned = [node for node in _tree(path).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    targets = [target for node in assigned for target in getattr(node, "targets", [getattr(node, "target", None)])]
    return names | {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("folder", sorted({path.parent for path in PACKAGE}), ids=lambda path: path.name)
def test_folders_are_small(folder):
    modules = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    most = 20 if folder.name in FLAT else 14
    assert len(modules) <= most, f"{len(modules)} modules; make a folder of those that tell one story"


def test_a_public_name_has_one_home():
    defined = {path: _defined(path) for path in PACKAGE if path.name != "__init__.py"}
    for name in set(hf_effml.__all__) - {"__version__"}:
        homes = [str(path.relative_to(ROOT)) for path, names in defined.items() if name in names]
        assert len(homes) == 1, f"`{name}` is defined in {homes}"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_packages_hand_names_on(path):
    """A module lists what it defines; a package, what its own modules and folders define."""
    public = set(hf_effml.__all__)
    imported = {
        alias.name: "." * node.level + (node.module or "")
        for node in _tree(path).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    if path.name != "__init__.py":
        listed = next((ast.literal_eval(node.value) for node in _tree(path).body if _is_all(node)), [])
        assert set(listed) <= _defined(path), f"`__all__` hands on {set(listed) - _defined(path)}"
        return
    for name in public & imported.keys():
        assert imported[name].startswith(".") and not imported[name].startswith(".."), f"{name} of {imported[name]}"


def _is_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_programs_are_frames(path):
    """Arguments in, library called, report out: what is longer does the library's work."""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGER.get(path.name, 160), f"{lines} lines"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_no_program_imports_another(path):
    """What several share is library."""
    for node in ast.walk(_tree(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = (getattr(node, "module", None) or "") if names else ""
        assert not module.startswith("hf_effml.scripts.") and getattr(node, "level", 0) == 0, module
        assert not any(name.startswith("hf_effml.scripts.") for name in names), names
        assert module != "hf_effml.scripts" or names == ["recipes"], names
