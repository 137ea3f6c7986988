"""Results are added to cards and sets while the process is killed or the disk is full: nothing is lost."""

import json
import multiprocessing
import os
import random
import resource
import signal
import time

import pytest
import torch
from huggingface_hub import ModelCard

from helpers import require_package
from hf_effml import DistilledDatasetConfig, DistilledDatasetModel, save_distilled_dataset
from hf_effml.distillation.card import add_evaluations
from hf_effml.hub import CardResult, add_results, check_folder, write_card
from hf_effml.utils.files import remove_leftovers


KILLS = 20


def _report(number):
    protocol = {"name": "tm", "labels": "soft", "epochs": number, "batch_size": 8, "optimizer": "sgd"}
    protocol |= {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.0, "schedule": "constant"}
    accuracies = {"distilled": {"mean": 0.5, "std": None, "values": [0.5]}}
    found = {"student": f"net-{number % 10}", "protocol": protocol, "split": "test", "test_images": 9}
    return found | {"test_fingerprint": "x", "accuracies": accuracies, "scores": {}, "notes": []}


def _add_to_model(folder, number):
    add_results(folder, [CardResult(f"Accuracy {number % 10}", number, metric="accuracy")], "digits")


def _add_to_set(folder, number):
    add_evaluations(folder, [_report(number % 10)])


@pytest.fixture(params=["model", "set"])
def case(request, tmp_path):
    """A folder with its card, what adds results to it, and what reads their number."""
    folder = tmp_path / "folder"
    if request.param == "model":
        DistilledDatasetModel(DistilledDatasetConfig(image_size=8)).save_pretrained(folder)
        write_card(folder)
        _add_to_model(folder, 0)
        return folder, _add_to_model, lambda: json.loads((folder / "results.json").read_text())["results"]
    require_package("datasets")
    save_distilled_dataset(DistilledDatasetModel(DistilledDatasetConfig(image_size=8)), folder)
    _add_to_set(folder, 0)
    return folder, _add_to_set, lambda: json.loads((folder / "distillation.json").read_text())["results"]


def _in_a_process(work, after=None):
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    if after is not None:
        time.sleep(after)
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    return process.exitcode


def _whole(folder, read):
    card = ModelCard.load(folder / "README.md")
    assert "## Results" in card.text and "## Versions" in card.text and "My own words." in card.text
    remove_leftovers(folder)
    check_folder(folder)
    return {json.dumps(entry, sort_keys=True) for entry in read()}


def test_kills_and_full_disks_lose_nothing(case):
    folder, add, read = case
    path = folder / "README.md"
    path.write_text(path.read_text() + "\nMy own words.\n")
    dice, known = random.Random(0), _whole(folder, read)
    torch.set_num_threads(1)

    def forever() -> None:
        for number in range(10**6):
            add(folder, number)

    def on_a_full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = dice.randrange(0, 4000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        add(folder, 3)

    for _ in range(KILLS):
        assert _in_a_process(forever, after=0.02 + 0.2 * dice.random()) == -signal.SIGKILL
        names = {json.loads(entry).get("name", "set") for entry in known}
        known = _whole(folder, read)
        assert names <= {json.loads(entry).get("name", "set") for entry in known}
    for _ in range(KILLS):
        assert _in_a_process(on_a_full_disk) in (0, 1)
        dice.random()
        assert len(_whole(folder, read)) >= len(known)
