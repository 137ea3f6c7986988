"""Cards that people wrote on, in any editor: renewing keeps their words, and twice is once."""

import ast
import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from hf_effml.hub import CardResult, add_results, check_folder, write_card
from hf_effml.hub.cards import set_license, set_repo_id


HEADER, SECTION = r"\A---\n(.*?)\n---\n", r"<!-- hf-effml: {} .*?<!-- end of {} -->\n*"
# Every word of a person begins with MINE.
EDITS = {
    "Windows": lambda text: "\ufeff" + f"{text}MINE\n".replace("\n", "\r\n"),
    "before the header": lambda text: f"MINE\n\n{text}",
    "no header": lambda text: re.sub(HEADER, "", text, flags=re.DOTALL) + "MINE\n",
    "within all": lambda text: re.sub("<!-- end of (.*) -->", r"MINE_\1\n\g<0>", text),
    "between all": lambda text: re.sub("<!-- hf-effml: (.*) .* -->", r"MINE_\1\n\n\g<0>", text) + "\nMINE",
    "deleted": lambda text: re.sub(SECTION.format("use", "use"), "MINE\n\n", text, flags=re.DOTALL),
    "emptied": lambda text: re.sub(r"(hf-effml: results .*\n)(?:.*\n)*?(<!-- end)", r"\1\2", text) + "MINE",
    "twice": lambda text: text + re.search(SECTION.format("use", "use"), text, re.DOTALL)[0].replace("Use", "MINE"),
    "without marks": lambda text: re.sub("<!-- .* -->\n", "", text) + "MINE\n",
    "spaced": lambda text: re.sub("(?<=-->)\n", "  \n\n", text).replace("<!-- end", "\n<!-- end") + "MINE",
    "metadata": lambda text: text.replace(
        "license: mit",
        "license: mit\nlanguage: no # MINE_1\n# MINE_2\nversion: 1.10\ndatasets: MINE_3\nof: {a: 'MINE_4'}",
    ),
    "tags": lambda text: text.replace("tags:\n", "tags:\n- MINE_1\n# MINE_2\n"),
    "anchors": lambda text: text.replace("license: mit", "license: &mine MINE_1\nown: *mine"),
    "index": lambda text: text.replace(
        "    metrics:\n", "    metrics:\n    - type: f1\n      value: 0.1\n      name: MINE_1\n"
    ),
}
RENEWALS = {
    "results": lambda folder: add_results(folder, [CardResult("Accuracy", 0.7, metric="accuracy")], "digits"),
    "card": lambda folder: write_card(folder, arguments={"seed": 1}),
    "other model": lambda folder: write_card(
        folder, results=[CardResult("Accuracy", 0.9)], evaluated_on="letters", tags=["new"], datasets=["a/b"]
    ),
    "id": lambda folder: set_repo_id(folder, "alice/elsewhere"),
    "license": lambda folder: set_license(folder, "apache-2.0"),
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "my-vim"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["VimForImageClassification"]}))
    save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
    results = [CardResult("Accuracy", 0.5, 0.6, "accuracy"), CardResult("Steps", 7)]
    write_card(folder, method="vim", results=results, evaluated_on="digits", license="mit", arguments={"lr": 1})
    return folder


@pytest.mark.parametrize("renewal", RENEWALS)
@pytest.mark.parametrize("edit", EDITS)
def test_what_a_person_wrote_stays(folder, edit, renewal):
    path = folder / "README.md"
    edited = EDITS[edit](path.read_text())
    path.write_bytes(edited.encode())
    if edit != "before the header":
        check_folder(folder)
    RENEWALS[renewal](folder)
    once = path.read_bytes().decode()
    check_folder(folder)
    RENEWALS[renewal](folder)
    assert path.read_bytes().decode() == once
    words = set(re.findall(r"MINE\w*", edited))
    assert words <= set(re.findall(r"MINE\w*", once)) or (edit, renewal) == ("anchors", "license")
    assert "\r" not in once and "\ufeff" not in once
    if renewal != "id":
        assert yaml.safe_load(re.match(HEADER, once, re.DOTALL)[1])
        assert "version: 1.10\n" in once or edit != "metadata"
    elif edit != "deleted":
        assert 'model_id = "alice/elsewhere"\n' in once and 'model_id = "my-vim"\n' not in once
    if renewal == "other model" and edit not in ("no header", "before the header"):
        measured = {result.metric_name for result in ModelCard(once).data.eval_results or []}
        assert measured == ({"MINE_1"} if edit == "index" else set())


@pytest.mark.parametrize("header", ["a: [", "- a", "2024: x", "model-index: 3"])
def test_metadata_that_cannot_be_read_are_named(folder, header):
    (folder / "README.md").write_text(f"---\n{header}\n---\n\n# Mine\n")
    for renewal in ("results", "card", "license"):
        with pytest.raises(ValueError, match=r"metadata of `.*README.md` cannot be read"):
            RENEWALS[renewal](folder)
    with pytest.raises(ValueError, match="metadata of"):
        check_folder(folder)


def test_cards_of_programs_are_replaced_and_those_of_people_are_not(folder):
    path = folder / "README.md"
    path.write_text("---\nlicense: mit\n---\n# Mine\n\nWords.\n")
    assert write_card(folder).read_text().startswith("---\nlicense: mit\n")
    assert "# Mine\n\nWords.\n" in path.read_text() and path.read_text().count("## Use") == 1
    for words in ("# Model Card for Model ID", "generated automatically according to the information the Trainer had"):
        path.write_text(f"{words}\n")
        assert words not in write_card(folder).read_text()


NAMES = [
    "a\nb",
    "a`|b",
    "{{ 7*7 }}",
    "<!-- end of use -->",
    "\n<!-- section: use -->\nx",
    "```",
    "\n```\nx",
    "照片 😀",
    "\\",
]


@pytest.mark.parametrize("name", [*NAMES, "照片 😀", "\\"])
def test_names_are_neither_code_nor_marks(folder, name):
    for tool in ("config.json", "README.md"):
        (folder / tool).unlink()
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["VimForImageClassification"], "id2label": {"0": name, "1": "b"}})
    )
    facts = {"results": [CardResult(name, 1.0, 2.0)], "evaluated_on": name, "arguments": {"x": name}}
    facts |= {"data": {"name": name, "splits": {name: 3}}, "base_model": name, "command": ["hf-effml", name]}
    text = write_card(folder, name, **facts).read_text()
    check_folder(folder)
    assert write_card(folder, name, **facts).read_text() == text
    set_repo_id(folder, name)
    code = re.search(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    ids = [node.value for node in ast.parse(code).body if isinstance(node, ast.Assign) and "id" in node.targets[0].id]
    assert [ast.literal_eval(each) for each in ids] == [name]
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert len(re.findall(r"^(?:#|```\w*$|<!-- end)", text, re.MULTILINE)) == 18
