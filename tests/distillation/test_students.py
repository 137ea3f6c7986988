"""Students by name fit the images they are made for, start fresh from a seed, and wrong names are explained."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, ResNetConfig, ViTConfig

from helpers import assert_close, require_package
from hf_effml import ConvNetConfig
from hf_effml.distillation.evaluation.students import StudentFactory, make_student, student_by_name, student_name
from hf_effml.distillation.flat_student import logits_of


NAMES = ("convnet", "convnet-w8-batchnorm", "resnet18", "resnet18-small", "vit-tiny", "lenet", "mlp")


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 64, 48)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_name_trains_on_every_size(name, shape):
    fields = {"hidden_size": 24, "num_hidden_layers": 1} if name == "vit-tiny" else {}
    if name.startswith("resnet"):
        fields = {"hidden_sizes": [8, 8, 8, 8], "embedding_size": 8}
    student = student_by_name(name, shape[1:], shape[0], 5, **fields)
    network = make_student(student).train()
    logits = logits_of(network(torch.randn(2, *shape)))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    "name, size, channels, depth",
    [("convnet", 32, 3, 3), ("convnet", 64, 3, 4), ("convnet", (128, 160), 3, 5)]
    + [("convnet", 28, 1, 3), ("convnet", 8, 1, 2), ("convnet", 2, 3, 1), ("convnet-d4", 32, 3, 4)],
)
def test_depth_of_a_convnet(name, size, channels, depth):
    config = student_by_name(name, size, channels, 10)
    assert config.depth == depth and config.num_labels == 10 and config.num_channels == channels
    assert config.image_shape == ((size, size) if isinstance(size, int) else size)


def test_suffixes_of_a_convnet_combine_and_fields_have_the_last_word():
    config = student_by_name("convnet-w16-d2-layernorm", 32, 3, 10, pooling="max", depth=1)
    assert (config.hidden_size, config.depth, config.norm, config.pooling) == (16, 1, "layer", "max")
    assert student_by_name("convnet-nonorm", 32, 3, 10).norm == "none"


def test_small_resnet_keeps_the_resolution():
    fields = {"hidden_sizes": [4, 4, 4, 4], "embedding_size": 4}
    for size, expected in ((32, 32), (64, 32)):
        network = make_student(student_by_name("resnet18-small", size, 3, 10, **fields))
        assert network.resnet.embedder(torch.zeros(1, 3, size, size)).shape[-1] == expected
    network = make_student(student_by_name("resnet18", 32, 3, 10, **fields))
    assert network.resnet.embedder(torch.zeros(1, 3, 32, 32)).shape[-1] == 8


def test_networks_of_published_tables_have_their_size():
    def parameters(name):
        return sum(p.numel() for p in make_student(student_by_name(name, 32, 3, 10)).parameters())

    # 11.17 million is the usual ResNet-18 for CIFAR-10.
    assert parameters("resnet18-small") == 11_173_962
    assert parameters("lenet") == 62_006
    assert parameters("mlp") == 3072 * 128 + 128 + 128 * 128 + 128 + 1280 + 10
    assert parameters("convnet") == 320_010


@pytest.mark.parametrize("name", ["convnet-w8", "resnet18-small", "mlp"])
def test_the_seed_decides_and_the_global_state_stays(name):
    student = student_by_name(name, 16, 3, 10, **({"hidden_sizes": [4] * 4} if name.startswith("resnet") else {}))
    before = torch.get_rng_state()
    first, again, other = (make_student(student, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert_close(first, again)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_saved_configurations(tmp_path):
    ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=224
    ).save_pretrained(tmp_path)
    config = student_by_name(str(tmp_path), (16, 16), 1, 7, intermediate_size=20)
    assert (config.image_size, config.num_channels, config.num_labels, config.intermediate_size) == (16, 1, 7, 20)
    assert AutoConfig.from_pretrained(tmp_path).num_labels == 2
    assert logits_of(make_student(config)(torch.zeros(1, 1, 16, 16))).shape == (1, 7)


def test_timm():
    require_package("timm")
    vgg = student_by_name("timm:vgg11_bn", 32, 1, 10)
    assert logits_of(make_student(vgg).train()(torch.zeros(2, 1, 32, 32))).shape == (2, 10)
    vit = student_by_name("timm:vit_tiny_patch16_224", 32, 3, 10, model_args={"depth": 1})
    assert vit.model_args == {"in_chans": 3, "img_size": [32, 32], "depth": 1}
    assert logits_of(make_student(vit)(torch.zeros(1, 3, 32, 32))).shape == (1, 10)
    assert student_name(vit) == "vit_tiny_patch16_224"
    with pytest.raises(ValueError, match=r"`vgg12_bn` is no model of timm .* Near it are .*vgg11"):
        student_by_name("timm:vgg12_bn", 32, 3, 10)


def test_names_for_tables():
    assert student_name(ConvNetConfig(depth=2, hidden_size=16)) == "ConvNet-D2-W16"
    assert student_name(ConvNetConfig(norm="batch").to_dict()) == "ConvNet-D3-W128-batchnorm"
    assert student_name(ConvNetConfig(norm="none")) == "ConvNet-D3-W128-nonorm"
    assert student_name(ResNetConfig()) == "resnet"
    assert student_name(StudentFactory("mlp", nn.Identity)) == "mlp"
    assert student_name(nn.Identity) == "Identity"


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnet", "`resnet` is no student. There are: `convnet` .*`timm:NAME`"),
        ("convnet-d", "`-d` must be a depth such as `-d3`, a width such as `-w128`, or one of -instancenorm"),
        ("convnet-switchnorm", "`convnet-switchnorm` is no student"),
        ("no/such/folder/anywhere", "no/such/folder"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises((ValueError, OSError), match=message):
        student_by_name(name, 32, 3, 10)
    with pytest.raises(ValueError, match="`mlp` has no fields to change; got depth"):
        student_by_name("mlp", 32, 3, 10, depth=3)


def test_a_trained_network_is_no_student():
    with pytest.raises(TypeError, match="every seed gets a fresh one. Got a Linear"):
        make_student(nn.Linear(2, 2))
