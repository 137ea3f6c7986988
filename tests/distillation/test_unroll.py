"""The exact adjoint of training on a synthetic set, against autograd through all of it, in double precision."""

import random
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import ConvNextConfig, PreTrainedConfig, ResNetConfig, ViTConfig

from helpers import assert_close, require_package
from hf_effml import ConvNetConfig
from hf_effml.distillation.differentiable_augmentation import OPERATIONS, AugmentationSettings
from hf_effml.distillation.flat_student import FlatStudent, build_student
from hf_effml.distillation.matching import MatchingSettings, match_segment, matching_loss
from hf_effml.distillation.unroll import (
    InnerProblem,
    InnerStep,
    StudentDerivatives,
    adjoint_sweep,
    plan_steps,
    soft_cross_entropy,
    unroll,
    unroll_reference,
)
from hf_effml.utils.benchmark import peak_memory


OFF = AugmentationSettings("none")


class Segment(NamedTuple):
    """All that a segment is matched with; small, in double precision."""

    derivatives: StudentDerivatives
    images: Tensor
    labels: Tensor
    lr: Tensor
    start: Tensor
    target: Tensor
    plan: list[InnerStep]
    settings: MatchingSettings

    @property
    def problem(self):
        return InnerProblem(*self[:5], self.plan, self.settings.augmentation)

    def matched(self, **others):
        return match_segment(self.problem, self.target, replace(self.settings, **others))

    def reference(self, checkpoint=False):
        """Loss and gradients by autograd through the whole unroll."""
        given = [tensor.clone().requires_grad_() for tensor in (self.images, self.labels, self.lr)]
        images, labels, lr = given
        final = unroll_reference(self.problem._replace(images=images, labels=labels, lr=lr), checkpoint)
        loss, _ = matching_loss(final, self.start, self.target, self.settings.mask, self.settings.drop_ratio)
        return loss.detach(), torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)


def convnet(**fields):
    return ConvNetConfig(**{"image_size": 8, "depth": 2, "hidden_size": 3, "num_labels": 3, **fields})


def segment(
    config: PreTrainedConfig | None = None,
    images: int = 6,
    lr: float = 0.1,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    derivatives: StudentDerivatives | None = None,
    **settings,
) -> Segment:
    """Random synthetic images that a student trains on, and a target not far from its start."""
    if derivatives is None:
        derivatives = StudentDerivatives(FlatStudent(build_student(config or convnet(), seed)).to(dtype))
    student, generator = derivatives.student, torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    own = student.module.config
    pixels, labels = noise(images, own.num_channels, own.image_size, own.image_size), noise(images, own.num_labels)
    start = student.flatten()
    target = start + 0.05 * noise(student.numel)
    settings = {"syn_steps": 4, "loss_threshold": 1e9, "augmentation": AugmentationSettings(), **settings}
    settings = MatchingSettings(**settings)
    plan = plan_steps(
        images,
        pixels.shape[2:],
        steps=settings.syn_steps,
        batch_size=settings.batch_syn,
        augmentation=settings.augmentation,
        seed=seed,
    )
    return Segment(derivatives, pixels, labels, torch.tensor(lr, dtype=dtype), start, target, plan, settings)


def assert_gradients(actual, expected, tolerance=1e-10):
    """Equal in the norm of each gradient."""
    for name, one, other in zip(("images", "labels", "lr"), actual, expected, strict=True):
        assert one.isfinite().all() and one.shape == other.shape
        error = (one - other).norm() / other.norm().clamp(min=1e-30)
        assert error <= tolerance, f"gradient of {name} is off by {error.item():.2g}"


def random_fields(seed):
    draw = random.Random(seed)
    operations = draw.sample(OPERATIONS, draw.randint(1, len(OPERATIONS)))
    mask = draw.choice(["none", "depth", "loss"])
    config = convnet(
        depth=draw.choice([1, 2]),
        norm=draw.choice(["instance", "batch", "layer", "group", "none"]),
        pooling=draw.choice(["avg", "max"]),
        activation=draw.choice(["relu", "leaky_relu", "sigmoid"]),
        num_channels=draw.choice([1, 3]),
        # Groups of 4 channels.
        hidden_size=4,
    )
    return {
        "config": config,
        "seed": seed,
        "images": draw.randint(1, 7),
        "lr": draw.choice([0.02, 0.3]),
        "syn_steps": draw.randint(1, 7),
        "batch_syn": draw.choice([None, 1, 2, 3, 4, 100]),
        "mask": mask,
        "drop_ratio": 0.0 if mask == "none" else draw.choice([0.0, 0.2, 0.5, 0.9]),
        "augmentation": AugmentationSettings(draw.choice(["none", "_".join(operations)])),
    }


