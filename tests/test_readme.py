"""The README's blocks run as written, its commands exist, and its table says what methods.py says."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from hf_effml.cli.main import main
from hf_effml.methods import METHODS


README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if not language for line in code.splitlines() if line.strip()]
COMMANDS = [line for line in SHELL if line.startswith("hf-effml ")]


# Accuracies side by side, ours first: `83.2 ± 2.1% 70.8 ± 2.3%`, with words in between where people read them.
ACCURACIES = re.compile(r"([\d.]+) ± [\d.]+%[^%\n]*?([\d.]+) ± [\d.]+%")
FOLDERS = sorted((Path(__file__).parents[1] / "hf_effml").glob("*/README.md"))


def assert_better_than_its_baseline(text):
    pairs = [tuple(map(float, found)) for found in ACCURACIES.findall(text)]
    assert all(ours > baseline for ours, baseline in pairs), pairs
    return pairs


def test_numbers_beside_the_code_are_better_than_their_baselines():
    blocks = [*PYTHON, *(code for path in FOLDERS for code in python_blocks(path.read_text()))]
    comments = "\n".join(line.partition("#")[2] for code in blocks for line in code.splitlines() if "print" in line)
    assert len(assert_better_than_its_baseline(comments)) >= 2


def test_the_table_says_what_a_distilled_set_is_worth():
    """More than real images on the networks that the text names, less where it says so."""
    text = next(path for path in FOLDERS if path.parent.name == "distillation").read_text()
    table = text.partition("## What transfers")[2].partition("## ")[0]
    rows = {line.split(" | ")[0]: re.findall(r"([\d.]+) ±", line) for line in table.splitlines() if " ± " in line}
    worse = {name for name, (ours, *real) in rows.items() if float(ours) <= max(map(float, real))}
    assert len(rows) >= 13 and worse and "its own" in next(iter(rows))
    assert all("as it is" in name or name.startswith(("| ViT", "| Vim, 4 blocks of width 64, SGD")) for name in worse)


@pytest.mark.slow
def test_what_the_readme_of_distillation_prints_is_better_than_its_baseline(tmp_path, monkeypatch, capsys):
    path = next(path for path in FOLDERS if path.parent.name == "distillation")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in python_blocks(path.read_text()):
        exec(compile(code, str(path), "exec"), names)
    assert assert_better_than_its_baseline(capsys.readouterr().out)


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


# What trains experts and distils takes half a minute.
MARKED = [pytest.param(code, marks=[pytest.mark.slow] if "PADTrainer" in code else []) for code in PYTHON]


@pytest.mark.parametrize("code", MARKED, ids=range(len(PYTHON)))
def test_python_blocks_run(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert_better_than_its_baseline(capsys.readouterr().out)


def test_setup_commands():
    setup = ['pip install -e ".[demo]" && hf-effml demo', 'pip install -e ".[dev]" && pytest']
    assert [line for line in SHELL if line not in COMMANDS] == setup


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_their_options_exist(line):
    words = shlex.split(line)[1:]
    program = words[:2] if words[0] in ("train", "evaluate", "bench", "comp-dd") else words[:1]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
        main([*program, "--help-all"])
    assert end.value.code == 0
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"(?<!\S){option}\b", output.getvalue()), option


def test_commands_it_lists_are_all_there_are(capsys):
    main([])
    listed = re.search(r"lists the commands: (.*)\.", README).group(1)
    assert re.findall(r"^  ([\w-]+)", capsys.readouterr().out, flags=re.MULTILINE) == re.findall(
        r"`(\w[\w-]*)`", listed
    )


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_table_is_honest(method):
    row = next(line for line in README.splitlines() if line.startswith(f"| [{method.name}]({method.url})"))
    assert ("not in this version yet" in row) != method.available
    assert all(f"`{name}`" in row for name in method.classes)
    assert (f"`hf-effml train {method.key}`" in row) == method.available


def test_citations_are_those_of_the_methods():
    for citation in (code for language, code in BLOCKS if language == "bibtex"):
        assert citation.strip() in [method.citation for method in METHODS]


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.parent.name)
def test_imports_of_the_folders_readmes_work(path):
    """Their blocks train too long for a test; a name that moved shows all the same."""
    lines = [
        line
        for block in python_blocks(path.read_text())
        for line in block.splitlines()
        if re.match(r"\s*from (hf_effml|\.)", line)
    ]
    assert lines
    for line in lines:
        exec(line.strip(), {})
