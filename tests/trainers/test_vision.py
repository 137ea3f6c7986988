"""What trainers of image models share: accuracy, mixing, epochs, the moving average, checkpoints that were cut off."""

import copy
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import EvalPrediction, TrainerCallback

import hf_effml
from helpers import in_model, require_package, tiny_vim_config
from hf_effml import MixupCollator, VimForImageClassification, VimTrainer, VimTrainingArguments
from hf_effml.trainers.base import last_complete_checkpoint
from hf_effml.trainers.vision import AVERAGE_NAME, WeightAverage, accuracy, distances, label_f1
from hf_effml.utils.processes import only_run_in


def images(count=16, seed=1):
    pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": image, "labels": index % 4} for index, image in enumerate(pixels)]


def make_trainer(tmp_path, collator=None, train_dataset=None, **arguments):
    torch.manual_seed(0)
    defaults = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 0}
    defaults |= {"report_to": "none", "use_cpu": True, "save_strategy": "no"}
    return VimTrainer(
        VimForImageClassification(tiny_vim_config(num_labels=4)),
        VimTrainingArguments(str(tmp_path / "run"), **defaults | arguments),
        data_collator=collator,
        train_dataset=images() if train_dataset is None else train_dataset,
        eval_dataset=images(8, 2),
    )


def test_accuracy():
    scores = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    assert accuracy(EvalPrediction(scores, np.array([1, 0, 0, 0]))) == {"accuracy": 0.75}


def test_metrics_of_other_problems():
    scores, labels = np.array([[2.0, -1.0, 1.0], [-1.0, -2.0, 3.0]]), np.array([[1, 0, 1], [1, 0, 1]])
    assert label_f1(EvalPrediction(scores, labels)) == {"f1": 6 / 7, "exact_match": 0.5}
    assert distances(EvalPrediction(np.array([[1.0], [3.0]]), np.array([2.0, 5.0]))) == {"mse": 2.5, "mae": 1.5}


PROBLEMS = {
    "multi_label_classification": (3, lambda i: [float(i % 2), float(i % 3 == 0), 1.0], {"f1", "exact_match"}),
    "regression": (1, lambda i: float(i % 2), {"mse", "mae"}),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", ["Vim", "DyVM", "RMeeTo"])
def test_other_problems_are_learned(method, problem, tmp_path):
    """Both halves of the loss are the problem's, and so are the metrics of an evaluation."""
    num_labels, label, metrics = PROBLEMS[problem]
    data = [row | {"labels": torch.tensor(label(i))} for i, row in enumerate(images(8))]
    vim = VimForImageClassification(tiny_vim_config(num_labels=num_labels, problem_type=problem))
    model = {
        "Vim": lambda: vim,
        "DyVM": lambda: hf_effml.DyVMForImageClassification.from_vim(vim, token_keep_ratio=0.9),
        "RMeeTo": lambda: hf_effml.RMeeToVimForImageClassification.from_vim(vim, merge_r=2),
    }[method]()
    fields = {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 0}
    fields |= {"report_to": "none", "use_cpu": True, "save_strategy": "no"}
    fields |= {} if method == "Vim" else {"teacher": "none"} if method == "DyVM" else {"distill_weight": 0.01}
    arguments = getattr(hf_effml, f"{method}TrainingArguments")
    trainer = getattr(hf_effml, f"{method}Trainer")(model, arguments(str(tmp_path), **fields), train_dataset=data)
    before = trainer.evaluate(data)
    trainer.train()
    after = trainer.evaluate(data)
    assert {f"eval_{name}" for name in metrics} <= after.keys() and "eval_accuracy" not in after
    assert after["eval_loss"] < before["eval_loss"] / 3
    with pytest.raises(ValueError, match=f"`label_smoothing_factor` is for images of one class each.* is '{problem}'"):
        type(trainer)(model, arguments(str(tmp_path), **fields, label_smoothing_factor=0.1), train_dataset=data)


def test_mixup_is_for_one_class_each(tmp_path):
    require_package("timm")
    model = VimForImageClassification(tiny_vim_config(problem_type="regression"))
    arguments = VimTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="A `MixupCollator` is for images of one class each; .* is 'regression'"):
        VimTrainer(model, arguments, data_collator=MixupCollator(2), train_dataset=images())


def test_teacher_of_another_problem(tmp_path):
    config = {"num_labels": 3, "problem_type": "multi_label_classification"}
    vim, teacher = (VimForImageClassification(tiny_vim_config(**c)) for c in (config, {"num_labels": 3}))
    model = hf_effml.RMeeToVimForImageClassification.from_vim(vim, merge_r=2)
    arguments = hf_effml.RMeeToTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="must agree in `problem_type`; got 'single_label.*' and 'multi_label"):
        hf_effml.RMeeToTrainer(model, arguments, teacher=teacher, train_dataset=images())


def test_training_learns_and_evaluates(tmp_path):
    data = images(8)
    trainer = make_trainer(tmp_path, train_dataset=data, max_steps=60)
    trainer.train()
    assert trainer.evaluate(data)["eval_accuracy"] == 1.0


