"""Which layer of a classifier gives the last map, in what layout, and which images it takes."""

import pytest
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from helpers import assert_close, require_package
from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.distillation.feature_layers import as_planes, demanded_size, feature_layers, find_cam_layer
from hf_effml.distillation.modeling_convnet import ConvNetForImageClassification


def resnet():
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 2], layer_type="basic")
    )


def convnext():
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 2]))


def vit(**fields):
    shape = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**shape, intermediate_size=16, **fields))


def swin():
    shape = {"image_size": 32, "patch_size": 2, "window_size": 4}
    return SwinForImageClassification(SwinConfig(**shape, embed_dim=8, depths=[1, 2], num_heads=[1, 1]))


def test_last_stages():
    assert find_cam_layer(resnet()) == "resnet.encoder.stages.3"
    assert find_cam_layer(convnext()) == "convnext.encoder.stages.3"
    assert find_cam_layer(ConvNetForImageClassification(ConvNetConfig(hidden_size=4))) == "features.11"
    assert find_cam_layer(swin()).endswith("encoder.layers.1")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_last_tokens_that_reach_the_class_token(attention):
    model = vit(attn_implementation=attention)
    name = find_cam_layer(model)
    assert name.endswith(("layers.1", "layer.1")), name
    assert not any(kind == "planes" and "attention" in layer for layer, kind in feature_layers(model, blank()).items())


def blank():
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_timm():
    timm = require_package("timm")
    assert find_cam_layer(timm.create_model("resnet18"), torch.rand(1, 3, 64, 64)) == "layer4"
    assert find_cam_layer(timm.create_model("convnext_atto"), torch.rand(1, 3, 64, 64)) == "stages.3"
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    assert find_cam_layer(vit, blank()) == "blocks.1.norm1"
    assert demanded_size(vit, (32, 32)) is None
    assert demanded_size(timm.create_model("vit_tiny_patch16_224", depth=1), (32, 32)) == (224, 224)


def test_small_images_get_an_earlier_stage():
    model = resnet().train()
    assert find_cam_layer(model, torch.rand(1, 3, 64, 64)) == "resnet.encoder.stages.3"
    assert find_cam_layer(model, torch.rand(1, 3, 32, 32)) == "resnet.encoder.stages.2"
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_no_map_at_all():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    with pytest.raises(ValueError, match=r"No layer of Sequential gives a map .* \(32, 32\) pixels"):
        find_cam_layer(model, blank())


def test_layouts():
    planes = torch.randn(2, 5, 6, 4)
    assert_close(as_planes(planes, (48, 32)), planes)
    assert_close(as_planes(planes.permute(0, 2, 3, 1), (48, 32)), planes)
    tokens = planes.flatten(2).transpose(1, 2)
    for class_tokens in (0, 1, 2, 5):
        sequence = torch.cat([torch.full((2, class_tokens, 5), 9.0), tokens], dim=1)
        assert_close(as_planes(sequence, (48, 32)), planes, what=f"{class_tokens} class tokens")
    # 100 x 75 pixels in patches of 16 leave a grid of another ratio.
    assert as_planes(tokens, (100, 75)).shape == (2, 5, 6, 4)
    assert as_planes(torch.zeros(2, 5), (32, 32)) is None
    assert as_planes(torch.zeros(2, 30, 5)[:, :3], (320, 32)) is None


def test_demanded_size():
    assert demanded_size(vit(), (32, 32)) is None
    assert demanded_size(vit(), (16, 16)) == (32, 32)
    assert demanded_size(ConvNetForImageClassification(ConvNetConfig(hidden_size=4)), (16, 16)) == (32, 32)
    assert demanded_size(resnet(), (48, 16)) is None
    plain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 14 * 14, 4))
    assert demanded_size(plain, (16, 16)) is None
    with pytest.raises(ValueError, match=r"takes no images of \(32, 32\) pixels"):
        demanded_size(plain, (32, 32))
