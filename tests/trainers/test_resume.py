"""A run that `kill -9` ended and that was resumed equals the straight run, bit for bit."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from hf_effml import (
    RMeeToTrainer,
    RMeeToTrainingArguments,
    RMeeToVimForImageClassification,
    VimConfig,
    VimForImageClassification,
    VimTrainer,
    VimTrainingArguments,
    load_image_data,
    vim_image_processor,
)
from hf_effml.trainers import base
from processes import Job


# Augmentation, mixup where timm is there, drop path, accumulation over a ragged epoch, moving average; merge warm-up
# of R-MeeTo, drawn decisions of DyVM.
PROGRAM = """
import os, signal, sys
import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback, set_seed
from hf_effml import *
from hf_effml.utils.image_data import ImageSplit
from hf_effml.utils.imports import usable

folder, kill_at, resume, method = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume", sys.argv[4]
torch.set_num_threads(1)


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


set_seed(0)
pixels = np.random.RandomState(0).randint(0, 255, (28, 12, 12, 3), dtype=np.uint8)
rows = [{"image": Image.fromarray(image), "label": index % 4} for index, image in enumerate(pixels)]
data = ImageSplit(rows, vim_image_processor(16, crop_share=1.0), Augmentation(max_shift=2, horizontal_flip=True))
vim = VimForImageClassification(
    VimConfig(image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=4, state_size=4, num_labels=4,
              drop_path_rate=0.2, hidden_dropout_prob=0.1)
)
settings = dict(
    max_steps=10, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2,
    save_strategy="steps", save_steps=3, logging_steps=1, ema_decay=0.8,
    report_to="none", use_cpu=True, disable_tqdm=True,
)
if method == "rmeeto":
    model = RMeeToVimForImageClassification.from_vim(vim, merge_r=5)
    trainer_class, args = RMeeToTrainer, RMeeToTrainingArguments(folder, merge_warmup=0.8, **settings)
else:
    model = DyVMForImageClassification.from_vim(vim, token_keep_ratio=0.7, block_keep_ratio=0.7)
    trainer_class, args = DyVMTrainer, DyVMTrainingArguments(folder, calibration_images=16, **settings)
collator = MixupCollator(4) if usable("timm") else None
trainer = trainer_class(model, args, train_dataset=data, data_collator=collator, callbacks=[Kill()])
trainer.train(resume_from_checkpoint=resume)
trainer.save_model()
trainer.save_state()
"""


def run(folder, method, kill_at=-1, resume=False):
    job = Job(PROGRAM, folder, kill_at, "resume" if resume else "start", method, cwd=folder.parent, package=True)
    job.wait()
    return job


def log(folder, after):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry and entry["step"] > after]


def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module", params=["rmeeto", "dyvm"])
def straight(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / request.param
    outcome = run(folder, request.param)
    assert outcome.returncode == 0, outcome.stderr
    return folder


# The newest checkpoint is in the middle of an epoch of four steps, in the second case of the first one.
@pytest.mark.parametrize("kill_at", [8, 5])
def test_killed_and_resumed_equals_straight(straight, tmp_path, kill_at):
    folder, method = tmp_path / "killed", straight.name
    assert run(folder, method, kill_at).returncode == -signal.SIGKILL
    assert not (folder / "model.safetensors").exists()
    outcome = run(folder, method, resume=True)
    assert outcome.returncode == 0, outcome.stderr
    for name in ("model.safetensors", "checkpoint-9/model.safetensors", "checkpoint-9/weight_average.safetensors"):
        expected, found = load_file(straight / name), load_file(folder / name)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), f"{name}: {key}"
    assert log(folder, kill_at) == log(straight, kill_at)
    # A DyVM's gates are set at the end.
    assert config(folder) == config(straight)


def test_what_a_checkpoint_cannot_go_on_as(tmp_path, monkeypatch):
    """Other classes would be loaded without a word; other shapes end deep inside."""
    data = load_image_data("digits", vim_image_processor(8, crop_share=1.0))
    rows = [data.train[number] for number in range(8)]
    shape = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 4, "state_size": 4}

    def train(config, resume, kind=VimTrainer, merged=False):
        vim = VimForImageClassification(config)
        model = RMeeToVimForImageClassification.from_vim(vim, merge_r=1) if merged else vim
        how = {"max_steps": 1, "save_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        args = (RMeeToTrainingArguments if merged else VimTrainingArguments)(str(tmp_path), **how)
        kind(model, args, train_dataset=rows).train(resume_from_checkpoint=resume)

    train(VimConfig(**shape, **data.label_fields), False)
    letters = {number: letter for number, letter in enumerate("abcdefghij")}
    with pytest.raises(ValueError, match="checkpoint-1` and the model .* got `0`, `1`.* and `a`, `b`"):
        train(VimConfig(**shape, id2label=letters), True)
    with pytest.raises(ValueError, match="checkpoint-1` do not fit this model: `hidden_size` was 16 and is 32"):
        train(VimConfig(**shape | {"hidden_size": 32}, **data.label_fields), True)
    with pytest.raises(ValueError, match="holds a `vim`; this run trains a `rmeeto_vim`"):
        train(VimConfig(**shape, **data.label_fields), True, RMeeToTrainer, merged=True)
    said = []
    monkeypatch.setattr(base.logger, "warning", said.append)
    train(VimConfig(**shape, **data.label_fields), True)
    assert said[0].endswith("checkpoint-1` is at step 1 of `max_steps=1`: nothing is left to train.")
