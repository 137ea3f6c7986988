"""Estimates of memory, arithmetic and disk against published numbers and against what a small run really takes."""

import pytest
import torch
from transformers import ResNetConfig, ViTConfig

from hf_effml import VimConfig
from hf_effml.cli.recipes import read_recipes
from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.distillation.differentiable_augmentation import AugmentationSettings
from hf_effml.distillation.evaluation.cost import estimate_cost, recipe_costs
from hf_effml.distillation.flat_student import FlatStudent, build_student
from hf_effml.distillation.unroll import (
    InnerProblem,
    StudentDerivatives,
    adjoint_sweep,
    plan_steps,
    unroll,
    unroll_reference,
)
from hf_effml.utils.benchmark import peak_memory


# MB per image-step, GB of the full unroll, of a step, of the states, MFLOP of an image, TFLOP of an iteration.
KNOWN = {
    "datm cifar10_ipc1": (3.1, 2.5, 0.03, 0.10, 101, 1.0),
    "datm cifar10_ipc10": (3.1, 25, 0.31, 0.10, 101, 9.7),
    "datm cifar10_ipc50": (3.1, 125, 1.6, 0.10, 101, 49),
    "datm cifar10_ipc1000": (3.1, 312, 3.1, 0.13, 101, 122),
    "datm tiny_imagenet_ipc50": (12.6, 252, 12.6, 0.07, 425, 102),
    "edf imagenette_ipc10": (50.6, 202, 5.1, 0.10, 1718, 82),
    "edf imagenette_ipc50": (50.6, 518, 6.5, 0.20, 1718, 211),
}


@pytest.fixture(scope="module")
def costs():
    """What every setting of the papers needs, by method and name of the recipe."""
    methods = ("datm", "pad", "edf")
    return {
        f"{method} {name}": cost for method in methods for name, cost in recipe_costs(read_recipes(method)).items()
    }


@pytest.mark.parametrize("name", KNOWN)
def test_known_settings(costs, name):
    cost = costs[name]
    found = (
        cost.mb_per_image_step,
        cost.gb_full_unroll,
        cost.gb_one_step,
        cost.gb_states,
        cost.forward_flop / 1e6,
        cost.tflop_ours,
    )
    # A bit over three percent, or half of the last digit that is printed.
    for value, known, half_digit in zip(found, KNOWN[name], (0.05, 0.05, 0.005, 0.005, 0.5, 0.05), strict=True):
        assert abs(value - known) <= max(0.035 * known, half_digit), (value, known)


def test_published_settings(costs):
    assert len(costs) == 12 + 12 + 41
    parameters = {"cifar10": 320_010, "cifar100": 504_420, "tiny_imagenet": 857_160}
    for name, cost in costs.items():
        data = name.split()[1].rpartition("_ipc")[0]
        assert cost.parameters == parameters.get(data, 615_690)
    whole = costs["pad cifar10_ipc500"]
    assert round(whole.gb_bank, 1) == 12.9 and whole.snapshots == 101
    # Start epochs 40 to 59 and targets up to 61.
    assert whole.kept_snapshots == 22
    assert costs["edf imagenette_ipc1"].batch == 10 and costs["edf imagewoof_ipc10"].batch == 100
    row = costs["edf imagenette_ipc50"].as_row()
    numbers = [row[name] for name in ("parameters", "MFLOP_per_image", "MB_per_image-step", "full_unroll_GB")]
    assert numbers == [615690, 1720, 50.3, 519]


def test_arithmetic_of_a_convnet():
    cost = estimate_cost(
        ConvNetConfig(hidden_size=4, depth=2), (3, 8, 16), 5, 3, syn_steps=7, batch_syn=4, snapshots=11, iterations=100
    )
    products = 8 * 16 * 4 * 27 + 4 * 8 * 4 * 36 + 2 * 4 * 4 * 5
    assert cost.forward_flop == 2 * products
    assert cost.outputs == 4 * (8 * 16 + 4 * 8) + 5
    assert cost.parameters == 4 * 28 + 8 + 4 * 37 + 8 + 5 * 33
    assert cost.tflop_full_unroll == pytest.approx(9 * 2 * products * 4 * 7 / 1e12)
    assert cost.tflop_ours == pytest.approx(12 / 9 * cost.tflop_full_unroll)
    assert cost.pflop_total == pytest.approx(cost.tflop_ours / 10)
    assert cost.gb_states == pytest.approx(8 * 4 * cost.parameters / 1e9)
    assert cost.gb_bank == cost.gb_bank_kept == pytest.approx(100 * 11 * 4 * cost.parameters / 1e9)


@pytest.mark.parametrize(
    "config",
    [
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        ViTConfig(patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32),
        # Its scan does not run without data.
        VimConfig(patch_size=8, hidden_size=16, num_hidden_layers=1, state_size=4),
    ],
    ids=lambda config: config.model_type,
)
def test_other_students(config):
    before = config.to_dict()
    cost = estimate_cost(config, (1, 16, 16), 7, 2, syn_steps=3)
    assert config.to_dict() == before and cost.batch == 14
    assert cost == estimate_cost(before, (1, 16, 16), 7, 2, syn_steps=3)
    config = type(config).from_dict({**before, "num_channels": 1, "image_size": 16}, num_labels=7)
    student = build_student(config)
    assert cost.parameters == sum(parameter.numel() for parameter in student.parameters())
    assert student(torch.zeros(1, 1, 16, 16)).logits.shape == (1, 7)
    assert cost.forward_flop > 2 * cost.outputs > 0


def test_memory_of_a_small_run():
    steps, batch = 4, 16
    student = FlatStudent(build_student(ConvNetConfig(hidden_size=16, image_size=32, num_labels=4)))
    derivatives, augmentation = StudentDerivatives(student), AugmentationSettings("none")
    plan = plan_steps(batch, (32, 32), steps=steps, batch_size=None, augmentation=augmentation, seed=0)
    images, labels, lr = torch.randn(batch, 3, 32, 32), torch.randn(batch, 4), torch.tensor(0.01)
    start = student.flatten()

    def full_unroll():
        wanted = [tensor.detach().requires_grad_() for tensor in (images, labels, lr)]
        final = unroll_reference(InnerProblem(derivatives, *wanted, start, plan, augmentation))
        torch.autograd.grad(final.square().sum(), wanted)

    def ours():
        problem = InnerProblem(derivatives, images, labels, lr, start, plan, augmentation)
        states = unroll(problem)
        adjoint_sweep(problem, states, 2 * states[-1])

    cost = estimate_cost(student.module.config, (3, 32, 32), 4, batch // 4, syn_steps=steps)
    assert peak_memory(full_unroll) / 1e9 == pytest.approx(cost.gb_full_unroll, rel=0.2)
    assert peak_memory(ours) / 1e9 == pytest.approx(cost.gb_ours, rel=0.2)


@pytest.mark.parametrize("name", ["num_classes", "ipc", "syn_steps", "batch_syn", "num_experts", "kept_snapshots"])
def test_impossible_numbers(name):
    numbers = {"num_classes": 2, "ipc": 1, "syn_steps": 1, name: 0}
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1; got 0"):
        estimate_cost(ConvNetConfig(), (3, 32, 32), **numbers)
