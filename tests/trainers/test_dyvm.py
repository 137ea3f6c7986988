"""DyVM's fine-tuning: the five losses, the teacher, what is logged, the gates set at the end, modes of training."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainerCallback, TrainingArguments

from helpers import assert_close, existing_gradients, in_model, require_package, tiny_vim_config
from hf_effml import (
    Augmentation,
    DyVMForImageClassification,
    DyVMTrainer,
    DyVMTrainingArguments,
    RMeeToVimForImageClassification,
    VimForImageClassification,
    vim_image_processor,
)
from hf_effml.utils.image_data import ImageSplit
from hf_effml.vim.losses import (
    dyvm_block_ratio_loss,
    dyvm_patch_features,
    dyvm_token_distillation_loss,
    dyvm_token_ratio_loss,
    logit_divergence,
)


def vim(**overrides):
    return VimForImageClassification(tiny_vim_config(**{"num_hidden_layers": 4, "num_labels": 4} | overrides))


def dyvm(start=None, **fields):
    defaults = {"pruning_layers": [1, 2], "token_keep_ratio": 0.7, "block_keep_ratio": 0.7}
    return DyVMForImageClassification.from_vim(start or vim(), **defaults | fields)


def images(count=16, seed=1):
    pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": image, "labels": index % 4} for index, image in enumerate(pixels)]


def make_trainer(tmp_path, model=None, loaded_teacher=None, train_dataset=None, **arguments):
    defaults = {"max_steps": 2, "per_device_train_batch_size": 8, "warmup_steps": 0, "learning_rate": 1e-2}
    defaults |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    args = DyVMTrainingArguments(str(tmp_path / "run"), **defaults | arguments)
    return DyVMTrainer(
        dyvm() if model is None else model,
        args,
        teacher=loaded_teacher,
        train_dataset=images() if train_dataset is None else train_dataset,
        eval_dataset=images(8, 2),
    )


def batch(count=3, labels=None):
    labels = torch.arange(count) % 4 if labels is None else labels
    return {"pixel_values": torch.randn(count, 3, 16, 16), "labels": labels}


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 3, 1]), torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3)], ids=["", "soft"]
)
def test_loss_is_the_sum_of_the_five(tmp_path, labels):
    start = vim()
    trainer = make_trainer(tmp_path, dyvm(start, token_ratio_loss_weight=7.0, distillation_weight=0.25))
    given, model = batch(labels=labels), trainer.model.train()
    torch.manual_seed(5)
    loss, outputs = trainer.compute_loss(model, dict(given), return_outputs=True)
    torch.manual_seed(5)
    again = model(given["pixel_values"])
    assert torch.equal(again.logits, outputs.logits)
    with torch.no_grad():
        seen = start.eval().vim(given["pixel_values"])
        teacher = dyvm_patch_features(seen.last_hidden_state, seen.cls_token_index)
        features = dyvm_patch_features(again.last_hidden_state, again.cls_token_index)
        expected = (
            F.cross_entropy(again.logits, labels)
            + 7.0 * dyvm_token_ratio_loss(again.token_decisions, model.config.token_keep_ratio)
            + 10.0 * dyvm_block_ratio_loss(again.block_gates, 0.7)
            + 0.25 * logit_divergence(again.logits, start(given["pixel_values"]).logits)
            + 0.25 * dyvm_token_distillation_loss(features, teacher, again.token_positions, again.token_policy)
        )
    torch.testing.assert_close(loss.detach(), expected)
    assert loss.dtype == torch.float32


def test_evaluation_reports_the_cross_entropy_and_the_scans(tmp_path):
    trainer = make_trainer(tmp_path)
    given = batch()
    model = trainer.model.eval()
    expected = F.cross_entropy(model(given["pixel_values"]).logits, given["labels"])
    torch.testing.assert_close(trainer.compute_loss(model, dict(given)), expected)
    with torch.no_grad():
        for block in model.vim.layers[2:]:
            block.mixer.block_head.bias.fill_(-5.0)
    metrics = trainer.evaluate()
    assert metrics["eval_block_keep_ratio"] == 0.5
    model.set_pruning(False)
    assert "eval_block_keep_ratio" not in trainer.evaluate()


def test_label_smoothing(tmp_path):
    trainer = make_trainer(tmp_path, teacher="none", label_smoothing_factor=0.1)
    model = trainer.model.train()
    model.config.token_ratio_loss_weight = model.config.block_ratio_loss_weight = 0.0
    given = batch()
    torch.manual_seed(3)
    loss = trainer.compute_loss(model, dict(given))
    torch.manual_seed(3)
    expected = F.cross_entropy(model(given["pixel_values"]).logits, given["labels"], label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_teacher_is_frozen_dense_and_in_evaluation_mode(tmp_path):
    model = dyvm(vim(drop_path_rate=0.5, hidden_dropout_prob=0.3)).train()
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(tmp_path, model, save_strategy="steps", save_steps=2)
    modes = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            modes.append((kwargs["model"].training, trainer.teacher.training))

    trainer.add_callback(Look())
    trainer.train()
    assert modes == [(True, False)] * 2
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())
    assert not existing_gradients(trainer.teacher)
    assert_close(dict(trainer.teacher.state_dict()), dict(before))
    known = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not known & {id(p) for p in trainer.teacher.parameters()}
    pixels = batch()["pixel_values"]
    dense = VimForImageClassification(tiny_vim_config(num_hidden_layers=4, num_labels=4)).eval()
    dense.load_state_dict(before, strict=False)
    assert torch.equal(trainer.teacher(pixels).logits, dense(pixels).logits)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert {in_model(name) for name in load_file(checkpoint / "model.safetensors")} == before.keys()
    assert not [path for path in checkpoint.iterdir() if "teacher" in path.name]


def test_teacher_from_a_folder_or_none(tmp_path):
    vim(num_hidden_layers=2).save_pretrained(tmp_path / "teacher")
    trainer = make_trainer(tmp_path, teacher=str(tmp_path / "teacher"))
    assert trainer.teacher.config.num_hidden_layers == 2
    trainer.train()
    trainer = make_trainer(tmp_path, teacher="none", logging_steps=1)
    trainer.train()
    assert trainer.teacher is None
    assert not [name for name in logged(trainer)[0] if "distill" in name]


def test_log_adds_up_and_names_the_shares(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=2, max_steps=4, gradient_accumulation_steps=2)
    trainer.train()
    entries = logged(trainer)
    assert len(entries) == 2
    losses = {
        f"{name}_loss" for name in ("classification", "token_ratio", "block_ratio", "distill_logits", "distill_tokens")
    }
    shares = {"token_keep_ratio/0", "token_keep_ratio/1", "block_keep_ratio", "block_keep_ratio_deterministic"}
    for entry in entries:
        assert entry.keys() == losses | shares | {"loss", "grad_norm", "learning_rate", "epoch", "step"}
        assert all(math.isfinite(value) for value in entry.values())
        assert sum(entry[name] for name in losses) == pytest.approx(entry["loss"], rel=1e-4)
        assert entry["token_keep_ratio/0"] > entry["token_keep_ratio/1"] > 0


@pytest.mark.parametrize(
    "fields, absent",
    [({"enable_token_pruning": False}, "token"), ({"enable_block_selection": False}, "block")],
    ids=["gates only", "tokens only"],
)
def test_one_mechanism_alone(tmp_path, fields, absent):
    trainer = make_trainer(tmp_path, dyvm(**fields), logging_steps=1)
    trainer.train()
    names = logged(trainer)[0]
    assert f"{absent}_ratio_loss" not in names and f"{absent}_keep_ratio" not in " ".join(names)
    assert "distill_tokens_loss" in names


@pytest.mark.parametrize("selection", ["random", "even"])
def test_baselines_train_at_their_rates(tmp_path, selection):
    trainer = make_trainer(tmp_path, dyvm(token_selection=selection), logging_steps=1)
    trainer.train()
    entry = logged(trainer)[0]
    assert entry["token_keep_ratio/0"] == pytest.approx(11 / 16) and entry["token_keep_ratio/1"] == pytest.approx(
        7 / 16
    )


@pytest.mark.slow
def test_shares_go_to_what_is_asked_for(tmp_path):
    trainer = make_trainer(
        tmp_path, dyvm(block_gate_bias_init=2.0), max_steps=120, logging_steps=30, per_device_train_batch_size=16
    )
    trainer.train()
    last = logged(trainer)[-1]
    assert last["token_keep_ratio/0"] == pytest.approx(0.7, abs=0.06)
    assert last["token_keep_ratio/1"] == pytest.approx(0.49, abs=0.06)
    assert last["block_keep_ratio"] == pytest.approx(0.7, abs=0.06)


def test_gates_are_set_after_training_and_saved(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=60, calibration_images=12)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "block_keep_ratio_after_calibration" in entry)
    assert abs(entry["block_keep_ratio_after_calibration"] - 0.7) < abs(
        entry["block_keep_ratio_before_calibration"] - 0.7
    )
    assert trainer.model.config.block_gate_logit_offset != 0.0
    assert trainer.teacher.config.block_gate_logit_offset == 0.0
    trainer.save_model()
    trainer.create_model_card()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "run").eval()
    assert loaded.config.block_gate_logit_offset == trainer.model.config.block_gate_logit_offset
    pixels = batch()["pixel_values"]
    assert torch.equal(loaded(pixels).logits, trainer.model.eval()(pixels).logits)
    text = (tmp_path / "run" / "README.md").read_text()
    assert text.count("Its gates were set on 12 training images") == 1


def test_gates_stay_if_asked(tmp_path):
    trainer = make_trainer(tmp_path, calibration_images=0)
    trainer.train()
    assert trainer.model.config.block_gate_logit_offset == 0.0
    assert not [name for entry in trainer.state.log_history for name in entry if "calibration" in name]


def test_gates_are_set_on_images_as_they_are(tmp_path, monkeypatch):
    from PIL import Image

    rows = [{"image": Image.new("RGB", (16, 16), (16 * i, 8 * i, 200)), "label": i % 4} for i in range(8)]
    processor = vim_image_processor(16, crop_share=1.0)
    data = ImageSplit(rows, processor, Augmentation(max_shift=8, horizontal_flip=True))
    seen = []

    def calibrate(self, dataloader, **kwargs):
        seen.extend(dataloader)
        return [{"before": 1.0, "after": 0.7}]

    monkeypatch.setattr(DyVMForImageClassification, "calibrate_block_gates", calibrate)
    make_trainer(tmp_path, train_dataset=data, calibration_images=6).train()
    pixels = torch.cat([given["pixel_values"] for given in seen])
    plain = ImageSplit(rows, processor)
    assert len(pixels) == 6
    assert all(any(torch.equal(image, plain[i]["pixel_values"]) for i in range(8)) for image in pixels)


def test_the_average_is_what_the_gates_are_set_for(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.5, max_steps=3)
    at_calibration = []
    original = trainer.model.calibrate_block_gates
    trainer.model.calibrate_block_gates = lambda batches: (
        at_calibration.append(copy.deepcopy(trainer.model.state_dict())),
        original(batches),
    )[1]
    trainer.train()
    assert_close(dict(at_calibration[0]), dict(trainer.model.state_dict()))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    model, weights = dyvm(), []
    for checkpointing in (False, True):
        arguments = {"gradient_checkpointing": checkpointing, "optim": "sgd", "learning_rate": 0.1, "max_steps": 3}
        trainer = make_trainer(tmp_path, copy.deepcopy(model), **arguments)
        trainer.train()
        weights.append(copy.deepcopy(dict(trainer.model.state_dict())))
    assert_close(weights[1], weights[0], 1e-5)


def test_bfloat16_autocast(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, logging_steps=1, max_steps=3)
    kinds = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            kinds.append({gradient.dtype for gradient in existing_gradients(kwargs["model"]).values()})

    trainer.add_callback(Look())
    trainer.train()
    assert kinds == [{torch.float32}] * 3
    assert all(math.isfinite(entry["loss"]) for entry in logged(trainer))
    # The teacher computes with the precision of the student: a fresh one whose gates are open agrees with it exactly.
    model = dyvm(enable_token_pruning=False, block_gate_bias_init=1e4)
    trainer = make_trainer(tmp_path, model, bf16=True, logging_steps=1, max_steps=1)
    trainer.train()
    assert logged(trainer)[0]["distill_logits_loss"] == pytest.approx(0, abs=1e-6)
    assert logged(trainer)[0]["distill_tokens_loss"] == pytest.approx(0, abs=1e-6)


def test_every_parameter_has_its_gradient(tmp_path):
    trainer = make_trainer(tmp_path)
    assert trainer.args.ddp_find_unused_parameters is False
    missing = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            missing.extend(name for name, p in kwargs["model"].named_parameters() if p.grad is None)

    trainer.add_callback(Look())
    trainer.train()
    assert missing == []


def test_wrong_use_is_explained(tmp_path):
    with pytest.raises(ValueError, match="must be a `DyVMForImageClassification`; got a `VimForImageClassification`"):
        make_trainer(tmp_path, vim())
    with pytest.raises(TypeError, match="`args` must be `DyVMTrainingArguments`; got a `TrainingArguments`"):
        DyVMTrainer(dyvm(), TrainingArguments(str(tmp_path)))
    model = dyvm()
    with pytest.raises(ValueError, match="cannot be the model itself"):
        make_trainer(tmp_path, model, model)
    with pytest.raises(ValueError, match="must agree in `num_labels`; got 7 and 4"):
        make_trainer(tmp_path, model, vim(num_labels=7))
    with pytest.raises(ValueError, match="must agree in `hidden_size`; got 32 and 16"):
        make_trainer(tmp_path, model, vim(hidden_size=32))
    with pytest.raises(ValueError, match="The teacher must be a Vim that keeps all patches; got a `RMeeTo"):
        make_trainer(tmp_path, model, RMeeToVimForImageClassification.from_vim(vim(), merge_r=2))
    with pytest.raises(ValueError, match="The teacher must be a Vim that keeps all patches; got a `Linear`"):
        make_trainer(tmp_path, model, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="`calibration_images` must not be negative; got -1"):
        make_trainer(tmp_path, model, calibration_images=-1)
    with pytest.raises(ValueError, match="needs training data of known length; got a `Stream`"):
        make_trainer(tmp_path, model, train_dataset=Stream())


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from images()


def test_lora(tmp_path):
    peft = require_package("peft")
    config = peft.LoraConfig(target_modules=["in_proj", "out_proj"], modules_to_save=["block_head"])
    model = dyvm()
    before = copy.deepcopy(dict(model.state_dict()))
    trainer = make_trainer(tmp_path, peft.get_peft_model(model, config), max_steps=3)
    trainer.train()
    assert not existing_gradients(trainer.teacher)
    pixels = batch()["pixel_values"]
    dense = dyvm()
    dense.load_state_dict(before)
    dense.eval().set_pruning(False)
    torch.testing.assert_close(trainer.teacher(pixels).logits, dense(pixels).logits)
    assert "eval_block_keep_ratio" in trainer.evaluate()
