"""Difficulty of images against recorded scores, trained classifiers, and orders read from files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import ResNetConfig, ViTConfig

from helpers import assert_close
from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.distillation.differentiable_augmentation import AugmentationSettings
from hf_effml.distillation.difficulty import (
    check_order,
    difficulty_from_logits,
    easy_to_hard,
    order_from_table,
    read_order_file,
    score_difficulty,
)
from hf_effml.distillation.flat_student import build_student, seed_from
from hf_effml.distillation.real_images import RealImages


VECTORS = Path(__file__).parents[1] / "vectors" / "distillation" / "difficulty.safetensors"
METHODS = ["el2n", "grand", "loss", "entropy", "least_confidence", "margin"]


@pytest.fixture(scope="module")
def tensors():
    return load_file(VECTORS)


@pytest.fixture(scope="module")
def squares():
    """Images of three classes told apart by colour; the last 6 of every 20 have another class's label."""
    generator = torch.Generator().manual_seed(0)
    true = torch.arange(60) // 20
    images = torch.randn(60, 3, 8, 8, generator=generator) * 0.5
    images[torch.arange(60), true] += 1.5
    labels = torch.where(torch.arange(60) % 20 < 14, true, (true + 1) % 3)
    return RealImages(images, labels, ["red", "green", "blue"])


def convnet(num_labels=3):
    return ConvNetConfig(image_size=8, depth=1, hidden_size=8, num_labels=num_labels)


def scored(squares, **arguments):
    settings = {"n_runs": 2, "epoch": 4, "learning_rate": 0.1, "batch_size": 20, "disable_tqdm": True}
    return score_difficulty(squares, **({"student_config": convnet()} | settings | arguments))


@pytest.mark.parametrize("method", ["el2n", "entropy", "least_confidence", "margin", "loss"])
def test_known_scores(method, tensors):
    expected = tensors[method]
    # There the margin itself is recorded, which is small for hard images.
    expected = 1 - expected if method == "margin" else expected
    assert_close(difficulty_from_logits(tensors["logits"], tensors["labels"], method), expected, 1e-6)


def test_known_orders(tensors):
    order = easy_to_hard(difficulty_from_logits(tensors["logits"], tensors["labels"]), tensors["labels"])
    assert_close(order, [tensors[f"easy_to_hard.class{label}"] for label in range(3)])
    assert_close(order_from_table(tensors["sorted_indices"], tensors["labels"]), order)
    assert json.loads(VECTORS.with_suffix(".json").read_text())["settings"]["classes"] == len(order)


@pytest.mark.parametrize("method", METHODS)
def test_larger_is_harder(method):
    # From a sure, right classifier to an undecided one; the true class is never overtaken.
    logits = torch.tensor([[[8.0, 0.0, 0.0], [4.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.1, 0.0, 0.0]]])
    features = torch.ones(1, 4, 5) if method == "grand" else None
    scores = difficulty_from_logits(logits, torch.zeros(4, dtype=torch.int64), method, features)
    assert (scores.diff() > 0).all()


def test_gradient_norm_equals_autograd():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(5, 3)
    features = torch.randn(2, 4, 5, generator=generator)
    labels = torch.tensor([0, 2, 1, 2])
    logits = layer(features)
    norms = torch.zeros(2, 4)
    for run in range(2):
        for image in range(4):
            loss = F.cross_entropy(layer(features[run, image]), labels[image])
            gradients = torch.autograd.grad(loss, list(layer.parameters()))
            norms[run, image] = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert_close(difficulty_from_logits(logits, labels, "grand", features), norms.mean(0), 1e-6)
    by_logits = difficulty_from_logits(logits, labels, "grand")
    assert torch.equal(by_logits, difficulty_from_logits(logits, labels, "el2n"))


def test_equally_hard_images_stay_in_order():
    scores = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0] * 10)
    (order,) = easy_to_hard(scores, torch.zeros(60, dtype=torch.int64))
    assert order.tolist() == [*range(1, 60, 2), *range(0, 60, 2)]


