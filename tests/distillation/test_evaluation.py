"""Evaluations train what they say, on the images they are given, and their scores follow from the accuracies."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from helpers import assert_close, require_package
from hf_effml import ConvNetConfig, DistilledDatasetConfig, DistilledDatasetModel
from hf_effml.distillation.bank.files import write_bank, write_expert
from hf_effml.distillation.bank.trajectories import TrajectoryBank
from hf_effml.distillation.differentiable_augmentation import AugmentationSettings
from hf_effml.distillation.evaluation import measure
from hf_effml.distillation.evaluation.measure import cross_architecture, evaluate_distilled
from hf_effml.distillation.evaluation.protocols import get_protocol
from hf_effml.distillation.evaluation.ranking import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
)
from hf_effml.distillation.evaluation.report import EvaluationReport, MeasuredAccuracy, evaluation_report
from hf_effml.distillation.evaluation.training import accuracy, train_student
from hf_effml.distillation.evaluation.training_sets import TrainingSet, as_training_set, random_real_images
from hf_effml.distillation.flat_student import FlatStudent, build_student
from hf_effml.distillation.real_images import RealImages


CLASSES, SIZE = 3, 6
CONFIG = ConvNetConfig(num_channels=1, image_size=SIZE, hidden_size=4, depth=1, num_labels=CLASSES)
PLAIN = AugmentationSettings("none")
QUICK = get_protocol("tm", epochs=4)


def _real(count, seed):
    """Noisy copies of one pattern per class."""
    patterns = torch.randn(CLASSES, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return RealImages(patterns[labels] + 1.5 * noise, labels, ["a", "b", "c"])


REAL, TEST = _real(60, 1), _real(90, 2)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Two experts, before and after training."""
    folder = tmp_path_factory.mktemp("bank")
    rows, rules = [], get_protocol("hard", epochs=40, augmentation=PLAIN)
    for seed in range(2):
        everything = TrainingSet(REAL.images, REAL.labels, learning_rate=0.05)
        trained = train_student(everything, CONFIG, rules, seed)
        rows.append(torch.stack([FlatStudent(build_student(CONFIG, seed)).flatten(), FlatStudent(trained).flatten()]))
    student = FlatStudent(build_student(CONFIG))
    metadata = {
        "num_experts": 2,
        "student": CONFIG.to_dict(),
        "epochs": [0, 1],
        "parameters": [
            {"name": name, "shape": list(shape)} for name, shape in zip(student.names, student.shapes, strict=True)
        ],
    }
    write_bank(folder, metadata)
    for expert, trajectory in enumerate(rows):
        write_expert(folder, expert, trajectory, metadata)
    return TrajectoryBank.from_pretrained(folder)


@pytest.fixture
def distilled():
    chosen = random_real_images(REAL, torch.arange(6) % 3, seed=99)
    logits = 4 * torch.eye(3)[REAL.labels[chosen]]
    return TrainingSet(REAL.images[chosen], REAL.labels[chosen], logits, 0.03)


@pytest.fixture
def trainings(monkeypatch):
    """What was trained, in order: set, protocol, seed, teacher."""
    seen = []

    def record(training_set, student, protocol, seed, device, teacher, disable_tqdm):
        seen.append(SimpleNamespace(set=training_set, protocol=protocol, seed=seed, teacher=teacher))
        return train_student(training_set, student, replace(protocol, epochs=1), seed, device, teacher, disable_tqdm)

    monkeypatch.setattr(measure, "train_student", record)
    return seen


