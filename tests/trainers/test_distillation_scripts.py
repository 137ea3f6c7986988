"""The programs around dataset distillation: from experts to a published set, the benchmark and the experiment."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers import require_package
from hf_effml import DistilledDatasetModel, TrajectoryBank, load_distilled
from hf_effml.cli.recipes import read_recipes
from hf_effml.distillation.evaluation import benchmarks
from hf_effml.hub.cards import CARD_NAME
from hf_effml.scripts import (
    bench_distillation,
    experiment_distillation,
    train_datm,
    train_edf,
    train_expert,
    train_pad,
)
from hf_effml.trainers import distillation
from hf_effml.trainers.base import _command_line


SHORT = [
    *("--syn_steps", "2", "--max_start_epoch", "1", "--max_steps", "2", "--report_to", "none", "--use_cpu"),
    *("--test_protocol", "tm-short", "--test_epochs", "2", "--test_seeds", "1"),
]


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("programs") / "bank")
    train_expert.main(["--recipe", "smoke", "--num_experts", "1", "--num_train_epochs", "3", "--output_dir", folder])
    return folder


@pytest.mark.parametrize("program", [train_pad, train_edf, train_datm], ids=["pad", "edf", "datm"])
def test_distils_tests_and_publishes(program, bank, tmp_path, capsys):
    out = tmp_path / "set"
    results = program.main(["--bank", bank, "--output_dir", str(out), "--picture_steps", "2", *SHORT])
    assert results["steps"] == 2 and 0 <= results["accuracies"]["random_hard"] <= 1
    published = load_distilled(out / "dataset")
    model = DistilledDatasetModel.from_pretrained(out)
    assert torch.equal(published.training_set.images, model.images)
    assert torch.equal(published.training_set.soft_labels, model.labels)
    assert model.config.method == {train_pad: "pad", train_edf: "edf", train_datm: "tm"}[program]
    assert {path.name for path in (out / "pictures").iterdir()} == {"step-000000.png", "step-000002.png"}
    assert "\n# set\n" in (out / "dataset" / CARD_NAME).read_text()
    card = (out / CARD_NAME).read_text()
    # What is measured on the test images stands on the card, and no license is made up.
    assert "the test images of digits" in card and "license:" not in card
    assert f"{results['accuracy']:.3g}"[:4] in card
    line = re.search(r'load_dataset\("parquet", data_files="(.*)", split="train"\)', capsys.readouterr().out)
    rows = require_package("datasets").load_dataset("parquet", data_files=line.group(1), split="train")
    assert torch.equal(rows.with_format("torch")["image"][:], model.images)


def test_dry_run_computes_nothing(bank, tmp_path, capsys):
    costs = train_pad.main(["--bank", bank, "--output_dir", str(tmp_path / "set"), "--dry_run", *SHORT])
    assert costs["full_unroll_GB"] > costs["ours_GB"] > 0
    assert "full unroll GB" in capsys.readouterr().out
    assert not (tmp_path / "set").exists() or not any((tmp_path / "set").iterdir())


@pytest.mark.parametrize("program", [train_pad, train_edf, train_datm], ids=["pad", "edf", "datm"])
def test_dry_run_needs_no_experts_and_no_network(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TrajectoryBank, "from_pretrained", lambda *_: pytest.fail("it looked for experts"))
    monkeypatch.setattr(distillation, "train_bank", lambda *_: pytest.fail("it trained experts"))
    for recipe in read_recipes(program.__file__):
        assert program.main(["--recipe", recipe, "--dry_run"])["ours_GB"] > 0
    described = ["--dry_run", "--student", "convnet-d3-w128", "--image_shape", "3", "32", "32", "--num_classes", "10"]
    costs = program.main([*described, "--images_per_class", "10", "--syn_steps", "80"])
    assert costs["parameters"] == 320010 and round(costs["full_unroll_GB"]) == 25
    with pytest.raises(ValueError, match="Nothing says which network is trained"):
        program.main(["--dry_run"])
    for wrong in (["--student", "mlp"], ["--dry_run", "--num_classes", "3"]):
        with pytest.raises(ValueError, match="`--dry_run` counts for"):
            program.main(wrong)
    assert not list(tmp_path.iterdir())


def test_last_step_is_reported_beside_the_selected_one(bank, tmp_path, monkeypatch):
    found = {}
    evaluate = distillation.evaluate_distilled
    monkeypatch.setattr(distillation, "evaluate_distilled", lambda *a, **k: found.update(k) or evaluate(*a, **k))
    argv = [
        "--bank",
        bank,
        "--output_dir",
        str(tmp_path / "set"),
        *SHORT,
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
    ]
    argv += ["--save_steps", "1", "--load_best_model_at_end", "true", "--eval_epochs", "1", "--lr_img", "3000"]
    results = train_datm.main(argv)
    selected = json.loads((tmp_path / "set" / "dataset" / "distillation.json").read_text())["selected"]["step"]
    assert ("last" in results["accuracies"]) == (selected == 1) == (found["last"] is not None)


@pytest.mark.parametrize(
    ("module", "program", "recorded"),
    [
        (
            "hf_effml.scripts.train_pad",
            "/somewhere/scripts/train_pad.py",
            ["python", "-m", "hf_effml.scripts.train_pad"],
        ),
        ("hf_effml.__main__", "/somewhere/hf_effml/__main__.py", ["python", "-m", "hf_effml"]),
        (None, "scripts/train_pad.py", ["python", "scripts/train_pad.py"]),
        ("pytest.__main__", "/somewhere/pytest/__main__.py", None),
    ],
)
def test_the_command_is_recorded_as_it_runs(module, program, recorded, monkeypatch):
    spec = None if module is None else SimpleNamespace(name=module)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", [program, "--recipe", "smoke"])
    assert _command_line() == (None if recorded is None else [*recorded, "--recipe", "smoke"])


def test_map_arguments_that_do_not_fit(bank):
    with pytest.raises(ValueError, match="Name it as well"):
        train_edf.MapArguments(cam_subset="imagenette")
    with pytest.raises(ValueError, match="`cam_subset`: `imagecars` is no subset. .*imagefruit"):
        train_edf.MapArguments(cam_model="resnet", cam_subset="imagecars")
    with pytest.raises(ValueError, match="one class of `cam_model` for each of the 10 classes; got 2"):
        train_edf._map_network(
            train_edf.MapArguments(cam_model="resnet", cam_classes=[1, 2]), TrajectoryBank.from_pretrained(bank)
        )


def test_bench_writes_table_and_json(tmp_path, capsys):
    argv = ["--hidden_size", "4", "--depth", "1", "--image_size", "8", "--batch_syn", "10", "--syn_steps", "2", "3"]
    argv += ["--bank_experts", "1", "--rounds", "1", "--no_compile", "--output_dir", str(tmp_path)]
    results = bench_distillation.main(argv)
    assert [row["way"] for row in results["gradients"]] == [*benchmarks.WAYS[:-1]] * 2
    errors = {row["way"]: float(row["error_images"]) for row in results["gradients"]}
    assert errors[benchmarks.OURS] < 1e-5 < errors[benchmarks.FIRST_ORDER]
    # Every published setting: of DATM, of PAD and of EDF.
    assert len(results["published"]) == 12 + 12 + 41 and results["others"][0]["name"].startswith("start and target")
    assert (tmp_path / "bench_distillation.md").read_text().strip() in capsys.readouterr().out


def test_bench_refuses_a_wrong_gradient(tmp_path, monkeypatch):
    right = benchmarks._matched
    monkeypatch.setattr(benchmarks, "_matched", lambda *a, **k: [1.1 * each for each in right(*a, **k)])
    with pytest.raises(RuntimeError, match="Nothing is reported.*`full unroll` and `ours` differ"):
        argv = ["--hidden_size", "4", "--depth", "1", "--image_size", "8", "--batch_syn", "4", "--syn_steps", "2"]
        bench_distillation.main([*argv, "--rounds", "1", "--no_compile", "--output_dir", str(tmp_path)])


def test_experiment_runs(tmp_path, monkeypatch):
    argv = ["--recipe", "digits", "--seeds", "0", "--output_dir", str(tmp_path), "--num_experts", "1", "--epochs", "3"]
    argv += ["--syn_steps", "2", "--max_start_epoch", "1", "--max_steps", "2", "--test_seeds", "1"]
    argv += ["--max_train", "100", "--max_test", "50", "--methods", "DATM", "PAD", "EDF"]
    settings = experiment_distillation.get_protocol("tm-short", epochs=2)
    monkeypatch.setattr(experiment_distillation, "get_protocol", lambda name: settings)
    rows = experiment_distillation.main(argv)["rows"]
    assert [row["name"] for row in rows][-3:] == ["DATM", "PAD", "EDF"] and len(rows) == 6
    assert json.loads((tmp_path / "distillation_digits.json").read_text())["rows"] == rows
    with pytest.raises(ValueError, match="`methods` may hold DATM"):
        experiment_distillation.ExperimentArguments(methods=["TESLA"])