@pytest.mark.parametrize("method", METHODS[:3])
def test_wrong_labels_are_hard(squares, method):
    scores = scored(squares, method=method)
    wrong = torch.arange(60) % 20 >= 14
    assert scores.shape == (60,) and scores.dtype == torch.float32
    assert (scores[wrong].mean() - scores[~wrong].mean()) > 2 * scores[~wrong].std()
    assert len(easy_to_hard(scores, squares.labels)) == 3


def test_untrained_scores_are_the_mean_over_fresh_classifiers(squares):
    students = [build_student(convnet(), seed_from(0, "difficulty student", run)) for run in range(3)]
    with torch.no_grad():
        logits = torch.stack([student(squares.images).logits for student in students])
        features = torch.stack([student.features(squares.images).flatten(1) for student in students])
    for method in METHODS:
        expected = difficulty_from_logits(logits, squares.labels, method, features)
        assert_close(scored(squares, method=method, n_runs=3, epoch=0), expected, 1e-6, method)


def test_scores_depend_on_the_seed_alone(squares):
    before = torch.get_rng_state()
    scores = scored(squares)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(scored(squares), scores)
    assert not torch.equal(scored(squares, seed=1), scores)
    assert not torch.equal(scored(squares, augmentation=AugmentationSettings("none")), scores)
    torch.set_rng_state(before)


def test_images_are_augmented_in_training(squares):
    # Both draw as many numbers, and one moves nothing.
    still, moving = (scored(squares, augmentation=AugmentationSettings("crop", ratio)) for ratio in (0.0, 0.25))
    assert not torch.equal(still, moving)


def test_dropout_is_on_in_training_and_seeded(squares):
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    configs = [ViTConfig(**sizes, intermediate_size=8, hidden_dropout_prob=share, num_labels=3) for share in (0.5, 0)]
    scores = [scored(squares, student_config=config) for config in configs]
    assert not torch.equal(*scores)
    torch.rand(3)
    assert torch.equal(scored(squares, student_config=configs[0]), scores[0])


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_classifier_with_batch_normalisation_and_a_nested_head(squares, epoch):
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    config = ResNetConfig(**sizes, num_labels=3).to_dict()
    scores = scored(squares, student_config=config, method="grand", n_runs=1, epoch=epoch)
    assert scores.isfinite().all()
    if not epoch:
        # Images are scored apart from each other, by running statistics.
        student = build_student(config, seed_from(0, "difficulty student", 0))
        with torch.no_grad():
            features = student.resnet(squares.images).pooler_output.flatten(1)
            logits = student(squares.images).logits
        expected = difficulty_from_logits(logits[None], squares.labels, "grand", features[None])
        assert_close(scores, expected, 1e-6)


def test_progress_is_shown_if_wanted(squares, capsys):
    scored(squares)
    assert not capsys.readouterr().err
    scored(squares, disable_tqdm=False)
    assert "scoring difficulty" in (shown := capsys.readouterr().err) and "8/8" in shown


