"""What `problem_type` makes of a head, and labels that no head can learn from: named, in every family."""

import json

import pytest
import torch
from common.model_cases import CONVNET, VIMS
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F

import hf_effml
from hf_effml.distillation.flat_student import student_config
from hf_effml.vim.losses import logit_divergence


CASES = [case for case in (*VIMS, CONVNET) if case.labels is not None]
every_head = pytest.mark.parametrize("case", CASES, ids=lambda case: case.model_class.__name__)
ONE_CLASS, SEVERAL, NUMBERS = "single_label_classification", "multi_label_classification", "regression"


def head(case, **fields):
    model = case.build(**{"num_labels": 3, **fields})
    return model, case.inputs(model)


@every_head
def test_the_loss_of_each_problem(case):
    classes, onehot = torch.tensor([2, -100]), torch.tensor([[1, 0, 1], [0, 0, 0]])
    soft = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    binary = F.binary_cross_entropy_with_logits
    for problem, labels, function in (
        (None, classes, F.cross_entropy),
        (None, soft, F.cross_entropy),
        (ONE_CLASS, classes.int(), lambda logits, labels: F.cross_entropy(logits, labels.long())),
        (SEVERAL, onehot, lambda logits, labels: binary(logits, labels.float())),
        (SEVERAL, onehot.bool(), lambda logits, labels: binary(logits, labels.float())),
        (SEVERAL, onehot.float(), binary),
        (NUMBERS, soft * 9, F.mse_loss),
    ):
        model, inputs = head(case, problem_type=problem)
        output = model(**inputs, labels=labels)
        torch.testing.assert_close(output.loss, function(output.logits, labels), rtol=0, atol=1e-6)
    for problem in (None, NUMBERS):
        model, inputs = head(case, problem_type=problem, num_labels=1)
        for labels in (torch.tensor([2.0, -3.0]), torch.tensor([[2], [-3]])):
            output = model(**inputs, labels=labels)
            torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], labels.view(-1).float()))


@every_head
@pytest.mark.parametrize(
    "problem, labels, message",
    [
        (
            None,
            [0, 751],
            r"outside 0 to 2: 751\. `num_labels` of the model is 3\. .*ignore_mismatched_sizes=True.*-100",
        ),
        (None, [0, -1], "outside 0 to 2: -1"),
        (None, [-100, -100], "hold no class: all 2 are -100"),
        (None, [[1.0, 0, 1], [0, 1, 0]], r'add up to 1: .1.0, 0.0, 1.0.. .*`problem_type="multi_label_class'),
        (None, [[1, 0, 1], [0, 1, 0]], r"labels of shape \(2,\); got \(2, 3\) of torch.int64"),
        (None, [1.0, 2.0], r"soft targets of shape \(2, 3\); got \(2,\) of torch.float32"),
        (SEVERAL, [0, 1], r"labels of shape \(2, 3\); got \(2,\) of torch.int64"),
        (SEVERAL, [[0, 2, 0], [0, 1, 1]], "neither 0 nor 1: 2"),
        (NUMBERS, [1.0, 2.0], r"labels of shape \(2, 3\)"),
        (NUMBERS, [[1.0, 0, float("nan")], [0, 1, 0]], "not finite: nan"),
    ],
)
def test_labels_that_do_not_go_with_it(case, problem, labels, message):
    model, inputs = head(case, problem_type=problem)
    with pytest.raises(ValueError, match=message):
        model(**inputs, labels=torch.tensor(labels))


@every_head
def test_unknown_problem_types(case):
    # Some versions of transformers ask before us, in words of theirs.
    named = "`problem_type` (must be one of|was not understood)|Field 'problem_type' .*'multi_label_classification'"
    with pytest.raises((StrictDataclassError, ValueError), match=named):
        case.config(problem_type="multi_class")
    model, inputs = head(case)
    with pytest.raises(
        (StrictDataclassError, ValueError), match=f"`problem_type` must be one of single_label|{named}"
    ):
        model.config.problem_type = "multi_class"
        model(**inputs, labels=torch.tensor([0, 1]))


def test_distillation_is_of_single_labels():
    with pytest.raises(StrictDataclassError, match="Distillation is of images of one class each; got .*regression"):
        hf_effml.DistilledDatasetConfig(problem_type=NUMBERS)
    config = hf_effml.ConvNetConfig(problem_type=SEVERAL)
    for given in (config, json.loads(config.to_json_string(use_diff=False))):
        with pytest.raises(
            ValueError, match="Experts and students classify images of one class each; got .*multi_label"
        ):
            student_config(given)


def test_divergences():
    """Of several labels: the Bernoulli divergence of each. All are 0 for equal scores."""
    scores, teacher = torch.randn(2, 4, 3)
    p, q = teacher.div(2).sigmoid(), scores.div(2).sigmoid()
    wanted = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean() * 4
    torch.testing.assert_close(logit_divergence(scores, teacher, 2.0, SEVERAL), wanted)
    torch.testing.assert_close(logit_divergence(scores, teacher, 2.0, NUMBERS), F.mse_loss(scores, teacher))
    for problem in (ONE_CLASS, SEVERAL, NUMBERS):
        assert logit_divergence(scores, scores, problem_type=problem).abs() < 1e-7


def test_accuracy_of_something_else():
    model, inputs = head(CASES[0], problem_type=SEVERAL)
    rows = [{"pixel_values": image, "labels": 0} for image in inputs["pixel_values"]]
    with pytest.raises(ValueError, match="Accuracy is of models that tell one class of several; got .*multi_label"):
        hf_effml.evaluate_vim({"dense": model}, rows, rounds=1)
