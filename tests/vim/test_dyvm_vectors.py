"""Known answers: DyVM in evaluation, and in training with recorded noise, losses and gradients."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from helpers import in_model
from hf_effml import DyVMConfig, DyVMForImageClassification, VimConfig, VimForImageClassification
from hf_effml.vim import dyvm_run, token_selection
from hf_effml.vim.losses import dyvm_distillation_losses, dyvm_patch_features, dyvm_ratio_losses


VECTORS = Path(__file__).parents[1] / "vectors" / "dyvm"
MANIFEST = json.loads((VECTORS / "dyvm.json").read_text())
TENSORS = load_file(VECTORS / "dyvm.safetensors")
TOLERANCE = MANIFEST["tolerance"]
CASES = MANIFEST["cases"]
every_case = pytest.mark.parametrize("name", CASES)


def tensors_of(name, group):
    prefix = f"{name}/{group}/"
    return {key.removeprefix(prefix): value for key, value in TENSORS.items() if key.startswith(prefix)}


def assert_close(actual, expected, kind="forward", what=""):
    assert actual.shape == expected.shape, what
    scale = max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= TOLERANCE[kind] * scale, what


def our_name(key):
    return key.replace("head.", "classifier.") if key.startswith("head.") else f"vim.{key}"


def official_config(name):
    case, official = CASES[name], CASES[name]["config"]
    fields = {
        "image_size": case["image_size"],
        "patch_size": official["patch_size"],
        "hidden_size": official["embed_dim"],
        "num_hidden_layers": official["depth"],
        "state_size": official.get("d_state", 16),
        "num_labels": official["num_classes"],
    }
    if name == "videomamba":
        fields |= {"cls_token_position": "head", "divide_output": False}
    dyvm = {
        "pruning_layers": official["pruning_loc"],
        "token_keep_ratio": official["token_ratio"],
        "block_keep_ratio": official["block_keep_ratio"],
    }
    return fields, dyvm


def official_model(name):
    fields, dyvm = official_config(name)
    model = DyVMForImageClassification(DyVMConfig(**fields, **dyvm))
    model.load_state_dict({our_name(key): value for key, value in tensors_of(name, "params").items()})
    return model.eval()


def official_teacher(name):
    model = VimForImageClassification(VimConfig(**official_config(name)[0]))
    model.load_state_dict({our_name(key): value for key, value in tensors_of(name, "teacher_params").items()})
    return model.eval()


@pytest.fixture
def recorded_noise(monkeypatch):
    """Replaces the noise of a training pass by that of a case, in its order."""

    def replay(name):
        case, noise = CASES[name]["config"], tensors_of(name, "noise")
        order = []
        for layer in range(case["depth"]):
            if layer in case["pruning_loc"]:
                order.append(noise[f"token.stage{case['pruning_loc'].index(layer)}"])
            order += [noise[f"block.layer{layer}.a"], noise[f"block.layer{layer}.b"]]
        queue = iter(order)

        def sample(shape, device, generator):
            drawn = next(queue)
            assert tuple(drawn.shape) == tuple(shape)
            return drawn

        for module in (dyvm_run, token_selection):
            monkeypatch.setattr(module, "sample_exponential", sample)
        return queue

    return replay


@every_case
@pytest.mark.parametrize("mode", ["select", "mask"])
def test_evaluation(name, mode):
    model, expected = official_model(name), tensors_of(name, "eval")
    model.config.inference_mode = mode
    entering, predicted = {}, {}
    for index, layer in enumerate(model.vim.layers):
        layer.register_forward_pre_hook(lambda _, inputs, index=index: entering.update({index: inputs[0]}))
    for stage, predictor in enumerate(model.vim.score_predictors):
        predictor.register_forward_hook(
            lambda _, inputs, output, stage=stage: predicted.update({stage: (inputs[0], output)})
        )
    with torch.no_grad():
        output = model(tensors_of(name, "in")["pixel_values"], output_hidden_states=True)
    assert_close(output.logits, expected["logits"])
    assert torch.equal(output.block_gates.transpose(0, 1), expected["block_policy"])
    for index in range(model.config.num_hidden_layers):
        after = expected[f"layer{index}.mixer_output"] + expected[f"layer{index}.residual"]
        assert_close(output.hidden_states[index + 1], after, what=f"block {index}")
        rearranged = expected.get(f"layer{index}.rearranged_mixer_output")
        if rearranged is not None:
            assert_close(entering[index], rearranged + expected[f"layer{index}.rearranged_residual"])
    positions = torch.arange(CASES[name]["num_patches"]).expand(CASES[name]["batch"], -1)
    for stage, kept in enumerate(CASES[name]["num_kept_eval"]):
        patches, scores = predicted[stage]
        place = CASES[name]["cls_position_per_layer_eval"][model.config.pruning_layers[stage] - 1]
        rows = [row for row in range(patches.shape[1]) if row != place]
        assert_close(patches[:, rows], expected[f"stage{stage}.predictor_input"])
        assert_close(scores[:, rows], expected[f"stage{stage}.predictor_logprob"])
        assert expected[f"stage{stage}.keep_index"].shape[1] == kept
        positions = positions.gather(1, expected[f"stage{stage}.keep_index"])
        assert torch.equal(output.kept_indices[stage], positions)
    assert output.cls_token_index.unique().tolist() == [CASES[name]["cls_position_per_layer_eval"][-1]]


@every_case
def test_training(name, recorded_noise):
    model, given, expected = official_model(name).train(), tensors_of(name, "in"), tensors_of(name, "train")
    left = recorded_noise(name)
    output = model(given["pixel_values"])
    assert next(left, None) is None
    assert_close(output.logits, expected["logits"])
    for stage, decisions in enumerate(output.token_decisions):
        assert torch.equal(decisions, expected[f"stage{stage}.keep_decision"])
    assert torch.equal(output.block_gates.transpose(0, 1), expected["block_policy"])
    assert torch.equal(output.token_policy, expected["token_policy"])
    assert torch.equal(output.token_positions, expected["current_pos"])
    assert_close(model.patch_features(output), expected["patch_features"])

    with torch.no_grad():
        teacher = official_teacher(name)
        seen = teacher.vim(given["pixel_values"])
        teacher_logits = teacher.classifier(seen.pooler_output)
        teacher_features = dyvm_patch_features(seen.last_hidden_state, seen.cls_token_index)
    assert_close(teacher_logits, expected["teacher_logits"])
    assert_close(teacher_features, expected["teacher_patch_features"])
    losses = {
        "cls": F.cross_entropy(output.logits, given["soft_targets"]),
        **dyvm_ratio_losses(output, model.config),
        **dyvm_distillation_losses(output, teacher_logits, teacher_features, model.config),
    }
    assert len(losses) == 5
    for part, loss in losses.items():
        assert_close(loss.reshape(1), expected[f"loss_{part}"], what=part)
    total = sum(losses.values())
    assert_close(total.reshape(1), expected["loss"])
    total.backward()
    gradients = tensors_of(name, "grad")
    assert set(gradients) == set(CASES[name]["grads"])
    for key, gradient in gradients.items():
        assert_close(model.get_parameter(in_model(our_name(key))).grad, gradient, "grad", key)


def test_one_image_keeps_no_token():
    """What the training part of the vectors covers."""
    kept = [TENSORS[f"{name}/train/token_policy"].sum(1).min() for name in CASES]
    assert 0 in kept


def test_model_in_training_adds_the_ratio_losses(recorded_noise):
    model, given, expected = official_model("vim").train(), tensors_of("vim", "in"), tensors_of("vim", "train")
    recorded_noise("vim")
    loss = model(given["pixel_values"], labels=given["soft_targets"]).loss
    parts = ("loss_cls", "loss_token_ratio", "loss_block_ratio")
    assert_close(loss.reshape(1), sum(expected[part] for part in parts))


@pytest.mark.parametrize("size, width", [("tiny", 192), ("small", 384), ("base", 768)])
def test_number_of_parameters(size, width):
    with torch.device("meta"):
        model = DyVMForImageClassification(DyVMConfig(hidden_size=width, num_labels=1000))
    assert model.num_parameters() == MANIFEST["known_flops"]["parameters"][f"dyvm_{size}"]
