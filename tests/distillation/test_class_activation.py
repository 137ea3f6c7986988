"""Class activation maps against recorded ones, against the definition on a full graph, and what they leave behind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from helpers import assert_close, randomized, require_package
from hf_effml.distillation.class_activation import class_activation_map
from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.distillation.feature_layers import find_cam_layer
from hf_effml.distillation.modeling_convnet import ConvNetForImageClassification


VECTORS = Path(__file__).parents[1] / "vectors" / "distillation"
CLASSES = 5
METHODS = ("gradcam", "smoothgradcampp")


def images(count=4, height=32, width=32):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def class_ids(count=4):
    return torch.arange(count) * 2 % CLASSES


def tiny_resnet():
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16], depths=[1, 1, 2], layer_type="basic", num_labels=CLASSES
    )
    return randomized(ResNetForImageClassification(config))


def tiny_convnext():
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_labels=CLASSES)
    return randomized(ConvNextForImageClassification(config))


def tiny_vit():
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=CLASSES,
    )
    return randomized(ViTForImageClassification(config))


def tiny_timm():
    model = require_package("timm").create_model("test_resnet", num_classes=CLASSES)
    return randomized(model)


class PlainNet(nn.Module):
    """Torch only; what follows the features changes them in place."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(8, 12, 3, stride=2))
        self.activation = nn.ReLU(inplace=True)
        self.head = nn.Sequential(nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(48, CLASSES))

    def forward(self, pixel_values):
        return self.head(self.activation(self.trunk(pixel_values)))


class PairNet(PlainNet):
    """Its features come in a tuple."""

    def __init__(self):
        super().__init__()
        self.pair = nn.Module()
        self.pair.forward = lambda features: (features, "and more")

    def forward(self, pixel_values):
        features, more = self.pair(self.trunk(pixel_values))
        assert more == "and more"
        return self.head(features)


def with_features(model, pixels, layer):
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *call: kept.append(call[2]))
    output = model(pixels)
    handle.remove()
    return output, kept[0][0] if isinstance(kept[0], tuple) else kept[0]


def by_definition(model, pixels, ids, layer, tokens=False):
    """Grad-CAM of one image after the other, with the graph of the whole model."""
    maps = []
    for image, index in zip(pixels, ids, strict=True):
        output, features = with_features(model, image[None], layer)
        score = getattr(output, "logits", output)[0, index]
        (gradient,) = torch.autograd.grad(score, features)
        if tokens:
            side = round((features.shape[1] - 1) ** 0.5)
            features, gradient = (
                tensor[0, 1:].T.reshape(-1, side, side)[None] for tensor in (features.detach(), gradient)
            )
        cam = (gradient.mean((2, 3), keepdim=True) * features.detach()).sum(1).relu()
        cam = (cam - cam.min()) / (cam.max() - cam.min())
        maps.append(F.interpolate(cam[None], image.shape[-2:], mode="bilinear")[0])
    return torch.cat(maps)


@pytest.fixture(scope="module")
def recorded():
    tensors = load_file(VECTORS / "edf_step.safetensors")
    settings = json.loads((VECTORS / "edf_step.json").read_text())["settings"]
    config = ConvNetConfig(
        hidden_size=settings["width"],
        depth=settings["depth"],
        image_size=settings["image_size"],
        num_labels=settings["num_classes"],
    )
    model = ConvNetForImageClassification(config)
    weights = {name.removeprefix("cam_model."): tensor for name, tensor in tensors.items() if "cam_model." in name}
    model.load_state_dict(weights)
    # Recorded class after class, with all copies of a class together.
    ids, copies = tensors["cam.class_index"], settings["cam_samples"]
    noise = torch.empty(copies, *tensors["images"].shape)
    for label in ids.unique():
        for copy in range(copies):
            noise[copy, ids == label] = tensors[f"cam.noise.{label * copies + copy:02d}"]
    return model, tensors, ids, noise, settings["cam_layer"]


