"""The schedule of training images and the cut through the parameters against recorded and worked examples."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import assert_close
from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.distillation.difficulty import difficulty_from_logits
from hf_effml.distillation.flat_student import FlatStudent, build_student
from hf_effml.distillation.pad import DataCurriculum, depth_report, describe_depth


VECTORS = Path(__file__).parents[1] / "vectors" / "distillation" / "difficulty.safetensors"
CURRICULUM = DataCurriculum(add_end_epoch=3, remove=((6, 0.1), (8, 0.2)))


def rows(*sizes):
    return list(torch.arange(sum(sizes)).flip(0).split(list(sizes)))


def sizes(curriculum, order, epochs):
    owner = {int(image): label for label, row in enumerate(order) for image in row}
    counts = []
    for epoch in range(epochs):
        labels = [owner[image] for image in curriculum.indices(order, epoch).tolist()]
        assert labels == sorted(labels), "class by class"
        counts.append([labels.count(label) for label in range(len(order))])
    return counts


def student_parts(depth, image_size, num_labels):
    student = FlatStudent(build_student(ConvNetConfig(depth=depth, image_size=image_size, num_labels=num_labels)))
    return student.names, student.shapes


def test_known_schedule():
    tensors, recorded = load_file(VECTORS), json.loads(VECTORS.with_suffix(".json").read_text())
    settings = recorded["settings"]
    curriculum = DataCurriculum(
        settings["init_ratio"],
        settings["add_end_epoch"],
        (
            (settings["rm_epoch_first"], settings["rm_easy_ratio_first"]),
            (settings["rm_epoch_second"], settings["rm_easy_ratio_second"]),
        ),
    )
    order = [tensors[f"easy_to_hard.class{label}"] for label in range(settings["classes"])]
    for step in recorded["schedule"]:
        epoch, phase = step["epoch"], curriculum.phase(step["epoch"])
        assert phase.name == step["phase"].split("_")[0]
        assert step["ratio"] == (phase.first if phase.name == "remove" else phase.last)
        assert_close(curriculum.indices(order, epoch), tensors[f"epoch_indices.{epoch:03d}"], what=str(epoch))
    assert epoch == settings["epochs"] - 1


def test_worked_schedule():
    expected = [15, 16, 18, 20, 20, 20, 20, 18, 18, 16, 16]
    assert sizes(CURRICULUM, rows(20, 20), 11) == [[count, count] for count in expected]


@pytest.mark.parametrize("initial_ratio", [0.1, 1 / 3, 0.7, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("add_end_epoch", [0, 1, 7, 20])
def test_the_schedule_grows_until_all_are_in_and_then_loses_the_easiest(initial_ratio, add_end_epoch):
    removal = ((add_end_epoch + 2, 0.1), (add_end_epoch + 4, 0.35))
    curriculum = DataCurriculum(initial_ratio, add_end_epoch, removal)
    order = rows(97, 20, 11)
    counts = sizes(curriculum, order, add_end_epoch + 7)
    added, rest = counts[: add_end_epoch + 1], counts[add_end_epoch:]
    assert added == sorted(added) and rest == sorted(rest, reverse=True)
    assert rest[:3] == [[97, 20, 11]] * 3 and rest[3:5] == [[88, 18, 10]] * 2 and rest[5:] == [[64, 13, 8]] * 2
    assert curriculum.phase(add_end_epoch).last == 1
    for label, row in enumerate(order):
        used = curriculum.indices(order, 0)
        used = used[torch.isin(used, row)]
        assert torch.equal(used, row[: len(used)]), f"easiest first in class {label}"
        late = curriculum.indices(order, add_end_epoch + 6)
        late = late[torch.isin(late, row)]
        assert torch.equal(late, row[-len(late) :]), f"hardest stay in class {label}"


def test_images_get_harder_from_phase_to_phase():
    tensors = load_file(VECTORS)
    scores = difficulty_from_logits(tensors["logits"], tensors["labels"])
    order = [tensors[f"easy_to_hard.class{label}"] for label in range(3)]
    means = [scores[CURRICULUM.indices(order, epoch)].mean().item() for epoch in (0, 1, 2, 3, 7, 9)]
    assert means == sorted(set(means))


def test_classes_of_unequal_size():
    assert sizes(CURRICULUM, rows(20, 8, 3), 10)[::3] == [[15, 6, 2], [20, 8, 3], [20, 8, 3], [16, 7, 3]]


def test_everything_from_the_start_and_no_removal():
    assert sizes(DataCurriculum(0.5, 0, ()), rows(4, 3), 3) == [[4, 3]] * 3


def test_indices_leave_the_order_alone():
    order = rows(6, 6)
    CURRICULUM.indices(order, 0).zero_()
    assert_close(order, rows(6, 6))


def test_settings_survive_json():
    data = json.loads(json.dumps(CURRICULUM.to_dict()))
    assert data == {"initial_ratio": 0.75, "add_end_epoch": 3, "remove": [[6, 0.1], [8, 0.2]]}
    assert DataCurriculum.from_dict(data) == CURRICULUM
    assert hash(DataCurriculum.from_dict(data)) == hash(CURRICULUM)
    with pytest.raises(ValueError, match="initial_ratio, add_end_epoch, remove; got keep"):
        DataCurriculum.from_dict({"keep": 0.5})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_ratio": 0.0}, "`initial_ratio`.*0.0"),
        ({"initial_ratio": 1.5}, "`initial_ratio`.*1.5"),
        ({"add_end_epoch": -1}, "`add_end_epoch`.*-1"),
        ({"remove": ((40, 0.2), (60, 0.1))}, "shares that do not fall"),
        ({"remove": ((60, 0.1), (40, 0.2))}, "epochs that do not fall"),
        ({"remove": ((10, 0.1),)}, "with `add_end_epoch` 20"),
        ({"remove": ((40, 1.0),)}, "less than 1; got 1.0"),
        ({"remove": ((40, -0.1),)}, "at least 0.*got -0.1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DataCurriculum(**settings)


def test_orders_that_do_not_fit():
    with pytest.raises(ValueError, match="it lists 4, and 2 is missing"):
        CURRICULUM.indices([torch.tensor([0, 1]), torch.tensor([3, 4])], 3)
    with pytest.raises(ValueError, match="class 1 has none"):
        CURRICULUM.indices([torch.tensor([0, 1]), torch.tensor([], dtype=torch.int64)], 3)
    with pytest.raises(ValueError, match="`epoch` must be at least 0; got -1"):
        CURRICULUM.indices(rows(20), -1)


def test_a_class_left_without_images():
    order = rows(20, 1)
    for function in (lambda: CURRICULUM.indices(order, 2), lambda: CURRICULUM.validate(order, 4)):
        with pytest.raises(ValueError, match="no image of class 1, which has 1, in epoch [02]"):
            function()
    assert len(CURRICULUM.indices(order, 3)) == 21


def test_validation_before_training():
    order, labels = rows(20, 20), torch.tensor([1] * 20 + [0] * 20)
    CURRICULUM.validate(order, 12, labels)
    with pytest.raises(ValueError, match="image 39 under class 0, but its label is 1"):
        CURRICULUM.validate(order, 12, 1 - labels)


@pytest.mark.parametrize(
    ("network", "total", "ends"),
    [
        ((3, 32, 10), 320_010, [1.2, 47.4, 93.6]),
        ((3, 32, 100), 504_420, [0.8, 30.1, 59.4]),
        ((4, 64, 200), 857_160, [0.5, 17.7, 34.9, 52.2]),
        ((5, 128, 10), 615_690, [0.6, 24.6, 48.7, 72.7, 96.7]),
    ],
)
def test_known_ends_of_blocks(network, total, ends):
    names, shapes = student_parts(*network)
    assert names[-2:] == ["classifier.weight", "classifier.bias"]
    for block, end in enumerate(ends):
        # A share just before and just after the end of the block: its last tensor is not, and is, left out whole.
        norm_bias = f"features.{4 * block + 1}.bias"
        below, above = (dict(depth_report(names, shapes, (end + step) / 100)) for step in (-0.06, 0.06))
        assert below[norm_bias] < 1 == above[norm_bias]
        assert below[names[names.index(norm_bias) + 1]] == 0 < above[names[names.index(norm_bias) + 1]]
        assert above["classifier.bias"] == 0
    assert f"of {total:,} parameters" in describe_depth(names, shapes, 0.5)


@pytest.mark.parametrize(
    ("ratio", "line"),
    [
        (0.0, "all 320,010 parameters are matched"),
        (1e-7, "all 320,010 parameters are matched"),
        (0.25, "80,002 of 320,010 parameters are not matched: features.0.weight to features.1.bias and "
         "52 % of features.4.weight"),
        (0.5, "160,005 of 320,010 parameters are not matched: features.0.weight to features.5.bias and "
         "6 % of features.8.weight"),
        (0.75, "240,007 of 320,010 parameters are not matched: features.0.weight to features.5.bias and "
         "60 % of features.8.weight"),
    ],
)  # fmt: skip
def test_known_cuts_in_words(ratio, line):
    names, shapes = student_parts(3, 32, 10)
    assert describe_depth(names, shapes, ratio) == line
    left_out = sum(
        share * torch.Size(shape).numel()
        for (_, share), shape in zip(depth_report(names, shapes, ratio), shapes, strict=True)
    )
    assert round(left_out) == int(ratio * 320_010)


def test_cuts_at_the_ends_of_tensors():
    names, shapes = ["a", "b", "scale"], [(2,), (2,), ()]
    assert describe_depth(names, shapes, 0.4) == "2 of 5 parameters are not matched: a"
    assert describe_depth(names, shapes, 0.2) == "1 of 5 parameters are not matched: 50 % of a"
    assert describe_depth(names, shapes, 0.8) == "4 of 5 parameters are not matched: a to b"


@pytest.mark.parametrize("ratio", [1.0, -0.1])
def test_ratios_out_of_range(ratio):
    for function in (depth_report, describe_depth):
        with pytest.raises(ValueError, match="`drop_ratio` must be at least 0 and less than 1"):
            function(["a"], [(2,)], ratio)
