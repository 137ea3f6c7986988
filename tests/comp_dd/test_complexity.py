"""Scoring of pictures: what must not matter, translation of classes, tables of classes and subsets from them."""

import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from helpers import randomized, require_package
from hf_effml.comp_dd import (
    MapNetwork,
    class_complexity,
    complexity_of_maps,
    draw_complexity,
    imagenet_classes,
    make_subsets,
    score_complexity,
    score_images,
    subset_complexity,
    translate_classes,
)
from hf_effml.distillation.feature_layers import find_cam_layer


NAMES = ["tench", "goldfish", "sofa"]
LAYER = "resnet.encoder.stages.1"


def network(seed=0, channels=3, names=("sofa", "n01440764", "goldfish, Carassius auratus"), **options):
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=channels, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"
    )
    config.id2label = dict(enumerate(names))
    model = randomized(ResNetForImageClassification(config), seed)
    side = {"height": 32, "width": 40}
    processor = ViTImageProcessorPil(size=side, image_mean=[0.5] * channels, image_std=[0.25] * channels)
    return MapNetwork(model, processor, **options)


def pictures(count=7, mode="RGB"):
    random = np.random.RandomState(0)
    arrays = [random.randint(0, 256, (12 + i, 20, 3), dtype=np.uint8) for i in range(count)]
    return [{"image": Image.fromarray(each).convert(mode), "label": i % 3} for i, each in enumerate(arrays)]


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "smoothgradcampp"])
def test_scores_lie_in_range_and_depend_on_no_batch(method):
    networks = [network(seed, method=method) for seed in (0, 1)]
    whole = score_images(pictures(), networks, thresholds=(0.3, 0.5))
    for batch_size in (1, 3):
        parts = score_images(pictures(), networks, thresholds=(0.3, 0.5), batch_size=batch_size)
        assert all(np.array_equal(parts.complexity[limit], whole.complexity[limit]) for limit in (0.3, 0.5))
        assert np.array_equal(parts.predicted, whole.predicted)
    low, high = whole.complexity[0.3], whole.complexity[0.5]
    assert (low <= high).all() and low.min() >= 0 and high.max() <= 1 and high.dtype == np.float32
    assert np.array_equal(score_images(pictures(), networks[1:]).complexity[0.5][:, 0], high[:, 1])


def test_scaling_of_scores_changes_nothing():
    before, scaled = network(), network()
    with torch.no_grad():
        scaled.model.classifier[1].weight.mul_(7)
        scaled.model.classifier[1].bias.mul_(7)
    first, second = (score_images(pictures(), [each], upsample=True) for each in (before, scaled))
    assert np.array_equal(first.complexity[0.5], second.complexity[0.5])


def test_constant_map_is_as_complex_as_can_be():
    flat = network()
    nn.init.zeros_(flat.model.classifier[1].weight)
    assert (score_images(pictures(), [flat], thresholds=(0.1,)).complexity[0.1] == 1).all()


def test_layer_is_looked_for_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "hf_effml.comp_dd.complexity.find_cam_layer", lambda *given: calls.append(given) or find_cam_layer(*given)
    )
    passes, used = [], network()
    used.model.register_forward_hook(lambda *given: passes.append(0))
    score_images(pictures(), [used], NAMES, batch_size=2)
    assert len(calls) == 1 and len(passes) == 4 and used.layer == LAYER


def test_label_or_prediction_by_name_not_by_position():
    used = network()
    found = score_images(pictures(), [used, network(names=("LABEL_0", "LABEL_1", "LABEL_2"))], NAMES)
    named = [{1: 0, 2: 1, 0: 2}[number] for number in found.predicted[:, 0]]
    assert np.array_equal(found.right[0], np.array(named) == found.labels) and found.right[1] is None
    by_label = score_images(pictures(), [used], NAMES, target="label").complexity[0.5]
    ids = torch.tensor([[1, 2, 0][row["label"]] for row in pictures()])
    maps, _ = used([row["image"] for row in pictures()], ids)
    assert np.array_equal(by_label[:, 0], complexity_of_maps(maps).numpy())
    with pytest.raises(ValueError, match="no class, or more than one, for `shoe`"):
        score_images(pictures(), [used], ["tench", "shoe", "sofa"], target="label")
    with pytest.raises(ValueError, match="needs labels with names"):
        score_images(pictures(), [used], target="label")


def test_classes_are_translated():
    synsets, texts = zip(*imagenet_classes(), strict=True)
    assert translate_classes(synsets, texts)[:134] == [*range(134)]
    assert translate_classes(texts, synsets).count(None) == 2
    wanted = ["crane", "crane (n02012849)", "killer whale", "grampus", "Great_Dane", "water snake", "0"]
    assert translate_classes(wanted, synsets) == [None, 134, 148, 148, 246, 58, None]
    assert translate_classes(["cat"], ["dog", "cat"]) == [1] and translate_classes(["cat"], []) == [None]


