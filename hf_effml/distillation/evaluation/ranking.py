"""Scores of DD-Ranking (https://huggingface.co/papers/2505.13300) for distilled sets; accuracies go from 0 to 1."""

import math


__all__ = [
    "augmentation_robust_score",
    "hard_label_recovery",
    "improvement_over_random",
    "label_robust_score",
]


def hard_label_recovery(full: float, distilled: float) -> float:
    """HLR: what distilled images lack, with hard labels, to the whole data set; less is better.

    Args:
        full (`float`):
            Accuracy after training on all real images with hard labels.
        distilled (`float`):
            Accuracy after training on the distilled images with hard labels.

    Returns:
        `float`: the difference, from -1 to 1.

    Raises:
        ValueError: If an accuracy is outside [0, 1].

    Example:

    ```python
    >>> from hf_effml.distillation.evaluation.ranking import hard_label_recovery

    >>> round(hard_label_recovery(full=0.85, distilled=0.6), 2)
    0.25
    ```
    """
    return _share("full", full) - _share("distilled", distilled)


def improvement_over_random(distilled: float, random: float) -> float:
    """IOR: what a distilled set gains on as many random real images under the same protocol; more is better.

    Args:
        distilled (`float`):
            Accuracy after training on the distilled set.
        random (`float`):
            Accuracy after training on random real images, with labels of the same kind.

    Returns:
        `float`: the difference, from -1 to 1.

    Raises:
        ValueError: If an accuracy is outside [0, 1].
    """
    return _share("distilled", distilled) - _share("random", random)


def label_robust_score(ior: float, hlr: float, weight: float = 0.5) -> float:
    """LRS: a gain that does not come from informative labels alone; more is better.

    Args:
        ior (`float`):
            From [`improvement_over_random`].
        hlr (`float`):
            From [`hard_label_recovery`].
        weight (`float`, *optional*, defaults to 0.5):
            How much `ior` counts; `hlr` has the rest.

    Returns:
        `float`: the score, from 0 to 1.

    Raises:
        ValueError: If a difference is outside [-1, 1], or the weight outside [0, 1].

    Example: no gain and nothing lost is above a third of the way.

    ```python
    >>> from hf_effml.distillation.evaluation.ranking import label_robust_score

    >>> round(label_robust_score(ior=0.0, hlr=0.0), 3), label_robust_score(ior=1.0, hlr=-1.0)
    (0.269, 1.0)
    ```
    """
    _share("weight", weight)
    return _normalised(weight * _difference("ior", ior) - (1 - weight) * _difference("hlr", hlr))


def augmentation_robust_score(augmented: float, plain: float, weight: float = 0.5) -> float:
    """ARS: a gain that does not depend on how images are augmented in training; more is better.

    Args:
        augmented (`float`):
            Gain on random real images, from [`improvement_over_random`], when both are trained on with augmentation.
        plain (`float`):
            The same without augmentation.
        weight (`float`, *optional*, defaults to 0.5):
            How much `augmented` counts; `plain` has the rest.

    Returns:
        `float`: the score, from 0 to 1.

    Raises:
        ValueError: If a difference is outside [-1, 1], or the weight outside [0, 1].
    """
    _share("weight", weight)
    return _normalised(weight * _difference("augmented", augmented) + (1 - weight) * _difference("plain", plain))


def _normalised(gain: float) -> float:
    """An exponential that takes -1 to 0 and 1 to 1."""
    return (math.exp(gain) - math.exp(-1)) / (math.e - math.exp(-1))


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        advice = " Divide per cent by 100." if 1 < value <= 100 and name != "weight" else ""
        raise ValueError(f"`{name}` must be from 0 to 1; got {value}.{advice}")
    return value


def _difference(name: str, value: float) -> float:
    if not -1 <= value <= 1:
        raise ValueError(
            f"`{name}` must be a difference of accuracies, from -1 to 1; got {value}. Accuracies in per cent have to "
            "be divided by 100 first."
        )
    return value
