"""EDF: activation maps that weight gradients, and when they are made."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from helpers import assert_close, existing_gradients
from hf_effml import ConvNetConfig, EDFTrainer, EDFTrainingArguments, distilled_from_real
from hf_effml.distillation.edf import area_weights
from hf_effml.distillation.flat_student import build_student
from hf_effml.trainers import edf


def content(trainer, **options):
    trainer.train(**options)
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(edf.logger, "warning", said.append)
    edf.logger.warning_once.cache_clear()
    return said


@pytest.fixture
def asked(monkeypatch):
    """What every call for maps was given: images and classes."""
    calls, original = [], edf.class_activation_map

    def recorded(model, pixels, class_ids, **options):
        calls.append((pixels.clone(), class_ids.clone()))
        return original(model, pixels, class_ids, **options)

    monkeypatch.setattr(edf, "class_activation_map", recorded)
    return calls


def steps_of_maps(trainer):
    """The steps at which maps are made, filled in while it trains."""
    steps, original = [], trainer.compute_maps
    trainer.compute_maps = lambda: steps.append(trainer.state.global_step) or original()
    return steps


class Flat(nn.Module):
    """A classifier whose scores do not depend on where anything is, so that its maps are constant."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)
        nn.init.zeros_(self.features.weight)

    def forward(self, pixel_values):
        return self.head(self.features(pixel_values).mean((2, 3)))


def test_without_ratio_and_weights_it_is_plain_matching(distil, warnings):
    plain = content(distil(folder="plain", loss_threshold=1.5))
    trainer = distil("EDF", drop_ratio=0.0, cam_model=Flat(), cam_layer="features", cam_interval=1)
    assert_close(content(trainer), plain)
    assert len([said for said in warnings if "activation maps are constant" in said]) == 1


def test_weights_come_before_momentum(distil):
    options = {"max_steps": 1, "drop_ratio": 0.25, "mask": "loss", "loss_threshold": 1.5}
    plain, trainer = distil(folder="plain", **options), distil("EDF", beta=2.0, **options)
    start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    others, after = content(plain), content(trainer)
    weights = area_weights(trainer.maps, 2.0)
    assert weights.max() > 2 and (weights == 1).any()
    wanted = plain.optimizer.state[plain.model.images]["momentum_buffer"] * weights
    assert_close(trainer.optimizer.state[trainer.model.images]["momentum_buffer"], wanted, 1e-6)
    assert_close(after["images"], start["images"] - 20 * wanted, 1e-6)
    assert_close([after["labels"], after["lr"]], [others["labels"], others["lr"]])


def test_maps_are_made_at_their_steps(distil, asked):
    """At 0, 3 and 6, of the images as they are then, also when the run goes on from between."""
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "cam_interval": 3}
    trainer = distil("EDF", folder="straight", **options)
    steps = steps_of_maps(trainer)
    straight = content(trainer)
    assert steps == [0, 3, 6] and len(asked) == 3
    folder = Path(trainer.args.output_dir)
    for call, step in zip(asked[1:], (3, 6), strict=True):
        assert_close(call[0], load_file(folder / f"checkpoint-{step}" / "model.safetensors")["images"])
    maps = {
        step: load_file(folder / f"checkpoint-{step}" / "activation_maps.safetensors")["maps"] for step in (1, 3, 4)
    }
    assert_close(maps[3], maps[1])
    assert not torch.equal(maps[4], maps[3]) and maps[4].shape == (6, 8, 8)
    for begin, wanted in ((1, [3, 6]), (3, [3, 6]), (5, [6])):
        again = distil("EDF", folder=f"from-{begin}", **options)
        steps = steps_of_maps(again)
        assert_close(content(again, resume_from_checkpoint=str(folder / f"checkpoint-{begin}")), straight)
        assert steps == wanted


