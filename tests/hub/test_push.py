"""Pushing a folder: what is refused and why, and what arrives."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from hub.conftest import ALICE
from safetensors.torch import save, save_file

from hf_effml.hub import check_folder, push_folder, write_card
from hf_effml.hub.checks import files_to_push


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
    write_card(folder, method="vim")
    return folder


def test_a_finished_folder_passes(folder):
    check_folder(folder)


def test_what_a_program_started_from_stays_here(folder):
    (folder / "start" / "checkpoint-3").mkdir(parents=True)
    torch.save({}, folder / "start" / "checkpoint-3" / "optimizer.pt")
    torch.save({}, folder / "start" / "training_args.bin")
    save_file({"weight": torch.ones(3)}, folder / "start" / "model.safetensors")
    check_folder(folder)
    assert files_to_push(folder) == ["README.md", "config.json", "model.safetensors"]


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


SECRET = "hf_" + "B" * 34


def _pickle(protocol):
    return pickle.dumps(Path("x"), protocol=protocol)


def _tensors(metadata=None, **tensors):
    return save({"weight": torch.ones(300), **tensors}, metadata)


def _archive():
    file = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, file)
    return file.getvalue()


def _header(text):
    """A safetensors file whose header is written otherwise than this library's."""
    header = (
        json.dumps({text: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).replace("/", r"\u002f").encode()
    )
    return len(header).to_bytes(8, "little") + header + bytes(4)


def _encrypted():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.txt", "y")
    data = bytearray(file.getvalue())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def _array(values):
    file = io.BytesIO()
    numpy.save(file, values, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    "name, content, remark",
    [
        ("model.safetensors", b"", "`model.safetensors` is empty, cut off or no safetensors file"),
        ("model.safetensors", b"x" * 1000, "`model.safetensors` is empty, cut off or no safetensors file"),
        ("model.safetensors", _tensors()[:-8], "`model.safetensors` is empty, cut off or no safetensors file"),
        ("model.safetensors", save({}), "`model.safetensors` holds no tensors"),
        ("model.safetensors", _tensors({"by": SECRET}), "what looks like an access token"),
        ("model.safetensors", _tensors({"from": "/home/alice/x"}), "a folder of this machine (`/home/alice`)"),
        ("README.md", b"", "`README.md` is empty or cut off"),
        ("README.md", b"---\nlicense: mit\n", "`README.md` is empty or cut off"),
        ("README.md", b"---\nlicense: mit\n---\n", "`README.md` is empty or cut off"),
        ("README.md", b"# A\n<!-- hf-effml: use 01234567 -->\n## Use", "`README.md` is empty or cut off"),
        ("README.md", "# Über".encode("utf-16"), "`README.md` is no text in UTF-8"),
        ("config.json", b'{"architectures": [', "`config.json` is empty or cut off"),
        ("notes.txt", SECRET.encode("utf-16"), "(UTF-16-LE) begins what looks like an access token"),
        ("notes.txt", f"in {SECRET}".encode("utf-16-be"), "(UTF-16-BE) begins what looks like an access token"),
        ("notes.txt", f"in {SECRET}".encode("utf-32-le"), "(UTF-32-LE) begins what looks like an access token"),
        ("notes.txt", r"C:\Users\alice".encode("utf-16"), "(UTF-16-LE) names a folder of this machine"),
        ("picture.png", b"\x89PNG\xff" + SECRET.encode(), "byte 5 begins what looks like an access token"),
        ("keys.env", b"OPENAI=sk-proj-" + b"a1B2" * 8, "line 1 holds what looks like an access token"),
        ("keys.env", b"AWS=AKIA" + b"A1B2" * 4, "line 1 holds what looks like an access token"),
        ("keys.env", b"GITHUB=ghp_" + b"a1B2" * 9, "line 1 holds what looks like an access token"),
        ("weights.PT", b"x", "`weights.PT` may be a pickle"),
        ("weights.data", _archive(), "`weights.data` may be a pickle"),
        ("weights.txt", _pickle(4), "`weights.txt` may be a pickle"),
        ("weights.txt", _pickle(0), "`weights.txt` may be a pickle"),
        ("objects.npy", _array(numpy.array([Path("x")], dtype=object)), "`objects.npy` may be a pickle"),
        ("squeezed.data", gzip.compress(_pickle(4), mtime=0), "`squeezed.data` may be a pickle"),
        ("squeezed.data", zlib.compress(_pickle(4)), "`squeezed.data` may be a pickle"),
        ("squeezed.data", bz2.compress(_pickle(4)), "`squeezed.data` may be a pickle"),
        ("squeezed.data", lzma.compress(_pickle(4), lzma.FORMAT_ALONE), "`squeezed.data` may be a pickle"),
        ("long.txt", pickle.dumps([Path("x"), "x" * 2**21], 0), "`long.txt` may be a pickle"),
        (
            "mixed.npy",
            _array(numpy.array([(1, None)], dtype=[("a", "f8"), ("b", "O")])),
            "`mixed.npy` may be a pickle",
        ),
        ("locked.zip", _encrypted(), "`locked.zip` may be a pickle"),
        ("weights.data", _archive()[:-30], "`weights.data` is empty or cut off"),
        ("picture.png", b"\x89PNG\r\n\x1a\n" + bytes(99), "`picture.png` is empty or cut off"),
        ("table.parquet", b"PAR1" + bytes(99), "`table.parquet` is empty or cut off"),
        ("table.parquet", b"", "`table.parquet` is empty or cut off"),
        ("model.safetensors", _header("/home/alice/w"), "a folder of this machine (`/home/alice`)"),
        ("tokenizer.json", rb'{"a": "\u002fhome\/alice", "a": "h\u0066_' + b"B" * 34 + b'"}', "access token"),
        ("lines.jsonl", b'{}\n{"a": "\\/home\\/alice"}', "`lines.jsonl`, line 2 names a folder of this machine"),
        ("notes.txt", rb"c:\users\alice", r"(`c:\users\alice`)"),
        ("notes.txt", b"/mnt/c/Users/alice and /var/home/alice", "(`/mnt/c/Users/alice`)"),
        (f"deep/{SECRET}/notes.txt", b"x", "`deep/<token>/notes.txt` has a name that looks like an access token"),
        (
            ".cache/mine/keys.txt",
            SECRET.encode(),
            "keys.txt`, line 1 holds what looks like an access token",
        ),
        (".tmpAbc12D", b"x", "`.tmpAbc12D` was left by a process that was killed"),
        (".config.json.a1b2c3d4.unfinished", b"x", "unfinished` was left by a process that was killed"),
        ("wandb/run/output.log", b"x", "`wandb/run/output.log` is a log of an experiment tracker"),
        ("logs/mlruns/0/meta.yaml", b"x", "`logs/mlruns/0/meta.yaml` is a log of an experiment tracker"),
    ],
)
def test_contents_that_are_refused(folder, name, content, remark):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        check_folder(folder)
    assert remark in str(error.value)
    assert "BBBB" not in str(error.value)


def test_links_that_leave_the_folder_are_refused(folder):
    outside = folder.parent / "outside.txt"
    outside.write_text("not for everybody")
    (folder / "inside.json").symlink_to("config.json")
    check_folder(folder)
    for name, target in (("notes.txt", outside), ("notes", folder.parent), ("gone", folder / "nothing"), ("me", "me")):
        (folder / name).symlink_to(target)
        with pytest.raises(ValueError, match=f"`{name}` is a link"):
            check_folder(folder)
        (folder / name).unlink()


def test_contents_that_are_fine(folder):
    for name, content in {
        "numbers.npy": _array(numpy.arange(3)),
        "notes.txt": b"hf_effml, sk-learn-like-names-with-hyphens, AKIA and /home/ are no secrets. i0 (lp1 .",
        "data.bin.txt": bytes(range(256)) * 9,
        "deep/.gitattributes": b"*.safetensors filter=lfs",
        ".gitignore": b"checkpoints\nold\n.venv\n",
        "records.npy": _array(numpy.zeros(2, dtype=[("O", "f4")])),
        "numbers.jsonl.gz": gzip.compress(b"{}", mtime=0),
        ".cache/huggingface/token": SECRET.encode(),
        "deep/.git/config": SECRET.encode(),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe")
    check_folder(folder)


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
