"""Known answers: matching with and without augmentation, an outer loop, initial labels, and a step of EDF."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers import assert_close
from hf_effml import (
    ConvNetConfig,
    DistilledDatasetConfig,
    DistilledDatasetModel,
    EDFTrainer,
    EDFTrainingArguments,
    TrajectoryBank,
    TrajectoryMatchingTrainer,
    TrajectoryMatchingTrainingArguments,
)
from hf_effml.distillation import matching
from hf_effml.distillation.bank.files import write_bank, write_expert
from hf_effml.distillation.bank.initialization import average_correct_logits
from hf_effml.distillation.bank.segments import TrajectorySegments
from hf_effml.distillation.differentiable_augmentation import AugmentationDraw, AugmentationSettings
from hf_effml.distillation.flat_student import FlatStudent, build_student
from hf_effml.distillation.matching import MatchingSettings, kept_entries, match_segment
from hf_effml.distillation.unroll import InnerProblem, InnerStep, StudentDerivatives, soft_cross_entropy, unroll


VECTORS = Path(__file__).parents[1] / "vectors" / "distillation"


class Vectors:
    """One file of recorded tensors, and what its description says."""

    def __init__(self, name):
        self.about = json.loads((VECTORS / f"{name}.json").read_text())
        self.tensors = load_file(VECTORS / f"{name}.safetensors")
        self.settings = self.about["settings"]

    def __getitem__(self, name):
        return self.tensors[name]

    def flat(self, prefix):
        return torch.cat([self[f"{prefix}.{name}"].flatten() for name in self.about["parameter_order"]])

    @property
    def config(self):
        settings = self.settings
        return ConvNetConfig(
            num_channels=settings["in_channels"],
            hidden_size=settings["width"],
            depth=settings["depth"],
            image_size=settings["image_size"],
            num_labels=settings["num_classes"],
        )

    def plan(self, prefix=""):
        operations = {step["step"]: step["op"] for step in self.about.get("dsa_steps", [])}
        return [self._step(prefix, number, operations) for number in range(self.settings["syn_steps"])]

    def _step(self, prefix, number, operations):
        drawn = f"dsa.{number:02d}."
        values = {name.removeprefix(drawn): value for name, value in self.tensors.items() if name.startswith(drawn)}
        draw = AugmentationDraw(operations[number], values) if values else None
        return InnerStep(self[f"{prefix}batch_index.{number:02d}"], draw)

    def problem(self, derivatives, augmentation):
        given = self["images"], self["labels"], self["lr"], self.flat("start"), self.plan()
        return InnerProblem(derivatives, *given, augmentation)

    def set(self):
        """The synthetic set at the beginning, without augmentation."""
        config = DistilledDatasetConfig(
            images_per_class=self.settings["ipc"],
            image_size=self.settings["image_size"],
            num_labels=self.settings["num_classes"],
            augmentation_strategy="none",
        )
        return DistilledDatasetModel(config).set_content(self["images"], self["labels"], self["lr"])

    def bank(self, folder, prefixes):
        """A bank of one expert per prefix: epoch 0 is a recorded start, the later two are the target."""
        names = self.about["parameter_order"]
        metadata = {
            "num_experts": len(prefixes),
            "student": self.config.to_dict(),
            "parameters": [{"name": name, "shape": list(self[f"{prefixes[0]}start.{name}"].shape)} for name in names],
            "epochs": [0, 1, 2],
        }
        write_bank(folder, metadata)
        for expert, prefix in enumerate(prefixes):
            rows = torch.stack([self.flat(f"{prefix}{end}") for end in ("start", "target", "target")])
            write_expert(folder, expert, rows, metadata)
        return TrajectoryBank.from_pretrained(folder)


def assert_equal_gradients(actual, expected, what):
    """In the norm that the tolerances are meant in."""
    for name, wanted in expected.items():
        error = ((actual[name] - wanted).norm() / wanted.norm()).item()
        assert error <= 5e-5, f"{what}: gradient of {name} is off by {error:.2g}"


def expected_gradients(vectors, prefix):
    return {name: vectors[f"{prefix}.grad_{name}"] for name in ("images", "labels", "lr")}


def match(vectors, **settings):
    settings = MatchingSettings(
        syn_steps=vectors.settings["syn_steps"],
        loss_threshold=100.0,
        augmentation=AugmentationSettings(crop_ratio=vectors.settings["ratio_crop_pad"]),
        **settings,
    )
    derivatives = StudentDerivatives(FlatStudent(build_student(vectors.config)))
    return match_segment(vectors.problem(derivatives, settings.augmentation), vectors.flat("target"), settings)


@pytest.mark.parametrize("name", ["tm_plain", "tm_dsa"])
def test_matching(name):
    vectors = Vectors(name)
    student = FlatStudent(build_student(vectors.config))
    assert student.names == vectors.about["parameter_order"]
    augmentation = AugmentationSettings(crop_ratio=vectors.settings["ratio_crop_pad"])
    states = unroll(vectors.problem(StudentDerivatives(student), augmentation))
    assert_close(states[-1], vectors["final_student_flat"], 1e-6)
    for case in vectors.about["outputs"]:
        mask = {"full": "none"}.get(case["mode"], case["mode"])
        result = match(vectors, mask=mask, drop_ratio=case["drop_ratio"])
        assert result.loss.item() == pytest.approx(vectors[f"out.{case['key']}.loss"].item(), rel=1e-5)
        expected = expected_gradients(vectors, f"out.{case['key']}")
        assert_equal_gradients(result.gradients._asdict(), expected, case["key"])
        kept = kept_entries((states[-1] - vectors.flat("target")).square(), mask, case["drop_ratio"])
        assert (case["total"] if kept is None else int(kept.sum())) == case["kept"]
        if mask == "loss":
            assert torch.equal(kept.bool(), vectors[f"out.{case['key']}.keep_mask"])


@pytest.mark.parametrize("name", ["tm_plain", "tm_dsa"])
def test_first_order(name):
    vectors = Vectors(name)
    result = match(vectors, gradient_mode="first_order")
    assert result.loss.item() == pytest.approx(vectors["out.tesla.loss"].item(), rel=1e-5)
    assert_equal_gradients(result.gradients._asdict(), expected_gradients(vectors, "out.tesla"), "first order")


def arguments_of(vectors, folder, kind=TrajectoryMatchingTrainingArguments, **others):
    fields = {
        "syn_steps": vectors.settings["syn_steps"],
        "expert_epochs": 1,
        "max_start_epoch": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return kind(str(folder), **(fields | others))


def test_outer_loop(tmp_path, monkeypatch):
    """Four steps of the trainer on recorded segments, of which the third is above its threshold."""
    vectors = Vectors("outer_loop")
    log = vectors.about["log"]
    bank = vectors.bank(tmp_path / "bank", [f"iter{number}." for number in range(len(log))])
    rates = {name: vectors.settings[name] for name in ("lr_img", "lr_y", "lr_lr")}
    rates |= {name: vectors.settings[name] for name in ("momentum_img", "momentum_y", "momentum_lr")}
    args = arguments_of(vectors, tmp_path, max_steps=len(log), logging_steps=1, **rates)
    monkeypatch.setattr(TrajectorySegments, "choose", lambda self, number: (number, 0, number))
    monkeypatch.setattr(matching, "plan_steps", lambda *_, seed, **__: vectors.plan(f"iter{seed}."))

    class Check(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            threshold = log[state.global_step]["threshold"]
            trainer.settings = replace(trainer.settings, loss_threshold=threshold)

        def on_step_end(self, args, state, control, **kwargs):
            prefix = f"iter{state.global_step - 1}.out"
            for name, parameter in trainer.model.named_parameters():
                assert_close(parameter.detach(), vectors[f"{prefix}.{name}"], 1e-6, f"{prefix} {name}")

    trainer = TrajectoryMatchingTrainer(vectors.set(), args, bank=bank, callbacks=[Check()])
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "matched" in entry]
    assert [bool(entry["matched"]) for entry in history] == [entry["stepped"] for entry in log]
    assert [entry["loss"] for entry in history] == pytest.approx([entry["loss"] for entry in log], rel=1e-5)


def test_soft_labels():
    vectors = load_file(VECTORS / "soft_labels.safetensors")
    labels, counts = average_correct_logits(vectors["expert_logits"], vectors["true_labels"])
    assert_close(counts, vectors["correct_counts"])
    assert_close(labels, vectors["initial_labels"], 1e-6)
    outputs, targets = (vectors[f"soft_ce.{name}"].requires_grad_() for name in ("outputs", "targets"))
    loss = soft_cross_entropy(outputs, targets)
    assert_close(loss.detach(), vectors["soft_ce.loss"], 1e-6)
    gradients = torch.autograd.grad(loss, (outputs, targets))
    assert_close(gradients, (vectors["soft_ce.grad_outputs"], vectors["soft_ce.grad_targets"]), 1e-6)


@pytest.fixture(scope="module")
def edf(tmp_path_factory):
    """Makes the trainer of the recorded step, with its own network for maps."""
    vectors = Vectors("edf_step")
    bank = vectors.bank(tmp_path_factory.mktemp("bank"), [""])
    cam_model = build_student(vectors.config)
    cam_model.load_state_dict(
        {name: vectors[f"cam_model.{name}"] for name in vectors.about["parameter_order"]}, strict=True
    )

    def make(folder, **others):
        fields = {"drop_ratio": vectors.settings["alpha"], "cam_layer": vectors.settings["cam_layer"]}
        args = arguments_of(vectors, folder, EDFTrainingArguments, **(fields | others))
        return EDFTrainer(vectors.set(), args, bank=bank, cam_model=cam_model)

    return vectors, make


def test_edf_loss_mask_and_gradients(edf, tmp_path, monkeypatch):
    vectors, make = edf
    trainer = make(tmp_path)
    monkeypatch.setattr(matching, "plan_steps", lambda *_, **__: vectors.plan())
    outputs = trainer.model(
        vectors.flat("start")[None], vectors.flat("target")[None], [0], trainer.derivatives, trainer.settings
    )
    assert outputs.loss.item() == pytest.approx(vectors["out.loss"].item(), rel=1e-5)
    outputs.loss.backward()
    actual = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    names = {"images": "images_before", "labels": "labels", "lr": "lr"}
    expected = {name: vectors[f"out.grad_{recorded}"] for name, recorded in names.items()}
    assert_equal_gradients(actual, expected, "EDF")
    states = unroll(vectors.problem(trainer.derivatives, trainer.settings.augmentation))
    kept = kept_entries((states[-1] - vectors.flat("target")).square(), "loss", vectors.settings["alpha"])
    assert torch.equal(kept.bool(), vectors["out.keep_mask"])


def test_edf_maps(edf, tmp_path):
    vectors, make = edf
    assert torch.equal(vectors["labels"].argmax(1), vectors["cam.class_index"])
    assert_close(make(tmp_path).compute_maps(), vectors["cam.gradcam_map"], 2e-5)


@pytest.mark.parametrize("method", ["gradcam", "smoothgradcampp"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_edf_weighted_gradients(edf, tmp_path, method, beta, threshold):
    vectors, make = edf
    trainer = make(tmp_path, beta=beta, act_threshold=threshold)
    case = f"{method}_beta{beta:.0f}_thr{'0' if threshold is None else '0p5'}"
    trainer.maps = vectors[f"cam.{method}_map"]
    before = {"images": vectors["out.grad_images_before"], "labels": vectors["out.grad_labels"]}
    for name, gradient in before.items():
        getattr(trainer.model, name).grad = gradient.clone()
    trainer._counts._matched = 1
    trainer.before_update()
    assert_equal_gradients({"images": trainer.model.images.grad}, {"images": vectors[f"out.grad_images.{case}"]}, case)
    assert_close(trainer.model.labels.grad, before["labels"])