def test_everything_is_measured_under_the_same_protocol(distilled, bank, trainings):
    initial, last = distilled._replace(learning_rate=0.01), distilled._replace(learning_rate=0.04)
    report = evaluate_distilled(
        distilled,
        CONFIG,
        TEST,
        protocol=QUICK,
        seeds=(4, 5),
        real=REAL,
        bank=bank,
        initial=initial,
        last=last,
        draws=3,
    )
    counts = {key: len(measured.values) for key, measured in report.accuracies.items()}
    assert counts == {
        "distilled": 2,
        "distilled_switched": 2,
        "distilled_hard": 2,
        "initial": 2,
        "last": 2,
        "random_hard": 6,
        "random": 6,
        "random_switched": 6,
        "full": 1,
    }
    assert len(trainings) == sum(counts.values())
    rules = {
        "soft": QUICK,
        "hard": replace(QUICK, labels="hard"),
        "plain": replace(QUICK, augmentation=PLAIN),
        "full": get_protocol("hard", epochs=100),
    }
    kinds = [next(name for name, rule in rules.items() if rule == one.protocol) for one in trainings]
    assert kinds == ["soft"] * 2 + ["plain"] * 2 + ["hard"] * 2 + ["soft"] * 4 + ["hard"] * 6 + ["soft"] * 6 + [
        "plain"
    ] * 6 + ["full"]
    assert [one.seed for one in trainings] == [4, 5] * 14 + [4]
    random = [one.set for one in trainings[10:28]]
    for one in random:
        assert one.learning_rate == 0.03 and torch.equal(one.class_ids, distilled.class_ids)
        assert all((REAL.images == image).flatten(1).all(1).any() for image in one.images)
    # Three draws, the same ones for hard and for soft labels.
    assert_close([one.images for one in random[0:6:2]], [one.images for one in random[6:12:2]])
    assert not torch.equal(random[0].images, random[2].images) and not torch.equal(random[2].images, random[4].images)
    experts = [bank.network(expert) for expert in range(2)]
    logits = torch.stack([expert(random[6].images).logits for expert in experts]).detach()
    right = (logits.argmax(-1) == random[6].class_ids).all(0)
    assert right.any()
    assert_close(random[6].soft_labels[right], logits.mean(0)[right], 1e-5)
    assert trainings[-1].set.images is REAL.images and trainings[-1].set.learning_rate == 0.01
    assert trainings[0].set is distilled and trainings[6].set is initial and trainings[8].set is last


def test_scores_follow_from_the_means(distilled, bank):
    report = evaluate_distilled(
        distilled, CONFIG, TEST, protocol=QUICK, real=REAL, bank=bank, draws=1, full_accuracy=0.9
    )
    mean = {key: measured.mean for key, measured in report.accuracies.items()}
    hlr = hard_label_recovery(0.9, mean["distilled_hard"])
    ior = improvement_over_random(mean["distilled"], mean["random"])
    plain = improvement_over_random(mean["distilled_switched"], mean["random_switched"])
    assert report.scores == {
        "HLR": hlr,
        "IOR": ior,
        "LRS": label_robust_score(ior, hlr),
        "ARS": augmentation_robust_score(ior, plain),
    }
    networks = [train_student(distilled, CONFIG, QUICK, seed) for seed in range(3)]
    assert report.accuracies["distilled"].values == tuple(accuracy(network, TEST) for network in networks)
    assert report.accuracy == mean["distilled"] and report.std == report.accuracies["distilled"].std > 0


def test_hard_labels_are_not_measured_twice(distilled, trainings):
    hard = distilled._replace(soft_labels=None)
    report = evaluate_distilled(hard, CONFIG, TEST, protocol=get_protocol("hard", epochs=2), real=REAL, draws=2)
    assert set(report.accuracies) == {"distilled", "distilled_switched", "random", "random_switched", "full"}
    assert {"HLR", "IOR", "LRS", "ARS"} == set(report.scores) and report.notes == ()
    mean = {key: measured.mean for key, measured in report.accuracies.items()}
    assert report.scores["HLR"] == mean["full"] - mean["distilled"]
    assert {one.protocol.labels for one in trainings} == {"hard"}


def test_a_protocol_without_augmentation_is_switched_on(distilled, bank, trainings):
    quick = replace(QUICK, augmentation=PLAIN)
    report = evaluate_distilled(
        distilled, CONFIG, TEST, protocol=quick, seeds=(0,), real=REAL, bank=bank, full_epochs=0
    )
    strategies = [one.protocol.augmentation.strategy for one in trainings]
    assert strategies[0] == "none" and strategies[1] == AugmentationSettings().strategy
    assert "distilled images, soft labels, with augmentation" in report.as_report().rows
    assert "HLR" not in report.scores and "ARS" in report.scores


