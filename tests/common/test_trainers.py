"""What every trainer promises. A trainer gets all these checks by its case in `TRAINERS`."""

import copy
import dataclasses
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from common.trainer_cases import TRAINERS, Case
from huggingface_hub import RepoCard
from transformers import TrainerCallback

import hf_effml
from helpers import assert_close


# Pickles that the Trainer itself writes.
TRAINERS_OWN_PICKLES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}


def test_every_public_trainer_is_here():
    public = {name for name in hf_effml.__all__ if name.endswith("Trainer")}
    assert public == {case.trainer_class.__name__ for case in TRAINERS}


def test_checks_that_are_left_out_exist():
    for case in TRAINERS:
        for name, reason in case.without.items():
            assert f"test_{name}" in globals() and len(reason.split()) > 3, (case.trainer_class.__name__, name)


def every_trainer(check: Any) -> Any:
    """Run a check with every case that does not say why it has no part in it."""
    name = check.__name__.removeprefix("test_")
    cases = [case for case in TRAINERS if name not in case.without]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.trainer_class.__name__)(check)


def make_trainer(case: Case, folder: Path, callbacks: Any = None, random: bool = False, **arguments: Any) -> Any:
    """A trainer of a few steps; `random` switches on what draws random numbers in the model."""
    return case.make(case.arguments(folder, **arguments), random=random, callbacks=callbacks)


def trained(case: Case, trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in case.trained(trainer).items()}


