"""The program measures a set in any form beside its baselines, writes what it found, and explains wrong use."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from helpers import require_package
from hf_effml import ConvNetConfig, DistilledDatasetModel
from hf_effml.cli.parsing import run_script
from hf_effml.distillation.bank.initialization import distilled_from_real
from hf_effml.distillation.publishing.origin import images_to_measure_on
from hf_effml.distillation.publishing.sets import load_distilled, save_distilled_dataset
from hf_effml.distillation.real_images import load_real_images
from hf_effml.hub import CardResult, write_card
from hf_effml.scripts.evaluate_distillation import main
from hf_effml.trainers.expert import ExpertTrainer, ExpertTrainingArguments


QUICK = ["--epochs", "2", "--seeds", "0", "1", "--draws", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bank of two experts, and a set that starts from two digits: as a data set and as a model."""
    require_package("sklearn")
    require_package("datasets")
    folder = tmp_path_factory.mktemp("made")
    data = load_real_images("digits", classes=[3, 8], whiten=False, max_train=60, max_test=40)
    config = ConvNetConfig(num_channels=1, image_size=8, hidden_size=4, depth=1, num_labels=2)
    args = ExpertTrainingArguments(
        str(folder / "bank"), num_experts=2, num_train_epochs=2, train_batch_size=8, device="cpu", disable_tqdm=True
    )
    bank = ExpertTrainer(config, args, data).train()
    model = distilled_from_real(data, bank, images_per_class=2)
    model.save_pretrained(folder / "model")
    save_distilled_dataset(model, folder / "set", data.processor)
    write_card(folder / "set")
    return SimpleNamespace(folder=folder, set=folder / "set", model=folder / "model", bank=folder / "bank", data=data)


def _run(made, tmp_path, *options, the_set=None):
    folders = ["--set", str(the_set or made.set), "--bank", str(made.bank), "--output_dir", str(tmp_path / "out")]
    return main([*folders, *QUICK, *options])


def test_a_published_set_with_two_networks(made, tmp_path, capsys):
    require_package("matplotlib")
    results = _run(
        made, tmp_path, "--students", "convnet-w4", "mlp", "--full_epochs", "1", "--initial", str(made.model)
    )
    assert json.loads(json.dumps(results)) == results == json.loads((tmp_path / "out/evaluation.json").read_text())
    first, second = results["reports"]
    assert (first["student"], second["student"]) == ("convnet-w4", "mlp")
    counts = {key: len(measured["values"]) for key, measured in first["accuracies"].items()}
    assert counts == dict.fromkeys(counts, 2) | {"full": 1} and len(counts) == 8
    # The set is what it was made of, so that both are the same to every network.
    assert first["accuracies"]["initial"] == first["accuracies"]["distilled"]
    assert set(first["scores"]) == {"HLR", "IOR", "LRS", "ARS"} and first["protocol"]["epochs"] == 2
    assert first["split"] == "test" and first["test_images"] == 40
    assert first["test_fingerprint"] == made.data.test.fingerprint
    text = capsys.readouterr().out
    report = (tmp_path / "out/evaluation.md").read_text()
    assert report.strip() in text
    for line in (
        "## mlp",
        "| random real images, soft labels |",
        "4 images for 2 classes, accuracy on 40 test images of digits",
    ):
        assert line in report
    assert Image.open(tmp_path / "out/evaluation.png").height > 800


def test_a_model_with_its_own_network_and_no_baselines(made, tmp_path, capsys):
    results = _run(made, tmp_path, "--no_baselines", "--no_picture", the_set=made.model)
    (report,) = results["reports"]
    assert report["student"] == "ConvNet-D1-W4" and list(report["accuracies"]) == ["distilled"]
    assert report["scores"] == {} and "HLR" not in capsys.readouterr().out
    assert not (tmp_path / "out/evaluation.png").exists()
    published = _run(made, tmp_path, "--no_baselines", "--no_picture")["reports"][0]
    assert published["accuracies"] == report["accuracies"]


def test_selection_uses_the_validation_images(made, tmp_path):
    results = _run(made, tmp_path, "--split", "validation", "--no_baselines", "--no_picture")
    (report,) = results["reports"]
    assert report["split"] == "validation" and report["test_fingerprint"] == made.data.validation.fingerprint
    results = _run(made, tmp_path, "--no_baselines", "--no_picture")
    assert results["reports"][0]["test_fingerprint"] == made.data.test.fingerprint


