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
        # The official code needs it; here an unused parameter would fail the second step.
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


def train_dyvm(folder, batch, deterministic):
    """Top level, so that the processes find it; each of them writes what it ended with."""
    from hf_effml import (
        DyVMForImageClassification,
        DyVMTrainer,
        DyVMTrainingArguments,
        VimConfig,
        VimForImageClassification,
    )

    torch.manual_seed(0)
    torch.set_num_threads(1)
    pixels = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    data = [{"pixel_values": image, "labels": index % 4} for index, image in enumerate(pixels)]
    vim = VimForImageClassification(VimConfig(**tiny_vim_fields(num_hidden_layers=3, num_labels=4)))
    # Decisions that are drawn, and a mean over the images of one process, make two processes differ from one.
    fields = {"token_selection": "even", "enable_block_selection": False} if deterministic else {}
    model = DyVMForImageClassification.from_vim(vim, token_keep_ratio=0.7, block_keep_ratio=0.7, **fields)
    args = DyVMTrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=batch,
        learning_rate=0.1,
        optim="sgd",
        warmup_steps=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = DyVMTrainer(model, args, train_dataset=data, eval_dataset=data[:10])
    trainer.train()
    found = {
        "weights": trainer.model.state_dict(),
        "offset": trainer.model.config.block_gate_logit_offset,
        "metrics": trainer.evaluate(),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    folder.mkdir(exist_ok=True)
    torch.save(found, folder / f"process-{args.process_index}-of-{args.world_size}.pt")


def test_dyvm_in_two_processes_equals_one_where_nothing_is_drawn(tmp_path):
    train_dyvm(tmp_path, 8, True)
    debug_launcher(train_dyvm, (tmp_path, 4, True), num_processes=2)
    one, two = (torch.load(tmp_path / f"process-0-of-{count}.pt") for count in (1, 2))
    for name, tensor in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], tensor, atol=1e-5, rtol=1e-4)
    for left, right in zip(one["log"], two["log"], strict=True):
        assert left.keys() == right.keys()
        for name in left:
            assert abs(left[name] - right[name]) < 1e-3, name


def test_dyvm_processes_agree(tmp_path):
    debug_launcher(train_dyvm, (tmp_path, 4, False), num_processes=2)
    first, second = (torch.load(tmp_path / f"process-{process}-of-2.pt") for process in (0, 1))
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
    assert first["offset"] == second["offset"] != 0.0
    share = "eval_block_keep_ratio"
    assert first["metrics"][share] == second["metrics"][share]
    entry = first["log"][0]
    assert abs(sum(value for name, value in entry.items() if name.endswith("_loss")) - entry["loss"]) < 1e-3
