"""R-MeeTo's re-training: the loss, the teacher, the warm-up, and the defects of the official code."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from helpers import existing_gradients, in_model, tiny_vim_fields
from hf_effml import (
    MergeWarmupCallback,
    RMeeToTrainer,
    RMeeToTrainingArguments,
    RMeeToVimConfig,
    RMeeToVimForImageClassification,
    VimConfig,
    VimForImageClassification,
    apply_token_merging,
)
from hf_effml.vim.losses import logit_divergence


VECTORS = Path(__file__).parents[1] / "vectors" / "rmeeto"


def merged_vim(**overrides):
    fields = tiny_vim_fields(num_hidden_layers=5, num_labels=4, merge_r=4, **overrides)
    return RMeeToVimForImageClassification(RMeeToVimConfig(**fields))


def images(count=16, seed=1):
    pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": image, "labels": index % 4} for index, image in enumerate(pixels)]


def make_trainer(tmp_path, model=None, loaded_teacher=None, **arguments):
    defaults = {"max_steps": 2, "per_device_train_batch_size": 8, "report_to": "none", "use_cpu": True}
    args = RMeeToTrainingArguments(str(tmp_path / "run"), **defaults | {"save_strategy": "no"} | arguments)
    model = merged_vim() if model is None else model
    return RMeeToTrainer(model, args, teacher=loaded_teacher, train_dataset=images(), eval_dataset=images(8, 2))


class Watch(TrainerCallback):
    """Calls a function at the end of every step, and in the middle of it, before the optimiser."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen.append(self.look(kwargs["model"]))


def test_loss_is_the_papers():
    case = load_file(VECTORS / "distill_loss.safetensors")
    logits = case["student_logits"].requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits, case["soft_labels"])
    loss = loss + 0.5 * logit_divergence(logits, case["teacher_logits"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), case["loss"].squeeze(), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits.grad, case["grad_student_logits"], atol=1e-6, rtol=0)


def test_temperature_keeps_the_size_of_gradients():
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    sizes = []
    for temperature in (1.0, 4.0):
        (gradient,) = torch.autograd.grad(logit_divergence(student, teacher, temperature), student)
        sizes.append(gradient.norm().item())
    assert 0.3 < sizes[1] / sizes[0] < 3


def test_trainer_computes_that_loss(tmp_path):
    trainer = make_trainer(tmp_path, distill_weight=0.3, distill_temperature=2.0)
    batch = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 3, 1])}
    model = trainer.model.train()
    with torch.no_grad():
        plain = VimForImageClassification(VimConfig(**tiny_vim_fields(num_hidden_layers=5, num_labels=4)))
        plain.load_state_dict(model.state_dict())
        output, teacher = model(**batch), plain.eval()(batch["pixel_values"]).logits
        expected = output.loss + 0.3 * logit_divergence(output.logits, teacher, 2.0)
        assert torch.equal(trainer.compute_loss(model, dict(batch)), expected)
        # Evaluations report the cross-entropy alone.
        assert torch.equal(trainer.compute_loss(model.eval(), dict(batch)), model(**batch).loss)


def test_soft_labels_and_smoothing(tmp_path):
    trainer = make_trainer(tmp_path, teacher="none")
    soft = torch.randn(2, 4).softmax(-1)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": soft}
    logits = trainer.model(batch["pixel_values"]).logits
    torch.testing.assert_close(
        trainer.compute_loss(trainer.model, batch), -(soft * logits.log_softmax(-1)).sum(-1).mean()
    )
    smooth = make_trainer(tmp_path, teacher="none", label_smoothing_factor=0.1)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([1, 2])}
    logits = smooth.model(batch["pixel_values"]).logits
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2]), label_smoothing=0.1)
    torch.testing.assert_close(smooth.compute_loss(smooth.model, batch), expected)