def test_results_go_to_the_card(made, tmp_path, capsys):
    results = _run(made, tmp_path, "--add_to_card", "--full_epochs", "0", "--no_picture")
    card = (made.set / "README.md").read_text()
    mean = results["reports"][0]["accuracies"]["distilled"]["mean"]
    assert f"{100 * mean:.1f}" in card and "random real" in card and "40 test images" in card
    assert json.loads((made.set / "distillation.json").read_text())["results"] == results["reports"]
    assert f"Renewed {made.set / 'README.md'}" in capsys.readouterr().out
    write_card(made.model, evaluated_on="others", results=[CardResult("Loss", 0.5)])
    _run(made, tmp_path, "--add_to_card", "--full_epochs", "0", "--no_picture", the_set=made.model)
    card = (made.model / "README.md").read_text()
    mean = results["reports"][0]["accuracies"]["random"]["mean"]
    assert "Measured on others.\n" in card and "| Loss | 0.5 |" in card
    assert "Measured on digits, test images.\n" in card and "| IOR (ConvNet-D1-W4, tm, test) |" in card
    assert "| Accuracy (ConvNet-D1-W4, tm, test) |" in card and f"| {mean:.4g} |" in card


def test_the_bank_that_the_set_names(made, tmp_path, capsys, caplog):
    model = DistilledDatasetModel.from_pretrained(made.model)
    described = json.loads((made.set / "distillation.json").read_text())

    def run(bank):
        save_distilled_dataset(model, made.folder / "named", made.data.processor, info=described | {"bank": bank})
        options = [*QUICK, "--no_picture", "--output_dir", str(tmp_path / "out"), "--full_epochs", "1"]
        return main(["--set", str(made.folder / "named"), *options])["reports"][0]

    assert {"random", "random_switched"} <= set(run("bank")["accuracies"])
    capsys.readouterr()
    report = run("experts-of-somebody")
    captured = capsys.readouterr()
    assert "names the bank `experts-of-somebody`, which is not here" in caplog.text
    assert "Without a `bank` random images have no soft labels" in captured.out
    assert "random" not in report["accuracies"] and "HLR" in report["scores"]


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "`--set` must be given"),
        (["--set", "{folder}/none"], "holds no distilled set"),
        (["--set", "{set}", "--protocol", "mtt"], "`mtt` is no protocol; choose one of tm, tm-short, hard, kd"),
        (["--set", "{set}", "--students", "resnet"], "`resnet` is no student"),
        (["--set", "{set}", "--bank", "{folder}/none"], "none"),
        (["--set", "alice/set", "--add_to_card"], "needs the set in a folder of this machine"),
        (["--set", "{model}"], "does not say how its images were preprocessed. Give its experts with `--bank`"),
        (["--set", "{set}", "--split", "train"], "invalid choice: 'train'"),
        (["--set", "{set}", "--epoch", "3"], "did you mean `--epochs`?"),
    ],
)
def test_wrong_use_ends_with_two_lines(made, argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "hf_effml.distillation.evaluation.measure.train_student", lambda *_: pytest.fail("it trained first")
    )
    assert run_script(main, [word.format(**vars(made)) for word in argv]) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("Loading weights")]
    assert len(lines) == 2 and lines[0].startswith("error: ") and message in lines[0]


def test_a_bank_of_other_pixels_is_refused(made, tmp_path):
    model = DistilledDatasetModel.from_pretrained(made.model)
    model.config.preprocessing = None
    whitened = load_real_images("digits", classes=[3, 8], max_train=60, max_test=40).processor
    save_distilled_dataset(model, tmp_path / "set", whitened)
    with pytest.raises(ValueError, match="preprocessed in another way"):
        _run(made, tmp_path, the_set=tmp_path / "set")


def test_validation_images_that_were_seen_are_refused(made, tmp_path, capsys):
    other = load_real_images("digits", classes=[3, 8], max_train=60, seed=1, processor=made.data.processor)
    with pytest.raises(ValueError, match="may have seen the validation images. Measure with `--split test`"):
        images_to_measure_on(other, "validation", load_distilled(made.set).info)
