"""Pushing a folder: what is refused and why, and what arrives."""

import json

import pytest
import torch
from hub.conftest import ALICE
from safetensors.torch import save_file

from hf_effml.hub import push_folder, write_model_card
from hf_effml.hub.push import check_folder


@pytest.fixture
def folder(tmp_path):
    """A folder as a Trainer leaves it: a model, its card, and files of the Trainer's own."""
    folder = tmp_path / "my-vim"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["VimForImageClassification"]}))
    save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "checkpoint-2/optimizer.pt"):
        torch.save({"output_dir": "/home/alice/secret"}, folder / name)
    (folder / "trainer_state.json").write_text('{"best_model_checkpoint": "/home/alice/secret"}')
    write_model_card(folder, method="vim")
    return folder


def test_a_finished_folder_passes(folder):
    check_folder(folder)


@pytest.mark.parametrize(
    "name, content, remark",
    [
        ("config.json", None, "no `config.json`"),
        ("model.safetensors", None, "no `.safetensors`"),
        ("README.md", None, "no card"),
        ("README.md", "# Mine\n\n[More Information Needed]\n", "More information needed"),
        ("README.md", "Trained on /home/alice/photos.", "line 1 names a folder of this machine (`/home/alice`)"),
        ("README.md", r"Trained on C:\Users\alice\photos.", "names a folder of this machine"),
        ("notes.txt", "first\nhf_" + "A" * 34, "`notes.txt`, line 2 holds what looks like an access token"),
        ("deep/weights.pth", "x", "`deep/weights.pth` may be a pickle"),
        ("pytorch_model.bin", "x", "`pytorch_model.bin` may be a pickle"),
    ],
)
def test_what_is_refused(folder, name, content, remark):
    (folder / name).parent.mkdir(exist_ok=True)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ValueError) as error:
        push_folder(folder, "alice/m")
    assert remark in str(error.value) and "is not ready for the Hub" in str(error.value)
    assert "A" * 34 not in str(error.value)


def test_all_remarks_come_at_once(folder):
    (folder / "README.md").unlink()
    (folder / "model.safetensors").rename(folder / "model.pt")
    with pytest.raises(ValueError, match="no `.safetensors`.*no card.*model.pt"):
        check_folder(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        push_folder(tmp_path / "absent", "alice/m")


def test_adapters_and_harmless_names_pass(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "README.md").write_text("`hf_effml` loads it; see https://example.org/home/alice/ and /homepage.")
    check_folder(folder)


def test_a_router_needs_its_base_model_on_the_hub(folder):
    config = {"architectures": ["TokenRouterModel"], "model_type": "token_router"}
    (folder / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": "alice/llama"}))
    check_folder(folder)
    for name in (None, str(folder)):
        (folder / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with pytest.raises(
            ValueError, match=r"base model `.*` is not one on the Hub: push that first .*to_full_checkpoint"
        ):
            check_folder(folder)


PUSH = """
import json
from hf_effml.hub import push_folder

commits = [
    push_folder("my-vim", "alice/m", private=True),
    push_folder("my-vim", "alice/m", revision="draft", commit_message="a draft"),
    push_folder("my-vim", "alice/m", create_pr=True),
]
print(json.dumps([[commit.commit_url, commit.pr_url] for commit in commits]))
"""

PROGRAM = """
from hf_effml.cli.parsing import run_script
from hf_effml.scripts.push import main
from pathlib import Path

assert run_script(main, ["my-vim", "alice/m", "--private", "--json"]) == 0
Path("my-vim/README.md").unlink()
print("now without a card", flush=True)
assert run_script(main, ["my-vim", "alice/m"]) == 2
"""


@pytest.mark.hub
def test_program(hub, client, folder):
    printed = client.run(PROGRAM, home="a", token=ALICE)
    good, wrong = printed.split("now without a card\n")
    result = json.loads(good.splitlines()[-1])
    assert result["repo"] == "alice/m" and result["commit"] == hub.repos["models", "alice/m"].refs["main"]
    assert hub.repos["models", "alice/m"].private
    lines = wrong.splitlines()
    assert len(lines) <= 2 and "no card" in lines[0], printed
