"""What `import hf_effml` offers, what it registers, and what it says when it cannot."""

import doctest
import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from transformers import AutoConfig

import hf_effml
from hf_effml.methods import METHODS, VIM, get_method


ROOT = Path(__file__).parents[1]
PUBLIC = [f"hf_effml.{name}" for name in hf_effml._PUBLIC]
MODULES = sorted(
    ".".join(["hf_effml", *path.relative_to(ROOT / folder).with_suffix("").parts])
    if folder == "hf_effml"
    else f"hf_effml.{folder}.{path.stem}"
    for folder in ("hf_effml", "trainers")
    for path in (ROOT / folder).rglob("*.py")
    if path.stem != "__init__"
)


def _run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def test_the_package_offers_what_its_parts_list():
    names = [name for module in PUBLIC for name in import_module(module).__all__]
    assert sorted(hf_effml.__all__) == sorted(["__version__", *names])
    assert len(names) == len(set(names)), "two offer the same name"


@pytest.mark.parametrize("name", [name for name in hf_effml.__all__ if name != "__version__"])
def test_public_names_are_documented(name):
    thing = getattr(hf_effml, name)
    assert inspect.getdoc(thing), name
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert "(" not in inspect.getdoc(thing).splitlines()[0][: len(name) + 1], "a docstring made by dataclass"
        assert thing.__module__.startswith("hf_effml."), thing.__module__


def test_methods_name_what_exists():
    assert len({method.key for method in (*METHODS, VIM)}) == 8
    assert [method.key for method in METHODS if method.available] == ["dyvm", "rmeeto", "token-router", "edf", "pad"]
    for method in (*METHODS, VIM):
        assert set(method.classes) <= set(hf_effml.__all__), method.key
        assert method.citation.count("{") == method.citation.count("}")


def test_unknown_method_names_the_known():
    with pytest.raises(ValueError, match="`magic` is no method; choose one of dyvm, rmeeto"):
        get_method("magic")


@pytest.mark.parametrize(
    "model_type",
    [
        "convnet",
        "distilled_dataset",
        "dyvm",
        "rmeeto_vim",
        "token_router",
        "token_router_llama",
        "token_router_qwen2",
        "token_router_qwen3",
        "vim",
    ],
)
def test_import_registers_the_models(model_type):
    assert type(AutoConfig.for_model(model_type)).__module__.startswith("hf_effml.")


def test_console_script_loads_names_only_when_asked_and_silently():
    outcome = _run(
        "import sys; sys.argv[0] = '/usr/bin/hf-effml'\n"
        "import hf_effml\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert hf_effml.VimConfig().model_type == 'vim'\n"
        "assert 'VimConfig' in hf_effml.__all__\n"
        "try: hf_effml.Nothing\n"
        "except AttributeError as error: assert 'Nothing' in str(error)\n"
        "else: raise SystemExit('no AttributeError')"
    )
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "", "")


def test_bare_checkout_says_to_install():
    outcome = _run(
        "import sys, types\n"
        "sys.modules['hf_effml.vim'] = types.SimpleNamespace(__all__=[])\n"
        "sys.modules['hf_effml.trainers'] = None\n"
        "import hf_effml"
    )
    assert "ImportError: `hf_effml.trainers` is not installed" in outcome.stderr
    assert "pip install -e ." in outcome.stderr.splitlines()[-1]


def test_torchvision_for_another_torch_is_named(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms is missing')")
    info = tmp_path / "torchvision-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1.0\nRequires-Dist: torch==1.0\n"
    )
    code = "import hf_effml; from hf_effml.utils.imports import require; require('timm')"
    last = _run(code, PYTHONPATH=str(tmp_path)).stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "torchvision 0.1.0 needs torch==1.0" in last


class _FenceBlindParser(doctest.DocTestParser):
    """Blanks the ``` lines, which doctest takes for output."""

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"^\s*```.*$", "", string, flags=re.MULTILINE), name)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # A trainer makes its folder when it is made.
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for example in doctest.DocTestFinder(parser=_FenceBlindParser()).find(import_module(name)):
        assert runner.run(example).failed == 0