def test_end_of_the_cosine_follows_changed_arguments(tmp_path):
    """It is derived for a trainer, and the arguments that were given stay as they are."""
    args = VimTrainingArguments(str(tmp_path), min_learning_rate=1e-4, report_to="none", use_cpu=True)
    for changed, end in ((args, 1e-4), (dataclasses.replace(args, min_learning_rate=1e-7), 1e-7)):
        model = VimForImageClassification(tiny_vim_config(num_labels=4))
        trainer = VimTrainer(model, changed, train_dataset=images(8))
        assert trainer.args.lr_scheduler_kwargs == {"min_lr": end} and changed.lr_scheduler_kwargs is None


def test_average_is_the_recursion(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.5)
    expected = copy.deepcopy(trainer.model.state_dict())

    class Follow(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for name, tensor in model.state_dict().items():
                expected[name] = 0.5 * expected[name] + 0.5 * tensor

    # Ahead of the trainer's own, which hands over the average at the end.
    trainer.callback_handler.callbacks.insert(0, Follow())
    trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


def test_average_is_what_evaluations_see(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.999, eval_strategy="steps", eval_steps=4)
    start = trainer.evaluate()["eval_loss"]
    seen = []

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
            seen.append((metrics["eval_loss"], copy.deepcopy(model.state_dict())))

    trainer.add_callback(Look())
    trainer.train()
    (loss, weights), after = seen[0], trainer.evaluate()["eval_loss"]
    assert loss == after and abs(loss - start) < 0.02
    # During training the model's own weights went on.
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in trainer.model.state_dict().items())


def test_average_lies_in_checkpoints_only(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.9, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    checkpoint, final = (
        VimForImageClassification.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "run" / "checkpoint-4", tmp_path / "run")
    )
    average = load_file(tmp_path / "run" / "checkpoint-4" / AVERAGE_NAME)
    assert not (tmp_path / "run" / AVERAGE_NAME).exists()
    assert all(torch.equal(final[name], average[in_model(name)]) for name in final)
    assert any(not torch.equal(final[name], checkpoint[name]) for name in final)


def test_best_average_is_kept(tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(
        tmp_path, ema_decay=0.5, load_best_model_at_end=True, metric_for_best_model="loss", max_steps=5, **arguments
    )
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/{AVERAGE_NAME}")
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())


def test_average_of_another_model_is_named(tmp_path):
    WeightAverage(torch.nn.Linear(1, 1), 0.5).save(tmp_path)
    with pytest.raises(ValueError, match="has no `0.bias`: it is the average of another model"):
        WeightAverage(torch.nn.Sequential(torch.nn.Linear(1, 1)), 0.5).load(tmp_path)


def test_average_missing_from_a_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="trained without `ema_decay`"):
        WeightAverage(torch.nn.Linear(1, 1), 0.5).load(tmp_path)


def test_checkpoints_that_were_cut_off_are_passed_over(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    for step, state in ((2, "{}"), (10, "{}"), (11, '{"epoch": '), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    for name in ("checkpoint-best", "checkpoint-10-copy", "checkpoint-"):
        shutil.copytree(tmp_path / "checkpoint-10", tmp_path / name)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_checkpoint_that_is_none_is_named(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="`elsewhere` is no folder with a complete checkpoint. Leave it out"):
        trainer.train(resume_from_checkpoint="elsewhere")
    trainer.train(resume_from_checkpoint="false")
    with pytest.raises(ValueError, match="The newest one of this run is `.*checkpoint-1`"):
        trainer.train(resume_from_checkpoint="elsewhere")


def test_a_folder_has_one_run_at_a_time(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    with only_run_in(tmp_path / "run"), pytest.raises(ValueError, match="Another run is at work in"):
        trainer.train()
    assert trainer.train().global_step == 1
    assert not (tmp_path / "run" / ".run.lock").exists()


def test_nothing_to_resume_starts_anew(tmp_path):
    assert make_trainer(tmp_path, max_steps=1).train(resume_from_checkpoint="true").global_step == 1


def test_data_is_told_the_epoch(tmp_path):
    class Data(list):
        epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    data = Data(images())
    make_trainer(tmp_path, train_dataset=data, max_steps=5).train()
    assert sorted(set(data.epochs)) == [0, 1, 2] and data.epochs == sorted(data.epochs)


def test_mixing_is_for_training_only(tmp_path):
    require_package("timm")
    trainer = make_trainer(tmp_path, MixupCollator(4))
    assert next(iter(trainer.get_train_dataloader()))["labels"].shape == (8, 4)
    assert next(iter(trainer.get_eval_dataloader()))["labels"].dtype == torch.long
    assert next(iter(trainer.get_test_dataloader(images())))["labels"].dtype == torch.long
    trainer.train()
    assert "eval_accuracy" in trainer.evaluate()


def test_smoothing_twice_is_refused(tmp_path):
    require_package("timm")
    with pytest.raises(ValueError, match="`label_smoothing_factor` must be 0 with a `MixupCollator`"):
        make_trainer(tmp_path, MixupCollator(4), label_smoothing_factor=0.1)


def test_plain_arguments_do(tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    model = VimForImageClassification(tiny_vim_config(num_labels=4))
    assert VimTrainer(model, args, train_dataset=images()).train().global_step == 1
