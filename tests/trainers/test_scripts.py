"""The programs around Vim, R-MeeTo and DyVM: train, re-train, evaluate, experiment, demo."""

import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForImageClassification

from helpers import require_package, run_python
from hf_effml import VimTrainingArguments
from hf_effml.cli.start_model import trainer_options
from hf_effml.scripts import (
    demo,
    evaluate_dyvm,
    evaluate_rmeeto,
    experiment_dyvm,
    experiment_rmeeto,
    train_dyvm,
    train_rmeeto,
    train_vim,
)
from hf_effml.vim.evaluation.baselines import selection_task


SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "--save_strategy", "no"]
TINY = ["--image_size", "16", "--patch_size", "4", "--hidden_size", "16", "--num_hidden_layers", "4"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    require_package("sklearn")
    folder = tmp_path_factory.mktemp("scripts") / "start"
    results = train_vim.main(["--recipe", "smoke", "--output_dir", str(folder), *TINY, *SMALL])
    assert results["steps"] == 2 and 0 <= results["accuracy"] <= 1
    return folder


def test_train_vim_writes_a_folder_that_loads(start):
    model = AutoModelForImageClassification.from_pretrained(start)
    assert model.config.id2label[3] == "3" and model.config.num_hidden_layers == 4
    card = ModelCard.load(start / "README.md")
    assert "Measured on digits." in card.text and "train_vim" not in str(card.data)
    assert (start / "preprocessor_config.json").exists()


def test_fine_tuning_goes_on(start, tmp_path):
    # Recipes may say the sizes that it has.
    own = ["--image_size", "16", "--crop_share", "1.0"]
    results = train_vim.main(
        ["--model_name_or_path", str(start), "--output_dir", str(tmp_path / "more"), *own, *SMALL]
    )
    assert results["steps"] == 2


def test_retrain_evaluate_and_card(start, tmp_path, capsys):
    folder = tmp_path / "merged"
    arguments = [
        "--recipe",
        "smoke",
        "--model_name_or_path",
        str(start),
        "--output_dir",
        str(folder),
        "--merge_r",
        "4",
    ]
    results = train_rmeeto.main([*arguments, *SMALL])
    assert results["tokens_per_layer"] == [17, 17, 13, 13]
    assert f'from_pretrained("{folder}", trust_remote_code=True)' in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert type(model).__name__ == "RMeeToVimForImageClassification" and model.config.merge_class_position == "exact"
    evaluated = evaluate_rmeeto.main(
        [str(folder), "--start", str(start), "--r", "2", "--rounds", "1", "--batch_size", "128", "--add_to_card"]
    )
    rows = {row["name"]: row for row in evaluated["rows"]}
    assert list(rows) == ["its start, merging off", "as saved", "r = 2"]
    assert rows["as saved"]["accuracy"] == results["accuracy"]
    assert rows["its start, merging off"]["accuracy"] == results["dense_accuracy"]
    assert [row["tokens"] for row in rows.values()] == [17, 15, 16]
    assert rows["as saved"]["multiply_adds"] < rows["its start, merging off"]["multiply_adds"]
    json.dumps(evaluated)
    text = ModelCard.load(folder / "README.md").text
    assert "| Tokens per block, on average | 15 | 17 |" in text and "Latency (ms per image, cpu, batch 128)" in text


def test_dyvm_train_evaluate_picture_and_card(start, tmp_path, capsys):
    require_package("matplotlib")
    folder, picture = tmp_path / "dynamic", tmp_path / "dropped.png"
    arguments = ["--recipe", "smoke", "--model_name_or_path", str(start), "--output_dir", str(folder)]
    results = train_dyvm.main([*arguments, *SMALL, "--token_keep_ratio", "0.5", "--pruning_layers", "1", "3"])
    assert results["tokens_per_layer"] == [17, 9, 9, 5]
    assert f'from_pretrained("{folder}", trust_remote_code=True)' in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert type(model).__name__ == "DyVMForImageClassification" and model.config.token_keep_ratio == [0.5, 0.25]
    command = [str(folder), "--start", str(start), "--token_keep_ratio", "0.7", "--picture", str(picture)]
    evaluated = evaluate_dyvm.main([*command, "--rounds", "1", "--batch_size", "128", "--add_to_card"])
    rows = {row["name"]: row for row in evaluated["rows"]}
    assert list(rows) == ["its start", "as saved", "token_keep_ratio = 0.7"]
    assert rows["as saved"]["accuracy"] == results["accuracy"]
    assert rows["as saved"]["block_keep_ratio"] == pytest.approx(results["block_keep_ratio"])
    assert rows["its start"]["accuracy"] == results["dense_accuracy"]
    assert [row["token_keep_ratio"] for row in rows.values()] == [[], [0.5, 0.25], [11 / 16, 7 / 16]]
    assert rows["as saved"]["multiply_adds"] < rows["its start"]["multiply_adds"]
    json.dumps(evaluated)
    assert picture.stat().st_size > 10_000
    text = ModelCard.load(folder / "README.md").text
    assert "| Tokens per block, on average | 10 | 17 |" in text and "Share of the scans that run" in text
    assert "Its gates were set on 898 training images" in text
    itself = evaluate_dyvm.main([str(folder), "--rounds", "1", "--batch_size", "128"])["rows"]
    assert itself[0]["name"] == "everything on" and itself[0]["tokens"] == 17 and itself[0]["block_keep_ratio"] == 1


def test_dyvm_refuses_other_models(start):
    with pytest.raises(ValueError, match="must be a DyVM; it is a `VimForImageClassification`"):
        evaluate_dyvm.main([str(start)])


def test_one_share_is_that_of_every_stage():
    assert train_dyvm.SelectionArguments(token_keep_ratio=[0.7]).fields()["token_keep_ratio"] == 0.7
    assert train_dyvm.SelectionArguments(token_keep_ratio=[0.7, 0.5]).fields()["token_keep_ratio"] == [0.7, 0.5]


def test_patches_of_the_selection_task_tell_the_class():
    train, test = selection_task(seed=1, train=60, test=20)
    assert (len(train), len(test)) == (60, 20) and train[0]["pixel_values"].shape == (1, 18, 18)
    pixels = torch.stack([row["pixel_values"] for row in train + test])
    labels = torch.tensor([row["labels"] for row in train + test])
    patches = pixels.view(80, 6, 3, 6, 3).transpose(2, 3).reshape(80, 36, 9)
    # The two that carry a class are near its pattern; the nearest of the noise is not.
    for label in labels.unique():
        own = patches[labels == label]
        first = own[0]
        distance = torch.cdist(own[1:].flatten(0, 1), first).view(len(own) - 1, 36, 36)
        assert (distance.amin(1) < 2.2).float().mean(0).topk(2).values.min() == 1
    again, _ = selection_task(seed=1, train=60, test=20)
    assert torch.equal(again[5]["pixel_values"], train[5]["pixel_values"])


@pytest.mark.slow
def test_dyvm_experiment_reports_every_way(tmp_path):
    require_package("sklearn")
    sizes = ["--patch_size", "4", "--hidden_size", "8", "--num_hidden_layers", "3", "--seeds", "0", "1"]
    settings = ["--token_keep_ratio", "0.5", "--block_keep_ratio", "0.8", "--epochs", "1", "--tune_epochs", "1"]
    results = experiment_dyvm.main(["--output_dir", str(tmp_path), *sizes, *settings])
    assert [row["model"] for row in results["rows"]][:2] == ["dense", "dense, trained on"]
    assert len(results["rows"]) == 7 and all(len(row["accuracies"]) == 2 for row in results["rows"])
    assert "| learned tokens, fine-tuned, 0.5 | 0.44 / 0.22 |" in (tmp_path / "dyvm_digits.md").read_text()
    written = json.loads((tmp_path / "dyvm_digits.json").read_text())["rows"]
    assert written == results["rows"]
    assert written[-1]["training"][0].keys() >= {"block_keep_ratio", "block_keep_ratio_after_calibration"}
    with pytest.raises(ValueError, match="must be of one length, one pair per setting"):
        experiment_dyvm.main(["--block_keep_ratio", "0.8"])


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("image_size", "32", "`--image_size 32` does not fit .*, which has 16"),
        ("hidden_size", "32", "`--hidden_size 32` does not fit .*, which has 16"),
        ("crop_share", "0.5", "`--crop_share 0.5` does not fit .*, which has 1.0"),
    ],
)
def test_a_trained_vim_keeps_its_shape(start, tmp_path, option, value, message):
    argv = ["--model_name_or_path", str(start), "--output_dir", str(tmp_path), *SMALL]
    with pytest.raises(ValueError, match=message):
        train_vim.main([*argv, f"--{option}", value])


