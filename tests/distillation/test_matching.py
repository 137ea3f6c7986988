"""The loss of trajectory matching: which parameters it looks at, and what happens to segments it cannot use."""

import math
from dataclasses import replace

import pytest
import torch

from helpers import assert_close
from hf_effml import ConvNetConfig
from hf_effml.distillation import matching
from hf_effml.distillation.differentiable_augmentation import AugmentationSettings
from hf_effml.distillation.flat_student import FlatStudent, build_student
from hf_effml.distillation.matching import MatchingSettings, kept_entries, match_segment, match_segments, matching_loss
from hf_effml.distillation.unroll import StudentDerivatives


RATIOS = [0.0, 0.001, 0.1, 0.25, 0.5, 0.999]


def vectors(length=101, dtype=torch.float64):
    return (torch.randn(length, dtype=dtype) for _ in range(3))


@pytest.mark.parametrize("mask", ["depth", "loss"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_kept_entries(mask, ratio):
    errors = torch.randn(101).square()
    kept = kept_entries(errors, mask, ratio)
    kept = torch.ones(101) if kept is None else kept
    assert kept.sum() == 101 - int(ratio * 101) and set(kept.tolist()) <= {0, 1}
    if mask == "depth":
        assert torch.equal(kept, (torch.arange(101) >= int(ratio * 101)).float())
    elif kept.sum() < 101:
        assert errors[kept == 1].min() > errors[kept == 0].max()


def test_ties_are_dropped_only_as_far_as_needed():
    assert kept_entries(torch.ones(10), "loss", 0.35).sum() == 7


def test_nothing_is_left_out():
    errors = torch.randn(101).square()
    assert kept_entries(errors, "none", 0.0) is None
    assert kept_entries(errors, "depth", 0.0) is None and kept_entries(errors, "loss", 0.009) is None


def test_a_larger_depth_ratio_keeps_a_part_of_what_a_smaller_one_keeps():
    masks = [kept_entries(torch.ones(101), "depth", ratio) for ratio in (0.1, 0.25, 0.5, 0.999)]
    for larger, smaller in zip(masks, masks[1:], strict=False):
        assert (larger >= smaller).all()


@pytest.mark.parametrize(("mask", "ratio"), [("none", 0.0), ("depth", 0.4), ("loss", 0.4)])
def test_loss_and_its_gradient(mask, ratio):
    final, start, target = vectors()
    final.requires_grad_()
    loss, gradient = matching_loss(final, start, target, mask, ratio)
    entries = torch.arange(101)
    if mask == "depth":
        entries = entries[40:]
    elif mask == "loss":
        entries = (final - target).detach().abs().argsort()[40:]
    expected = (final - target)[entries].square().sum() / (start - target)[entries].square().sum()
    assert_close(loss.detach(), expected.detach(), 1e-14)
    (wanted,) = torch.autograd.grad(expected, final, retain_graph=True)
    assert_close(gradient, wanted, 1e-14)
    assert_close(torch.autograd.grad(loss, final)[0], wanted, 1e-14)
    assert not gradient.requires_grad


def test_worked_example():
    """Squared errors 4 1 9 0 16 2 25 36, squared ways 9 9 9 9 25 25 49 64; the 0 and the 1 are dropped."""
    errors = torch.tensor([4.0, 1, 9, 0, 16, 2, 25, 36])
    ways = torch.tensor([9.0, 9, 9, 9, 25, 25, 49, 64])
    target = torch.zeros(8)
    loss, _ = matching_loss(errors.sqrt(), ways.sqrt(), target, "loss", 0.25)
    assert loss.item() == pytest.approx(92 / 181)
    assert matching_loss(errors.sqrt(), ways.sqrt(), target)[0].item() == pytest.approx(93 / 199)


class Case:
    """A student, a synthetic set, and segments of random length."""

    def __init__(self, segments=3, **settings):
        generator = torch.Generator().manual_seed(0)
        student = FlatStudent(build_student(ConvNetConfig(image_size=8, depth=1, hidden_size=4, num_labels=3)))
        self.derivatives = StudentDerivatives(student.to(torch.float64))
        self.images = torch.randn(6, 3, 8, 8, generator=generator).double()
        self.labels = torch.randn(6, 3, generator=generator).double()
        self.lr = torch.tensor(0.1).double()
        self.starts = torch.stack([student.flatten() + 0.01 * number for number in range(segments)])
        self.targets = self.starts + 0.05 * torch.randn(self.starts.shape, generator=generator).double()
        self.seeds = list(range(segments))
        self.settings = MatchingSettings(**{"syn_steps": 3, "batch_syn": 4, "loss_threshold": 100.0, **settings})

    def alone(self, number, **others):
        settings = replace(self.settings, **others)
        return match_segment(self.problem(number), self.targets[number], settings)

    def problem(self, number):
        given = self.derivatives, self.images, self.labels, self.lr, self.starts[number], self.seeds[number]
        return self.settings.problem(*given)

    def together(self):
        leaves = [tensor.clone().requires_grad_() for tensor in (self.images, self.labels, self.lr)]
        found = match_segments(self.derivatives, *leaves, self.starts, self.targets, self.seeds, self.settings)
        return leaves, *found


@pytest.mark.parametrize(("mask", "ratio"), [("depth", 0.4), ("loss", 0.4)])
def test_what_is_left_out_does_not_matter(mask, ratio):
    case = Case(mask=mask, drop_ratio=ratio)
    before = case.alone(0)
    final = matching.unroll(case.problem(0))[-1]
    errors = (final - case.targets[0]).square()
    dropped = kept_entries(errors, mask, ratio) == 0
    # By depth any other target will do; by loss the entries must stay the best ones.
    case.targets[0][dropped] = case.targets[0][dropped] * 3 + 1 if mask == "depth" else final[dropped]
    after = case.alone(0)
    assert_close(after.loss, before.loss)
    assert_close(after.gradients, before.gradients)


def test_ratio_zero_is_the_full_loss():
    case = Case()
    expected = case.alone(0)
    for mask in ("depth", "loss"):
        assert_close(case.alone(0, mask=mask), expected)


def test_the_students_way_does_not_depend_on_the_mask(monkeypatch):
    case, ways = Case(), []

    def recorded(*arguments):
        states = unroll(*arguments)
        ways.append(torch.stack(states))
        return states

    unroll = matching.unroll
    monkeypatch.setattr(matching, "unroll", recorded)
    losses = {
        case.alone(0, mask=mask, drop_ratio=ratio).loss.item()
        for mask, ratio in (("none", 0.0), ("depth", 0.2), ("depth", 0.6), ("loss", 0.6))
    }
    assert len(losses) == 4 and all(torch.equal(way, ways[0]) for way in ways)


def test_several_segments_are_averaged():
    case = Case()
    leaves, loss, losses, took_part = case.together()
    single = [case.alone(number) for number in range(3)]
    assert_close(losses, torch.stack([each.loss for each in single]))
    assert_close(loss.detach(), losses.mean(), 1e-14)
    assert took_part.tolist() == [True] * 3
    gradients = torch.autograd.grad(0.5 * loss, leaves)
    for name, gradient in zip(("images", "labels", "lr"), gradients, strict=True):
        mean = sum(getattr(each.gradients, name) for each in single) / 3
        assert_close(gradient, mean / 2, 1e-14, name)


def test_segments_above_the_threshold_count_as_zero():
    case = Case()
    values = sorted(case.alone(number).loss.item() for number in range(3))
    case.settings = replace(case.settings, loss_threshold=(values[0] + values[1]) / 2)
    leaves, loss, losses, took_part = case.together()
    assert sorted(losses.tolist()) == pytest.approx(values) and loss.item() == pytest.approx(sum(values) / 3)
    assert took_part.sum() == 1
    best = case.alone(int(losses.argmin()))
    for gradient, wanted in zip(torch.autograd.grad(loss, leaves), best.gradients, strict=True):
        assert_close(gradient, wanted / 3, 1e-14)


def test_a_loss_equal_to_the_threshold_takes_part():
    case = Case()
    assert case.alone(0, loss_threshold=case.alone(0).loss.item()).gradients is not None


def test_segments_without_a_way_are_left_out():
    case = Case()
    case.targets[1] = case.starts[1]
    leaves, loss, losses, took_part = case.together()
    assert took_part.tolist() == [True, False, True] and not losses[1].isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite(value):
    case = Case(loss_threshold=math.inf)
    case.labels[0, 0] = value
    matched = case.alone(0)
    assert not matched.loss.isfinite() and matched.gradients is None


def test_gradients_that_are_not_finite_make_the_loss_so(monkeypatch):
    case = Case()
    broken = case.alone(0).gradients
    broken.labels[2, 1] = math.inf
    monkeypatch.setattr(matching, "adjoint_sweep", lambda *_, **__: broken)
    matched = case.alone(0)
    assert matched.loss.isnan() and matched.gradients is None


def test_no_gradients_without_need(monkeypatch):
    case = Case()
    monkeypatch.setattr(matching, "adjoint_sweep", lambda *_, **__: pytest.fail("gradients were computed"))
    found = match_segments(
        case.derivatives, case.images, case.labels, case.lr, case.starts, case.targets, case.seeds, case.settings
    )
    assert found[0].isfinite() and not found[0].requires_grad


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"syn_steps": -1}, "`syn_steps` must be at least 0; got -1"),
        ({"batch_syn": 0}, "`batch_syn` must be at least 1; got 0"),
        ({"mask": "deep"}, '`mask` must be "none", "depth" or "loss"; got "deep"'),
        ({"mask": "depth", "drop_ratio": 1.0}, "`drop_ratio` must be from 0 to below 1; got 1.0. At 1 nothing"),
        ({"mask": "loss", "drop_ratio": -0.1}, "`drop_ratio` must be from 0 to below 1; got -0.1"),
        ({"mask": "loss", "drop_ratio": math.nan}, "`drop_ratio` must be from 0 to below 1; got nan"),
        ({"drop_ratio": 0.25}, '`drop_ratio` is 0.25, but `mask` is "none".*set `drop_ratio` to 0'),
        ({"gradient_mode": "tesla"}, '`gradient_mode` must be "exact" or "first_order"; got "tesla"'),
    ],
)
def test_impossible_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        MatchingSettings(**fields)


def test_defaults():
    settings = MatchingSettings()
    assert (settings.mask, settings.drop_ratio, settings.gradient_mode) == ("none", 0.0, "exact")
    assert settings.augmentation == AugmentationSettings()