def test_the_augmentation_of_the_set_counts(distilled, trainings):
    own = AugmentationSettings("flip", crop_ratio=0.25)
    report = evaluate_distilled(
        distilled._replace(augmentation=own), CONFIG, TEST, protocol=QUICK, seeds=(0,), real=REAL
    )
    assert report.protocol.augmentation == own
    assert all(one.set.augmentation == own for one in trainings if one.protocol.augmentation is None)


def test_a_teacher_is_an_expert(distilled, bank, trainings):
    report = evaluate_distilled(
        distilled, CONFIG, TEST, protocol=get_protocol("kd", epochs=1), seeds=(0,), real=REAL, bank=bank, full_epochs=0
    )
    assert {"random", "random_hard", "distilled_hard"} <= set(report.accuracies)
    assert_close(trainings[0].teacher.state_dict(), bank.network(0).state_dict())


def test_what_is_missing_is_said(distilled, bank, trainings):
    report = evaluate_distilled(distilled, CONFIG, TEST, protocol=QUICK, seeds=(0,), real=REAL, draws=1, full_epochs=0)
    assert "random" not in report.accuracies and "random_hard" in report.accuracies
    assert report.scores == {} and "Without a `bank`" in report.notes[0]
    report = evaluate_distilled(distilled, CONFIG, TEST, protocol=QUICK, seeds=(0,), bank=bank)
    assert set(report.accuracies) == {"distilled", "distilled_hard", "distilled_switched"}
    assert "Without `real` images" in report.notes[0] and report.draws == 0


def test_selection_trains_nothing_but_the_set_and_names_its_images(distilled, bank, trainings):
    options = {"protocol": QUICK, "seeds": (0,), "bank": bank, "real": REAL, "baselines": False, "split": "validation"}
    validation = TEST.subset(range(30))
    report = evaluate_distilled(distilled, CONFIG, validation, **options)
    assert len(trainings) == 1 and list(report.accuracies) == ["distilled"]
    assert report.test_images == 30 and report.test_fingerprint == validation.fingerprint != TEST.fingerprint
    assert "| validation accuracy | trainings |" in report.as_report().as_markdown()
    assert report.std is None and "validation" in report.card_results()[0].name


def test_several_distillations_spread(distilled, trainings):
    other = distilled._replace(images=distilled.images.flip(0), learning_rate=0.02)
    report = evaluate_distilled([distilled, other], CONFIG, TEST, protocol=QUICK, seeds=(0, 1), baselines=False)
    assert [one.set.learning_rate for one in trainings] == [0.03, 0.03, 0.02, 0.02]
    assert len(report.accuracies["distilled"].values) == 4 and report.learning_rates == (0.03, 0.02)


