"""Experts and EDF on a built subset: in a folder, below the folder of the data, and on the Hub."""

import shutil

import pytest
from hub.conftest import ALICE

from hf_effml import load_real_images
from hf_effml.comp_dd import build_comp_dd
from hf_effml.comp_dd.building import PictureSettings
from hf_effml.scripts import train_edf, train_expert
from hf_effml.utils.sources.image_splits import load_image_splits
from hf_effml.utils.sources.split_files import data_name, recorded_name, split_subset


EXPERTS = (
    "--student convnet-d1-w4 --image_size 8 --num_experts 1 --num_train_epochs {} --train_batch_size 8 --device cpu"
)
EDF = "--syn_steps 1 --max_start_epoch 1 --max_steps 2 --report_to none --use_cpu --test_seeds 1 --test_epochs 1"
RUN = f"""
from hf_effml.scripts import train_edf, train_expert

train_expert.main(["--data", "alice/pictures:bird_easy", "--output_dir", "bank", *{EXPERTS.format(3)!r}.split()])
train_edf.main(["--bank", "bank", "--output_dir", "set", *{EDF!r}.split()])
"""
TRY = """
from hf_effml.utils.sources.image_splits import load_image_splits

found = load_image_splits("alice/pictures:bird_easy")
assert (found.hub_id, len(found.train), len(found.labels)) == ("alice/pictures", 40, 10)
for wrong in ("alice/pictures:bird_esy", "alice/pictures"):
    try:
        load_image_splits(wrong)
    except ValueError as error:
        assert "bird_easy" in str(error) and "music_hard" in str(error), error
    else:
        raise AssertionError(wrong)
"""


def test_one_epoch_of_an_expert(built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data", "comp-dd:bird_easy", "--output_dir", "bank", *EXPERTS.format(1).split()]
    assert train_expert.main(options)["epochs"] == [0, 1]


def test_edf_in_a_folder(built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_expert.main(["--data", "comp-dd:bird_easy", "--output_dir", "bank", *EXPERTS.format(3).split()])
    assert train_edf.main(["--bank", "bank", "--output_dir", "set", *EDF.split()])["steps"] == 2
    for card in ("bank/README.md", "set/README.md", "set/dataset/README.md"):
        assert "comp-dd:bird_easy" in (tmp_path / card).read_text(), card


@pytest.mark.hub
def test_edf_from_the_hub(hub, client, built, tmp_path):
    client.run(
        "from hf_effml.comp_dd import push_comp_dd\npush_comp_dd('comp-dd', 'alice/pictures')", "a", token=ALICE
    )
    built.rename(tmp_path / "elsewhere")
    client.run(TRY + RUN, "b", token=ALICE)
    for card in ("bank/README.md", "set/README.md", "set/dataset/README.md"):
        assert "alice/pictures:bird_easy" in (tmp_path / card).read_text(), card
    card = (tmp_path / "set/dataset/README.md").read_text()
    assert "load_dataset('alice/pictures', 'bird_easy', revision=" in card
    assert "https://huggingface.co/datasets/alice/pictures)" in card


def test_pictures_that_were_built_again_are_read_again(built, noise):
    assert load_image_splits(f"{built}:bird_easy").test.image(0).size == (16, 16)
    shutil.rmtree(built)
    build_comp_dd("bird_easy", str(noise), built, pictures=PictureSettings(size=24))
    assert load_image_splits(f"{built}:bird_easy").test.image(0).size == (24, 24)


def test_names_and_subsets(built, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_EFFML_DATA", str(tmp_path))
    data = load_real_images("comp-dd:bird_easy", image_size=8, whiten=False)
    assert (data.name, data.hub_id) == ("comp-dd:bird_easy", None)
    assert len(data.train) == 30 and len(data.test) == 20 and data.label_names[0] == "flamingo"
    assert load_image_splits(f"{built}:music_hard").labels[0] == "banjo"
    with pytest.raises(ValueError, match="bird_esy.*bird_easy.*fish_hard.*music_hard"):
        load_image_splits("comp-dd:bird_esy")
    with pytest.raises(ValueError, match=r"For example, `comp-dd:bird_easy`"):
        load_image_splits("comp-dd")
    shard = next((built / "fish_hard").glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match="`comp-dd:fish_hard` cannot be read"):
        load_image_splits("comp-dd:fish_hard")
    assert split_subset("a:b/c") == ("a:b/c", None) and split_subset("a:b/c:d") == ("a:b/c", "d")
    assert data_name("x/comp-dd/:bird_easy", None) == "comp-dd:bird_easy" and data_name("me/x:y", "me/x") == "me/x:y"
    assert recorded_name({"name": "animals", "hub_id": "me/x"}) == "me/x"
    assert recorded_name({"name": "me/x:y", "hub_id": "me/x"}) == "me/x:y" and recorded_name({}) is None
