"""The programs around token routing: train and search on a language model made on the spot, experiment."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoTokenizer

from helpers import require_package
from hf_effml import TokenRouterModel
from hf_effml.hub import check_folder, write_card
from hf_effml.scripts import experiment_token_router, train_token_router
from hf_effml.utils.language_models import train_language_model
from hf_effml.utils.sources.text_examples import LeftPaddingCollator


SMALL = [
    "--sequence_length=96",
    "--eval_windows=4",
    "--max_steps=3",
    "--per_device_train_batch_size=2",
    "--use_cpu",
    "--report_to=none",
    "--disable_tqdm=true",
]
SEARCH = ["--search_population=6", "--search_windows=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("token_router") / "out"
    argv = ["--start_steps=2", f"--output_dir={folder}", "--target_sparsity=0.4", *SMALL, *SEARCH]
    results = train_token_router.main([*argv, "--search_generations=1", "--refine_generations=1"])
    return folder, results


def test_train_writes_a_router_that_loads(trained):
    folder, results = trained
    assert results["steps"] == 3
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["dense", "random tokens", "first and newest tokens", "trained router"]
    assert rows["dense"]["kl"] == 0 == rows["dense"]["sparsity"]
    for name in list(rows)[1:]:
        assert rows[name]["kl"] > 0 and abs(rows[name]["sparsity"] - 0.4) < 0.02
        assert rows[name]["kv_bytes"] / rows[name]["dense_kv_bytes"] == pytest.approx(1 - rows[name]["sparsity"])
    model = TokenRouterModel.from_pretrained(folder)
    assert model.config.schedule == results["sparsity_schedule"]
    assert sum(model.config.schedule) / 4 == pytest.approx(0.4, abs=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(
        "The for statement is used to iterate over the elements of a sequence. " * 6, return_tensors="pt"
    )
    text = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert text.shape[1] == prompt["input_ids"].shape[1] + 4
    assert model.routing_report.sparsity > 0.3
    assert sum(value.numel() for value in load_file(folder / "model.safetensors").values()) == 450


def test_card_and_searches_are_beside_it(trained):
    folder, _ = trained
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert (
        "Measured on pydoc, prompts of 72 tokens." in card.text and "KL divergence from the dense model" in card.text
    )
    for name in ("search.json", "refine.json"):
        assert json.loads((folder / name).read_text())
    # The language model was made here, and nobody could load the router without it.
    with pytest.raises(ValueError, match="base model .* is not one on the Hub"):
        check_folder(folder)
    # From elsewhere its relative name looks like one on the Hub.
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps(config | {"base_model_name_or_path": f"{folder.name}/start"})
    write_card(shutil.copytree(folder, folder.with_name("copy"), ignore=shutil.ignore_patterns("start")))
    (folder.with_name("copy") / "config.json").write_text(text)
    with pytest.raises(ValueError, match="base model .* is not one on the Hub"):
        check_folder(folder.with_name("copy"))


def test_the_start_model_is_used_again(trained, monkeypatch):
    folder, results = trained

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("hf_effml.utils.language_models.Trainer", never)
    argv = ["--start_steps=2", f"--output_dir={folder}", "--target_sparsity=0.4", *SMALL]
    assert train_token_router.main(argv)["rows"][0] == results["rows"][0]


def test_another_start_model_than_the_one_there_is_refused(trained):
    folder, _ = trained
    argv = [f"--output_dir={folder}", "--target_sparsity=0.4", *SMALL]
    with pytest.raises(ValueError, match="`steps` is 2 there and 3 here. Choose another folder, or delete this one."):
        train_token_router.main(["--start_steps=3", *argv])
    with pytest.raises(ValueError, match="`seed` is 42 there and 7 here"):
        train_token_router.main(["--start_steps=2", "--seed=7", *argv])


@pytest.mark.parametrize(
    "option, message",
    [
        ("--search_population=1", "`population` must be at least 2; got 1."),
        ("--sequence_length=1", "`sequence_length` must be at least 2; got 1."),
        ("--prompt_length=96", "`prompt_length` must be from 1 to below `sequence_length`; got 96."),
        ("--eval_windows=0", "`eval_windows` must be at least 1; got 0."),
    ],
)
def test_wrong_values_are_found_before_anything_is_trained(option, message, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_effml.utils.language_models.Trainer", None)
    argv = ["--start_steps=2", f"--output_dir={tmp_path}", "--search_generations=1", "--sequence_length=96", option]
    with pytest.raises(ValueError, match=message):
        train_token_router.main(argv)
    assert not [*tmp_path.iterdir()]


def test_a_start_model_learns_from_short_texts(tmp_path):
    folder = train_language_model([f"Text {number} is short." for number in range(200)], tmp_path / "start", 2, seed=0)
    assert (tmp_path / "start" / "model.safetensors").is_file() and folder == str(tmp_path / "start")


def test_texts_with_a_completion(trained, tmp_path, monkeypatch):
    datasets = require_package("datasets")
    folder, _ = trained
    rows = [{"text": f"Say {number} twice. " * 5 + f"### Response: {number} and {number}."} for number in range(40)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    argv = [f"--model_name_or_path={folder / 'start'}", f"--data={tmp_path / 'train.parquet'}", "--eval_data=pydoc"]
    argv += [f"--output_dir={tmp_path / 'out'}", "--completion_marker=### Response:", *SMALL]
    assert train_token_router.main(argv)["steps"] == 3
    with pytest.raises(ValueError, match="No text has `completion_marker` 'Answer:'"):
        train_token_router.main([*argv, "--completion_marker=Answer:"])


def test_padding_of_completions():
    rows = [
        {"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]},
        {"input_ids": [4, 5], "completion_mask": [0, 1]},
    ]
    batch = LeftPaddingCollator(9)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1], [0, 0, 1]]


def test_experiment_runs(trained, tmp_path):
    folder, _ = trained
    threads = torch.get_num_threads()
    argv = [f"--model_name_or_path={folder / 'start'}", "--data=pydoc", f"--output_dir={tmp_path}", "--name=try"]
    argv += ["--seeds=0", "--sparsities=0.4", "--prompt_length=72", "--continuation_length=24", "--eval_windows=4"]
    results = experiment_token_router.main([*argv, "--search_windows=2", "--generations=1", "--steps=2"])
    torch.set_num_threads(threads)
    ways = {row["name"] for row in results["rows"]}
    wanted = {"dense", "random tokens", "static", "one-pass, trained", "ShortGPT, blocks removed"}
    assert ways >= {f"0.4, {way}" for way in wanted}
    assert {gate["holds"] for gate in results["gates"]} <= {"yes", "no"} and len(results["gates"]) == 7
    assert json.loads((tmp_path / "try.json").read_text())["rows"] == results["rows"]


def test_a_folder_that_is_no_language_model(tmp_path):
    with pytest.raises((OSError, ValueError)):
        train_token_router.main([f"--model_name_or_path={tmp_path}", "--use_cpu"])
