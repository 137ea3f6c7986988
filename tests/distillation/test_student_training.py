"""Training by a protocol equals a loop written out by hand, depends on its seed alone, and explains what cannot be."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import assert_close
from hf_effml import ConvNetConfig
from hf_effml.distillation.differentiable_augmentation import AugmentationSettings
from hf_effml.distillation.evaluation import training
from hf_effml.distillation.evaluation.protocols import PROTOCOLS, EvaluationProtocol, get_protocol
from hf_effml.distillation.evaluation.students import make_student
from hf_effml.distillation.evaluation.training import accuracy, train_student
from hf_effml.distillation.evaluation.training_sets import TrainingSet
from hf_effml.distillation.flat_student import seed_from
from hf_effml.distillation.real_images import RealImages


PLAIN = AugmentationSettings("none")


def _set(count=6, size=4, classes=3, **fields):
    generator = torch.Generator().manual_seed(5)
    return TrainingSet(
        torch.randn(count, 1, size, size, generator=generator),
        torch.arange(count) % classes,
        torch.randn(count, classes, generator=generator) * 3,
        **fields,
    )


def _linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


class _Recording(nn.Module):
    """A linear classifier that remembers what it was given."""

    def __init__(self, seen):
        super().__init__()
        self.linear, self.seen = nn.Linear(16, 3), seen

    def forward(self, pixel_values):
        self.seen.append(pixel_values.detach().clone())
        return self.linear(pixel_values.flatten(1))


def test_protocols_are_the_published_ones():
    tm = PROTOCOLS["tm"]
    assert (tm.labels, tm.epochs, tm.drop_epoch, tm.schedule, tm.batch_size) == ("soft", 1001, 501, "step", 128)
    assert (tm.optimizer, tm.momentum, tm.weight_decay, tm.learning_rate) == ("sgd", 0.9, 5e-4, None)
    assert not tm.all_operations and not tm.cutmix
    assert PROTOCOLS["tm-short"] == replace(tm, name="tm-short", epochs=300, drop_epoch=150)
    assert PROTOCOLS["hard"] == replace(tm, name="hard", labels="hard")
    kd = PROTOCOLS["kd"]
    assert (kd.labels, kd.epochs, kd.optimizer, kd.schedule, kd.cutmix) == ("teacher", 300, "adamw", "cosine", True)
    assert kd.all_operations and kd.augmentation.operations == ("crop", "flip")
    assert get_protocol("tm", epochs=100).drop_epoch == 50 and get_protocol("kd", epochs=9).drop_epoch is None
    assert get_protocol("tm", epochs=100, drop_epoch=None).drop_epoch is None
    assert list(PROTOCOLS) == ["tm", "tm-short", "hard", "kd"]
    for protocol in PROTOCOLS.values():
        assert EvaluationProtocol(**_thawed(json.loads(json.dumps(protocol.to_dict())))) == protocol


def _thawed(fields):
    found = fields["augmentation"]
    return fields | {"augmentation": None if found is None else AugmentationSettings(**found)}


def test_protocols_take_what_they_leave_open_from_the_set():
    rules = get_protocol("tm").for_set(_set(learning_rate=0.02))
    assert rules.learning_rate == 0.02 and rules.augmentation == AugmentationSettings()
    own = AugmentationSettings("flip", crop_ratio=0.25)
    assert get_protocol("tm").for_set(_set(augmentation=own)).augmentation == own
    named = get_protocol("tm", learning_rate=0.1, augmentation=PLAIN)
    assert named.for_set(_set(augmentation=own)) == named


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: get_protocol("mtt"), "`mtt` is no protocol; choose one of tm, tm-short, hard, kd"),
        (lambda: get_protocol("tm", labels="none"), "`labels` must be one of soft, hard, teacher; got 'none'"),
        (lambda: get_protocol("tm", epochs=0), "`epochs` must be at least 1; got 0"),
        (lambda: get_protocol("tm", learning_rate=0.0), "`learning_rate` must be more than 0"),
        (lambda: get_protocol("tm").for_set(_set(learning_rate=-1e-3)), "got -0.001. Where a set has learned"),
        (lambda: get_protocol("tm").for_set(_set(learning_rate=math.nan)), "got nan"),
    ],
)
def test_impossible_protocols(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sgd_with_a_drop_is_the_loop_by_hand():
    data = _set(learning_rate=0.05)
    protocol = get_protocol("tm", epochs=7, drop_epoch=4, augmentation=PLAIN)
    trained = train_student(data, _linear, protocol, seed=3)
    model = make_student(_linear, seed_from(3, "student"))
    weights = list(model.parameters())
    momenta = [torch.zeros_like(weight) for weight in weights]
    for epoch in range(7):
        if epoch == 4:
            momenta = [torch.zeros_like(weight) for weight in weights]
        loss = -(data.soft_labels.softmax(-1) * model(data.images).log_softmax(-1)).sum(-1).mean()
        for index, gradient in enumerate(torch.autograd.grad(loss, weights)):
            momenta[index] = 0.9 * momenta[index] + gradient + 5e-4 * weights[index].detach()
            weights[index].data -= (0.05 if epoch < 4 else 0.005) * momenta[index]
    assert_close(list(trained.parameters()), weights, 1e-6)
    assert not trained.training


def test_adamw_with_a_cosine_is_the_loop_by_hand():
    data = _set()
    protocol = get_protocol("kd", epochs=5, labels="hard", cutmix=False, augmentation=PLAIN)
    trained = train_student(data, _linear, protocol)
    model = make_student(_linear, seed_from(0, "student"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(data.images), data.class_ids).backward()
        optimizer.step()
        schedule.step()
    assert_close(list(trained.parameters()), list(model.parameters()), 1e-6)


def test_batches_cover_the_set_in_a_new_order_every_epoch():
    seen = []
    data = _set(count=7)
    train_student(data, lambda: _Recording(seen), get_protocol("tm", epochs=3, batch_size=3, augmentation=PLAIN))
    assert [len(batch) for batch in seen] == [3, 3, 1] * 3
    orders = [torch.cat(seen[start : start + 3]) for start in (0, 3, 6)]
    for order in orders:
        assert torch.equal(order.flatten(1).sort(0).values, data.images.flatten(1).sort(0).values)
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], data.images)


def test_labels_stay_with_their_images():
    # One image per class of its own kind: only with the right labels it is learned by heart.
    data = TrainingSet(torch.eye(16).view(16, 1, 4, 4) * 4, torch.randperm(16), learning_rate=0.5)
    protocol = get_protocol("hard", epochs=60, batch_size=5, augmentation=PLAIN)
    model = train_student(data, lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 16)), protocol)
    assert torch.equal(model(data.images).argmax(-1), data.class_ids)


def test_the_seed_decides_everything_and_the_global_state_stays():
    def network():
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))

    protocol = get_protocol("tm", epochs=5, batch_size=4)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(runs))
        before = torch.get_rng_state()
        runs.append(train_student(_set(), network, protocol, seed=seed).state_dict())
        assert torch.equal(before, torch.get_rng_state())
    assert_close(runs[0], runs[1])
    assert not torch.equal(runs[0]["2.weight"], runs[2]["2.weight"])


def test_one_operation_at_random_or_all_of_them():
    data = _set()
    seen = []
    train_student(
        data, lambda: _Recording(seen), get_protocol("tm", epochs=40, augmentation=AugmentationSettings("flip_crop"))
    )
    # A flip keeps the pixels of every image; a crop of 4 pixels by 0.125 shifts by one, to where zeros are.
    flips = [torch.equal(x.flatten(1).sort(1).values, data.images.flatten(1).sort(1).values) for x in seen]
    crops = [bool((x == 0).any()) for x in seen]
    assert any(flips) and any(crops) and not any(f and c for f, c in zip(flips, crops, strict=True))
    seen = []
    every = get_protocol("tm", epochs=40, augmentation=AugmentationSettings("flip_crop"), all_operations=True)
    train_student(data, lambda: _Recording(seen), every)
    mirrored = data.images.flip(3)

    def matches(batch, images, row):
        inside = batch[row] != 0
        return any(
            torch.equal(batch[row][inside], images[row].roll((dy, dx), (1, 2))[inside])
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
        )

    both = [row for x in seen for row in range(6) if (x[row] == 0).any() and matches(x, mirrored, row)]
    assert both and all(matches(x, mirrored, r) or matches(x, data.images, r) for x in seen for r in range(6))


def test_a_teacher_labels_what_the_student_sees():
    shown, asked = [], []
    teacher = make_student(lambda: _Recording(asked), 7).train()
    protocol = get_protocol("kd", epochs=300, learning_rate=0.05, weight_decay=0.0)
    student = train_student(_set(), lambda: _Recording(shown), protocol, teacher=teacher)
    assert_close(shown, asked)
    assert teacher.training and any(not torch.equal(batch, _set().images) for batch in shown)
    # The same architecture can agree with it.
    images = torch.randn(50, 1, 4, 4)
    assert_close(student(images).softmax(-1), teacher(images).softmax(-1), 0.1)


def test_cutmix_pastes_the_share_it_says():
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 6, 10)
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(50):
        mixed, other, pasted = training._cutmix(images, generator)
        for row in range(8):
            assert set(mixed[row].unique().tolist()) <= {row, int(other[row])}
        moved = [row for row in range(8) if other[row] != row]
        assert all((mixed[row] == other[row]).float().mean().item() == pytest.approx(pasted) for row in moved)
        shares.append(pasted)
    assert min(shares) < 0.1 and max(shares) > 0.5 and torch.equal(images[:, 0, 0, 0], torch.arange(8.0))


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_cutmix_mixes_the_labels_too(labels, monkeypatch):
    data = _set(learning_rate=0.05)
    other = torch.tensor([5, 4, 3, 2, 1, 0])
    monkeypatch.setattr(training, "_cutmix", lambda images, generator: (images, other, 0.25))
    trained = train_student(
        data, _linear, get_protocol("tm", labels=labels, epochs=3, augmentation=PLAIN, cutmix=True)
    )
    targets = F.one_hot(data.class_ids).float() if labels == "hard" else data.soft_labels.softmax(-1)
    mixed = data._replace(soft_labels=(0.75 * targets + 0.25 * targets[other]).log())
    mixed = mixed._replace(soft_labels=mixed.soft_labels.clamp(min=-80))
    expected = train_student(mixed, _linear, get_protocol("tm", epochs=3, augmentation=PLAIN))
    assert_close(list(trained.parameters()), list(expected.parameters()), 1e-6)


def test_batch_norm_learns_its_statistics():
    config = ConvNetConfig(num_channels=1, image_size=4, hidden_size=4, depth=1, num_labels=3, norm="batch")
    model = train_student(_set(), config, get_protocol("tm", epochs=3))
    norm = model.features[1]
    assert norm.num_batches_tracked == 3 and norm.running_mean.abs().max() > 0 and not norm.training


def test_what_cannot_be_trained_is_explained():
    config = ConvNetConfig(
        num_channels=1, image_size=4, hidden_size=4, depth=2, num_labels=3, norm="batch", pooling="max"
    )
    with pytest.raises(ValueError, match=r"ConvNet-D2-W4-batchnorm cannot be trained on 6 image\(s\) of shape \(1, 8"):
        train_student(_set(size=8), config, "tm")

    def deep():
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 3))

    with pytest.raises(
        ValueError, match="deep cannot be trained on 1 image.*Expected more than 1 value.*`batch_size`"
    ):
        train_student(_set(count=7), deep, get_protocol("tm", batch_size=3))
    with pytest.raises(ValueError, match="`tm` trains on soft labels and the set has none. Use the protocol `hard`"):
        train_student(_set()._replace(soft_labels=None), _linear)
    with pytest.raises(ValueError, match="`kd` trains on the labels of a `teacher`; give a trained network"):
        train_student(_set(), _linear, "kd")


def test_a_failed_training_warns(caplog):
    protocol = get_protocol("tm", epochs=60, drop_epoch=None, learning_rate=1e20, augmentation=PLAIN)
    with caplog.at_level("WARNING", training.__name__):
        train_student(_set(), lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.Linear(9, 3)), protocol)
    assert "ended with a loss of nan" in caplog.text and "1e+20 is too large" in caplog.text


def test_accuracy_counts_and_restores_the_mode():
    images = torch.zeros(5, 1, 1, 3)
    images[torch.arange(5), 0, 0, torch.tensor([0, 1, 2, 0, 1])] = 1
    test = RealImages(images, torch.tensor([0, 1, 2, 1, 0]), ["a", "b", "c"])
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.99), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(3))
    assert [accuracy(model.train(), test, batch_size=size) for size in (1, 2, 5, 512)] == [0.6] * 4
    assert model.training
    with pytest.raises(ValueError, match="no image"):
        accuracy(model, test.subset([]))
