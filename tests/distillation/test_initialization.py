"""Real images to start from, and what experts say about them."""

import pytest
import torch

from helpers import assert_close
from hf_effml import ConvNetConfig, ExpertTrainer, ExpertTrainingArguments, distilled_from_real
from hf_effml.distillation.bank import initialization
from hf_effml.distillation.bank.initialization import (
    average_correct_logits,
    select_real_images,
    soft_labels_from_experts,
)
from hf_effml.distillation.flat_student import FlatStudent, build_student
from hf_effml.distillation.image_processing_zca import ZCAImageProcessor
from hf_effml.distillation.real_images import RealImageData, RealImages


class Experts:
    """As much of a bank as is asked here: networks whose scores are the pixels of an image, plus a bias each."""

    def __init__(self, *biases):
        self.biases = biases

    def __len__(self):
        return len(self.biases)

    def network(self, expert, epoch=-1):
        assert epoch == -1
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 3))
        with torch.no_grad():
            network[1].weight.copy_(torch.eye(3))
            network[1].bias.copy_(torch.tensor(self.biases[expert]))
        return network


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(initialization.logger, "warning", said.append)
    return said


def scores_as_images(scores, labels):
    return RealImages(torch.tensor(scores).view(-1, 3, 1, 1), torch.tensor(labels), ["a", "b", "c"])


def test_an_image_that_no_expert_gets_right():
    logits = torch.tensor([[[3.0, 1.0, 0.0]], [[0.0, 5.0, 1.0]]])
    labels, counts = average_correct_logits(logits, torch.tensor([2]))
    assert counts.tolist() == [0]
    assert_close(labels.softmax(1), torch.tensor([[0.1 / 3, 0.1 / 3, 0.9 + 0.1 / 3]]), 1e-6)


def test_wrong_experts_do_not_count_whatever_they_say():
    logits = torch.tensor([[[3.0, 1.0]], [[0.0, torch.inf]], [[5.0, 2.0]]])
    labels, counts = average_correct_logits(logits, torch.tensor([0]))
    assert counts.tolist() == [2]
    assert_close(labels, torch.tensor([[4.0, 1.5]]))


def test_soft_labels(warnings):
    bank = Experts([0.0, 0.0, 0.0], [0.0, 3.0, 0.0])
    real = scores_as_images([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, -9.0]], [0, 1, 2])
    labels = soft_labels_from_experts(bank, real.images, real.labels, batch_size=2)
    assert_close(labels[:2], torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.5, 0.0]]))
    assert labels[2].argmax() == 2
    assert warnings == ["No expert classifies 1 of 3 images correctly; their labels are the true class, smoothed."]
    everyone = soft_labels_from_experts(bank, real.images, real.labels, only_correct=False)
    assert_close(everyone, real.images.view(3, 3) + torch.tensor([0.0, 1.5, 0.0]))
    first = soft_labels_from_experts(bank, real.images, real.labels, only_correct=False, num_experts=1)
    assert_close(first, real.images.view(3, 3))
    assert len(warnings) == 1


