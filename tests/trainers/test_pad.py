"""PAD: what its trainer adds to trajectory matching."""

import json
import shutil

import pytest

from helpers import assert_close
from hf_effml import PADTrainingArguments, TrajectoryBank
from hf_effml.trainers import pad


def content(trainer):
    trainer.train()
    return {name: value.detach() for name, value in trainer.model.named_parameters()}


@pytest.fixture
def said(monkeypatch):
    messages = {"warning": [], "info": []}
    for level, into in messages.items():
        monkeypatch.setattr(pad.logger, level, into.append)
    return messages


def test_leaves_out_the_shallow_quarter(distil, said):
    trainer = distil("PAD")
    assert (trainer.settings.mask, trainer.settings.drop_ratio) == ("depth", 0.25)
    assert len(said["info"]) == 1 and "features.0" in said["info"][0]
    plain = distil(folder="plain", mask="depth", drop_ratio=0.25)
    assert_close(content(trainer), content(plain))
    assert trainer.model.config.method == "pad"


def test_ratio_zero_is_plain_matching(distil):
    assert_close(content(distil("PAD", drop_ratio=0.0)), content(distil(folder="plain")))


def test_mask_by_loss_names_no_layers(distil, said):
    assert distil("PAD", mask="loss").settings.mask == "loss"
    assert not said["info"]


def test_experts_without_a_curriculum(distil, said, expert_bank, tmp_path):
    distil("PAD")
    assert len(said["warning"]) == 1 and "saw all images in every epoch" in said["warning"][0]
    folder = tmp_path / "bank"
    shutil.copytree(expert_bank[1].folder, folder)
    # Files of experts name the settings they belong to; nothing is read here.
    description = json.loads((folder / "bank.json").read_text())
    (folder / "bank.json").write_text(json.dumps({**description, "curriculum": {"initial_ratio": 0.75}}))
    distil("PAD", folder="with", bank=TrajectoryBank.from_pretrained(folder))
    assert len(said["warning"]) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"drop_ratio": 1.0}, "`drop_ratio` must be from 0 to below 1; got 1.0"),
        ({"drop_ratio": -0.5}, "`drop_ratio` must be from 0 to below 1; got -0.5"),
        ({"mask": "none"}, '`drop_ratio` is 0.25, but `mask` is "none".*set `drop_ratio` to 0'),
        ({"mask": "shallow"}, '`mask` must be "none", "depth" or "loss"; got "shallow"'),
    ],
)
def test_refused_arguments(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        PADTrainingArguments(str(tmp_path), use_cpu=True, **fields)
