"""Plain trajectory matching: steps that repeat themselves exactly, and what must not spoil them."""

import copy
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate import PartialState, debug_launcher
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers import assert_close
from hf_effml import (
    ConvNetConfig,
    DistilledDatasetConfig,
    DistilledDatasetModel,
    TrajectoryBank,
    TrajectoryMatchingTrainingArguments,
    distilled_from_real,
)
from hf_effml.distillation.bank.files import write_bank, write_expert
from hf_effml.distillation.bank.segments import TrajectorySegments
from hf_effml.distillation.flat_student import FlatStudent, build_student
from hf_effml.trainers import trajectory_matching
from processes import run_together


def content(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def trained(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    return content(trainer.model)


def differs(one, other):
    return [name for name in one if not torch.equal(one[name], other[name])]


def changed_bank(bank, folder, change):
    """A copy of a bank with other rows for its first expert."""
    shutil.copytree(bank.folder, folder)
    write_expert(folder, 0, change(bank.read(0, bank.epochs)), bank.metadata)
    return TrajectoryBank.from_pretrained(folder)


@pytest.fixture
def standing_still(expert_bank, tmp_path):
    """A bank whose first expert never moves."""
    return changed_bank(expert_bank[1], tmp_path / "still", lambda rows: rows[:1].expand_as(rows))


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(trajectory_matching.logger, "warning", said.append)
    trajectory_matching.logger.warning_once.cache_clear()
    return said


def test_the_loss_falls(distil):
    trainer = distil(max_steps=30, batch_syn=None, max_start_epoch=1, logging_steps=10)
    before = content(trainer.model)
    assert differs(trained(trainer), before) == ["images", "labels", "lr"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0] and trainer.state.global_step == 30
    assert trainer.state.log_history[0].keys() >= {"matched", "synthetic_lr", "learning_rate"}
    assert trainer.model.config.method == "tm"


@pytest.mark.parametrize("method", ["TrajectoryMatching", "PAD", "EDF"])
def test_what_the_caller_gave_stays(distil, expert_bank, method):
    """Training changes the set and says in its configuration how; making a trainer changes nothing."""
    data, bank = expert_bank
    metadata, images = copy.deepcopy(bank.metadata), data.validation.images.clone()
    start = distilled_from_real(data, bank, 2)
    # Every Trainer writes this one.
    start.config.use_cache = False
    before = start.config.to_dict()
    processor = bank.image_processor
    fields = processor.to_dict()
    made = distil(method, start=start, eval_dataset=data.validation, processing_class=processor, eval_epochs=2)
    assert start.config.to_dict() == before
    given = made.args.to_dict()
    made.train()
    made.evaluate()
    assert made.args.to_dict() == given and bank.metadata == metadata and processor.to_dict() == fields
    assert torch.equal(data.validation.images, images)
    assert start.config.to_dict() == before | {"method": made._method}


def test_what_killed_writers_left_is_removed(distil):
    trainer = distil(max_steps=1)
    folder = Path(trainer.args.output_dir)
    (folder / "pictures").mkdir(parents=True)
    leftovers = [folder / ".tmpA1b2C3", folder / "pictures" / ".step-000000.png.abcdefgh.unfinished"]
    for path in leftovers:
        path.write_bytes(b"half")
    trainer.train()
    assert not any(path.exists() for path in leftovers)


def test_seeds(distil):
    first = trained(distil())
    torch.manual_seed(5)
    assert_close(trained(distil(folder="again")), first)
    assert differs(trained(distil(folder="other", seed=1)), first) == ["images", "labels", "lr"]


def test_arguments_that_must_not_matter(distil, expert_bank):
    """Logging, saving, pictures, evaluations and workers on the way leave the set bit-equal."""
    plain = trained(distil())
    busy = distil(
        folder="busy",
        eval_dataset=expert_bank[0].validation,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        eval_epochs=2,
        eval_seeds=2,
        save_strategy="steps",
        save_steps=1,
        logging_steps=1,
        picture_steps=2,
        dataloader_num_workers=1,
    )
    assert_close(trained(busy), plain)
    pictures = sorted(os.listdir(f"{busy.args.output_dir}/pictures"))
    assert pictures == ["step-000000.png", "step-000002.png", "step-000004.png"]
    evaluations = [entry for entry in busy.state.log_history if "eval_accuracy" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 2, 4]
    assert all(0 <= entry["eval_accuracy"] <= 1 and "eval_accuracy_std" in entry for entry in evaluations)


def test_processes_batch_and_accumulation_are_the_same(distil, tmp_path):
    """Two segments of a step, together, one after the other, or in two processes; some are above the threshold."""
    methods = {"TrajectoryMatching": {}, "EDF": {"cam_interval": 2}}
    options = {"loss_threshold": 0.93, "max_steps": 5}
    together = {}
    for method, others in methods.items():
        trainer = distil(method, "one", per_device_train_batch_size=2, logging_steps=1, **options, **others)
        together[method] = trained(trainer)
        matched = [entry["matched"] for entry in trainer.state.log_history if "matched" in entry]
        assert 0.5 in matched, "one of two segments above the threshold shows more"
        split = distil(method, "two", gradient_accumulation_steps=2, **options, **others)
        assert_close(trained(split), together[method], what=method)

    def in_each_process():
        torch.set_num_threads(1)
        for method, others in methods.items():
            trainer = distil(method, "processes", **options, **others)
            assert trainer.args.world_size == 2
            torch.save(trained(trainer), tmp_path / f"{method}-{trainer.args.process_index}.pt")

    debug_launcher(in_each_process, num_processes=2)
    for method in methods:
        for process in (0, 1):
            assert_close(torch.load(tmp_path / f"{method}-{process}.pt"), together[method], 1e-6, method)


def test_a_process_gives_up_when_another_has_died(distil):
    """Whatever it waits for: here the gradient of the other one's segment."""

    def in_process(index):
        torch.set_num_threads(1)
        PartialState._reset_state()
        trainer = distil(callbacks=[_Kill()] if index else None, use_cpu=False)
        assert trainer.args.world_size == 2
        with pytest.raises(RuntimeError, match="Another process .* has ended.*this one waited for its part of a step"):
            trainer.train()

    assert run_together(in_process) == [0, -signal.SIGKILL]


class _Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_lies_beside_the_model_is_not_pushed_with_it(distil, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda *_, **__: None)
    trainer = distil(max_steps=1)
    trainer.init_hf_repo()
    trainer.init_hf_repo()
    lines = Path(trainer.args.output_dir, ".gitignore").read_text().splitlines()
    assert sorted(lines) == ["bank/", "dataset/", "pictures/", "training_args.bin"]


def test_a_batch_larger_than_the_set(distil):
    assert_close(trained(distil(batch_syn=1000)), trained(distil(folder="all", batch_syn=None)))


def test_optimizer(distil):
    trainer = distil(lr_img=3.0, lr_y=0.5, lr_lr=1e-3, momentum_img=0.1, momentum_y=0.2, momentum_lr=0.3)
    groups = trainer.create_optimizer().param_groups
    model = trainer.model
    assert [group["params"] for group in groups] == [[model.images], [model.labels], [model.lr]]
    assert [(group["lr"], group["momentum"]) for group in groups] == [(3.0, 0.1), (0.5, 0.2), (1e-3, 0.3)]
    assert all(not group["weight_decay"] and not group["nesterov"] and not group["dampening"] for group in groups)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == 3.0, "the learning rate is to stay what it is"


def test_steps_above_the_threshold_change_nothing(distil, warnings, monkeypatch):
    monkeypatch.setattr(trajectory_matching, "_FIRST_STEPS", 3)
    trainer = distil(loss_threshold=0.0)
    before = content(trainer.model)
    assert_close(trained(trainer), before)
    assert not trainer.optimizer.state
    assert len(warnings) == 1 and "3 of the first 3 steps exceeded `loss_threshold`, 0.0" in warnings[0]


def test_segments(distil, expert_bank):
    """Every segment depends on the seed and its number alone; experts come in turn, starts from the growing range."""
    options = {"min_start_epoch": 1, "initial_max_start_epoch": 2, "max_start_epoch": 5, "expansion_steps": 30}
    segments = distil(**options, max_steps=60).train_dataset
    chosen = [segments.choose(number) for number in range(60)]
    assert len(segments) == 60
    for lap in range(0, 60, 3):
        assert {expert for expert, _, _ in chosen[lap : lap + 3]} == {0, 1, 2}
    assert len({tuple(expert for expert, _, _ in chosen[lap : lap + 3]) for lap in range(0, 60, 3)}) > 1
    ends = [min(5, 2 + 3 * number // 30) for number in range(60)]
    assert all(1 <= start < end for (_, start, _), end in zip(chosen, ends, strict=True))
    assert {start for _, start, _ in chosen} == {1, 2, 3, 4} and {start for _, start, _ in chosen[:10]} == {1}
    assert len({seed for _, _, seed in chosen}) == 60
    assert any(len({start for _, start, _ in chosen[lap : lap + 3]}) > 1 for lap in range(0, 60, 3))
    expert, start, seed = chosen[7]
    row, target = expert_bank[1].pair(expert, start, 2)
    assert_close({**segments[7], "seeds": 0}, {"starts": row, "targets": target, "seeds": 0})
    assert segments[7]["seeds"] == seed
    twice = distil(**options, max_steps=30, per_device_train_batch_size=2).train_dataset
    assert len(twice) == 60 and twice.choose(7)[0] == expert and twice.choose(7)[2] == seed
    assert all(twice.choose(number)[1] < min(5, 2 + 3 * (number // 2) // 30) for number in range(60))
    assert [twice._args.last_start_epoch(step) for step in (0, 9, 10, 29, 30, 99)] == [2, 2, 3, 4, 5, 5]


def test_segments_without_a_loss_are_left_out(distil, standing_still):
    trainer = distil(bank=standing_still, max_steps=6, logging_steps=1, max_bad_steps=2)
    after = trained(trainer)
    matched = [entry["matched"] for entry in trainer.state.log_history if "matched" in entry]
    numbers = [trainer.train_dataset.choose(number)[0] for number in range(6)]
    assert matched == [float(number != 0) for number in numbers]
    assert all(value.isfinite().all() for value in after.values())
    together = trained(distil(bank=standing_still, folder="both", per_device_train_batch_size=3, max_bad_steps=1))
    assert all(value.isfinite().all() for value in together.values())
    split = distil(bank=standing_still, folder="split", gradient_accumulation_steps=3, max_bad_steps=1)
    assert_close(trained(split), together, 1e-6)


def test_no_loss_in_many_steps(distil, expert_bank, standing_still, tmp_path, monkeypatch):
    """Stops with the set as it was after the last good step, in memory and in `output_dir`."""
    monkeypatch.setattr(TrajectorySegments, "choose", lambda self, number: (0 if number >= 2 else 1, 0, number))
    good = trained(distil(bank=standing_still, folder="good", max_steps=2))
    trainer = distil(bank=standing_still, max_bad_steps=3, max_steps=20)
    with pytest.raises(RuntimeError, match=r"not finite in 3 steps in a row.*lower `lr_lr`.*is saved in `.*run`"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert_close(content(trainer.model), good)
    assert_close(load_file(tmp_path / "run" / "model.safetensors"), good)


def test_step_size_stays_positive(distil, warnings):
    trainer = distil(lr_lr=1e6, momentum_lr=0.0, min_lr=1e-4, loss_threshold=1e9, max_steps=6, max_bad_steps=99)
    values = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            values.append(trainer.model.lr.item())

    trainer.add_callback(Watch())
    with torch.no_grad():
        trainer.model.lr.fill_(10.0)
    trainer.train()
    assert min(values) == pytest.approx(1e-4), values
    for value in (-1.0, -2.0):
        with torch.no_grad():
            trainer.model.lr.fill_(value)
        trainer.after_update()
        assert trainer.model.lr.item() == pytest.approx(1e-4)
    assert len([said for said in warnings if "fell below `min_lr`, 0.0001, and is kept" in said]) == 1


def test_bf16(distil):
    """Autocast touches the student only, so losses agree to its precision and what is trained stays float32."""
    options = {"max_steps": 3, "logging_steps": 1, "loss_threshold": 100.0}
    exact, rounded = distil(**options), distil(folder="bf16", bf16=True, **options)
    one, other = trained(exact), trained(rounded)
    assert differs(one, other) and all(value.dtype == torch.float32 for value in other.values())
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (exact, rounded)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1] != [torch.tensor(loss).bfloat16().item() for loss in losses[1]]
    change = one["images"] - distil(folder="start").model.images
    assert (other["images"] - one["images"]).norm() < 0.3 * change.norm()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_grad_norm": 1.0}, "`max_grad_norm` must stay 0 .*Clipped"),
        ({"lr_scheduler_type": "linear"}, "`lr_scheduler_type` must stay 'constant'"),
        ({"lr_scheduler_type": "cosine"}, "`lr_scheduler_type` must stay 'constant'"),
        ({"learning_rate": 1e-3}, "`learning_rate` must stay .*Set `lr_img`, `lr_y` and `lr_lr`"),
        ({"weight_decay": 0.1}, "`weight_decay` must stay 0"),
        ({"fp16": True}, "`fp16` must stay False"),
        ({"torch_compile": True}, "`torch_compile` must stay False.*Use `compile`"),
        ({"train_sampling_strategy": "random"}, "`train_sampling_strategy` must stay 'sequential'"),
        ({"remove_unused_columns": True}, "`remove_unused_columns` must stay False"),
        ({"ignore_data_skip": True}, "`ignore_data_skip` must stay False"),
        ({"max_steps": -1}, "`max_steps` must be at least 1"),
        ({"lr_img": -1.0}, "`lr_img` must be at least 0"),
        ({"lr_y": math.nan}, "`lr_y` must be at least 0"),
        ({"momentum_y": 1.0}, "`momentum_y` must be from 0 to below 1"),
        ({"min_lr": 0.0}, "`min_lr` must be positive"),
        ({"expansion_steps": 0}, "`expansion_steps` must be at least 1"),
        ({"max_bad_steps": 0}, "`max_bad_steps` must be at least 1"),
        ({"min_start_epoch": 20}, "`min_start_epoch` must be from 0 to below `max_start_epoch`, 20"),
        ({"initial_max_start_epoch": 30}, "`initial_max_start_epoch` must be above .* at most .*20; got 30"),
        ({"initial_max_start_epoch": 0}, "`initial_max_start_epoch` must be above `min_start_epoch`, 0"),
        ({"drop_ratio": 0.5}, '`drop_ratio` is 0.5, but `mask` is "none"'),
        ({"drop_ratio": 1.0, "mask": "loss"}, "`drop_ratio` must be from 0 to below 1"),
        ({"syn_steps": -1}, "`syn_steps` must be at least 0"),
        ({"batch_syn": 0}, "`batch_syn` must be at least 1"),
        ({"gradient_mode": "tesla"}, "`gradient_mode` must be"),
        ({"eval_protocol": "best"}, "tm-short"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_arguments(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        TrajectoryMatchingTrainingArguments(str(tmp_path), use_cpu=True, **fields)


def test_several_gpus_in_one_process(distil):
    arguments = distil().args
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs are visible to one process.*torchrun"):
        trajectory_matching.TrajectoryMatchingTrainer(distil().model, arguments, bank=distil().bank)


def synthetic(**fields):
    return DistilledDatasetModel(DistilledDatasetConfig(**{"image_size": 8, "num_labels": 3, **fields}))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"num_labels": 4}, "experts tell 3 classes apart, the synthetic set has 4"),
        ({"image_size": 16}, r"student .ConvNet.* cannot take images of shape .3, 16, 16."),
        ({"num_channels": 1}, r"student .ConvNet.* cannot take images of shape .1, 8, 8."),
        ({"preprocessing": "other"}, "preprocessed in another way"),
    ],
)
def test_sets_that_do_not_fit_the_bank(distil, start, message):
    with pytest.raises(ValueError, match=message):
        distil(start=synthetic(**start))


def test_other_pixels_if_one_insists(distil):
    distil(start=synthetic(preprocessing="other", images_per_class=2), allow_preprocessing_mismatch=True, max_steps=1)


def test_the_best_set_is_the_most_accurate_one(distil, expert_bank):
    trainer = distil(
        eval_dataset=expert_bank[0].validation,
        eval_strategy="steps",
        save_strategy="best",
        eval_steps=1,
        eval_epochs=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    accuracies = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert trainer.state.best_metric == max(accuracies)
    best = 1 + accuracies.index(max(accuracies))
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")


def test_ranges_beyond_the_bank(distil):
    with pytest.raises(ValueError, match=r"goes beyond the bank. It ends with epoch 8. The largest possible .* is 6"):
        distil(max_start_epoch=9)
    distil(max_start_epoch=6)


def test_a_bank_whose_networks_are_built_otherwise_now(distil, expert_bank, tmp_path):
    """Its description says other parameters than its configuration makes."""
    bank = expert_bank[1]
    parameters = [dict(entry) for entry in bank.metadata["parameters"]]
    parameters[0]["name"] = "features.9.weight"
    metadata = {**bank.metadata, "parameters": parameters}
    write_bank(tmp_path / "odd", metadata)
    for expert in range(len(bank)):
        write_expert(tmp_path / "odd", expert, bank.read(expert, bank.epochs), metadata)
    with pytest.raises(ValueError, match="is no match for the bank's networks: `features.9.weight`"):
        distil(bank=TrajectoryBank.from_pretrained(tmp_path / "odd"))


def test_a_half_precision_bank(distil, expert_bank, tmp_path):
    bank = expert_bank[1]
    metadata = {**bank.metadata, "dtype": "bfloat16"}
    write_bank(tmp_path / "half", metadata)
    for expert in range(len(bank)):
        write_expert(tmp_path / "half", expert, bank.read(expert, bank.epochs).bfloat16(), metadata)
    trainer = distil(bank=TrajectoryBank.from_pretrained(tmp_path / "half"), max_steps=1)
    assert all(value.dtype == torch.float32 for value in trained(trainer).values())


def test_one_channel_and_a_set_that_batches_do_not_divide(distil, expert_bank, tmp_path):
    config = ConvNetConfig(num_channels=1, image_size=8, depth=1, hidden_size=4, num_labels=3, norm="batch")
    rows = torch.stack([FlatStudent(build_student(config, seed)).flatten() for seed in range(8)])
    parameters = [{"name": n, "shape": list(p.shape)} for n, p in build_student(config).named_parameters()]
    metadata = {"num_experts": 1, "student": config.to_dict(), "parameters": parameters, "epochs": list(range(8))}
    write_bank(tmp_path / "grey", metadata)
    write_expert(tmp_path / "grey", 0, rows, metadata)
    bank = TrajectoryBank.from_pretrained(tmp_path / "grey")
    start = synthetic(num_channels=1, images_per_class=3)
    before = content(start)
    trainer = distil(start=start, bank=bank, batch_syn=5, loss_threshold=100.0, picture_steps=1, max_steps=2)
    assert differs(trained(trainer), before) == ["images", "labels", "lr"]


def test_nothing_to_evaluate_on(distil):
    with pytest.raises(ValueError, match="pass `eval_dataset`"):
        distil().evaluate()


def test_first_order_and_compile_reach_the_derivatives(distil):
    assert distil(compile=True).derivatives.compile and not distil().derivatives.compile
    exact, approximate = trained(distil()), trained(distil(folder="first", gradient_mode="first_order"))
    assert "images" in differs(exact, approximate)


def test_the_gradient_follows_all_steps(distil, expert_bank):
    """Ten steps of plain gradient descent on one segment, by autograd through everything."""
    model = distilled_from_real(*expert_bank, 1, augmentation_strategy="none")
    rates = {"lr_img": 5.0, "lr_y": 1.0, "lr_lr": 1e-3}
    momenta = {"momentum_img": 0.0, "momentum_y": 0.0, "momentum_lr": 0.0}
    options = {"start": model, "syn_steps": 10, "batch_syn": None, "max_steps": 1, "loss_threshold": 100.0}
    leaves = {name: value.clone().requires_grad_() for name, value in content(model).items()}
    trainer = distil(**options, **rates, **momenta)
    expert, epoch, _ = trainer.train_dataset.choose(0)
    start, target = expert_bank[1].pair(expert, epoch, 2)
    theta, student = start.clone().requires_grad_(), trainer.derivatives.student
    for _ in range(10):
        loss = torch.nn.functional.cross_entropy(student.logits(theta, leaves["images"]), leaves["labels"].softmax(1))
        theta = theta - leaves["lr"] * torch.autograd.grad(loss, theta, create_graph=True)[0]
    loss = (theta - target).square().sum() / (start - target).square().sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    after = trained(trainer)
    for (name, value), gradient, rate in zip(leaves.items(), gradients, rates.values(), strict=True):
        assert_close(after[name], value.detach() - rate * gradient, 2e-5, name)
