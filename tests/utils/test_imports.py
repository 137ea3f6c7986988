"""Optional packages: absent, broken and working ones, and the sentences about them."""

import sys

import pytest

from hf_effml.utils import imports


@pytest.fixture
def broken_package(tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(imports, "torchvision_mismatch", lambda: None)


def test_require_returns_the_module():
    assert imports.require("matplotlib.pyplot").__name__ == "matplotlib.pyplot"


def test_absent_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=r"`evaluate` is needed .*pip install .*\[metrics\]"):
        imports.require("evaluate")


def test_broken_package_is_not_called_absent(broken_package):
    with pytest.raises(ImportError, match=r"`timm` is installed but cannot be imported .*nms.*`hf-effml env`"):
        imports.require("timm")
    assert not imports.usable.__wrapped__("timm")


def test_missing_dependency_of_a_package_is_not_its_absence(tmp_path, monkeypatch):
    (tmp_path / "evaluate.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    with pytest.raises(ImportError, match="`evaluate` is installed but cannot be imported"):
        imports.require("evaluate")


def test_usable():
    assert imports.usable("sklearn")
    assert not imports.usable("a_package_that_nobody_has")


@pytest.mark.parametrize(
    "needs, torch, fits",
    [
        ("torch==2.13.0", "2.13.0+cpu", True),
        ("torch (>=2.14.0)", "2.13.0+cpu", False),
        ("torch==2.15.0", "2.13.0", False),
        ("numpy", "2.13.0", True),
    ],
)
def test_torchvision_mismatch(monkeypatch, needs, torch, fits):
    monkeypatch.setattr(imports, "version", {"torch": torch, "torchvision": "0.28.0"}.__getitem__)
    monkeypatch.setattr(imports, "requires", lambda name: [needs])
    mismatch = imports.torchvision_mismatch()
    assert (mismatch is None) == fits
    if mismatch is not None:
        reason, remedy = mismatch
        assert "torchvision 0.28.0" in reason and f"torch {torch}" in reason
        assert "torch==2.13.0" in remedy


@pytest.mark.parametrize(
    "error, explanation",
    [
        (ImportError("cannot import name `x`"), None),
        (ModuleNotFoundError("no module", name="hf_effml.trainers"), "`hf_effml.trainers` is not installed"),
        (RuntimeError("operator torchvision::nms does not exist"), "they do not fit, and so transformers"),
    ],
)
def test_explain_failed_import(monkeypatch, error, explanation):
    monkeypatch.setattr(imports, "torchvision_mismatch", lambda: ("they do not fit", "do this"))
    text = imports.explain_failed_import(error)
    assert text is None if explanation is None else text.startswith(explanation)