def test_data_set_gets_a_column():
    datasets = require_package("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    data = datasets.Dataset.from_list(pictures(), features=features)
    used = [network(seed) for seed in (0, 1)]
    how = {"models": [each.model for each in used], "processors": [each.processor for each in used]}
    scored = score_complexity(score_complexity(data, **how, threshold=0.4), **how)
    assert scored.features["complexity"].dtype == "float32"
    assert scored.column_names == ["image", "label", "complexity"]
    expected = score_images(pictures(), used).complexity[0.5].mean(1)
    assert np.array_equal(np.array(scored["complexity"], np.float32), expected)
    with pytest.raises(ValueError, match="for `a`, `b`"):
        score_complexity(data, **how, target="label")
    synsets = [["n01440764", "n01443537", "n04344873"][row["label"]] for row in pictures()]
    model = network(names=["studio couch, day bed", *NAMES[:2]]).model
    assert len(score_complexity(data.add_column("synset", synsets), model, used[0].processor, target="label")) == 7


def test_grey_networks_and_plain_tensors():
    grey, colours = (score_images(pictures(mode=mode), [network(channels=1)]).complexity[0.5] for mode in ("L", "RGB"))
    assert grey.shape == colours.shape == (7, 1)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    plain(torch.zeros(1, 3, 224, 224))
    used = MapNetwork(plain)
    assert used.size == (224, 224) and used.layer == "1" and used.class_names == []
    with pytest.raises(ValueError, match="for images of 1 channels"):
        MapNetwork(network(channels=1).model)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"thresholds": (1.0,)}, r"lie in \(0, 1\); got 1.0"),
        ({"target": "both"}, "got 'both'"),
        ({"batch_size": 0}, "got 0"),
    ],
)
def test_impossible_arguments(given, said):
    with pytest.raises(ValueError, match=said):
        score_images(pictures(), [network()], **given)
    with pytest.raises(ValueError, match="is empty"):
        score_images([], [network()])
    with pytest.raises(ValueError, match=re.escape(LAYER)):
        network(layer="stage")
    with pytest.raises(ValueError, match="as `layer`"):
        MapNetwork(nn.Sequential(nn.Flatten(), nn.Linear(3 * 224**2, 3)))


def table_of(means, spread=0.0, images=4):
    labels = np.repeat(np.arange(len(means)), images)
    wave = np.tile([-spread, spread], len(labels) // 2)
    return class_complexity(np.repeat(means, images) + wave, labels, [f"c{i}" for i in range(len(means))])


def test_tables_of_classes_and_subsets():
    scores = np.array([[0.2, 0.4], [0.4, 0.6], [0.9, 0.7]])
    rows = class_complexity(scores, [0, 0, 2], NAMES).rows
    assert [*rows] == ["tench", "sofa"] and rows["sofa"]["standard_error"] is None
    wanted = {"label": 0, "images": 2, "complexity": 0.4, "standard_error": 0.1, "network_1": 0.3, "network_2": 0.5}
    assert rows["tench"] == pytest.approx(wanted)
    assert subset_complexity(table_of([0.2, 0.4, 0.9]), ["c0", "c1"]) == pytest.approx((0.3, 0.1))


def test_subsets_do_not_overlap_and_doubts_are_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clear = make_subsets(table_of([0.5, 0.2, 0.9, 0.4], 0.01), {"all": ["c3", "c1", "c0", "c2"]}, k=2)
    assert clear == {"all_easy": ["c1", "c3"], "all_hard": ["c2", "c0"]}
    with pytest.warns(UserWarning, match="`k` is 1 instead of 10"):
        ties = make_subsets(table_of([0.5, 0.5, 0.5], 0.0), {"g": ["c2", "c1", "c0"]})
    assert ties == {"g_easy": ["c0"], "g_hard": ["c2"]}
    with pytest.warns(UserWarning, match="picking extremes"):
        make_subsets(table_of([0.5, 0.52, 0.51, 0.53], 0.2), {"g": ["c0", "c1", "c2", "c3"]}, k=2)
    with pytest.warns(UserWarning, match="no standard error"):
        make_subsets(class_complexity(np.array([0.1, 0.9]), [0, 1], ["a", "b"]), {"g": ["a", "b"]}, k=1)
    for groups, said in (
        ({"g": ["c0", "c01"]}, "Did you mean"),
        ({"g": ["c0"]}, "at least two"),
        ({"g": ["c0", "c0"]}, "two"),
    ):
        with pytest.raises(ValueError, match=said):
            make_subsets(table_of([0.1, 0.2]), groups, k=1)


def test_figure_is_drawn(tmp_path):
    require_package("matplotlib")
    scores = score_images(pictures(), [network()]).complexity[0.5][:, 0]
    draw_complexity(pictures(), network(), scores, NAMES, tmp_path / "figure.png", each=2)
    assert Image.open(tmp_path / "figure.png").width > 1000
