"""The health report, on packages that work, are absent or are broken."""

import json
import sys

import pytest

from hf_effml.cli.main import main
from hf_effml.utils import environment
from hf_effml.utils.environment import Part, check_environment, describe_system
from hf_effml.utils.imports import how_to_install


@pytest.fixture
def packages(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "dying_package.py").write_text("import os; os._exit(9)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(environment, "CORE_PACKAGES", {"jinja2": "jinja2", "broken_package": "broken-package"})
    (tmp_path / "half_package.py").write_text("import what_it_needs")
    optional = {
        "half_package": ("half-package", "plot"),
        "absent_package": ("absent-package", "data"),
        "dying_package": ("dying-package", "peft"),
    }
    monkeypatch.setattr(environment, "OPTIONAL_PACKAGES", optional)


def test_states(packages, monkeypatch):
    monkeypatch.setattr(environment, "torchvision_mismatch", lambda: None)
    works, broken, half, absent, dying = check_environment()
    assert (works.state, works.extra) == ("works", None) and works.version
    assert broken.state == "broken" and "torchvision::nms" in broken.reason and "broken-package" in broken.remedy
    assert absent == Part("absent-package", None, "data", "absent", remedy=how_to_install("data"))
    assert dying.state == "broken" and "code 9" in dying.reason
    assert "No module named 'what_it_needs'" in half.reason and half.remedy.startswith("`pip install half-package`")


def test_slow_is_not_broken(tmp_path, monkeypatch):
    (tmp_path / "slow_package.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(environment, "CORE_PACKAGES", {})
    monkeypatch.setattr(environment, "OPTIONAL_PACKAGES", {"slow_package": ("slow-package", "data")})
    monkeypatch.setattr(environment, "_CHECK_SECONDS", 0.5)
    (slow,) = check_environment()
    assert slow.state == "slow" and slow.reason == "its import took more than 0.5 s"
    assert slow.remedy.startswith(f"`{sys.executable} -c 'import slow_package'`")


def test_a_reason_beside_everything_that_does_not_work(packages, capsys):
    assert main(["env"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "-package" in line]
    assert len(lines) == 4
    for line in lines:
        state, _, advice = line.partition(": ")
        assert state.endswith(("broken", "absent")) and "pip install" in advice, line
        assert (" -> " in advice) is state.endswith("broken"), line


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, '`pip install "hf-effml[data]"`'),
        ({"url": "file:///a/b.whl", "archive_info": {}}, '`pip install "hf-effml[data]"`'),
        (
            {"url": "file:///my%20work/tree", "dir_info": {"editable": True}},
            '`pip install -e ".[data]"` in /my work/tree',
        ),
    ],
)
def test_the_remedy_fits_the_installation(tmp_path, monkeypatch, origin, command):
    """In a checkout, `pip install hf-effml` would replace it by what an index has."""
    info = tmp_path / "hf_effml-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-effml\nVersion: 1.0\n")
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)
    assert how_to_install("data") == command


def test_torchvision_is_named_as_the_cause(packages, monkeypatch):
    monkeypatch.setattr(environment, "torchvision_mismatch", lambda: ("they do not fit", "do this"))
    broken = list(check_environment())[1]
    assert (broken.reason, broken.remedy) == ("they do not fit", "do this")


def test_system():
    assert set(describe_system()) == {"hf-effml", "python", "platform"}
