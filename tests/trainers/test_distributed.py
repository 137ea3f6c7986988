"""Two processes train together as one would."""

import json

import torch
from accelerate import debug_launcher
from safetensors.torch import load_file

from helpers import tiny_vim_fields


def train(folder, batch, processes_expected):
    """Top level, so that the processes find it."""
    from hf_effml import RMeeToTrainer, RMeeToTrainingArguments, RMeeToVimConfig, RMeeToVimForImageClassification

    torch.manual_seed(0)
    torch.set_num_threads(1)
    pixels = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    data = [{"pixel_values": image, "labels": index % 4} for index, image in enumerate(pixels)]
    config = RMeeToVimConfig(**tiny_vim_fields(num_hidden_layers=3, num_labels=4, merge_r=4))
    args = RMeeToTrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=batch,
        learning_rate=1e-2,
        ema_decay=0.5,
        merge_warmup=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        # The official code needs it (rmeeto.md 3.3, item 14); here an unused parameter would fail the second step.
        ddp_find_unused_parameters=False,
    )
    trainer = RMeeToTrainer(RMeeToVimForImageClassification(config), args, train_dataset=data)
    assert trainer.accelerator.num_processes == processes_expected
    trainer.train()
    # The teacher stays outside of the synchronisation.
    assert type(trainer.teacher) is RMeeToVimForImageClassification
    trainer.save_model()
    trainer.save_state()


def test_two_processes_equal_one(tmp_path):
    train(tmp_path / "one", 8, 1)
    debug_launcher(train, (tmp_path / "two", 4, 2), num_processes=2)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)
    logs = [json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("one", "two")]
    for left, right in zip(*logs, strict=True):
        for key in {"loss", "distill_loss"} & left.keys():
            assert abs(left[key] - right[key]) < 1e-3