def test_report_as_json_and_tables():
    measured = {"distilled": [0.8, 0.82], "random": [0.7, 0.72, 0.74], "distilled_hard": [0.6], "full": [0.95]}
    report = EvaluationReport(
        student="convnet",
        protocol=get_protocol("tm", learning_rate=0.02),
        split="test",
        test_images=797,
        test_fingerprint="f",
        images=10,
        classes=10,
        learning_rates=(0.02,),
        seeds=(0, 1),
        draws=3,
        accuracies={key: MeasuredAccuracy.of(values) for key, values in measured.items()},
        notes=("a note",),
    )
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["accuracies"]["random"] == {
        "mean": pytest.approx(0.72),
        "std": pytest.approx(0.02),
        "values": [0.7, 0.72, 0.74],
    }
    assert plain["scores"]["IOR"] == pytest.approx(0.09) and plain["scores"]["HLR"] == pytest.approx(0.35)
    assert plain["protocol"]["epochs"] == 1001 and plain["notes"] == ["a note"] and plain["split"] == "test"
    table = report.as_report().as_markdown()
    assert "|  | test accuracy | trainings |" in table
    assert "| distilled images, soft labels | 81.0 ± 1.4% | 2 |" in table
    assert "| all real images, hard labels | 95.0% | 1 |" in table
    assert report.bars()["random real images, soft labels"] == (pytest.approx(0.72), pytest.approx(0.02))
    names = {one.name: (one.value, one.starting_point, one.metric) for one in report.card_results()}
    assert names["Accuracy (convnet, tm, test)"] == (pytest.approx(0.81), None, "accuracy")
    assert names["Accuracy with hard labels (convnet, tm, test)"] == (pytest.approx(0.6), None, None)
    random = names["Accuracy of random real images, labels of the same kind (convnet, tm, test)"]
    assert random == (pytest.approx(0.72), None, None)
    heads = [name.split()[0] for name in names]
    assert heads == ["Accuracy", "Standard", "Accuracy", "Accuracy", "HLR", "IOR", "LRS"]
    other = replace(report, student="mlp", accuracies={"distilled": MeasuredAccuracy.of([0.5])})
    both = evaluation_report([report, other], "digits")
    assert [part.name for part in both.parts] == ["convnet", "mlp", "networks"]
    head, _, first, second = both.parts[2].as_markdown().splitlines()[2:]
    assert head == "|  | distilled | random real | distilled, hard labels | all real | HLR | IOR | LRS |"
    lrs = f"{report.scores['LRS']:.3f}"
    assert first == f"| convnet | 81.0 ± 1.4% | 72.0 ± 2.0% | 60.0% | 95.0% | 0.350 | 0.090 | {lrs} |"
    assert second == "| mlp | 50.0% |  |  |  |  |  |  |"
    assert both.as_dict()["reports"] == [report.to_dict(), other.to_dict()] and "a note" in both.as_markdown()


def test_random_images_are_drawn_per_class_without_repeats():
    class_ids = torch.tensor([2, 0, 2, 1, 2, 0])
    draws = [random_real_images(REAL, class_ids, seed) for seed in range(4)]
    for chosen in draws:
        assert torch.equal(REAL.labels[chosen], class_ids) and len(chosen.unique()) == 6
    assert (
        torch.equal(draws[0], random_real_images(REAL, class_ids, 0)) and len({tuple(d.tolist()) for d in draws}) == 4
    )
    with pytest.raises(ValueError, match="class `b` has 20 real images and 21 distilled ones"):
        random_real_images(REAL, torch.ones(21, dtype=torch.int64))


def test_sets_of_every_form_are_the_same(distilled):
    datasets = require_package("datasets")
    features = datasets.Features(
        {
            "image": datasets.Array3D((1, SIZE, SIZE), "float32"),
            "label": datasets.ClassLabel(names=["a", "b", "c"]),
            "soft_label": datasets.List(datasets.Value("float32"), length=3),
        }
    )
    columns = {
        "image": distilled.images.numpy(),
        "label": distilled.class_ids.tolist(),
        "soft_label": distilled.soft_labels.tolist(),
    }
    rows = datasets.Dataset.from_dict(columns, features=features)
    assert_close(as_training_set(rows, 0.03)[:3], distilled[:3])
    assert as_training_set(rows, 0.03).learning_rate == 0.03
    by_class = distilled.class_ids.argsort(stable=True)
    fields = {"augmentation_strategy": "flip", "augmentation_crop_ratio": 0.25, "num_labels": CLASSES}
    model = DistilledDatasetModel(
        DistilledDatasetConfig(images_per_class=2, num_channels=1, image_size=SIZE, **fields)
    )
    model.set_content(distilled.images[by_class], distilled.soft_labels[by_class], lr=0.5)
    found = as_training_set(model)
    assert_close(found[:3], tuple(part[by_class] for part in distilled[:3]))
    assert found.learning_rate == 0.5 and found.augmentation == AugmentationSettings("flip", 0.25)
    assert not found.images.requires_grad and not found.soft_labels.requires_grad
    assert as_training_set(distilled) is distilled and as_training_set(distilled, 0.2).learning_rate == 0.2
    with pytest.raises(ValueError, match="`learning_rate` is needed with a datasets.Dataset"):
        as_training_set(rows)
    with pytest.raises(ValueError, match="it lacks soft_label"):
        as_training_set(rows.remove_columns("soft_label"), 0.1)
    with pytest.raises(TypeError, match="got a dict"):
        as_training_set({})