def test_start_is_trained_once(tmp_path, monkeypatch):
    require_package("sklearn")
    calls = []

    def train_start(argv):
        calls.append(argv)
        return original([*argv, *TINY, *SMALL])

    original = train_vim.main
    monkeypatch.setattr(train_vim, "main", train_start)
    folder = tmp_path / "run"
    for _ in range(2):
        train_rmeeto.main(["--recipe", "smoke", "--output_dir", str(folder), *SMALL])
    own = ["--data", "digits", "--seed", "42"]
    assert calls == [["--recipe", "smoke", *own, "--output_dir", str(folder / "start")]]
    with pytest.raises(ValueError, match="`seed` is 42 there and 7 here. Choose another folder, or delete this one."):
        train_rmeeto.main(["--recipe", "smoke", "--output_dir", str(folder), "--seed", "7", *SMALL])


@pytest.mark.parametrize(
    "program, argv, message",
    [
        (train_rmeeto, ["--merge_target_ratio", "1.5"], "merge_target_ratio"),
        (train_rmeeto, ["--merge_interval", "0"], "merge_interval"),
        (train_rmeeto, ["--start_recipe", "smok"], "`--start_recipe smok` is no recipe of a Vim; there are: smoke"),
        (train_dyvm, ["--pruning_layers", "9"], "pruning_layers"),
        (train_dyvm, ["--teacher", "."], "holds no `config.json`, so no model"),
        (train_dyvm, ["--drop_path_rate", "2"], "drop_path_rate"),
    ],
)
def test_wrong_values_are_found_before_the_start_is_trained(program, argv, message, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vim, "main", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError, StrictDataclassError), match=message):
        program.main(["--recipe", "smoke", "--output_dir", str(tmp_path), *argv])


