"""DD-Ranking's scores of accuracies that were computed by hand."""

import math

import pytest

from hf_effml.distillation.evaluation.ranking import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
)


def test_differences():
    assert hard_label_recovery(full=0.99, distilled=0.61) == pytest.approx(0.38)
    assert improvement_over_random(distilled=0.848, random=0.747) == pytest.approx(0.101)
    assert improvement_over_random(distilled=0.2, random=0.3) == pytest.approx(-0.1)


def test_scores_by_hand():
    def normalised(value):
        return (math.exp(value) - 1 / math.e) / (math.e - 1 / math.e)

    assert label_robust_score(ior=0.1, hlr=0.4) == pytest.approx(normalised(0.05 - 0.2))
    assert label_robust_score(ior=0.1, hlr=0.4, weight=0.8) == pytest.approx(normalised(0.08 - 0.08))
    assert augmentation_robust_score(augmented=0.1, plain=0.4) == pytest.approx(normalised(0.25))
    assert augmentation_robust_score(augmented=0.1, plain=0.4, weight=0.8) == pytest.approx(normalised(0.16))


def test_scores_go_from_0_to_1():
    assert label_robust_score(ior=-1, hlr=1) == pytest.approx(0) == augmentation_robust_score(-1, -1)
    assert label_robust_score(ior=1, hlr=-1) == pytest.approx(1) == augmentation_robust_score(1, 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hard_label_recovery(84.8, 0.6), "`full` must be from 0 to 1; got 84.8. Divide per cent by 100."),
        (lambda: improvement_over_random(0.6, -0.1), "`random` must be from 0 to 1; got -0.1."),
        (lambda: improvement_over_random(math.nan, 0.1), "`distilled` must be from 0 to 1; got nan."),
        (lambda: label_robust_score(0.1, 38), "`hlr` must be a difference of accuracies, from -1 to 1; got 38."),
        (lambda: augmentation_robust_score(0.1, -2), "`plain` must be a difference"),
        (lambda: label_robust_score(0.1, 0.2, weight=50), r"`weight` must be from 0 to 1; got 50\.$"),
    ],
)
def test_wrong_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