def test_cross_architecture(distilled, bank):
    students = {"ours": CONFIG, "other": "mlp"}
    options = {"protocol": QUICK, "seeds": (0,), "real": REAL, "bank": bank, "draws": 1}
    ours, other = cross_architecture(distilled, students, TEST, full_accuracy={"ours": 0.8, "other": 0.7}, **options)
    assert (ours.student, other.student) == ("ours", "other")
    assert ours.accuracies["full"].mean == 0.8 and other.accuracies["full"].mean == 0.7
    assert ours.accuracies["random"].values != other.accuracies["random"].values
    alone = evaluate_distilled(distilled, "mlp", TEST, full_accuracy=0.7, **options)
    assert alone.accuracies == other.accuracies
    (named,) = cross_architecture(distilled, [CONFIG], TEST, protocol=QUICK, seeds=(0,), baselines=False)
    assert named.student == "ConvNet-D1-W4"


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({"images": torch.zeros(6, 1, 5, 6)}, {}, r"images of shape \(1, 5, 6\), `test` of shape \(1, 6, 6\)"),
        ({"class_ids": torch.tensor([0, 1, 2, 3, 0, 1])}, {}, "below 3, the classes of `test`.*from 0 to 3"),
        ({"class_ids": torch.tensor([0, 1])}, {}, "each of its 6 images; got 2"),
        ({"soft_labels": torch.zeros(6, 4)}, {}, r"must have the shape \(6, 3\)"),
        ({"soft_labels": torch.full((6, 3), torch.nan)}, {}, "not finite"),
        ({"learning_rate": -0.1}, {}, "Where a set has learned an impossible one"),
        ({"soft_labels": None}, {}, "trains on soft labels and the set has none"),
        ({}, {"seeds": ()}, "`seeds` must name at least one"),
        ({}, {"draws": 0}, "`draws` must be at least 1"),
        ({}, {"real": TEST}, "`real` and `test` are the same images"),
        ({}, {"real": RealImages(torch.zeros(3, 1, 5, 5), torch.arange(3), ["a", "b", "c"])}, "preprocessed alike"),
        ({}, {"full_accuracy": 80.0, "real": REAL}, "Divide per cent by 100"),
        ({}, {"protocol": "mtt"}, "`mtt` is no protocol"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(distilled, change, options, message, monkeypatch):
    if "learning" not in str(change) and change != {"soft_labels": None}:
        monkeypatch.setattr(measure, "train_student", lambda *_: pytest.fail("it trained first"))
    with pytest.raises(ValueError, match=message):
        evaluate_distilled(distilled._replace(**change), CONFIG, TEST, **options)


def test_batch_normalisation_of_a_few_images_is_remarked_and_calibrated(caplog):
    """Real images are brighter than those that were trained on, so running statistics are wrong for them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = torch.randn(40, 3, 8, 8, generator=generator) * 0.3 + 2 * labels.view(-1, 1, 1, 1)
    real = RealImages(4 * images + 9, labels, ["a", "b"])
    few = TrainingSet(images[:4], labels[:4], 5 * torch.eye(2)[labels[:4]], learning_rate=0.05)
    student = ConvNetConfig(image_size=8, depth=1, hidden_size=8, norm="batch")
    how = {"protocol": get_protocol("tm", epochs=60), "seeds": [0], "baselines": False, "disable_tqdm": True}
    report = evaluate_distilled(few, student, real, real=replace(real, source_fingerprint="other"), **how)
    accuracies = {name: found.mean for name, found in report.accuracies.items()}
    assert accuracies["distilled_calibrated"] == 1 > accuracies["distilled"] + 0.3
    assert "statistics of 4 images fit real ones badly" in caplog.text and "calibrated" in report.notes[0]
    bare = evaluate_distilled(few, student, real, **how)
    assert list(bare.accuracies) == ["distilled"] and "says little about the set" in bare.notes[0]
    plain = evaluate_distilled(few, ConvNetConfig(image_size=8, depth=1, hidden_size=8), real, **how)
    assert not plain.notes and list(plain.accuracies) == ["distilled"]
