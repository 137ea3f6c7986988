"""The ConvNet: official outputs, every variant at every size, second derivatives, saving and impossible settings."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

from helpers import assert_close, randomized
from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.distillation.modeling_convnet import ConvNetForImageClassification


VECTORS = Path(__file__).parents[1] / "vectors" / "distillation"
TENSORS = load_file(VECTORS / "convnet.safetensors")
NETS = json.loads((VECTORS / "convnet.json").read_text())["nets"]
NORMS = ("instance", "batch", "layer", "group", "none")
ACTIVATIONS = ("relu", "leaky_relu", "sigmoid")
POOLINGS = ("avg", "max", "none")


def vector_config(net):
    return ConvNetConfig(
        num_channels=net["in_channels"],
        image_size=net["image_size"],
        hidden_size=net["width"],
        depth=net["depth"],
        norm=net["norm"].removesuffix("norm"),
        activation=net["activation"].replace("leakyrelu", "leaky_relu"),
        pooling=net["pooling"].removesuffix("pooling"),
        num_labels=net["num_classes"],
    )


def tiny(**fields):
    fields = {"image_size": 8, "hidden_size": 4, "depth": 2, "num_labels": 3, **fields}
    torch.manual_seed(0)
    return randomized(ConvNetForImageClassification(ConvNetConfig(**fields)))


def random_images(config, batch=2):
    shape = (batch, config.num_channels, *config.image_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("net", NETS, ids=lambda net: str(net["index"]))
def test_official_outputs(net):
    prefix = f"net{net['index']}."
    model = ConvNetForImageClassification(vector_config(net))
    state = {name.removeprefix(f"{prefix}state."): t for name, t in TENSORS.items() if f"{prefix}state." in name}
    model.load_state_dict(state)
    assert [name for name, _ in model.named_parameters()] == net["parameter_order"]
    assert model.num_parameters() == net["num_parameters"]
    assert_close(torch.cat([parameter.flatten() for parameter in model.parameters()]), TENSORS[f"{prefix}flat"])
    for training, name in ((False, "out_eval"), (True, "out_train")):
        logits = model.train(training)(TENSORS[f"{prefix}x"]).logits
        assert_close(logits, TENSORS[prefix + name], 1e-5)


@pytest.mark.parametrize(
    "fields, parameters",
    [
        ({"num_labels": 10}, 320_010),
        ({"num_labels": 100}, 504_420),
        ({"depth": 4, "image_size": 64, "num_labels": 200}, 857_160),
        ({"depth": 5, "image_size": 128, "num_labels": 10}, 615_690),
    ],
)
def test_published_sizes(fields, parameters):
    with torch.device("meta"):
        assert ConvNetForImageClassification(ConvNetConfig(**fields)).num_parameters() == parameters


@pytest.mark.parametrize("norm", NORMS)
def test_every_variant_at_every_size(norm):
    """The official ablation networks take 32 pixels only."""
    sizes = ((3, 8), (1, 8), (3, 13), (1, 28), (3, [9, 14]))
    for activation, pooling, (channels, size) in itertools.product(ACTIVATIONS, POOLINGS, sizes):
        fields = {"activation": activation, "pooling": pooling, "num_channels": channels, "image_size": size}
        model = tiny(norm=norm, **fields)
        output = model(random_images(model.config), output_hidden_states=True)
        assert output.logits.shape == (2, 3), fields
        assert output.hidden_states[-1].shape == (2, 4, *model.config.feature_size), fields
        kinds = [type(layer) for layer in model.features]
        assert kinds.count(nn.Conv2d) == 2 and len(kinds) == 4 + 2 * (norm != "none") + 2 * (pooling != "none")


@pytest.mark.parametrize("norm, pooling", [("batch", "avg"), ("layer", "max"), ("group", "none"), ("none", "avg")])
def test_ablations_at_64_and_128_pixels(norm, pooling):
    for size, depth in ((64, 4), (128, 5)):
        model = tiny(image_size=size, depth=depth, norm=norm, pooling=pooling, num_channels=1)
        assert model(random_images(model.config, 1)).logits.shape == (1, 3)


def test_one_channel_pads_by_three():
    model = tiny(num_channels=1, image_size=28, depth=3)
    assert model.features[0].padding == (3, 3) and model.features[4].padding == (1, 1)
    assert model.config.map_sizes == [(32, 32), (16, 16), (8, 8)] and model.config.feature_size == (4, 4)
    # A width of 1 is no image of one channel.
    assert tiny(hidden_size=1).features[4].padding == (1, 1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_second_derivatives_through_functional_call(norm, activation):
    """The derivative of a training step, against finite differences."""
    for pooling in POOLINGS:
        model = tiny(norm=norm, activation=activation, pooling=pooling, hidden_size=4).double()
        parameters = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
        images = random_images(model.config).double().requires_grad_()

        def step(pixel_values, model=model, parameters=parameters):
            logits = functional_call(model, parameters, (pixel_values,)).logits
            loss = nn.functional.cross_entropy(logits, torch.tensor([0, 2]))
            gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            weights = (torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view_as(g) for g in gradients)
            return sum((g * weight).sum() for g, weight in zip(gradients, weights, strict=True))

        (analytic,) = torch.autograd.grad(step(images), images)
        direction = random_images(model.config).double().flip(0)
        with torch.no_grad():
            ends = [(images + sign * 1e-6 * direction).requires_grad_() for sign in (1, -1)]
        numeric = (step(ends[0]) - step(ends[1])) / 2e-6
        expected = (analytic * direction).sum()
        assert expected.abs() > 1e-4
        torch.testing.assert_close(numeric, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("norm", ["instance", "layer", "batch"])
def test_starts_as_torch_does(norm):
    """Weights and biases uniform within one over the square root of the inputs."""
    torch.manual_seed(0)
    model = ConvNetForImageClassification(ConvNetConfig(norm=norm, hidden_size=64, image_size=16, num_labels=50))
    for layer in (model.features[0], model.features[4], model.classifier):
        bound = layer.weight[0].numel() ** -0.5
        for values in (layer.weight, layer.bias):
            assert 0.9 * bound < values.abs().max() <= bound
            assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    assert torch.equal(model.features[1].weight, torch.ones_like(model.features[1].weight))
    assert not model.features[1].bias.any()


@pytest.mark.parametrize("norm", NORMS)
def test_save_and_load_is_exact(norm, tmp_path):
    model = tiny(norm=norm, image_size=[9, 12], id2label={0: "ant", 1: "bee", 2: "cat"})
    if norm == "batch":
        model.train()(random_images(model.config))
    model.eval().save_pretrained(tmp_path)
    loaded = ConvNetForImageClassification.from_pretrained(tmp_path)
    assert_close(loaded.state_dict(), model.state_dict())
    images = random_images(model.config)
    assert_close(loaded(images).to_tuple(), model(images).to_tuple())
    assert loaded.config.id2label == {0: "ant", 1: "bee", 2: "cat"} and loaded.config.image_size == [9, 12]


def test_missing_parameters_are_drawn_anew(tmp_path):
    model = tiny(norm="batch", hidden_size=32)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    lost = {"features.0.bias", "features.4.weight", "classifier.bias", "features.1.running_var", "features.5.weight"}
    kept = {name: value for name, value in load_file(file).items() if name not in lost}
    save_file(kept, file, metadata={"format": "pt"})
    loaded, report = ConvNetForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == lost
    state = loaded.state_dict()
    assert_close({name: state[name] for name in kept}, kept)
    assert state["features.1.running_var"].eq(1).all() and state["features.5.weight"].eq(1).all()
    for name, inputs in (("features.0.bias", 27), ("features.4.weight", 288), ("classifier.bias", 128)):
        assert 0 < state[name].abs().max() <= inputs**-0.5


def test_outputs_and_losses():
    model = tiny()
    images, labels = random_images(model.config), torch.tensor([2, 0])
    output = model(images, labels)
    assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    soft = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    assert_close(model(images, soft).loss, -(soft * output.logits.log_softmax(1)).sum(1).mean(), 1e-6)
    assert output.hidden_states is None and len(model(images, output_hidden_states=True).hidden_states) == 2
    assert_close(model(images, labels, return_dict=False), output.to_tuple())
    assert_close(model.to(torch.bfloat16)(images).logits.float(), output.logits, 0.05)
    assert not ConvNetForImageClassification.accepts_loss_kwargs


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"depth": 6}, "`image_size` 32 is too small for `depth` 6.*Use `depth` 5 or less"),
        ({"image_size": 1, "depth": 1}, 'is too small for `depth` 1.*Use larger images, or `pooling="none"`'),
        ({"image_size": [64, 7]}, r"`image_size` \[64, 7\] is too small for `depth` 3.*Use `depth` 2 or less"),
        ({"image_size": 0}, "`image_size` must be from 1 to 32768; got 0"),
        ({"image_size": [8, 8, 8]}, r"must be one number or \[height, width\]"),
        ({"depth": 0}, "`depth` must be from 1 to 1024; got 0"),
        ({"num_channels": 0}, "`num_channels` must be from 1 to 4096; got 0"),
        ({"norm": "group", "hidden_size": 6}, "multiple of 4.*got 6"),
        ({"norm": "instancenorm"}, "'norm' expected one of .'instance', 'batch'.*got instancenorm"),
        ({"activation": "gelu"}, "'activation' expected one of .'relu', 'leaky_relu', 'sigmoid'.*got gelu"),
        ({"pooling": True}, "'pooling' expected one of .'avg', 'max', 'none'"),
        ({"depth": 2.5}, "'depth' expected int"),
    ],
)
def test_impossible_settings(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ConvNetConfig(**fields)


def test_wrong_inputs():
    model = tiny()
    for shape in ((2, 3, 9, 8), (2, 1, 8, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"shape \(batch, 3, 8, 8\)"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="soft targets of shape"):
        model(torch.zeros(2, 3, 8, 8), torch.zeros(2))
