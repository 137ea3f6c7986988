"""Pictures go to private repositories, facts to public ones; what others have there stays."""

import json
import shutil
from itertools import count

import pytest
from hub.conftest import ALICE, BOB
from huggingface_hub import DatasetCard

from hf_effml.comp_dd import build_comp_dd, index_rows, push_comp_dd
from hf_effml.comp_dd.building import PictureSettings
from hf_effml.comp_dd.card import TERMS
from hf_effml.hub import check_folder, push_folder, write_card


ID = ("datasets", "alice/pictures")
PUSH = "from hf_effml.comp_dd import push_comp_dd\npush_comp_dd('comp-dd', 'alice/pictures'{})"
SHARD = "validation-00000-of-00001.parquet"
# The rows of every subset, as the folder here and the repository hold them.
COMPARE = """
from datasets import load_dataset

def rows(dataset):
    return [[row.pop("image").tobytes(), row] for row in dataset]

for name in {names}:
    ours, theirs = load_dataset("comp-dd", name), load_dataset("alice/pictures", name)
    streamed = load_dataset("alice/pictures", name, streaming=True)
    assert [*ours] == [*theirs] == [*streamed] == ["train", "validation"]
    for split in ours:
        assert ours[split].features == theirs[split].features == streamed[split].features
        assert len(rows(ours[split])) and rows(ours[split]) == rows(theirs[split]) == rows(streamed[split])
"""


def _blobs(hub, *names):
    files = hub.repos[ID].files("main")
    return {path: file.git_oid for path, file in files.items() if path.split("/")[0] in names}


def _card(hub):
    return DatasetCard(hub.read(ID[1], "README.md", kind="datasets").decode())


def test_card(built):
    text = (built / "README.md").read_text()
    for words in ("nine classes, not ten", "American alligator, platypus", "squash", "webp, without loss", "13,000"):
        assert words in text, words
    assert "16 x 16" in text and "66.0" in text and "ResNet-18" in text and TERMS in text
    assert "timber wolf" not in text and "Decoded fast" not in text and "Broken pictures" not in text
    data = DatasetCard(text).data
    assert data.license_name == "imagenet" and data.source_datasets == ["extended|imagenet-1k"]
    assert [each["config_name"] for each in data.configs] == ["bird_easy", "fish_hard", "music_hard"]
    assert [each["splits"][0]["num_examples"] for each in data.dataset_info] == [40, 40, 36]
    facts = json.loads((built / "bird_easy/comp_dd.json").read_text())
    facts |= {"fast_decode": True, "skipped": [f"{number}.JPEG" for number in range(12)], "size": None}
    (built / "bird_easy/comp_dd.json").write_text(json.dumps(facts | {"image_format": "original"}))
    (built / "fish_hard/comp_dd.json").unlink()
    text = write_card(built).read_text()
    assert "at most 72" in text and "`9.JPEG` and 2 more" in text and "alligator" not in text and "original" in text


def test_what_is_refused_here(built, tmp_path):
    with pytest.raises(ValueError, match="hf-effml comp-dd push"):
        push_folder(built, "alice/pictures")
    with pytest.raises(ValueError, match="hf-effml comp-dd push"):
        push_folder(built / "bird_easy", "alice/pictures")
    with pytest.raises(PermissionError, match="--i_hold_the_rights"):
        push_comp_dd(built, "alice/pictures", private=False)
    with pytest.raises(FileNotFoundError, match="comp-dd build"):
        push_comp_dd(tmp_path, "alice/pictures")
    (built / "bird_easy/comp_dd.json").unlink()
    (built / "fish_hard/old.parquet").write_bytes(b"PAR1PAR1")
    shard = next((built / "music_hard").glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-9] + b"PAR1")
    with pytest.raises(ValueError) as error:
        push_comp_dd(built, "alice/pictures")
    for words in ("`bird_easy` is not complete", "`fish_hard/old.parquet` belongs", "train pictures of `music_hard`"):
        assert words in str(error.value)
    (built / "music_hard/comp_dd.json").write_text('{"classes": []}')
    with pytest.raises(ValueError, match="`classes` in `music_hard/comp_dd.json`"):
        push_comp_dd(built, "alice/pictures")


@pytest.mark.hub
def test_private_push_and_a_second_one(hub, client, built):
    shutil.move(built / "music_hard", built.parent / "later")
    write_card(built)
    client.run(PUSH.format(""), home="a", token=ALICE)
    assert hub.repos[ID].private and not hub.repos[ID].gated and len(hub.repos[ID].commits) == 2
    assert not client.leaks() and not any("_build" in path for path in hub.paths(ID[1], kind="datasets"))
    client.run(COMPARE.format(names=["bird_easy", "fish_hard"]), home="b", token=ALICE)
    refused = client.start("from datasets import load_dataset\nload_dataset('alice/pictures', 'bird_easy')", "c", BOB)
    assert refused.wait() != 0
    # Somebody writes on the card, and adds a subset of their own.
    repo = hub.repos[ID]
    card = _card(hub)
    card.data.configs.append({"config_name": "mine", "data_files": "mine/a.parquet"})
    text = f"{card.content}\nWords of a person.\n"
    stale = {"music_hard/train-00007-of-00009.parquet": hub.store(b"PAR1PAR1", True)}
    new = {
        "README.md": hub.store(text.encode(), False),
        "mine/a.parquet": repo.files("main")[f"bird_easy/{SHARD}"],
    }
    repo.commit("main", "by hand", repo.files("main") | stale | new)
    before = _blobs(hub, "bird_easy", "fish_hard", "mine")
    shutil.rmtree(built)
    shutil.move(built.parent / "later", built / "music_hard")
    write_card(built)
    client.run(PUSH.format(""), home="a", token=ALICE)
    assert _blobs(hub, "bird_easy", "fish_hard", "mine") == before
    assert set(_blobs(hub, "music_hard")) == {
        f"music_hard/{name}" for name in ("comp_dd.json", "train-00000-of-00001.parquet", SHARD)
    }
    card = _card(hub)
    assert "Words of a person." in card.text and "nine classes" in card.text and "alligator" in card.text
    names = ["bird_easy", "fish_hard", "music_hard"]
    assert [each["config_name"] for each in card.data.configs] == [*names, "mine"]
    assert [each["config_name"] for each in card.data.dataset_info] == names
    client.run(
        "from datasets import load_dataset\n"
        + "".join(f"assert load_dataset('alice/pictures', {name!r}).num_rows\n" for name in [*names, "mine"]),
        home="d",
        token=ALICE,
    )