def many_images(per_class=8):
    """Of class 0 all are known to a plain expert, of class 1 the even ones, of class 2 none."""
    labels = torch.arange(3).repeat_interleave(per_class)
    scores = torch.zeros(3 * per_class, 3)
    scores[:per_class, 0] = 1
    scores[per_class : 2 * per_class, 1] = torch.tensor([1.0, -1.0]).repeat(per_class // 2)
    scores[2 * per_class :, 2] = -torch.linspace(1, 4, per_class)
    return scores_as_images(scores.tolist(), labels.tolist())


def test_images_that_the_first_expert_knows(warnings):
    real = many_images().subset(range(16))
    real = RealImages(real.images, real.labels, ["a", "b"])
    bank = Experts([0.0, 0.0, -9.0])
    chosen = select_real_images(real, 3, bank=bank)
    assert real.labels[chosen].tolist() == [0] * 3 + [1] * 3 and len(set(chosen.tolist())) == 6
    assert all(index % 2 == 0 for index in chosen[3:].tolist())
    assert torch.equal(chosen, select_real_images(real, 3, bank=bank))
    others = {tuple(select_real_images(real, 3, bank=bank, seed=seed).tolist()) for seed in range(5)}
    assert len(others) == 5 and not warnings


def test_further_experts_are_asked_only_if_needed(warnings, monkeypatch):
    real, asked = many_images(), []
    bank = Experts([0.0, 0.0, 0.0], [0.0, 0.0, 9.0], [9.0, 9.0, 9.0])
    monkeypatch.setattr(bank, "network", lambda expert: asked.append(expert) or Experts.network(bank, expert))
    chosen = select_real_images(real, 4, bank=bank)
    assert real.labels[chosen].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert asked == [0, 1] and not warnings
    select_real_images(real, 4, bank=Experts([5.0, 0.0, 0.0]))
    assert len(warnings) == 1


def test_classes_without_enough_known_images(warnings):
    """The even images of class 1 come first, then odd ones; of class 2 those that are least wrong."""
    real = many_images()
    chosen = select_real_images(real, 6, bank=Experts([0.0, 0.0, 0.0]))
    assert {8, 10, 12, 14} < set(chosen[6:12].tolist())
    assert chosen[12:].tolist() == [16, 17, 18, 19, 20, 21]
    assert warnings == [
        "Experts classify fewer than 6 images correctly of the classes b, c; images of least loss fill up."
    ]


def test_what_some_expert_knows_comes_before_what_is_nearly_right(warnings):
    """The first image is known to the first expert, but no other is as wrong about it as the second one."""
    scores = torch.tensor([[5.0, 0.0, 4.9], [4.0, 4.1, -30.0], [4.0, 4.2, -30.0]])
    real = RealImages(scores.view(3, 3, 1, 1), torch.zeros(3, dtype=torch.int64), ["a"])
    chosen = select_real_images(real, 2, bank=Experts([0.0, 0.0, 0.0], [0.0, 0.0, 30.0]))
    assert chosen.tolist() == [0, 1] and len(warnings) == 1


def test_any_images():
    real = many_images()
    chosen = select_real_images(real, 8, method="real")
    assert real.labels[chosen].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert sorted(chosen.tolist()) == list(range(24))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_per_class": 9}, "Class `a` has 8 images, fewer than `images_per_class`, 9. Choose at most 8."),
        ({"images_per_class": 1, "method": "correct"}, 'needs the experts: pass `bank`, or choose "real"'),
        ({"images_per_class": 1, "method": "best"}, '`method` must be "correct" or "real"; got "best"'),
    ],
)
def test_impossible_choices(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_real_images(many_images(), **{"method": "real", **arguments})


def test_a_set_from_real_images(expert_bank):
    data, bank = expert_bank
    model = distilled_from_real(data, bank, 2, augmentation_crop_ratio=0.25)
    config = model.config
    assert (config.num_images, config.height_and_width, config.num_channels) == (6, (8, 8), 3)
    assert config.id2label == {0: "red", 1: "green", 2: "blue"} and config.augmentation.crop_ratio == 0.25
    assert config.preprocessing == bank.metadata["preprocessing"] and config.student["model_type"] == "convnet"
    assert config.dataset["fingerprint"] == data.train.fingerprint
    chosen = select_real_images(data.train, 2, bank=bank)
    assert_close(model.images.detach(), data.train.images[chosen])
    wanted = soft_labels_from_experts(bank, data.train.images[chosen], data.train.labels[chosen])
    assert_close(model.labels.detach(), wanted)
    assert model.lr.item() == pytest.approx(0.01)
    assert torch.equal(model.class_ids, data.train.labels[chosen])
    again = distilled_from_real(data, bank, 2)
    assert_close(dict(again.named_parameters()), dict(model.named_parameters()))
    assert not torch.equal(distilled_from_real(data, bank, 2, seed=1).images, model.images)


def test_other_beginnings(expert_bank):
    data, bank = expert_bank
    real = distilled_from_real(data, bank, 2, method="real")
    student = FlatStudent(build_student(bank.student_config))
    assert_close(real.labels.detach(), student.logits(bank.read(0, -1)[0], real.images.detach()), 1e-6)
    state = torch.get_rng_state()
    noise = distilled_from_real(data, bank, 2, method="noise", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(noise.labels.argmax(1), noise.class_ids) and 0.9 < noise.images.std() < 1.1
    assert_close(distilled_from_real(data, bank, 2, method="noise", seed=3).images, noise.images)
    with pytest.raises(ValueError, match="`method` must be"):
        distilled_from_real(data, bank, 2, method="best")


def test_other_pixels_are_refused(expert_bank):
    data, bank = expert_bank
    other = ZCAImageProcessor.from_images(torch.rand(20, 3, 8, 8))
    mixed = RealImageData("other", data.train, None, data.test, other)
    with pytest.raises(ValueError, match="preprocessed in another way"):
        distilled_from_real(mixed, bank, 2)
    assert distilled_from_real(mixed, bank, 2, allow_mismatch=True).config.preprocessing == other.fingerprint


def test_one_channel_and_batch_norm(tmp_path):
    labels = torch.arange(20) % 2
    pixels = (torch.rand(20, 1, 8, 8) + labels.view(-1, 1, 1, 1)) / 2
    processor = ZCAImageProcessor.from_images(pixels, num_channels=1, do_whiten=False)
    real = RealImages(processor.whiten(pixels), labels, ["dark", "bright"])
    data = RealImageData("grey", real, None, real, processor)
    config = ConvNetConfig(num_channels=1, image_size=8, depth=1, hidden_size=4, norm="batch")
    args = ExpertTrainingArguments(
        str(tmp_path), num_experts=1, num_train_epochs=2, train_batch_size=10, disable_tqdm=True, device="cpu"
    )
    bank = ExpertTrainer(config, args, data).train()
    model = distilled_from_real(data, bank, 3)
    assert model.images.shape == (6, 1, 8, 8) and model.labels.isfinite().all()