def test_only_checkpoints_hold_maps(distil):
    trainer = distil("EDF", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    for place in (folder, folder / "final"):
        trainer.save_model(str(place))
        assert (place / "model.safetensors").exists() and not (place / "activation_maps.safetensors").exists()
    assert (folder / "checkpoint-2" / "activation_maps.safetensors").exists()
    assert json.loads((folder / "config.json").read_text())["method"] == "edf"


def test_goes_on_from_a_checkpoint_without_maps(distil):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    plain = distil(folder="plain", **options)
    plain.train()
    trainer = distil("EDF", **options)
    steps = steps_of_maps(trainer)
    content(trainer, resume_from_checkpoint=str(Path(plain.args.output_dir) / "checkpoint-2"))
    assert steps == [2]


@pytest.mark.parametrize("method", ["gradcam", "smoothgradcampp"])
def test_the_network_of_the_maps_is_left_alone(distil, expert_bank, method):
    network = expert_bank[1].network(1).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trainer = distil("EDF", cam_model=network, cam_method=method, cam_interval=1, max_steps=2)
    once = content(trainer)
    assert_close(dict(network.state_dict()), before)
    assert network.training and not existing_gradients(network)
    assert not any(module._forward_hooks or module._backward_hooks for module in network.modules())
    assert_close(
        content(distil("EDF", folder="again", cam_model=network, cam_method=method, cam_interval=1, max_steps=2)), once
    )


def test_classes_that_are_explained(distil, expert_bank, asked):
    """Those of the soft labels, as the network of the maps numbers them."""
    model = distilled_from_real(*expert_bank, 2)
    with torch.no_grad():
        model.labels.copy_(torch.eye(3).repeat(2, 1))
    network = build_student(ConvNetConfig(image_size=8, depth=2, hidden_size=4, num_labels=10))
    numbers = {0: 7, 1: 4, 2: 9}
    for options, wanted in (
        ({"cam_label_map": numbers}, [7, 4, 9, 7, 4, 9]),
        ({"cam_class": "legacy"}, [0, 1, 2, 0, 1, 2]),
        ({"cam_class": "legacy", "cam_label_map": numbers}, [0, 1, 2, 0, 1, 2]),
    ):
        asked.clear()
        distil("EDF", start=model, cam_model=network, **options).compute_maps()
        assert asked[0][1].tolist() == wanted


def test_defaults(distil, expert_bank, warnings):
    trainer = distil("EDF")
    assert trainer.settings.mask == "loss" and trainer.settings.loss_threshold == 1.5
    assert_close(dict(trainer.cam_model.state_dict()), dict(expert_bank[1].network(0).state_dict()))
    assert trainer.args.cam_method == "hirescam" and not warnings
    assert distil("EDF", cam_model=expert_bank[1].network(0)).args.cam_method == "gradcam"


@pytest.mark.parametrize(
    ("images_per_class", "fields", "ratio"),
    [
        (1, {}, 0.0),
        (2, {}, 0.25),
        (10, {}, 0.25),
        (11, {}, 0.375),
        (15, {"drop_ratio": 0.0}, 0.0),
        (15, {"mask": "none"}, 0.0),
        (1, {"mask": "depth", "drop_ratio": 0.5}, 0.5),
    ],
)
def test_drop_ratio_follows_the_images_per_class(distil, expert_bank, images_per_class, fields, ratio):
    start = distilled_from_real(*expert_bank, images_per_class, method="noise")
    assert distil("EDF", start=start, **fields).settings.drop_ratio == ratio


def test_the_same_arguments_serve_for_a_second_set(expert_bank, tmp_path):
    """What follows from one set, one network for maps, does not stay for the next."""
    bank = expert_bank[1]
    args = EDFTrainingArguments(str(tmp_path), max_start_epoch=4, report_to="none", use_cpu=True)
    before = args.to_dict()
    one, two = (distilled_from_real(*expert_bank, per_class, method="noise") for per_class in (1, 2))
    first = EDFTrainer(one, args, bank=bank, cam_model=bank.network(0))
    assert (first.settings.drop_ratio, first.args.cam_method) == (0.0, "gradcam")
    second = EDFTrainer(two, args, bank=bank)
    assert (second.settings.drop_ratio, second.args.cam_method) == (0.25, "hirescam")
    assert args.to_dict() == before and args.drop_ratio is None


def test_a_network_with_a_processor_and_a_size_of_its_own(distil, asked):
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    config.num_labels = 3
    network = ViTForImageClassification(config)
    processor = ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    trainer = distil("EDF", cam_model=network, cam_processor=processor)
    assert trainer.compute_maps().shape == (6, 8, 8)
    pixels = asked[0][0]
    assert pixels.shape == (6, 3, 16, 16) and pixels.abs().max() <= 1


def test_a_network_without_a_processor_is_mentioned(distil, expert_bank, warnings):
    distil("EDF", cam_model=expert_bank[1].network(0))
    assert len(warnings) == 1 and "pass its image processor as `cam_processor`" in warnings[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": -1.0}, "`beta` must be at least 0; got -1.0"),
        ({"beta": math.nan}, "`beta` must be at least 0; got nan"),
        ({"act_threshold": 0.0}, "`act_threshold` must be above 0 and at most 1; got 0.0. Leave it out"),
        ({"act_threshold": 1.5}, "`act_threshold` must be above 0 and at most 1; got 1.5"),
        ({"cam_interval": 0}, "`cam_interval` and `cam_batch_size` must be at least 1; got 0 and 64"),
        ({"cam_batch_size": 0}, "`cam_interval` and `cam_batch_size` must be at least 1; got 100 and 0"),
        ({"cam_method": "cam"}, "`cam_method` must be one of gradcam, hirescam, smoothgradcampp; got 'cam'"),
        ({"cam_class": "imagenet"}, "`cam_class` must be one of label, legacy; got 'imagenet'"),
        ({"drop_ratio": 1.0}, "`drop_ratio` must be from 0 to below 1; got 1.0"),
        ({"max_grad_norm": 1.0}, "`max_grad_norm` must stay 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_arguments(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        EDFTrainingArguments(str(tmp_path), use_cpu=True, **fields)


def test_classes_without_a_counterpart(distil):
    network = build_student(ConvNetConfig(image_size=8, depth=2, hidden_size=4, num_labels=10))
    with pytest.raises(ValueError, match=r"a class of the map network for every class; \[1\] are missing"):
        distil("EDF", cam_model=network, cam_label_map={0: 1, 2: 3})
    with pytest.raises(ValueError, match="`cam_model` tells 10 classes apart, the synthetic set has 3.*cam_label_map"):
        distil("EDF", cam_model=network)


def test_a_layer_that_is_not_there(distil):
    trainer = distil("EDF", cam_layer="layer4")
    before = trainer.model.images.detach().clone()
    with pytest.raises(
        ValueError, match="`layer` 'layer4' is not in ConvNet.*last layers with a map are .*features.7"
    ):
        trainer.train()
    assert_close(trainer.model.images.detach(), before)
