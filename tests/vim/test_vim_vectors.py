"""Known answers: whole models, single mixers and the raw scan against `tests/vectors/vim`."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.nn import functional as F

from helpers import in_model
from hf_effml import ScanStream, VimConfig, VimForImageClassification, selective_scan, selective_scan_reference
from hf_effml.vim.vim_blocks import VimMixer


VECTORS = Path(__file__).parents[1] / "vectors" / "vim"
MANIFEST = json.loads((VECTORS / "vim.json").read_text())
TENSORS = load_file(VECTORS / "vim.safetensors")
TOLERANCE = MANIFEST["tolerance"]
CASES = MANIFEST["cases"]
MODELS = [name for name, case in CASES.items() if "kind" not in case]
MIXERS = [name for name, case in CASES.items() if case.get("kind") == "mixer"]


def tensors_of(name, group):
    prefix = f"{name}/{group}/"
    return {key.removeprefix(prefix): value for key, value in TENSORS.items() if key.startswith(prefix)}


def assert_close(actual, expected, kind, what=""):
    scale = max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= TOLERANCE[kind] * scale, what


def build_model(case):
    official = case["config"]
    position = "none"
    if official["if_cls_token"]:
        position = "middle" if official["use_middle_cls_token"] else "head"
        position = "double" if official.get("use_double_cls_token") else position
    config = VimConfig(
        image_size=case["image_size"],
        patch_size=official["patch_size"],
        patch_stride=official["stride"],
        hidden_size=official["embed_dim"],
        num_hidden_layers=official["depth"],
        state_size=official["d_state"],
        divide_output=official["if_divide_out"],
        cls_token_position=position,
        pooling="mean" if position == "none" else "cls",
        num_labels=official["num_classes"],
    )
    return VimForImageClassification(config).eval()


def official_names(params):
    renamed = {key: key.replace("head.", "classifier.") if key.startswith("head.") else f"vim.{key}" for key in params}
    return {renamed[key]: value for key, value in params.items()}


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    model = build_model(CASES[name])
    model.load_state_dict(official_names(tensors_of(name, "params")))
    given, expected = tensors_of(name, "in"), tensors_of(name, "out")
    out = model(given["pixel_values"], labels=given["labels"].long(), output_hidden_states=True)
    assert_close(out.logits, expected["logits"], "forward")
    assert_close(out.loss, expected["loss"], "forward")
    assert_close(model.vim(given["pixel_values"]).pooler_output, expected["pooled"], "forward")
    assert_close(out.hidden_states[0], expected["embeddings"], "forward")
    depth = model.config.num_hidden_layers
    for index in range(depth):
        residual, mixed = expected[f"residual.{index}"], expected[f"mixer_output.{index}"]
        assert_close(out.hidden_states[index], residual, "forward", f"residual {index}")
        assert_close(out.hidden_states[index + 1], residual + mixed, "forward", f"block {index}")
    out.loss.backward()
    named = official_names(tensors_of(name, "grad"))
    assert set(named) == set(official_names(dict.fromkeys(CASES[name]["grads"])))
    for key, gradient in named.items():
        assert_close(model.get_parameter(in_model(key)).grad, gradient, "grad", key)


@pytest.mark.parametrize("name", MIXERS)
def test_mixer(name):
    kwargs = CASES[name]["kwargs"]
    config = VimConfig(
        hidden_size=kwargs["d_model"],
        state_size=kwargs["d_state"],
        divide_output=kwargs["if_divide_out"],
        conv_kernel=kwargs.get("d_conv", 4),
        time_step_rank=kwargs.get("dt_rank", "auto"),
        layer_scale_init_value=kwargs.get("init_layer_scale"),
    )
    mixer = VimMixer(config)
    mixer.load_state_dict(tensors_of(name, "params"))
    given, expected = tensors_of(name, "in"), tensors_of(name, "out")
    hidden_states = given["hidden_states"].clone().requires_grad_()
    output, _ = mixer(hidden_states)
    assert_close(output, expected["output"], "forward")
    (output * given["cotangent"]).sum().backward()
    for key, gradient in tensors_of(name, "grad").items():
        tensor = hidden_states if key == "hidden_states" else mixer.get_parameter(in_model(key))
        assert_close(tensor.grad, gradient, "grad", key)


@pytest.mark.parametrize("scan", [lambda stream: selective_scan(stream)[0], selective_scan_reference])
def test_scan(scan):
    given, expected, gradients = (tensors_of("scan", group) for group in ("in", "out", "grad"))
    leaves = {key: value.clone().requires_grad_() for key, value in given.items() if key != "cotangent"}
    x, dt, B, C = (leaves[key].mT for key in ("u", "delta", "B", "C"))
    y = scan(ScanStream(x, dt, leaves["A"], B, C, leaves["D"], leaves["delta_bias"]))
    output = y.mT * F.silu(leaves["z"])
    assert_close(output, expected["out"], "forward")
    (output * given["cotangent"]).sum().backward()
    assert set(gradients) == set(leaves)
    for key, gradient in gradients.items():
        assert_close(leaves[key].grad, gradient, "grad", key)
