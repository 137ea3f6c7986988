"""Differentiable augmentation against recorded results, a loop over images, and finite differences."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from helpers import assert_close
from hf_effml.distillation.differentiable_augmentation import (
    OPERATIONS,
    AugmentationDraw,
    AugmentationSettings,
    augment,
    draw_augmentation,
)


VECTORS = Path(__file__).parents[1] / "vectors" / "distillation" / "dsa_ops.safetensors"
SIZES = [(1, 3, 8, 8), (3, 3, 7, 5), (2, 1, 5, 9), (4, 2, 2, 6)]


def settings_of(operation, **ratios):
    return AugmentationSettings(operation, **({"crop_ratio": 0.25, "cutout_ratio": 0.4} | ratios))


def drawn(operation, shape, seed=0, **ratios):
    generator = torch.Generator().manual_seed(seed)
    return draw_augmentation(settings_of(operation, **ratios), shape[0], shape[2:], generator)


def random_images(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def one_at_a_time(images, draw, settings):
    """The definition of every operation, image by image and pixel by pixel where that is plainest."""
    results = []
    for index, image in enumerate(images):
        value = {name: values[index].item() for name, values in draw.values.items()}
        results.append(LITERAL[draw.operation](image, value, settings))
    return torch.stack(results)


def literal_color(image, value, settings):
    image = image + (value["u_brightness"] - 0.5)
    grey = image.mean(0, keepdim=True)
    image = (image - grey) * 2 * value["u_saturation"] + grey
    return (image - image.mean()) * (value["u_contrast"] + 0.5) + image.mean()


def literal_crop(image, value, settings):
    height, width = image.shape[1:]
    padded = F.pad(image, (width, width, height, height))
    top, left = height + value["t_h"], width + value["t_w"]
    return padded[:, top : top + height, left : left + width]


def literal_cutout(image, value, settings):
    hole = [int(length * settings.cutout_ratio + 0.5) for length in image.shape[1:]]
    starts = (value["o_h"] - hole[0] // 2, value["o_w"] - hole[1] // 2)
    image = image.clone()
    for row in range(hole[0]):
        for column in range(hole[1]):
            place = [
                min(max(start + step, 0), length - 1)
                for start, step, length in zip(starts, (row, column), image.shape[1:], strict=True)
            ]
            image[:, place[0], place[1]] = 0
    return image


def literal_flip(image, value, settings):
    return image.flip(2) if value["u"] < 0.5 else image


def literal_scale(image, value, settings):
    stretch = [value[name] * (1.2 - 1 / 1.2) + 1 / 1.2 for name in ("u_x", "u_y")]
    return literal_affine(image, [[stretch[0], 0, 0], [0, stretch[1], 0]])


def literal_rotate(image, value, settings):
    angle = math.radians((value["u"] - 0.5) * 30)
    return literal_affine(image, [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])


def literal_affine(image, matrix):
    matrix = torch.tensor([matrix], dtype=image.dtype)
    grid = F.affine_grid(matrix, [1, *image.shape], align_corners=True)
    return F.grid_sample(image.unsqueeze(0), grid, align_corners=True)[0]


LITERAL = {
    "color": literal_color,
    "crop": literal_crop,
    "cutout": literal_cutout,
    "flip": literal_flip,
    "scale": literal_scale,
    "rotate": literal_rotate,
}


@pytest.mark.parametrize("case", ["color", "crop", "crop_pad0p25", "cutout", "flip", "scale", "rotate"])
def test_known_answers(case):
    tensors = load_file(VECTORS)
    described = json.loads(VECTORS.with_suffix(".json").read_text())["tensors"]
    values = {
        name.removeprefix(f"{case}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{case}.") and described[name]["what"].startswith("raw draw")
    }
    settings = AugmentationSettings(crop_ratio=0.25 if case == "crop_pad0p25" else 0.125)
    images = tensors["x"].requires_grad_()
    result = augment(images, AugmentationDraw(case.split("_")[0], values), settings)
    (gradient,) = torch.autograd.grad(result, images, tensors[f"{case}.cotangent"])
    assert_close(result, tensors[f"{case}.out"], 1e-6, case)
    assert_close(gradient, tensors[f"{case}.grad_x"], 1e-6, case)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_equals_a_loop_over_images(operation, shape):
    images, cotangent = random_images(shape), random_images(shape, seed=1)
    for seed in range(6):
        draw = drawn(operation, shape, seed)
        outcomes = []
        for function in (augment, one_at_a_time):
            leaf = images.clone().requires_grad_()
            result = function(leaf, draw, settings_of(operation))
            outcomes.append((result, torch.autograd.grad(result, leaf, cotangent)[0]))
        # Angles and scales are drawn in float32, and the loop computes with Python's numbers.
        assert_close(outcomes[0], outcomes[1], 1e-5 if operation in ("scale", "rotate") else 1e-6, f"seed {seed}")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_equal_finite_differences(operation):
    shape = (2, 3, 5, 4)
    draw, settings = drawn(operation, shape, seed=3), settings_of(operation)
    images = random_images(shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, draw, settings), images)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, draw, settings) ** 3, images)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_function_transforms_agree_with_autograd(operation):
    shape = (3, 3, 6, 6)
    draw, settings = drawn(operation, shape, seed=1), settings_of(operation)
    images = random_images(shape).requires_grad_()

    def loss(x):
        return (augment(x, draw, settings) ** 3).sum()

    (first,) = torch.autograd.grad(loss(images), images, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), images)
    assert_close(torch.func.grad(loss)(images), first, 1e-12)
    assert_close(torch.func.grad(lambda x: (torch.func.grad(loss)(x) ** 2).sum())(images), second, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_lower_precision(operation, dtype):
    shape = (3, 3, 9, 9)
    draw, settings = drawn(operation, shape, seed=2), settings_of(operation)
    images = random_images(shape, dtype).requires_grad_()
    result = augment(images, draw, settings)
    (gradient,) = torch.autograd.grad(result.sum(), images)
    assert result.dtype == gradient.dtype == dtype
    exact = augment(images.detach().double(), draw, settings)
    # Everything is computed in float32 or better: only the result is rounded.
    assert_close(result.double(), exact, max(torch.finfo(dtype).eps, 1e-5) / 2)


def test_images_outside_of_the_shift_range_of_the_settings_are_not_mixed_up():
    images = random_images((2, 1, 4, 4))
    draw = AugmentationDraw("crop", {"t_h": torch.tensor([0, 9]), "t_w": torch.tensor([-3, 0])})
    result = augment(images, draw, AugmentationSettings("crop"))
    assert torch.equal(result[0, 0, :, 3], images[0, 0, :, 0])
    assert not result[0, 0, :, :3].any()
    assert not result[1].any()


@pytest.mark.parametrize(
    ("operation", "limits"),
    [("crop", {"t_h": (-2, 2), "t_w": (-1, 1)}), ("cutout", {"o_h": (0, 8), "o_w": (0, 4)})],
)
def test_integer_draws_cover_their_range(operation, limits):
    # Height 8 has an even hole of 4 with nine places, width 5 an odd one of 3 with five.
    values = drawn(operation, (2000, 3, 8, 5), crop_ratio=0.25, cutout_ratio=0.5).values
    assert {name: (value.min().item(), value.max().item()) for name, value in values.items()} == limits
    assert all(len(value.unique()) == 1 + limits[name][1] - limits[name][0] for name, value in values.items())


def test_operations_are_drawn_alike_often():
    generator = torch.Generator().manual_seed(0)
    names = [draw_augmentation(AugmentationSettings(), 1, 4, generator).operation for _ in range(1200)]
    assert all(150 < names.count(operation) < 250 for operation in OPERATIONS)


def test_draws_repeat_with_the_seed_and_differ_between_images():
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 5, 6)]
    draws = [[draw_augmentation(AugmentationSettings(), 4, 8, each) for _ in range(8)] for each in generators]
    kinds = [[draw.operation for draw in row] for row in draws]
    assert kinds[0] == kinds[1] != kinds[2]
    assert_close([draw.values for draw in draws[0]], [draw.values for draw in draws[1]])
    uniform = next(draw for draw in draws[0] if draw.operation in ("color", "flip", "scale", "rotate"))
    assert all(len(value.unique()) == 4 for value in uniform.values.values())


def test_a_draw_moves_to_another_device():
    draw = drawn("scale", (3, 3, 4, 4))
    generator = torch.Generator().manual_seed(0)
    moved = draw_augmentation(settings_of("scale"), 3, 4, generator, device="meta")
    assert {name: value.device.type for name, value in moved.values.items()} == {"u_x": "meta", "u_y": "meta"}
    assert draw.to("meta").operation == "scale"


@pytest.mark.parametrize("strategy", ["", "none"])
def test_no_augmentation(strategy):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    settings, images = AugmentationSettings(strategy), torch.ones(2, 3, 4, 4)
    assert draw_augmentation(settings, 2, 4, generator) is None
    assert torch.equal(generator.get_state(), before)
    assert augment(images, None, settings) is images


def test_a_ratio_of_zero_changes_nothing():
    images = random_images((3, 3, 6, 5))
    for operation in ("crop", "cutout"):
        ratios = {"crop_ratio": 0.0, "cutout_ratio": 0.0}
        draw = drawn(operation, images.shape, **ratios)
        assert torch.equal(augment(images, draw, settings_of(operation, **ratios)), images)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "color_blur"}, "color, crop, cutout, flip, scale, rotate.*'blur'"),
        ({"strategy": "color_none"}, "'none' is none of them"),
        ({"crop_ratio": 1.0}, "`crop_ratio`.*1.0"),
        ({"crop_ratio": -0.1}, "`crop_ratio`.*-0.1"),
        ({"cutout_ratio": math.nan}, "`cutout_ratio`.*nan"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        AugmentationSettings(**fields)


def test_draws_that_do_not_fit():
    settings, images = AugmentationSettings(), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="for a batch of 3; got 2 images"):
        augment(images, drawn("flip", (3, 3, 4, 4)), settings)
    with pytest.raises(ValueError, match="'blur'"):
        augment(images, AugmentationDraw("blur", {"u": torch.zeros(2)}), settings)
