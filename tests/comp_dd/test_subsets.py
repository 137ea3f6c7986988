"""The facts about subsets are those of the paper's repository, and any list of classes is understood or refused."""

import json
import subprocess
import sys
from importlib.resources import files

import pytest

from helpers import require_package
from hf_effml.cli.main import run_command
from hf_effml.cli.recipes import read_recipes
from hf_effml.comp_dd import OLDER_SUBSETS, SUBSETS, custom_subset, imagenet_classes, list_subsets, subset_info


def test_the_sixteen():
    assert len(SUBSETS) == 16 and len({index for each in SUBSETS.values() for index in each.indices}) == 159
    assert sum(each.train_images for each in SUBSETS.values()) == 204_374
    assert sum(each.validation_images for each in SUBSETS.values()) == 7_950
    assert len(subset_info("music_hard").names) == 9 and subset_info("music_hard").names[0] == "banjo"
    for category in {each.category for each in SUBSETS.values()}:
        easy, hard = (SUBSETS[f"{category}_{level}"] for level in ("easy", "hard"))
        assert hard.mean_complexity - easy.mean_complexity > 4.5


def test_facts_are_those_of_the_sheet(shared_data):
    path = shared_data.parent / "methods" / "comp_dd_subsets.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} beside the test data")
    assert json.loads(files("hf_effml.comp_dd").joinpath("subsets.json").read_text()) == json.loads(path.read_text())


def test_classes_are_those_of_imagenet():
    classes = imagenet_classes()
    assert len(classes) == 1000 and [synset for synset, _ in classes] == sorted(synset for synset, _ in classes)
    for subset in list_subsets().values():
        assert [classes[index][0] for index in subset.indices] == list(subset.synsets)
        assert all(classes[i][1].startswith(name) for i, name in zip(subset.indices, subset.names, strict=True))
        assert len(set(subset.names)) == len(subset.names)
    assert {name: len(each.indices) for name, each in OLDER_SUBSETS.items()} == dict.fromkeys(OLDER_SUBSETS, 10)


def test_classes_are_those_of_timm():
    info = require_package("timm.data").ImageNetInfo("imagenet-1k")
    assert [synset for synset, _ in imagenet_classes()] == info.label_names()


@pytest.mark.parametrize("name", ["bird_easy", "birds_easy", "BIRD_Easy"])
def test_spellings(name):
    assert subset_info(name).config == "bird_easy"


def test_a_subset_of_ones_own():
    made = custom_subset("cranes", ["n02012849", "n03126707", 0, "7", "Goldfish"])
    assert made.indices == (134, 517, 0, 7, 1)
    assert made.names[:3] == ("crane (n02012849)", "crane (n03126707)", "tench")
    assert made.train_images is None and made.validation_images == 250


@pytest.mark.parametrize(
    ("config", "classes", "message"),
    [
        ("mine", ["crane", 0], "did you mean n02012849 .* or n03126707"),
        ("mine", ["tenchh", 0], "did you mean tench"),
        ("mine", [1000, 0], "from 0 to 999; got 1000"),
        ("mine", [-1, 0], "from 0 to 999; got -1"),
        ("mine", [3, "tiger shark"], "twice"),
        ("mine", [3], "got 1 of them"),
        ("../mine", [0, 1], "letters, digits"),
        ("birds_easy", [0, 1], "another name"),
    ],
)
def test_classes_that_are_refused(config, classes, message):
    with pytest.raises(ValueError, match=message):
        custom_subset(config, classes)


def test_an_unknown_subset_gets_the_nearest():
    with pytest.raises(ValueError, match="Did you mean `bird_easy`.* There are: bird_easy, bird_hard"):
        subset_info("bird_eazy")


def test_the_list_as_text_and_json(capsys):
    found = run_command(["comp-dd", "list"])
    assert len(found["subsets"]) == 22 and "12,108" in capsys.readouterr().out
    found = run_command(["comp-dd", "list", "fish_hard"])
    assert found["subset"]["validation_images"] == 500 and "# build it" in capsys.readouterr().out
    found = run_command(["comp-dd", "list", "mine", "--classes", "tench", "n01443537"])
    assert "--cam_classes 0 1" in found["commands"].popitem()[1]


@pytest.mark.parametrize("name", ["bird_easy", "fish_easy", "imagenette"])
def test_commands_that_the_list_prints_are_understood(name, capsys):
    commands = list(run_command(["comp-dd", "list", name])["commands"].values())
    for line, program in zip(commands, ("comp_dd_build", "expert", "edf"), strict=True):
        words = line.partition("  #")[0].split()
        recipes = read_recipes(program) if "--recipe" in words else {}
        assert "--recipe" not in words or words[words.index("--recipe") + 1] in recipes
        with pytest.raises(SystemExit):
            run_command([*words[1:], "--help"])


def test_the_list_needs_neither_torch_nor_transformers():
    code = (
        "import sys; sys.argv = ['hf-effml']; from hf_effml.cli.main import run_command; "
        "run_command(['comp-dd', 'list', 'bird_easy']); "
        "assert not {'torch', 'transformers', 'datasets', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
