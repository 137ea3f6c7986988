"""Weights from activation maps, class ids and pixels for the network that draws them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTImageProcessorPil

from helpers import assert_close, require_package
from hf_effml.comp_dd import subset_info
from hf_effml.distillation.edf import area_weights, constant_maps, for_map_network, map_class_ids
from hf_effml.distillation.image_processing_zca import ZCAImageProcessor


TENSORS = load_file(Path(__file__).parents[1] / "vectors" / "distillation" / "edf_step.safetensors")
WORKED = torch.tensor([[[0, 0, 0.2, 0.4], [0, 0.1, 0.6, 0.8], [0, 0.2, 0.9, 1], [0, 0, 0.3, 0.5]]])


@pytest.mark.parametrize("method", ["gradcam", "smoothgradcampp"])
@pytest.mark.parametrize("beta", [1, 2])
@pytest.mark.parametrize(("threshold", "written"), [(None, "0"), (0.5, "0p5")])
def test_recorded_weights(method, beta, threshold, written):
    weights = area_weights(TENSORS[f"cam.{method}_map"], beta, threshold)
    case = f"{method}_beta{beta}_thr{written}"
    assert_close(weights, TENSORS[f"out.weight.{case}"], 1e-6)
    gradient = TENSORS["out.grad_images_before"] * weights
    expected = TENSORS[f"out.grad_images.{case}"]
    assert (gradient - expected).norm() <= 5e-5 * expected.norm()


def test_worked_example():
    weights = area_weights(WORKED, beta=1)[0, 0]
    assert_close(weights, torch.tensor([[1, 1, 1, 1.4], [1, 1, 1.6, 1.8], [1, 1, 1.9, 2], [1, 1, 1, 1.5]]), 1e-6)
    weights = area_weights(WORKED, beta=1, threshold=0.5)[0, 0]
    assert_close(weights, torch.tensor([[1, 1, 1, 1], [1, 1, 1.6, 1.8], [1, 1, 1.9, 2], [1, 1, 1, 1.5]]), 1e-6)


def test_weights_depend_on_their_own_map_and_never_shrink_a_gradient():
    maps = torch.rand(5, 8, 6, generator=torch.Generator().manual_seed(0))
    for beta in (1.0, 1.5):
        weights = area_weights(maps, beta)
        below = maps < maps.mean((1, 2), keepdim=True)
        assert (weights.squeeze(1)[below] == 1).all() and (weights.squeeze(1)[~below] > 1).all()
    assert_close(area_weights(maps[3:4], 1), area_weights(maps, 1)[3:4])
    changed = torch.cat([maps[:4], torch.zeros(1, 8, 6)])
    assert_close(area_weights(changed, 1)[:4], area_weights(maps, 1)[:4])


@pytest.mark.parametrize("beta", [0, 1, 2])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_maps_without_contrast_weight_nothing(beta, threshold):
    maps = torch.stack([torch.zeros(4, 4), WORKED[0], torch.full((4, 4), 0.7)])
    weights = area_weights(maps, beta, threshold)
    assert constant_maps(maps).tolist() == [True, False, True]
    assert (weights[[0, 2]] == 1).all() and (weights[1] != 1).any()


def test_impossible_weights():
    for beta in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="`beta` must be at least 0"):
            area_weights(WORKED, beta)
    for threshold in (0, -1, 1.5):
        with pytest.raises(ValueError, match="`threshold` must be above 0 .* Leave it unset for the mean"):
            area_weights(WORKED, 1, threshold)


def test_class_ids():
    woof = dict(enumerate(subset_info("imagewoof").indices))
    labels = torch.tensor([[0.0, 0, 2], [3, 0, 1], [0, 1, 0]]).argmax(1)
    assert map_class_ids(labels, woof).tolist() == [258, 193, 182]
    with pytest.raises(ValueError, match=r"\[1, 2\] are missing, it has \[0, 5\]"):
        map_class_ids(labels, {0: 3, 5: 1})


def processor(mean, std, **settings):
    return ViTImageProcessorPil(image_mean=mean, image_std=std, **settings)


def test_between_processors():
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whitening = ZCAImageProcessor.from_images(torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    plain = ZCAImageProcessor(do_whiten=False, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    halves = processor([0.5] * 3, [0.25] * 3)
    bytes_of = processor([0.0] * 3, [1.0] * 3, rescale_factor=1.0)
    forms = {
        "whitening": (whitening, whitening.whiten(pixels)),
        "plain": (plain, plain.whiten(pixels)),
        "halves": (halves, (pixels - 0.5) / 0.25),
        "without": (processor([0.5] * 3, [0.25] * 3, do_normalize=False), pixels),
        "bytes": (bytes_of, pixels * 255),
    }
    for name, (source, given) in forms.items():
        for other, (target, expected) in forms.items():
            assert_close(for_map_network(given.requires_grad_(), source, target), expected, 1e-4, f"{name} to {other}")
            given = given.detach()


def test_what_the_processor_itself_does():
    picture = torch.randint(256, (3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    settings = {"do_resize": False, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    target = ViTImageProcessorPil(**settings)
    expected = target(picture, return_tensors="pt")["pixel_values"]
    source = processor([0.5] * 3, [0.5] * 3)
    assert_close(for_map_network((picture[None] / 255 - 0.5) / 0.5, source, target), expected, 1e-5)


@pytest.mark.parametrize("kind", [ViTImageProcessorPil, ZCAImageProcessor])
def test_what_no_picture_shows_is_cut_off(kind):
    settings = {} if kind is ViTImageProcessorPil else {"do_whiten": False}
    source, target = kind(image_mean=[0.5] * 3, image_std=[0.5] * 3, **settings), processor([0.0] * 3, [1.0] * 3)
    shown = for_map_network(torch.tensor([-3.0, 0.5, 3.0]).view(1, 3, 1, 1), source, target)
    assert_close(shown.flatten(), torch.tensor([0.0, 0.75, 1.0]))


def test_sizes_and_channels():
    colours = processor([0.5] * 3, [0.5] * 3)
    grey = ZCAImageProcessor(num_channels=1, do_whiten=False, image_mean=0.5, image_std=0.5)
    pixels = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wide = for_map_network(pixels, grey, colours, size=(32, 16))
    assert wide.shape == (2, 3, 32, 16) and torch.equal(wide[:, 0], wide[:, 2])
    whitening = ZCAImageProcessor.from_images(torch.rand(60, 3, 4, 4, generator=torch.Generator().manual_seed(1)))
    assert for_map_network(pixels, grey, whitening).shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match="for images of 1 channels; the synthetic ones have 3. Choose another map"):
        for_map_network(pixels.expand(-1, 3, -1, -1), colours, grey)
    with pytest.raises(ValueError, match="`pixel_values` have 1 channels, `source_processor` is for 3"):
        for_map_network(pixels, colours, colours)
    with pytest.raises(TypeError, match="A NoneType does not say how it normalises"):
        for_map_network(pixels, grey, None)


def test_timm_processor():
    require_package("timm")
    from transformers import TimmWrapperImageProcessor

    settings = {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 1.0}
    target = TimmWrapperImageProcessor({**settings, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)})
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_close(for_map_network(pixels, processor([0.0] * 3, [1.0] * 3), target), (pixels - 0.5) / 0.25, 1e-5)
