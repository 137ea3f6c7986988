"""Official ConvNet weights: what they show of their network, reading them safely, and the way back."""

import itertools
import pickle

import pytest
import torch
from safetensors.torch import save_file

from helpers import assert_close, randomized
from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.distillation.convert_convnet import convert_convnet_checkpoint, to_official
from hf_effml.distillation.modeling_convnet import ConvNetForImageClassification


def build(**fields):
    fields = {"image_size": 32, "hidden_size": 4, "depth": 3, "num_labels": 5, **fields}
    return randomized(ConvNetForImageClassification(ConvNetConfig(**fields)))


@pytest.mark.parametrize("norm", ["instance", "batch", "layer", "group", "none"])
def test_weights_show_their_network(norm):
    sizes = ((3, 32, 3), (1, 28, 3), (3, 64, 4), (3, 16, 1), (1, 8, 2))
    for (channels, size, depth), pooling in itertools.product(sizes, ["avg", "max", "none"]):
        if depth * size > 100 and pooling == "none":
            continue
        fields = {"num_channels": channels, "image_size": size, "depth": depth, "norm": norm, "pooling": pooling}
        model = build(**fields)
        told = {"pooling": pooling} if pooling == "max" or depth == 1 else {}
        told |= {"norm": norm} if norm == "group" else {}
        converted = convert_convnet_checkpoint(to_official(model), **told)
        assert converted.config.to_dict() == model.config.to_dict(), fields
        assert_close(converted.state_dict(), model.state_dict())
        assert not converted.training


def test_odd_shapes_need_their_size():
    model = build(image_size=[32, 48], num_channels=1, activation="sigmoid")
    with pytest.raises(ValueError, match=r"Pass `image_size=\(height, width\)`"):
        convert_convnet_checkpoint(to_official(model))
    converted = convert_convnet_checkpoint(
        to_official(model), "sigmoid", image_size=(32, 48), id2label=dict(enumerate("abcde"))
    )
    images = torch.rand(2, 1, 32, 48)
    assert_close(converted(images).logits, model(images).logits)
    assert converted.config.id2label[4] == "e"
    # 33 pixels leave the same map as 32.
    assert convert_convnet_checkpoint(to_official(build(image_size=33)), image_size=33).config.image_size == 33


def test_grey_images_of_32_pixels_are_to_be_named(caplog):
    """They leave the same map as 28, which the official ones have."""
    weights = to_official(build(num_channels=1, image_size=32))
    assert convert_convnet_checkpoint(weights).config.image_size == 28
    assert "fit grey images of 28 to 35 pixels" in caplog.text and "Pass `image_size`" in caplog.text
    caplog.clear()
    converted = convert_convnet_checkpoint(weights, image_size=32)
    assert converted(torch.zeros(1, 1, 32, 32)).logits.shape == (1, 5) and not caplog.text


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_files(suffix, tmp_path):
    model, file = build(), tmp_path / f"net.{suffix}"
    state = {f"module.{name}": value for name, value in to_official(model).items()}
    if suffix == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    assert_close(convert_convnet_checkpoint(file).state_dict(), model.state_dict())
    assert_close(convert_convnet_checkpoint(str(file)).state_dict(), model.state_dict())


def test_copies_are_independent():
    model = build()
    weights = to_official(model)
    before = model.classifier.bias.clone()
    converted = convert_convnet_checkpoint(weights)
    for tensor in (*weights.values(), *converted.state_dict().values()):
        tensor.zero_()
    assert torch.equal(model.classifier.bias, before)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a pickle ran')",)


def test_what_is_no_convnet(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        convert_convnet_checkpoint(tmp_path / "nothing.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="cannot be read safely"):
        convert_convnet_checkpoint(tmp_path / "evil.pt")
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="is no state dict of tensors"):
        convert_convnet_checkpoint(tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"no weights of a ConvNet.*They start with \['fc.weight'\]"):
        convert_convnet_checkpoint({"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="do not fit a ConvNet.*'classifier.weight' with .5, 64. for .5, 256."):
        convert_convnet_checkpoint(to_official(build()), image_size=64)
