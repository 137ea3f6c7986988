"""How good a distilled set is: networks trained on it and, by the same rules, on what it has to be better than."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging

from hf_effml.distillation.bank.initialization import soft_labels_from_experts
from hf_effml.distillation.differentiable_augmentation import AugmentationSettings
from hf_effml.utils.sources.class_labels import check_same_classes

from .protocols import EvaluationProtocol, get_protocol
from .report import EvaluationReport, MeasuredAccuracy
from .students import Student, student_by_name, student_name
from .training import accuracy, keeps_statistics, train_student, with_statistics_of
from .training_sets import TrainingSet, as_training_set, class_names, random_real_images


if TYPE_CHECKING:
    from hf_effml.distillation.bank.trajectories import TrajectoryBank
    from hf_effml.distillation.real_images import RealImages


__all__ = ["cross_architecture", "evaluate_distilled"]

logger = logging.get_logger(__name__)

_ALL_OPERATIONS = AugmentationSettings().strategy


_CALIBRATED = ("distilled", "random", "random_hard")


def evaluate_distilled(
    dataset: Any,
    student: Student | str,
    test: "RealImages",
    *,
    protocol: str | EvaluationProtocol = "tm",
    seeds: Sequence[int] = (0, 1, 2),
    real: "RealImages | None" = None,
    bank: "TrajectoryBank | None" = None,
    initial: Any = None,
    last: Any = None,
    teacher: nn.Module | None = None,
    full_accuracy: float | None = None,
    full_epochs: int = 100,
    draws: int = 3,
    baselines: bool = True,
    learning_rate: float | None = None,
    split: str = "test",
    name: str | None = None,
    device: torch.device | str | None = None,
    disable_tqdm: bool = False,
) -> EvaluationReport:
    """Measures a distilled set beside random real images under the same protocol, so that the numbers cannot flatter.

    What is measured, each with fresh networks of every seed: the set with its own labels; its images with hard labels;
    as many random real images, drawn `draws` times, with labels of the same kind and with hard labels; the set and
    the random images once more without augmentation; the set before it was distilled and that of the last step, if
    given; and all real images with hard labels. Networks with batch normalisation, whose statistics of a few synthetic
    images fit no real ones, are measured with those of the real training images as well. From those come the scores of
    DD-Ranking, see [`~hf_effml.distillation.evaluation.ranking`].

    Only the accuracy at the end of training counts, on `test` as given. To choose between sets, give images that were
    cut from the training data and name them with `split="validation"`.

    Args:
        dataset ([`TrainingSet`], [`DistilledDatasetModel`], `datasets.Dataset` or a `list` of them):
            The distilled set; several are distillations with different seeds, whose spread then counts too.
        student (`PreTrainedConfig`, `Mapping`, `Callable[[], nn.Module]` or `str`):
            The network to train, or its name as in [`student_by_name`].
        test ([`RealImages`]):
            What accuracy is measured on. A set that names its classes gives them its own numbers.
        protocol (`str` or [`EvaluationProtocol`], *optional*, defaults to `"tm"`):
            How to train, see [`get_protocol`].
        seeds (`Sequence[int]`, *optional*, defaults to `(0, 1, 2)`):
            Seeds of the networks.
        real ([`RealImages`], *optional*):
            The training images. Without them nothing is compared with random images.
        bank ([`TrajectoryBank`], *optional*):
            The experts that give random images their soft labels, and the teacher where the protocol needs one.
        initial, last ([`TrainingSet`] or [`DistilledDatasetModel`], *optional*):
            The set before it was distilled, and at the last step, where `dataset` was selected from the steps before.
        teacher (`nn.Module`, *optional*):
            The teacher for protocols with `labels="teacher"`; the bank's first expert if unset.
        full_accuracy (`float`, *optional*):
            Accuracy of the network trained on all real images, if known; from 0 to 1.
        full_epochs (`int`, *optional*, defaults to 100):
            Otherwise the network is trained once on `real` with hard labels for so many epochs; 0 leaves it out.
        draws (`int`, *optional*, defaults to 3):
            How often random images are drawn.
        baselines (`bool`, *optional*, defaults to `True`):
            `False` measures the set with its own labels and nothing else.
        learning_rate (`float`, *optional*):
            The learned learning rate of a `datasets.Dataset`, which holds none; otherwise in place of the set's.
        split, name (`str`, *optional*):
            What kind of images `test` are, and what to call the network; the report says both.
        device, disable_tqdm (*optional*):
            Where to train, on a GPU if there is one; `True` shows no progress bars.

    Returns:
        [`EvaluationReport`]: all accuracies and scores.

    Raises:
        ValueError: If the images or their classes do not fit together, or what the protocol needs is not there.

    Example:

    ```python
    >>> report = evaluate_distilled(model, "convnet", data.test, real=data.train, bank=bank)  # doctest: +SKIP
    >>> report.accuracy, report.scores["IOR"]  # doctest: +SKIP
    (0.848, 0.101)
    ```
    """
    test, real = _with_own_classes(dataset if isinstance(dataset, list) else [dataset], test, real, bank)
    compared = {key: as_training_set(one) for key, one in (("initial", initial), ("last", last)) if one is not None}
    sets = [as_training_set(one, learning_rate) for one in (dataset if isinstance(dataset, list) else [dataset])]
    plan = _Plan(get_protocol(protocol), seeds, sets, _device(device), real)
    _check(plan, compared, test, real, draws, full_accuracy)
    if baselines:
        plan.add_baselines(compared, real, bank, draws, full_epochs if full_accuracy is None else 0)
    if teacher is None and bank is not None and plan.protocol.labels == "teacher":
        teacher = bank.network(0)
    known = {} if full_accuracy is None else {"full": [full_accuracy]}
    return plan.measure(student, test, teacher, known, split, name, disable_tqdm)


def cross_architecture(
    dataset: Any,
    students: Sequence[Student | str] | Mapping[str, Student | str],
    test: "RealImages",
    *,
    full_accuracy: Mapping[str, float] | None = None,
    **options: Any,
) -> list[EvaluationReport]:
    """Measures a distilled set with several networks, most of which it was not made with.

    Args:
        dataset ([`TrainingSet`], [`DistilledDatasetModel`], `datasets.Dataset` or a `list` of them):
            The distilled set.
        students (`Sequence` or `Mapping[str, Student | str]`):
            The networks, or their names as in [`student_by_name`]; the keys of a mapping name them in the report.
        test ([`RealImages`]):
            What accuracy is measured on.
        full_accuracy (`Mapping[str, float]`, *optional*):
            By name of the network, its accuracy when trained on all real images.
        options (`dict`, *optional*):
            Further arguments of [`evaluate_distilled`].

    Returns:
        `list[EvaluationReport]`: one per network; [`evaluation_report`] makes tables of them.
    """
    named = dict(students) if isinstance(students, Mapping) else {_name(student): student for student in students}
    return [
        evaluate_distilled(dataset, student, test, name=name, full_accuracy=(full_accuracy or {}).get(name), **options)
        for name, student in named.items()
    ]


class _Plan:
    """All trainings of an evaluation: name of the row, what is trained on, how, and with which seed."""

    def __init__(
        self,
        protocol: EvaluationProtocol,
        seeds: Sequence[int],
        sets: Sequence[TrainingSet],
        device: torch.device,
        real: "RealImages | None",
    ):
        self.started = time.perf_counter()
        self.protocol, self.seeds, self.sets, self.device, self.real = protocol, seeds, sets, device, real
        self.trainings: list[tuple[str, TrainingSet, EvaluationProtocol, int]] = []
        self.draws, self.notes = 0, list[str]()
        self.add("distilled", sets)

    def add(
        self,
        key: str,
        sets: Sequence[TrainingSet],
        protocol: EvaluationProtocol | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        """Every set with every seed."""
        self.trainings += [(key, one, protocol or self.protocol, seed) for one in sets for seed in seeds or self.seeds]

    def add_baselines(
        self,
        compared: Mapping[str, TrainingSet],
        real: "RealImages | None",
        bank: "TrajectoryBank | None",
        draws: int,
        full_epochs: int,
    ) -> None:
        """Adds what the sets are compared with, and remarks on what they cannot be compared with."""
        own = self.protocol.for_set(self.sets[0]).augmentation or AugmentationSettings()
        # The other half of the augmentation-robust score.
        switched = replace(
            self.protocol, augmentation=AugmentationSettings("none" if own.operations else _ALL_OPERATIONS)
        )
        self.add("distilled_switched", self.sets, switched)
        if self.protocol.labels != "hard":
            self.add("distilled_hard", self.sets, replace(self.protocol, labels="hard"))
        for key, one in compared.items():
            self.add(key, [one])
        if real is None:
            self.notes.append(
                "Without `real` images there is nothing random to compare with: IOR, LRS and ARS are missing."
            )
            return
        self.draws = draws
        self._add_random(real, bank, switched)
        if full_epochs:
            everything = TrainingSet(real.images, real.labels, augmentation=self.sets[0].augmentation)
            self.add("full", [everything], get_protocol("hard", epochs=full_epochs), self.seeds[:1])

    def _add_random(self, real: "RealImages", bank: "TrajectoryBank | None", switched: EvaluationProtocol) -> None:
        random = [_random_set(real, self.sets[0], draw) for draw in range(self.draws)]
        if self.protocol.labels != "hard":
            self.add("random_hard", random, replace(self.protocol, labels="hard"))
        if self.protocol.labels == "soft":
            if bank is None:
                self.notes.append("Without a `bank` random images have no soft labels: IOR, LRS and ARS are missing.")
                return
            random = [_with_soft_labels(one, bank, self.device) for one in random]
        self.add("random", random)
        self.add("random_switched", random, switched)

    def measure(
        self,
        student: Student | str,
        test: "RealImages",
        teacher: nn.Module | None,
        known: dict[str, list[float]],
        split: str,
        name: str | None,
        disable_tqdm: bool,
    ) -> EvaluationReport:
        """Trains all networks and measures each."""
        if isinstance(student, str):
            name = name or student
            student = student_by_name(student, test.images.shape[2:], test.images.shape[1], test.num_labels)
        for key, one, how, seed in logging.tqdm(self.trainings, desc="trainings", leave=False, disable=disable_tqdm):
            network = train_student(one, student, how, seed, self.device, teacher, disable_tqdm)
            known.setdefault(key, []).append(accuracy(network, test))
            if key in _CALIBRATED and keeps_statistics(network):
                self._calibrate(known, key, network, test, name or student_name(student))
        return EvaluationReport(
            student=name or student_name(student),
            protocol=self.protocol.for_set(self.sets[0]),
            split=split,
            test_images=len(test),
            test_fingerprint=test.fingerprint,
            images=len(self.sets[0].images),
            classes=test.num_labels,
            learning_rates=tuple(one.learning_rate for one in self.sets),
            seeds=tuple(self.seeds),
            draws=self.draws,
            accuracies={key: MeasuredAccuracy.of(found) for key, found in known.items()},
            notes=tuple(self.notes),
            seconds=time.perf_counter() - self.started,
        )

    def _calibrate(
        self, known: dict[str, list[float]], key: str, network: nn.Module, test: "RealImages", name: str
    ) -> None:
        """Says what batch normalisation means for a few images, and measures what else it could be."""
        count = len(self.sets[0].images)
        remark = f"{name} has batch normalisation, whose statistics of {count} images fit real ones badly"
        if self.real is None:
            remark += ": its accuracy says little about the set. Give real training images, or take another network."
        else:
            known.setdefault(f"{key}_calibrated", []).append(accuracy(with_statistics_of(self.real, network), test))
            remark += "; with those of real training images, taken without their labels, it is calibrated."
        if remark not in self.notes:
            self.notes.append(remark)
            logger.warning(remark)


def _random_set(real: "RealImages", like: TrainingSet, draw: int) -> TrainingSet:
    chosen = random_real_images(real, like.class_ids, draw).to(real.images.device)
    return like._replace(images=real.images[chosen], class_ids=real.labels[chosen], soft_labels=None)


def _with_soft_labels(training_set: TrainingSet, bank: "TrajectoryBank", device: torch.device) -> TrainingSet:
    logits = soft_labels_from_experts(bank, training_set.images, training_set.class_ids, device=device)
    return training_set._replace(soft_labels=logits)


def _name(student: Student | str) -> str:
    return student if isinstance(student, str) else student_name(student)


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)


def _with_own_classes(
    datasets: Sequence[Any], test: "RealImages", real: "RealImages | None", bank: "TrajectoryBank | None"
) -> "tuple[RealImages, RealImages | None]":
    """The real images with the class numbers of the sets, which the experts must have, too."""
    named = [names for names in map(class_names, datasets) if names is not None]
    for names in named:
        check_same_classes("Sets that are measured together", named[0], names)
    if named:
        test = test.aligned_to(named[0], "test")
        real = None if real is None else real.aligned_to(named[0], "real")
    elif real is not None:
        check_same_classes("`real` and `test`", real.label_names, test.label_names)
    if bank is not None and bank.label_names is not None:
        check_same_classes("The images and the experts of `bank`", test.label_names, bank.label_names)
    return test, real


def _check(
    plan: _Plan,
    compared: Mapping[str, TrainingSet],
    test: "RealImages",
    real: "RealImages | None",
    draws: int,
    full_accuracy: float | None,
) -> None:
    for one in [*plan.sets, *compared.values()]:
        _check_set(one, test)
        plan.protocol.for_set(one)
    if not plan.seeds:
        raise ValueError("`seeds` must name at least one seed.")
    if draws < 1:
        raise ValueError(f"`draws` must be at least 1; got {draws}.")
    if real is not None and real.fingerprint == test.fingerprint:
        raise ValueError("`real` and `test` are the same images. Give the training images as `real`.")
    if full_accuracy is not None and not 0 <= full_accuracy <= 1:
        raise ValueError(f"`full_accuracy` must be from 0 to 1; got {full_accuracy}. Divide per cent by 100.")
    if real is not None and real.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"`real` and `test` must be preprocessed alike; got images of shape {tuple(real.images.shape[1:])} and "
            f"{tuple(test.images.shape[1:])}."
        )


def _check_set(training_set: TrainingSet, test: "RealImages") -> None:
    images, class_ids, soft_labels = training_set[:3]
    if images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"The set has images of shape {tuple(images.shape[1:])}, `test` of shape {tuple(test.images.shape[1:])}. "
            "Preprocess the real images with the image processor that was saved beside the set."
        )
    if len(class_ids) != len(images) or int(class_ids.min()) < 0 or int(class_ids.max()) >= test.num_labels:
        raise ValueError(
            f"The set must have one class number below {test.num_labels}, the classes of `test`, for each of its "
            f"{len(images)} images; got {len(class_ids)} from {int(class_ids.min())} to {int(class_ids.max())}."
        )
    if soft_labels is not None and soft_labels.shape != (len(images), test.num_labels):
        raise ValueError(
            f"The soft labels must have the shape {(len(images), test.num_labels)}, as `test` has {test.num_labels} "
            f"classes; got {tuple(soft_labels.shape)}."
        )
    for what, values in (("images", images), ("soft labels", soft_labels)):
        if values is not None and not values.isfinite().all():
            raise ValueError(f"The {what} hold values that are not finite. The distillation has failed.")