@pytest.mark.hub
def test_public_repositories(hub, client, built):
    create = "from huggingface_hub import HfApi\nHfApi().create_repo('alice/pictures', repo_type='dataset')"
    client.run(create, "a", token=ALICE)
    refused = client.start(PUSH.format(""), "a", ALICE)
    assert refused.wait() != 0 and "PermissionError: The repository is public" in refused.stdout
    assert hub.paths(ID[1], kind="datasets") == {".gitattributes"} and len(hub.repos[ID].commits) == 1
    # When the first picture arrives, the gate is closed already.
    gates = []
    hub.after_put = lambda: gates.append(hub.repos[ID].gated)
    client.run(PUSH.format(", private=False, holds_rights=True"), "a", token=ALICE)
    assert gates and all(gates) and not hub.repos[ID].private
    data = _card(hub).data
    assert data.extra_gated_prompt == TERMS and "checkbox" in data.extra_gated_fields.values()
    closed = client.start("from datasets import load_dataset\nload_dataset('alice/pictures', 'bird_easy')", "b", BOB)
    assert closed.wait() != 0 and "gated" in closed.stdout


@pytest.mark.hub
def test_a_killed_push_leaves_the_old_state(hub, client, built, noise):
    client.run(PUSH.format(""), "a", token=ALICE)
    before, commit = hub.repos[ID].files("main"), hub.repos[ID].refs["main"]
    shutil.move(built, built.parent / "old")
    build_comp_dd(["bird_easy", "fish_hard"], str(noise), built, pictures=PictureSettings(size=24))
    for number in (1, 2, 4):
        for path in built.rglob("*.parquet"):
            hub.blobs.pop(hub.store(path.read_bytes(), True).sha256)
        jobs, arrived = [], count(1)
        hub.after_put = lambda: jobs[0].kill() if next(arrived) == number else None  # noqa: B023
        jobs.append(client.start(PUSH.format(""), "a", ALICE))
        assert jobs[0].wait() == -9 and hub.repos[ID].refs["main"] == commit and hub.repos[ID].files("main") == before
    hub.after_put = None
    shutil.move(built, built.parent / "new")
    shutil.move(built.parent / "old", built)
    client.run(COMPARE.format(names=["bird_easy", "fish_hard", "music_hard"]), "b", token=ALICE)


INDEX = """
from datasets import load_dataset
from hf_effml.comp_dd import SUBSETS, index_rows

for name in [*SUBSETS, "all"]:
    for streaming in (False, True):
        assert [*load_dataset("alice/index", name, split="classes", streaming=streaming)] == index_rows(name)
"""


@pytest.mark.hub
def test_index(hub, client, built):
    push = "from hf_effml.comp_dd import push_index\npush_index({!r})\n"
    for _ in range(2):
        client.run(push.format("alice/index"), "a", token=ALICE)
    repo = hub.repos["datasets", "alice/index"]
    assert not repo.private and not repo.gated
    assert "nine classes" in hub.read("alice/index", "README.md", kind="datasets").decode()
    assert len(json.loads(hub.read("alice/index", "metadata.json", kind="datasets"))["subsets"]) == 16
    client.run(INDEX, "b")
    mixed = client.start(PUSH.format("").replace("pictures", "index"), "a", ALICE)
    assert mixed.wait() != 0 and "is public" in mixed.stdout
    client.run(PUSH.format(""), "a", token=ALICE)
    mixed = client.start(push.format("alice/pictures"), "a", ALICE)
    assert mixed.wait() != 0 and "holds pictures" in mixed.stdout


def test_rows_of_the_index():
    rows = index_rows("all")
    assert len(rows) == 159 == len({row["synset"] for row in rows})
    assert rows[0] == index_rows("birds_easy")[0]
    assert rows[0]["imagenet_index"] == 130 and rows[0]["train_images"] == 1300
    assert index_rows("dog_easy")[0]["train_images"] is None and index_rows("imagenette")[0]["category"] is None


def test_a_built_folder_can_be_pushed(built):
    check_folder(built)


PROGRAM = """
from hf_effml.cli.parsing import run_script
from hf_effml.scripts.comp_dd_push import main

assert run_script(main, ["comp-dd", "alice/pictures", "--json"]) == 0
assert run_script(main, ["--index", "alice/index"]) == 0
for wrong in (["comp-dd"], ["comp-dd", "alice/pictures", "--public"], ["comp-dd", "--index", "alice/index"]):
    assert run_script(main, wrong) == 2
"""


@pytest.mark.hub
def test_program(hub, client, built):
    printed = client.run(PROGRAM, home="a", token=ALICE)
    assert f'"commit": "{hub.repos[ID].refs["main"]}"' in printed and "Pushed the index" in printed
    assert hub.repos[ID].private and not hub.repos["datasets", "alice/index"].private