def test_recorded_gradcam(recorded):
    model, tensors, ids, _, layer = recorded
    assert find_cam_layer(model, tensors["images"]) == layer
    assert_close(class_activation_map(model, tensors["images"], ids), tensors["cam.gradcam_map"], 2e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_recorded_smooth_gradcampp(recorded, batch_size):
    model, tensors, ids, noise, layer = recorded
    maps = class_activation_map(
        model, tensors["images"], ids, layer, "smoothgradcampp", batch_size=batch_size, noise=noise
    )
    assert_close(maps, tensors["cam.smoothgradcampp_map"], 2e-5)


@pytest.mark.parametrize("build", [tiny_resnet, tiny_convnext, tiny_timm, PlainNet, PairNet])
def test_convolutional_families_by_definition(build):
    model, pixels = build().eval(), images(12, 64, 64)
    layer = "pair" if build is PairNet else find_cam_layer(model, pixels)
    ids = class_ids(12)
    maps = class_activation_map(model, pixels, ids, layer, batch_size=5)
    expected = by_definition(model, pixels, ids, layer)
    assert maps.shape == (12, 64, 64) and maps.min() == 0 and 0.5 < maps.max() <= 1
    # Where every place speaks against the class, the definition has 0/0.
    has_contrast = expected.isfinite().all(dim=(1, 2))
    assert has_contrast.sum() >= 2 and not maps[~has_contrast].any()
    assert_close(maps[has_contrast], expected[has_contrast], 2e-5)


def test_vit_without_its_class_token():
    model, pixels = tiny_vit(), images()
    layer = find_cam_layer(model)
    maps = class_activation_map(model, pixels, class_ids(), batch_size=3)
    assert_close(maps, by_definition(model, pixels, class_ids(), layer, tokens=True), 2e-5)


def test_pooled_linear_head_is_the_row_of_the_classifier():
    model, pixels, ids = tiny_resnet(), images(4, 64, 64), class_ids()
    with torch.no_grad():
        features = model.resnet(pixels).last_hidden_state
        row = model.classifier[1].weight[ids]
        cam = torch.einsum("bk,bkhw->bhw", row, features).relu()
    cam = cam / cam.amax((1, 2), keepdim=True)
    maps = class_activation_map(model, pixels, ids, "resnet.encoder.stages.2", size=tuple(features.shape[-2:]))
    assert_close(maps, cam - cam.amin((1, 2), keepdim=True) * (1 - cam) / (1 - cam.amin((1, 2), keepdim=True)), 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_maps_depend_on_their_own_image_only(method):
    model, pixels, ids = tiny_resnet(), images(7), class_ids(7)
    whole = class_activation_map(model, pixels, ids, method=method)
    assert_close(class_activation_map(model, pixels, ids, method=method, batch_size=3), whole, 2e-5)
    # A generator continues, so alone an image would get other noise than among others.
    if method == "gradcam":
        assert_close(class_activation_map(model, pixels[5:6], ids[5:6]), whole[5:6], 2e-5)
    else:
        other = class_activation_map(model, pixels, ids, method=method, generator=torch.Generator().manual_seed(1))
        assert not torch.allclose(other, whole, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_maps_ignore_the_scale_of_the_scores(scale):
    model, pixels, ids = tiny_resnet(), images(), class_ids()
    expected = class_activation_map(model, pixels, ids)
    with torch.no_grad():
        model.classifier[1].weight.mul_(scale)
    assert expected.amax() > 0.5
    assert_close(class_activation_map(model, pixels, ids), expected, 1e-5)


def test_map_without_contrast_is_zero():
    model = PlainNet()
    nn.init.zeros_(model.head[2].weight)
    assert not class_activation_map(model, images(), class_ids(), "trunk").any()


def test_other_size_and_type():
    model, pixels = tiny_resnet(), images(2, 48, 32)
    maps = class_activation_map(model, pixels, class_ids(2))
    assert maps.shape == (2, 48, 32)
    half = class_activation_map(model.bfloat16(), pixels, class_ids(2), size=(24, 16))
    assert half.shape == (2, 24, 16) and half.dtype == torch.float32
    assert (F.avg_pool2d(maps, 2) - half).abs().mean() < 0.05


def is_untouched(model, before, modes):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    return True


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(method):
    model = tiny_resnet().train()
    model.resnet.embedder.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    pixels = images().requires_grad_()
    maps = class_activation_map(model, pixels, class_ids(), method=method)
    assert not maps.requires_grad and pixels.grad is None and is_untouched(model, before, modes)
    for ids, layer, message in [
        (class_ids() + 10, None, "below the model's 5 classes; got 10 to 14.*map_class_ids"),
        (class_ids(), "stages.3", "`layer` 'stages.3' is not in ResNet.*'resnet.encoder.stages.2'"),
        (class_ids(), "classifier", "'classifier' of ResNet.* gives no map .*'resnet.encoder.stages.2'"),
        (class_ids(), "resnet", "gives no map"),
    ]:
        with pytest.raises(ValueError, match=message):
            class_activation_map(model, pixels, ids, layer, method)
        assert is_untouched(model, before, modes)
    with pytest.raises(ValueError, match="channel"):
        class_activation_map(model, pixels[:, :2], class_ids(), "resnet.encoder.stages.2", method)
    assert is_untouched(model, before, modes)


def test_no_graph_before_the_layer():
    model, pixels = tiny_resnet(), images(8, 64, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        class_activation_map(model, pixels, class_ids(8), "resnet.encoder.stages.2")
    assert kept and all(shape[-1] <= 16 and len(shape) < 4 or shape[1:] == (16, 4, 4) for shape in kept), kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_ids": torch.zeros(3, dtype=torch.int64)}, "one class per image, 4 in all; got \\(3,\\)"),
        ({"pixel_values": torch.zeros(3, 32, 32)}, "must be images"),
        ({"method": "lime"}, '"gradcam", "hirescam" or "smoothgradcampp"; got \'lime\''),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"noise": torch.zeros(4, 3, 32, 32)}, "\\(copies, 4, 3, 32, 32\\); got \\(4, 3, 32, 32\\)"),
    ],
)
def test_impossible_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        class_activation_map(tiny_resnet(), **{"pixel_values": images(), "class_ids": class_ids(), **arguments})