def train(case: Case, folder: Path, resume: Any = None, **options: Any) -> dict[str, torch.Tensor]:
    trainer = make_trainer(case, folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trained(case, trainer)


class KillAt(TrainerCallback):
    """Ends the process as a power cut would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@every_trainer
def test_two_steps(case, tmp_path):
    trainer = make_trainer(case, tmp_path, logging_steps=1, eval_strategy="steps", eval_steps=1)
    before = trained(case, trainer)
    assert trainer.train().global_step == 2
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    measured = [entry[case.metric] for entry in history if case.metric in entry]
    highest = 1 if case.metric == "eval_accuracy" else 10
    assert len(measured) == 2 and all(0 <= value <= highest for value in measured)
    for name, value in trained(case, trainer).items():
        assert value.isfinite().all() and not torch.equal(value, before[name]), name


@every_trainer
def test_arguments_stay_as_the_caller_made_them(case, tmp_path):
    """What a trainer derives from them must not reach a second one that is made of the same."""
    arguments = case.arguments(tmp_path)
    before = {field.name: copy.deepcopy(getattr(arguments, field.name)) for field in dataclasses.fields(arguments)}
    for _ in range(2):
        case.make(arguments, random=False, callbacks=None).train()
        assert {name: getattr(arguments, name) for name in before} == before


@every_trainer
def test_resume_equals_the_straight_run(case, tmp_path):
    """Cut off by SIGKILL after the checkpoint, with drop path and dropout, whose random state must continue too."""
    options = {"random": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, **case.resuming}
    trainer = make_trainer(case, tmp_path / "straight", **options)
    trainer.train()
    straight = trained(case, trainer)
    assert case.telling(trainer.state.log_history)

    def run_until_killed() -> None:
        torch.set_num_threads(1)
        train(case, tmp_path / "cut", callbacks=[KillAt(5)], **options)

    process = multiprocessing.get_context("fork").Process(target=run_until_killed)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "cut" / "checkpoint-4").is_dir()
    assert_close(train(case, tmp_path / "cut", resume=True, **options), straight)
    earlier = str(tmp_path / "straight" / "checkpoint-2")
    assert_close(train(case, tmp_path / "earlier", resume=earlier, **options), straight)


@every_trainer
def test_gradient_accumulation(case, tmp_path):
    options = {"optim": "sgd", "learning_rate": 0.1}
    split = train(case, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert_close(split, train(case, tmp_path, **options), 1e-5)


@every_trainer
def test_two_processes_equal_one(case, tmp_path):
    options = {"optim": "sgd", "learning_rate": 0.1}
    alone = train(case, tmp_path / "one", **options)

    def in_each_process() -> None:
        torch.set_num_threads(1)
        trainer = make_trainer(case, tmp_path / "two", per_device_train_batch_size=4, **options)
        assert trainer.args.world_size == 2
        trainer.train()
        torch.save(trained(case, trainer), tmp_path / f"process-{trainer.args.process_index}.pt")

    debug_launcher(in_each_process, num_processes=2)
    for process in (0, 1):
        assert_close(torch.load(tmp_path / f"process-{process}.pt"), alone, 1e-5)


@every_trainer
def test_arguments_that_must_not_matter(case, tmp_path):
    """Logging, saving and evaluating on the way leave the weights bit-equal."""
    saving = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 3}
    loading = {"dataloader_num_workers": 1}
    plain, random = train(case, tmp_path / "plain"), train(case, tmp_path / "random", random=True)
    if not case.draws:
        assert_close(train(case, tmp_path / "busy", **saving, **evaluating, **loading), plain)
    # Evaluation draws a seed for its data loader, so with drop path the Trainer goes on with other random numbers.
    assert_close(train(case, tmp_path / "saving", random=True, **saving), random)
    for options in ({"seed": 1}, {"learning_rate": 2e-2}, {"weight_decay": 0.7}):
        other = train(case, tmp_path / "other", **options)
        assert any(not torch.equal(other[name], plain[name]) for name in plain), options


@every_trainer
def test_arguments_are_documented(case):
    """Every argument that a trainer adds is described where it is added, and on the command line."""
    for field in dataclasses.fields(case.arguments_class):
        added_by = next(
            kind
            for kind in reversed(case.arguments_class.__mro__)
            if field.name in getattr(kind, "__annotations__", {})
        )
        if added_by.__module__.startswith("hf_effml."):
            assert re.search(rf"^        (\w+, )*{field.name}(, \w+)* \(", added_by.__doc__, re.MULTILINE), (
                f"`{field.name}` is not in the docstring of {added_by.__name__}"
            )
            assert field.metadata.get("help"), field.name
            assert field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


@every_trainer
def test_weight_decay_spares_what_the_model_names(case, tmp_path):
    trainer = make_trainer(case, tmp_path)
    trainer.create_optimizer()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    decayed = {names[p] for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert not decayed & trainer.model.no_weight_decay()
    assert decayed | trainer.model.no_weight_decay() == set(names.values())


@every_trainer
def test_card_has_no_placeholder(case, tmp_path):
    trainer = make_trainer(case, tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    for placeholder in (
        r"(?i)more information needed",
        r"\{\{|\}\}|\{%",
        r"\]\(\s*\)",
        r"\bNone\b",
        r"(?i)\bto ?do\b",
        r"\bnan\b",
    ):
        assert not re.search(placeholder, text), re.search(placeholder, text)
    assert str(tmp_path) not in text
    card = RepoCard.load(tmp_path / "README.md")
    assert any((case.trainer_class._paper or "distillation") in tag for tag in card.data.tags)
    for name, value in case.card.items():
        assert getattr(card.data, name) == value
    assert "from_pretrained" in text


@every_trainer
def test_saved_folders(case, tmp_path):
    trainer = make_trainer(case, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    with torch.no_grad():
        wanted = case.output(trainer.model.eval())
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        files = {path.name for path in folder.iterdir() if path.is_file()}
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        code = {f"{place.rpartition('.')[0]}.py" for place in auto_map.values()}
        assert {"config.json", "model.safetensors", *code} <= files
        pickles = {name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))}
        assert pickles <= TRAINERS_OWN_PICKLES
        loaded = case.auto_class.from_pretrained(folder)
        assert type(loaded) is type(trainer.model)
        with torch.no_grad():
            assert_close(case.output(loaded), wanted)