def test_gradient_norms_need_a_linear_last_layer(squares, monkeypatch):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build_student(convnet())
            self.config = self.inner.config

        def forward(self, pixel_values):
            return 2 * self.inner(pixel_values).logits

    monkeypatch.setattr("hf_effml.distillation.difficulty.build_student", lambda config, seed: Scaled())
    assert scored(squares, n_runs=1, epoch=0).isfinite().all()
    with pytest.raises(ValueError, match="last layer is linear; Scaled has none. Use `el2n`"):
        scored(squares, n_runs=1, epoch=0, method="grand")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "el3n"}, "`method` must be one of el2n, grand.*'el3n'"),
        ({"n_runs": 0}, "`n_runs` must be at least 1; got 0"),
        ({"epoch": -1}, "`epoch` must be at least 0; got -1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1; got 0"),
        ({"student_config": convnet(num_labels=4)}, "3 classes like the images; it has 4"),
        ({"learning_rate": 1e30}, "diverged with `learning_rate` 1e\\+30"),
        ({"learning_rate": 1e30, "method": "grand"}, "diverged with `learning_rate` 1e\\+30"),
    ],
)
def test_scoring_refuses(squares, arguments, message):
    with pytest.raises(ValueError, match=message):
        scored(squares, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, 3), torch.zeros(4)), "`logits` must be \\(runs, images, classes\\)"),
        ((torch.zeros(1, 4, 3), torch.zeros(5)), "\\(1, 4, 3\\) and \\(5,\\)"),
        ((torch.zeros(1, 2, 3), torch.tensor([0, 3])), "`labels` must be 0 to 2.*got 0 to 3"),
        ((torch.zeros(1, 2, 3), torch.tensor([-1, 2])), "got -1 to 2"),
        ((torch.zeros(1, 2, 3), torch.tensor([0, 1]), "hard"), "`method`.*'hard'"),
        ((torch.zeros(1, 2, 3), torch.tensor([0, 1]), "grand", torch.zeros(2, 2, 5)), "`features`.*\\(2, 2, 5\\)"),
    ],
)
def test_scores_of_logits_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        difficulty_from_logits(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(4)), "\\(3,\\) and \\(4,\\)"),
        ((torch.tensor([0.0, torch.nan]), torch.tensor([0, 1])), "finite; 1 of 2 are not"),
        ((torch.zeros(2), torch.tensor([0, 2])), "class 1 has none"),
        ((torch.zeros(2), torch.tensor([0, 1]), 3), "class 2 has none"),
    ],
)
def test_sorting_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        easy_to_hard(*arguments)


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([[0, 1], [3, 4]], None, "0 to 3, once; it lists 4, and 2 is missing"),
        ([[0, 1], [1, 2]], None, "it lists 4, and 3 is missing"),
        ([[0, 1], [2, 1]], [0, 0, 1], "it lists 4, and some are no training image or listed twice"),
        ([[0, 1], [2]], [0, 0, 1, 1], "4 training images.*it lists 3, and 3 is missing"),
        ([[0, 1], [-1, 2]], None, "3 is missing"),
        ([[0, 1], []], None, "class 1 has none"),
        ([], None, "class 0 has none"),
        ([[0, 2], [1, 3]], [0, 0, 1, 1], "image 2 under class 0, but its label is 1"),
    ],
)
def test_orders_that_do_not_fit(rows, labels, message):
    with pytest.raises(ValueError, match=message):
        check_order([torch.tensor(row) for row in rows], None if labels is None else torch.tensor(labels))


@pytest.mark.parametrize("kind", ["npy", "pt", "GraNd"])
@pytest.mark.parametrize("whole", [True, False])
def test_official_index_files(tmp_path, tensors, kind, whole):
    table = tensors["sorted_indices"]
    expected = list(table)
    if not whole:
        # One list of all images, sorted over the classes; the labels split it.
        table = table.T.flatten()
    path = tmp_path / f"table.{kind}"
    if kind == "pt":
        torch.save(table, path)
    else:
        with path.open("wb") as file:
            np.save(file, table.numpy())
    assert_close(read_order_file(path, tensors["labels"]), expected)
    if whole:
        assert_close(read_order_file(path), expected)
    else:
        with pytest.raises(ValueError, match="has no classes: pass `labels`"):
            read_order_file(path)


def test_index_files_that_hold_something_else(tmp_path):
    torch.save({"table": torch.zeros(2, 2)}, tmp_path / "dict.pt")
    with pytest.raises(ValueError, match="dict.pt must hold one index table; it holds a dict"):
        read_order_file(tmp_path / "dict.pt")
    np.save(tmp_path / "floats.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="int64.*float64"):
        read_order_file(tmp_path / "floats.npy")
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_order_file(tmp_path / "objects.npy")
    with pytest.raises(ValueError, match="and 4 is missing"):
        order_from_table(torch.tensor([[0, 1, 2], [3, 5, 6]]), torch.tensor([0, 0, 0, 1, 1, 1]))
    with pytest.raises(ValueError, match="and 1 is missing"):
        order_from_table(torch.tensor([0, 0]), torch.tensor([0, 0]))


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02", b"PK\x03\x04", b"\x93NUMPY", b"<html>", b"cos\nsystem\n(S'id'\ntR."]
)
def test_files_that_are_no_order(tmp_path, content):
    (tmp_path / "order").write_bytes(content)
    with pytest.raises(ValueError, match="order` is no index table of NumPy or PyTorch.*It was not opened"):
        read_order_file(tmp_path / "order")
