"""The package list equals the tree, and a wheel holds everything and works where no checkout is."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import hf_effml


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = ("hub_cards", "scripts", "trainers")
SMOKE = """
import sys, tempfile
import torch
import hf_effml
from transformers import AutoModelForImageClassification

config = hf_effml.VimConfig(image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=2, num_labels=3)
model = hf_effml.VimForImageClassification(config).eval()
pixels = torch.randn(1, 3, 16, 16)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
assert torch.equal(model(pixels).logits, loaded(pixels).logits)
assert hf_effml.__file__.startswith(sys.argv[1]) and hf_effml.trainers.__file__.startswith(sys.argv[1])
"""


def _import_name(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "hf_effml" else ("hf_effml", *parts))


def _installed_path(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "/".join(parts if parts[0] == "hf_effml" else ("hf_effml", *parts))


def _extra(name: str) -> set[str]:
    """The distributions an extra asks for, through the extras it names."""
    found: set[str] = set()
    for requirement in PROJECT["project"]["optional-dependencies"][name]:
        package, extras = re.match(r"([\w-]+)(?:\[(.*)\])?", requirement).groups()
        found |= set().union(*map(_extra, extras.split(","))) if extras else {package}
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "tree"
    for folder in ("hf_effml", *MAPPED):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "would be ignored" not in outcome.stdout + outcome.stderr
    return next((source / "dist").glob("*.whl"))


def test_package_list_equals_the_tree():
    inits = [ROOT / "hf_effml" / "__init__.py", *(ROOT / "hf_effml").rglob("__init__.py")]
    inits += [path for folder in MAPPED for path in (ROOT / folder).rglob("__init__.py")]
    expected = {_import_name(path.parent) for path in inits} | {"hf_effml.scripts.recipes"}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(expected)
    assert len(listed) == len(set(listed))


def test_version_is_stated_once():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", hf_effml.__version__)


@pytest.mark.parametrize("name", ["demo", "dev", "data", "peft", "plot"])
def test_extra_leaves_torch_alone(name):
    assert not _extra(name) & {"timm", "torchvision"}


def test_all_is_everything_but_the_sources_to_compile():
    extras = PROJECT["project"]["optional-dependencies"]
    users = set().union(*map(_extra, set(extras) - {"all", "dev", "mamba"}))
    assert _extra("all") == users


def test_wheel_holds_the_tree(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path for folder in ("hf_effml", *MAPPED) for path in (ROOT / folder).rglob("*.py")]
    files += [*(ROOT / "hub_cards").glob("*.md"), *(ROOT / "scripts" / "recipes").glob("*.yaml")]
    files.append(ROOT / "hf_effml" / "py.typed")
    missing = {_installed_path(path) for path in files} - names
    assert not missing
    info = {name.partition("/")[0] for name in names} - {"hf_effml"}
    assert info == {f"hf_effml-{hf_effml.__version__}.dist-info"}
    assert f"{info.pop()}/licenses/LICENSE" in names


@pytest.mark.slow
def test_wheel_works_without_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        [sys.executable, "-c", SMOKE, str(site)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stderr