@pytest.mark.parametrize("seed", range(20))
def test_adjoint_equals_autograd(seed):
    one = segment(**random_fields(seed))
    loss, gradients = one.reference()
    matched = one.matched()
    assert_close(matched.loss, loss, 1e-12)
    assert_gradients(matched.gradients, gradients)


def with_func(derivatives):
    """What `compile=True` compiles, without compiling it."""
    twin = StudentDerivatives(derivatives.student)
    object.__setattr__(twin, "gradient", twin._gradient_of_func)
    object.__setattr__(twin, "second_order", twin._second_order_of_func)
    return twin


RESNET = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", image_size=16)
VIT = ViTConfig(
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=8,
    image_size=8,
    patch_size=4,
    attn_implementation="sdpa",
    hidden_dropout_prob=0.3,
)
CONVNEXT = ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2, image_size=8)


@pytest.mark.parametrize("config", [convnet(norm="batch"), RESNET, VIT, CONVNEXT], ids=lambda each: each.model_type)
def test_students(config):
    one = segment(config, syn_steps=3, batch_syn=4)
    _, gradients = one.reference()
    assert_gradients(one.matched().gradients, gradients)
    assert_gradients(one._replace(derivatives=with_func(one.derivatives)).matched().gradients, gradients)


@pytest.mark.parametrize(("architecture", "arguments"), [("test_resnet", {}), ("test_vit", {"img_size": 32})])
def test_students_of_timm(architecture, arguments):
    require_package("timm")
    from transformers import TimmWrapperConfig

    config = TimmWrapperConfig(architecture=architecture, model_args=arguments, num_labels=3)
    derivatives = StudentDerivatives(FlatStudent(build_student(config)).to(torch.float64))
    derivatives.student.module.config.update({"num_channels": 3, "image_size": 32})
    one = segment(derivatives=derivatives, images=3, syn_steps=2, augmentation=OFF)
    _, gradients = one.reference()
    assert_gradients(one.matched().gradients, gradients)
    assert_gradients(one._replace(derivatives=with_func(derivatives)).matched().gradients, gradients)


@pytest.mark.slow
def test_compiled_derivatives():
    """With and without what the first step leaves out."""
    one = segment(syn_steps=3, batch_syn=3)
    _, gradients = one.reference()
    compiled = one._replace(derivatives=StudentDerivatives(one.derivatives.student, compile=True))
    assert_gradients(compiled.matched().gradients, gradients)