def test_teacher_is_frozen_unmerged_and_in_evaluation_mode(tmp_path):
    model = merged_vim(drop_path_rate=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(tmp_path, model, max_steps=3)
    watch = Watch(lambda model: (model.training, trainer.teacher.training))
    trainer.add_callback(watch)
    trainer.train()
    assert watch.seen == [(True, False)] * 3
    assert trainer.teacher.vim.token_reducer is None and trainer.model.vim.token_reducer is not None
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())
    assert not existing_gradients(trainer.teacher)
    for name, tensor in trainer.teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_teacher_is_not_saved(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert {in_model(name) for name in saved} == merged_vim().state_dict().keys()
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert not [name for name in names if "teacher" in name]


def test_teacher_from_a_folder(tmp_path):
    plain = VimForImageClassification(VimConfig(**tiny_vim_fields(num_labels=4)))
    plain.save_pretrained(tmp_path / "teacher")
    trainer = make_trainer(tmp_path, teacher=str(tmp_path / "teacher"))
    assert trainer.teacher.config.num_hidden_layers == 2
    trainer.train()


def test_preconditions(tmp_path):
    plain = VimForImageClassification(VimConfig(**tiny_vim_fields(num_labels=4)))
    with pytest.raises(
        ValueError, match="must be a Vim with merged tokens; got a `VimForImageClassification` without"
    ):
        make_trainer(tmp_path, plain)
    with pytest.raises(ValueError, match="same classes; got 7 and 4"):
        make_trainer(tmp_path, None, VimForImageClassification(VimConfig(**tiny_vim_fields(num_labels=7))))
    model = merged_vim()
    with pytest.raises(ValueError, match="cannot be the model itself"):
        make_trainer(tmp_path, model, model)
    with pytest.raises(TypeError, match="`args` must be `RMeeToTrainingArguments`; got a `TrainingArguments`"):
        RMeeToTrainer(model, TrainingArguments(str(tmp_path)))
    for wrong in ({"distill_weight": -1.0}, {"distill_temperature": 0.0}, {"merge_warmup": 2.0}, {"ema_decay": 1.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            RMeeToTrainingArguments(str(tmp_path), **wrong)


def test_merging_switched_on_in_a_plain_vim(tmp_path):
    model = VimForImageClassification(VimConfig(**tiny_vim_fields(num_hidden_layers=3, num_labels=4)))
    apply_token_merging(model, r=4)
    trainer = make_trainer(tmp_path, model)
    assert trainer.train().global_step == 2


def test_log_has_five_numbers(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=1)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry.keys() == {"loss", "distill_loss", "grad_norm", "learning_rate", "epoch", "step"}
    assert math.isfinite(entry["distill_loss"]) and entry["distill_loss"] >= 0


def tokens(model):
    return model(torch.zeros(1, 3, 16, 16), output_merge_info=True).merge_info.tokens_per_layer


def test_warm_up_grows_to_the_full_amount(tmp_path):
    model = merged_vim()
    trainer = make_trainer(tmp_path, model, max_steps=6, merge_warmup=0.7, eval_strategy="steps", eval_steps=1)
    watch = Watch(tokens)
    trainer.add_callback(watch)
    evaluated = []
    trainer.add_callback(
        type("Look", (TrainerCallback,), {"on_evaluate": lambda *_, **__: evaluated.append(tokens(model))})()
    )
    trainer.train()
    lengths = [sum(found) for found in watch.seen]
    assert watch.seen[0] == [17] * 5 and watch.seen[-1] == tokens(model) == [17, 17, 13, 13, 9]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 2
    # What is measured and saved merges in full.
    assert evaluated == [tokens(model)] * 6
    assert model.config.merge_r == 4


def test_warm_up_of_a_target_ratio():
    model = RMeeToVimForImageClassification(
        RMeeToVimConfig(**tiny_vim_fields(num_hidden_layers=5), merge_target_ratio=0.3)
    )
    full, callback = tokens(model), MergeWarmupCallback(1.0)
    state = type("State", (), {"global_step": 1, "max_steps": 2})
    callback.on_train_begin(None, state, None, model=model)
    callback.on_step_begin(None, state, None)
    assert sum(full) < sum(tokens(model)) < 17 * 5
    callback.on_step_end(None, state, None)
    assert tokens(model) == full and model.config.merge_target_ratio == 0.3


def test_gradient_accumulation_equals_one_batch(tmp_path):
    """Defect 7: the official loop makes three updates of two batches."""
    start = merged_vim().state_dict()
    weights, updates = [], []
    for batch, accumulate in ((16, 1), (4, 4)):
        model = merged_vim()
        model.load_state_dict(start)
        arguments = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        trainer = make_trainer(tmp_path, model, learning_rate=1e-2, max_grad_norm=0, max_steps=1, **arguments)
        watch = Watch(existing_gradients)
        trainer.add_callback(watch)
        trainer.train()
        updates.append(len(watch.seen))
        weights.append(watch.seen[0])
    assert updates == [1, 1]
    for name, gradient in weights[0].items():
        torch.testing.assert_close(weights[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_no_anomaly_detection(tmp_path):
    """Defect 8."""
    trainer = make_trainer(tmp_path)
    watch = Watch(lambda model: torch.is_anomaly_enabled())
    trainer.add_callback(watch)
    trainer.train()
    assert watch.seen == [False, False]


def test_learning_rate_falls_from_the_first_step_to_its_minimum(tmp_path):
    """Defect 10: there the first two epochs share the peak, and a short run never gets far below it."""
    trainer = make_trainer(tmp_path, max_steps=8, learning_rate=1e-2, min_learning_rate=1e-4, logging_steps=1)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[0] == 1e-2 and rates == sorted(rates, reverse=True) and len(set(rates)) == 8
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-4)


def test_parameters_are_not_searched_for(tmp_path):
    """Defect 14: DDP with `find_unused_parameters=True`; every parameter has its gradient."""
    trainer = make_trainer(tmp_path)
    assert trainer.args.ddp_find_unused_parameters is False
    watch = Watch(lambda model: [name for name, parameter in model.named_parameters() if parameter.grad is None])
    trainer.add_callback(watch)
    trainer.train()
    assert watch.seen == [[], []]
