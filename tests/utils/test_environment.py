"""The health report, on packages that work, are absent or are broken."""

import pytest

from hf_effml.utils import environment
from hf_effml.utils.environment import Part, check_environment, describe_system


@pytest.fixture
def packages(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "dying_package.py").write_text("import os; os._exit(9)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(environment, "CORE_PACKAGES", {"jinja2": "jinja2", "broken_package": "broken-package"})
    optional = {"absent_package": ("absent-package", "data"), "dying_package": ("dying-package", "peft")}
    monkeypatch.setattr(environment, "OPTIONAL_PACKAGES", optional)


def test_states(packages, monkeypatch):
    monkeypatch.setattr(environment, "torchvision_mismatch", lambda: None)
    works, broken, absent, dying = check_environment()
    assert (works.state, works.extra) == ("works", None) and works.version
    assert broken.state == "broken" and "torchvision::nms" in broken.reason and "broken-package" in broken.remedy
    assert absent == Part("absent-package", None, "data", "absent", remedy='`pip install "hf-effml[data]"`')
    assert dying.state == "broken" and "code 9" in dying.reason


def test_torchvision_is_named_as_the_cause(packages, monkeypatch):
    monkeypatch.setattr(environment, "torchvision_mismatch", lambda: ("they do not fit", "do this"))
    broken = list(check_environment())[1]
    assert (broken.reason, broken.remedy) == ("they do not fit", "do this")


def test_system():
    assert set(describe_system()) == {"hf-effml", "python", "platform"}
