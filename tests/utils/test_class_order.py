"""Data whose classes are in another order than a model's are mapped by name, and other classes are refused."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import hf_effml
from helpers import require_package, tiny_vim_config
from hf_effml.cli.start_model import StartArguments, load_start
from hf_effml.distillation.evaluation.measure import evaluate_distilled
from hf_effml.distillation.evaluation.training_sets import as_training_set
from hf_effml.distillation.publishing.origin import find_images
from hf_effml.distillation.publishing.sets import DistilledSet
from hf_effml.scripts import evaluate_rmeeto, train_vim
from hf_effml.utils.image_data import ImageSplit
from hf_effml.utils.sources.class_labels import check_same_classes, match_classes
from hf_effml.vim.evaluation.measure import classify


PROCESSOR = hf_effml.vim_image_processor(16, crop_share=1.0)
NAMES = ["ant", "bee", "cat", "dog"]


def vim(names=NAMES, seed=0):
    torch.manual_seed(seed)
    fields = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = hf_effml.VimForImageClassification(tiny_vim_config(**fields)).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    return model


@pytest.fixture
def labelled():
    """Images that a model reads right, with its classes or in another order of their names."""
    model = vim()
    random = np.random.RandomState(0)
    images = [Image.fromarray(random.randint(0, 255, (16, 16, 3), np.uint8)) for _ in range(24)]
    plain = ImageSplit([{"image": image, "label": 0} for image in images], PROCESSOR)
    with torch.inference_mode():
        seen = model(torch.stack([plain[index]["pixel_values"] for index in range(24)])).logits.argmax(-1).tolist()
    assert len(set(seen)) > 1

    def rows(names):
        labels = [names.index(NAMES[label]) for label in seen]
        return [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]

    def split(names=NAMES):
        return ImageSplit(rows(names), PROCESSOR, labels=names)

    def write(folder, names=NAMES, called=None):
        datasets = require_package("datasets")
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=called or names)})
        folder.mkdir()
        for name in ("train", "test"):
            datasets.Dataset.from_list(rows(names), features=features).to_parquet(folder / f"{name}.parquet")
        return str(folder)

    return model, split, write


def test_names_decide():
    assert match_classes("d", ["b", "a"], ["a", "b", "c"]) == [1, 0]
    # Some versions of transformers refuse names that are no texts, which a `config.json` can hold.
    numbered = SimpleNamespace(id2label={0: 0, 1: 1})
    assert match_classes("d", ["1", "0"], numbered) == [1, 0]
    assert match_classes("d", ["x", "y"], tiny_vim_config(num_labels=2)) == [0, 1]
    for names, known, message in (
        (["a", "z"], ["a", "b"], "does not know `z`: `d` has the classes `a`, `z`; the model has `a`, `b`. Take"),
        (["z"] * 40, ["a"] * 40, "`z` and 28 more; the model has .*`a` and 28 more"),
        (["a", "b", "c"], tiny_vim_config(num_labels=2), "`d` has 3 classes, `a`.*the model tells 2 apart, `LABEL_0`"),
        (["crane"], ["crane", "crane"], "has two classes `crane`"),
    ):
        with pytest.raises(ValueError, match=message):
            match_classes("d", names, known)


def test_names_that_are_numbers_or_written_in_two_ways():
    labels = [f"LABEL_{number}" for number in range(11)]
    assert match_classes("data", sorted(labels), labels) == [0, 1, 10, *range(2, 10)]
    assert match_classes("data", labels, sorted(labels))[2] == 3 and match_classes("data", labels[3:4], labels) == [3]
    assert match_classes("data", ["cafe\u0301", "bar"], ["bar", "caf\u00e9"]) == [1, 0]
    with pytest.raises(ValueError, match="They must number the same classes alike"):
        check_same_classes("They", labels, sorted(labels))


def test_evaluations_of_vims(labelled):
    model, split, _ = labelled
    for names in (NAMES, NAMES[::-1], ["dog", "ant", "cat", "bee"]):
        assert classify(model, split(names))[0] == 1.0
        report = hf_effml.evaluate_vim({"vim": model}, split(names), rounds=1)
        assert report.rows["vim"]["accuracy"] == 1.0
    # A model that names nothing is taken by number.
    nameless = hf_effml.VimForImageClassification(tiny_vim_config(num_labels=4)).eval()
    nameless.load_state_dict(model.state_dict())
    assert classify(nameless, split())[0] == 1.0
    with pytest.raises(
        ValueError, match="does not know `emu`: `the data` has the classes .*`emu`; the model has `ant`"
    ):
        hf_effml.evaluate_vim({"vim": model}, split([*NAMES, "emu"]), rounds=1)
    # The caller's images stay as they are, and share what was prepared.
    own = split(NAMES[::-1])
    aligned = own.aligned_to(model.config)
    assert own[0]["labels"] == 3 - aligned[0]["labels"] and aligned[0]["pixel_values"] is own[0]["pixel_values"]


def test_trainers_of_vims(labelled, tmp_path):
    model, split, _ = labelled
    args = hf_effml.VimTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    turned, data = split(NAMES[::-1]), {"train_dataset": split(NAMES[::-1]), "eval_dataset": split(NAMES[::-1])}
    trainer = hf_effml.VimTrainer(model, args, **data)
    assert trainer.evaluate()["eval_accuracy"] == trainer.evaluate(turned)["eval_accuracy"] == 1.0
    assert trainer.predict(turned).metrics["test_accuracy"] == 1.0
    assert [row["labels"] for row in trainer.train_dataset] == [row["labels"] for row in split()]
    with pytest.raises(ValueError, match="does not know `emu`"):
        hf_effml.VimTrainer(model, args, train_dataset=split([*NAMES[:0:-1], "emu", "ant"]))
    merged = hf_effml.RMeeToVimForImageClassification.from_vim(model, merge_r=2)
    args = hf_effml.RMeeToTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="Model and teacher must number the same classes alike; got `ant`"):
        hf_effml.RMeeToTrainer(merged, args, train_dataset=split(), teacher=vim(NAMES[::-1]))


def test_the_program_that_evaluates(labelled, tmp_path):
    model, _, write = labelled
    model.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    options = [str(tmp_path / "model"), "--rounds", "1", "--data"]
    for number, names in enumerate((NAMES, NAMES[::-1])):
        report = evaluate_rmeeto.main([*options, write(tmp_path / str(number), names)])
        assert report["rows"][0]["accuracy"] == 1.0
    with pytest.raises(ValueError, match="does not know `w`: .*other` has the classes `w`, .*; the model has `ant`"):
        evaluate_rmeeto.main([*options, write(tmp_path / "other", NAMES, ["w", "x", "y", "z"])])


def test_training_a_vim_further(labelled, tmp_path, capsys):
    model, _, write = labelled
    model.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    options = ["--model_name_or_path", str(tmp_path / "model"), "--max_steps", "1", "--learning_rate", "1e-12"]
    options += ["--min_learning_rate", "0", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]

    def train(name, *names):
        data, out = write(tmp_path / name, *names), str(tmp_path / f"{name}-model")
        found = train_vim.main([*options, "--data", data, "--output_dir", out])
        return found["accuracy"], hf_effml.VimForImageClassification.from_pretrained(out)

    accuracy, further = train("turned", NAMES[::-1])
    assert accuracy == 1.0 and [*further.config.id2label.values()] == NAMES
    accuracy, further = train("other", NAMES, ["w", "x", "y", "z"])
    assert "knows other classes than other: its head starts anew" in capsys.readouterr().out
    assert accuracy < 1 and [*further.config.id2label.values()] == ["w", "x", "y", "z"]
    assert torch.equal(further.vim.layers[0].mixer.D, model.vim.layers[0].mixer.D)
    assert not torch.allclose(further.classifier.weight, model.classifier.weight, atol=1e-3)


def test_some_of_a_vims_classes_do(labelled, tmp_path):
    model, _, _ = labelled
    model.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    for split in ("train", "val"):
        for name in ("dog", "bee"):
            (tmp_path / "two of them" / split / name).mkdir(parents=True)
            Image.new("L", (9, 9), 50).save(tmp_path / "two of them" / split / name / "1.png")
    script = StartArguments(str(tmp_path / "model"), data=str(tmp_path / "two of them"))
    args = hf_effml.RMeeToTrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True, teacher="none")
    _, data, _ = load_start(script, hf_effml.Augmentation(), args, lambda model: model)
    assert data.labels == NAMES and sorted(row["labels"] for row in data.train) == [1, 3]
    (tmp_path / "two of them" / "val" / "bee").rename(tmp_path / "two of them" / "val" / "eel")
    with pytest.raises(ValueError, match="does not know `eel`: .* That is `hf-effml train vim .* --data '.*them'`"):
        load_start(script, hf_effml.Augmentation(), args, lambda model: model)


def turned(real):
    """The same images with the order of their classes turned round."""
    parts = {name: getattr(real, name) for name in ("train", "validation", "test")}
    return replace(
        real,
        **{
            name: replace(part, labels=2 - part.labels, label_names=part.label_names[::-1], source_fingerprint=None)
            for name, part in parts.items()
        },
    )


def test_distilled_sets(expert_bank):
    data, bank = expert_bank
    other = turned(data)
    model, again = (hf_effml.distilled_from_real(each, bank, 2) for each in (data, other))
    assert again.config.id2label == model.config.id2label and torch.equal(again.labels, model.labels)
    options = {"protocol": "tm-short", "seeds": (0,), "draws": 1, "full_epochs": 0, "disable_tqdm": True}
    reports = [
        evaluate_distilled(model, bank.student_config, each.test, real=each.train, bank=bank, **options)
        for each in (data, other)
    ]
    assert reports[0].accuracies == reports[1].accuracies and reports[0].accuracy > 0.5
    strange = replace(data.test, label_names=["red", "green", "mauve"])
    with pytest.raises(ValueError, match="does not know `mauve`: `test` has the classes `red`, `green`, `mauve`"):
        evaluate_distilled(model, bank.student_config, strange, **options)
    with pytest.raises(ValueError, match="The images and the experts of `bank` must number the same classes alike"):
        evaluate_distilled(as_training_set(model), bank.student_config, other.test, bank=bank, **options)


def test_programs_find_the_classes_of_a_set(expert_bank, monkeypatch):
    data, bank = expert_bank
    training_set = as_training_set(hf_effml.distilled_from_real(data, bank, 2))
    monkeypatch.setattr("hf_effml.distillation.publishing.origin.reload_real_images", lambda *_: turned(data))
    found = find_images(DistilledSet(training_set, {"classes": data.label_names}, data.processor), bank)
    assert found.label_names == data.label_names and torch.equal(found.test.labels, data.test.labels)
    with pytest.raises(ValueError, match="The set and its experts must number the same classes alike"):
        find_images(DistilledSet(training_set, {"classes": data.label_names[::-1]}, data.processor), bank)


def test_trainers_of_distillation(expert_bank, distil, tmp_path):
    data, bank = expert_bank
    model = hf_effml.distilled_from_real(data, bank, 2)
    model.config.id2label = {0: "blue", 1: "green", 2: "red"}
    with pytest.raises(ValueError, match="The synthetic set and the bank's experts must number the same classes"):
        distil(start=model)
    config = hf_effml.ConvNetConfig(image_size=8, depth=2, hidden_size=4, id2label={0: "blue", 1: "green", 2: "red"})
    args = hf_effml.ExpertTrainingArguments(str(tmp_path / "bank"), num_experts=1, num_train_epochs=1)
    with pytest.raises(ValueError, match="`student_config` and `data` must number the same classes alike"):
        hf_effml.ExpertTrainer(config, args, data)
    # A classifier for EDF's maps finds its own classes, too.
    classifier = hf_effml.ConvNetForImageClassification(config)
    assert distil("EDF", cam_model=classifier)._cam_label_map == {0: 2, 1: 1, 2: 0}
    config.id2label = {0: "blue", 1: "green", 2: "mauve"}
    with pytest.raises(ValueError, match="does not know `red`.*Or say by `cam_label_map`"):
        distil("EDF", cam_model=hf_effml.ConvNetForImageClassification(config))
    assert isinstance(distil("EDF", cam_model=classifier, cam_label_map={0: 0, 1: 1, 2: 2}).cam_model, nn.Module)