def draw_objects(count, generator):
    """Noise with the pattern of a class in one of the corners, the classes, and where the patterns are."""
    patterns = torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(5)).sign() * 2
    labels = torch.randint(3, (count,), generator=generator)
    pixels = torch.randn(count, 3, 16, 16, generator=generator)
    inside = torch.zeros(count, 16, 16, dtype=torch.bool)
    for image, mask, label in zip(pixels, inside, labels, strict=True):
        top, left = (11 * torch.randint(2, (2,), generator=generator)).tolist()
        image[:, top : top + 5, left : left + 5] = patterns[label]
        mask[top : top + 5, left : left + 5] = True
    return pixels, labels, inside


# Without pooling before its classifier, a ConvNet misleads Grad-CAM: means of gradients over places say little there.
@pytest.mark.parametrize(("family", "methods"), [("resnet", METHODS), ("convnet", METHODS[1:])])
def test_maps_find_the_object(family, methods):
    generator = torch.Generator().manual_seed(0)
    model = ConvNetForImageClassification(ConvNetConfig(hidden_size=16, depth=2, image_size=16, num_labels=3))
    if family == "resnet":
        config = ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 16], depths=[1, 1], layer_type="basic", num_labels=3
        )
        model = ResNetForImageClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(50):
        pixels, labels, _ = draw_objects(64, generator)
        optimizer.zero_grad()
        model(pixels, labels=labels).loss.backward()
        optimizer.step()
    pixels, labels, inside = draw_objects(100, generator)
    assert (model.eval()(pixels).logits.argmax(1) == labels).float().mean() > 0.9
    for method in methods:
        maps = class_activation_map(model, pixels, labels, method=method)
        share, area = maps[inside].sum() / maps.sum(), inside.float().mean()
        assert share > 1.5 * area, f"{method}: {share:.2f} of the map on {area:.2f} of the area"


def test_hirescam_equals_gradcam_where_the_head_pools_and_differs_where_it_flattens():
    from hf_effml import ConvNetConfig, build_student

    pooled = build_student(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4), seed=1
    )
    flattened = build_student(ConvNetConfig(image_size=32, hidden_size=8, num_labels=4), seed=1)
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(5) % 4
    for network, equal in ((pooled, True), (flattened, False)):
        maps = [class_activation_map(network, images, classes, method=method) for method in ("gradcam", "hirescam")]
        assert torch.allclose(*maps, atol=1e-5) == equal


def test_own_size_and_own_class_in_one_forward_pass():
    model, pixels, passes = tiny_resnet(), images(), []
    model.register_forward_hook(lambda *given: passes.append(given[2].logits))
    maps = class_activation_map(model, pixels, None, "resnet.encoder.stages.1", size="map")
    assert len(passes) == 1 and maps.shape == (4, 4, 4)
    named = passes[0].argmax(1)
    assert torch.equal(maps, class_activation_map(model, pixels, named, "resnet.encoder.stages.1", size="map"))
    half = class_activation_map(model.bfloat16(), pixels, named, "resnet.encoder.stages.1", size="map")
    assert half.dtype == torch.float32 and half.shape == maps.shape