def test_checkpointed_reference_is_the_same():
    one = segment(batch_syn=4)
    for actual, expected in zip(one.reference(checkpoint=True), one.reference(), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("operation", [*OPERATIONS, "none"])
def test_gradient_equals_finite_differences(operation):
    """Along random directions; nothing here has a kink."""
    config = convnet(activation="sigmoid")
    one = segment(config, batch_syn=4, augmentation=AugmentationSettings(operation), seed=3)
    gradients = one.matched().gradients
    for name in ("images", "labels", "lr"):
        value = getattr(one, name)
        direction = torch.randn(value.shape, dtype=torch.float64)
        step = 1e-5 * direction
        ahead, behind = (one._replace(**{name: value + sign * step}).matched().loss for sign in (1, -1))
        slope = (getattr(gradients, name) * direction).sum()
        assert slope.abs() > 1e-6
        assert_close((ahead - behind) / 2e-5 / slope, torch.ones((), dtype=torch.float64), 1e-6, name)


@pytest.mark.parametrize("change", [{"syn_steps": 0}, {"lr": 0.0}])
def test_a_student_that_does_not_move(change):
    one = segment(**change)
    loss, gradients = one.matched()
    assert loss == 1 and not gradients.images.any() and not gradients.labels.any()
    assert bool(gradients.lr) == ("lr" in change)


def test_a_student_that_arrives():
    one = segment()
    final = unroll(one.problem)[-1]
    loss, gradients = one._replace(target=final).matched()
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


def test_images_that_are_never_drawn_have_no_gradient():
    one = segment(images=7, syn_steps=3, batch_syn=2, seed=1)
    drawn = torch.cat([step.index for step in one.plan]).unique()
    gradients = one.matched().gradients
    with_gradient = gradients.images.flatten(1).any(1).nonzero().squeeze(1)
    assert 0 < len(drawn) < 7 and torch.equal(with_gradient, drawn)
    assert torch.equal(gradients.labels.any(1).nonzero().squeeze(1), drawn)


def test_permuted_images_have_permuted_gradients():
    one = segment(batch_syn=4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    plan = [step._replace(index=order.argsort()[step.index]) for step in one.plan]
    other = one._replace(images=one.images[order], labels=one.labels[order], plan=plan)
    mine, theirs = one.matched(), other.matched()
    assert_close(theirs.loss, mine.loss)
    assert_close(theirs.gradients, (mine.gradients.images[order], mine.gradients.labels[order], mine.gradients.lr))


def test_first_order_is_exact_for_one_step_only():
    one = segment(syn_steps=1)
    assert_gradients(one.matched(gradient_mode="first_order").gradients, one.reference()[1])
    two = segment(syn_steps=2)
    approximate, exact = two.matched(gradient_mode="first_order").gradients, two.matched().gradients
    assert (approximate.images - exact.images).norm() > 1e-3 * exact.images.norm()


def test_sweep_empties_the_states_and_leaves_its_input():
    one = segment()
    before = [tensor.clone() for tensor in (one.images, one.labels, one.lr, one.start)]
    states = unroll(one.problem)
    assert len(states) == one.settings.syn_steps + 1
    adjoint = torch.randn_like(one.start)
    kept = adjoint.clone()
    adjoint_sweep(one.problem, states, adjoint)
    assert states == [] and torch.equal(adjoint, kept)
    assert_close([one.images, one.labels, one.lr, one.start], before)


def test_soft_cross_entropy():
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits, labels.softmax(1))
    assert_close(soft_cross_entropy(logits, labels), expected, 1e-14)
    half, labels = logits.bfloat16(), labels.float()
    assert_close(soft_cross_entropy(half, labels), soft_cross_entropy(half.float(), labels))


@pytest.mark.parametrize(
    ("images", "batch", "sizes"),
    [
        (10, 4, [2, 4, 4, 2, 4, 4]),
        (6, 3, [3, 3, 3]),
        (5, None, [5, 5]),
        (5, 100, [5, 5]),
        (1, 1, [1, 1]),
    ],
)
def test_plan(images, batch, sizes):
    """The small batch comes first, every round holds each image once, and rounds differ."""

    def plan(seed):
        return plan_steps(images, (8, 8), steps=len(sizes), batch_size=batch, augmentation=OFF, seed=seed)

    steps = plan(0)
    assert [len(step.index) for step in steps] == sizes and all(step.draw is None for step in steps)
    per_round = -(-images // min(batch or images, images))
    rounds = [torch.cat([step.index for step in steps[i : i + per_round]]) for i in range(0, len(steps), per_round)]
    for each in rounds[: len(steps) // per_round]:
        assert torch.equal(each.sort().values, torch.arange(images))
    assert images == 1 or any(not torch.equal(one, two) for one, two in pairwise(rounds)) or len(rounds) == 1
    assert all(torch.equal(one.index, two.index) for one, two in zip(steps, plan(0), strict=True))
    assert images == 1 or any(not torch.equal(one.index, two.index) for one, two in zip(steps, plan(1), strict=True))


def test_plan_draws_an_augmentation_per_step():
    steps = plan_steps(6, (8, 8), steps=60, batch_size=4, augmentation=AugmentationSettings(), seed=0)
    assert {step.draw.operation for step in steps} == set(OPERATIONS)
    for step in steps:
        assert {len(value) for value in step.draw.values.values()} == {len(step.index)}


def test_memory_grows_by_the_states_alone():
    derivatives = StudentDerivatives(FlatStudent(build_student(convnet(image_size=16, hidden_size=8, depth=1))))
    segments = {
        steps: segment(derivatives=derivatives, images=10, syn_steps=steps, dtype=torch.float32) for steps in (20, 40)
    }
    ours = {steps: peak_memory(each.matched) for steps, each in segments.items()}
    state = derivatives.student.numel * 4
    assert 0 < ours[40] - ours[20] <= 20 * state
    full = peak_memory(segments[40].reference)
    # What every step leaves behind, beyond the states.
    assert full >= 15 * (ours[40] - 41 * state)


def test_autocast_leaves_states_and_adjoint_in_single_precision():
    config = convnet(image_size=16, hidden_size=8)
    one = segment(config, dtype=torch.float32, images=8, syn_steps=6, batch_syn=4)
    exact = one.matched()
    with torch.autocast("cpu", torch.bfloat16):
        states = unroll(one.problem)
        found = one.derivatives.second_order(
            one.start, one.images[:4], one.labels[:4], torch.ones_like(one.start) * (1 + 2**-12)
        )
        ones = one.derivatives.second_order(one.start, one.images[:4], one.labels[:4], torch.ones_like(one.start))
        rounded = one.matched()
    assert all(tensor.dtype == torch.float32 for tensor in (*states, *found, rounded.loss, *rounded.gradients))
    # A direction that half precision could not tell from ones.
    assert not torch.equal(found[3], ones[3])
    assert rounded.loss != exact.loss
    assert_close(rounded.loss, exact.loss, 1e-2)
    for one_gradient, other in zip(rounded.gradients, exact.gradients, strict=True):
        assert (one_gradient - other).norm() <= 0.2 * other.norm()