def test_mixing_smooths_in_place_of_the_loss(tmp_path):
    """The arguments that were parsed stay as they are."""
    data = SimpleNamespace(labels=["a", "b"], train=[], test=[])
    args = VimTrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none")
    mixing = SimpleNamespace(collator=lambda labels, smoothing: (labels, smoothing))
    options = trainer_options(mixing, args, data, None)
    assert options["data_collator"] == (2, 0.1)
    assert (options["args"].label_smoothing_factor, args.label_smoothing_factor) == (0.0, 0.1)
    plain = trainer_options(SimpleNamespace(collator=lambda *_: None), args, data, None)
    assert plain["args"].label_smoothing_factor == 0.1


def test_wrong_use_is_explained(start, tmp_path):
    with pytest.raises(ValueError, match="Say how much to merge"):
        train_rmeeto.main(["--model_name_or_path", str(start)])
    with pytest.raises(ValueError, match="There is no model to start from"):
        train_rmeeto.main(["--merge_r", "4", "--output_dir", str(tmp_path)])


def test_whole_numbers_are_tokens_and_fractions_shares():
    assert train_rmeeto.MergeArguments(merge_r=5.0).fields()["merge_r"] == 5
    assert isinstance(train_rmeeto.MergeArguments(merge_r=5.0).fields()["merge_r"], int)
    assert train_rmeeto.MergeArguments(merge_r=0.1).fields()["merge_r"] == 0.1


@pytest.mark.slow
def test_experiment_reports_every_way(tmp_path, monkeypatch):
    require_package("sklearn")
    sizes = ["--patch_size", "4", "--hidden_size", "8", "--num_hidden_layers", "3", "--r", "4", "--seeds", "0", "1"]
    results = experiment_rmeeto.main(["--output_dir", str(tmp_path), *sizes, "--epochs", "1", "--retrain_epochs", "1"])
    assert [row["model"] for row in results["rows"]][0] == "dense" and len(results["rows"]) == 8
    assert all(len(row["accuracies"]) == 2 for row in results["rows"])
    assert "| merged and re-trained, r=4 |" in (tmp_path / "digits.md").read_text()
    assert json.loads((tmp_path / "digits.json").read_text())["rows"] == results["rows"]


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    require_package("sklearn")
    require_package("matplotlib")
    out = tmp_path / "effml-demo"
    results = demo.main(["--out", str(out), "--epochs", "1", "--retrain_epochs", "1"])
    expected = {"accuracy_speed.png", "merged_tokens.png", "results.json", "rmeeto-digits"}
    expected |= {"dropped_tokens.png", "dyvm-digits", "digits-experts", "distilled-digits", "distilled_digits.png"}
    assert {path.name for path in out.iterdir()} == expected
    assert json.loads((out / "results.json").read_text())["rows"] == results["rows"]
    model, dataset = (line.strip() for line in capsys.readouterr().out.strip().splitlines()[-2:])
    assert model == f'pipeline("image-classification", "{out}/dyvm-digits", trust_remote_code=True)'
    code = f"""
from PIL import Image
from datasets import load_dataset
from transformers import pipeline
print(len({model}(Image.new("L", (8, 8)))), {dataset}.num_rows)
"""
    assert run_python(code, cwd=tmp_path, without_package=True).strip() == "5 10"
