import json
import os
import resource
import signal
import stat
import time
from multiprocessing import get_context

import pytest
import torch
from safetensors.torch import load_file

from hf_effml.utils.files import (
    is_leftover,
    remove_leftovers,
    replacing_file,
    replacing_folder,
    write_json,
    write_safetensors,
    write_text,
)
from hf_effml.utils.shards import ShardFolder, differing_settings


def test_files_are_whole_and_readable(tmp_path):
    path = write_json(tmp_path / "new" / "value.json", {"a": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü"}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    path.chmod(0o600)
    write_text(path, "again")
    assert (stat.S_IMODE(path.stat().st_mode), path.read_text()) == (0o600, "again")
    no_text = os.fsdecode(b"photos-\xff")
    assert json.loads(write_json(tmp_path / "new" / "names.json", no_text).read_text(encoding="utf-8")) == no_text
    tensors = {"a": torch.arange(6.0).view(2, 3).t()}
    write_safetensors(tmp_path / "t.safetensors", tensors, {"note": "x"})
    assert torch.equal(load_file(tmp_path / "t.safetensors")["a"], tensors["a"])
    assert sorted(os.listdir(tmp_path)) == ["new", "t.safetensors"]


def test_an_error_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "file", "old")
    write_text(tmp_path / "folder" / "part", "old")
    with pytest.raises(KeyError), replacing_file(tmp_path / "file") as path:
        path.write_text("half")
        raise KeyError
    with pytest.raises(KeyError), replacing_folder(tmp_path / "folder") as path:
        (path / "part").write_text("half")
        raise KeyError
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "part").read_text() == "old"
    with replacing_folder(tmp_path / "folder") as path:
        (path / "other").write_text("new")
    assert os.listdir(tmp_path / "folder") == ["other"] and len(os.listdir(tmp_path)) == 2


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """As a process meets it that may write no more than a few bytes."""

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(OSError):
            write_text(tmp_path / "file", "new" * 1000)
        with pytest.raises(Exception):  # noqa: B017 - safetensors has errors of its own
            write_safetensors(tmp_path / "tensors", {"a": torch.ones(1000)})

    write_text(tmp_path / "file", "old" * 1000)
    write_safetensors(tmp_path / "tensors", {"a": torch.zeros(1000)})
    process = get_context("fork").Process(target=fill)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "file").read_text() == "old" * 1000
    assert not load_file(tmp_path / "tensors")["a"].any()


def test_kills_leave_whole_files_and_leftovers_that_are_known(tmp_path):
    def write() -> None:
        torch.set_num_threads(1)
        for number in range(10**6):
            write_json(tmp_path / "value.json", [number] * 500)
            write_safetensors(tmp_path / "t.safetensors", {"a": torch.full((500,), number)})

    for turn in range(8):
        process = get_context("fork").Process(target=write)
        process.start()
        while not (tmp_path / "t.safetensors").exists():
            time.sleep(0.001)
        time.sleep(0.003 * turn)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert len(set(json.loads((tmp_path / "value.json").read_text()))) == 1
        assert load_file(tmp_path / "t.safetensors")["a"].unique().numel() == 1
    others = [path.name for path in tmp_path.iterdir() if not is_leftover(path.name)]
    assert sorted(others) == ["t.safetensors", "value.json"]
    (tmp_path / ".tmpA1b2C3").write_text("of safetensors")
    (tmp_path / ".expert-00001.safetensors.4711.tmp").write_text("of an earlier version")
    (tmp_path / ".gitignore").write_text("no leftover")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".gitignore", "t.safetensors", "value.json"]


def test_shards_go_on_where_they_stopped(tmp_path):
    settings = {"seed": 0, "size": (2, 3), "model": {"width": 8}}
    shards = ShardFolder(tmp_path / "shards", ["0", "1", "2"], settings)
    assert shards.missing() == ["0", "1", "2"] and not shards.path.exists()
    shards.start()
    with shards.writing("1") as path:
        path.write_text("done")
    assert ShardFolder(shards.path, ["0", "1", "2", "3"], settings).start() == ["0", "2", "3"]
    other = ShardFolder(shards.path, ["0"], settings | {"model": {"width": 16}})
    with pytest.raises(ValueError, match="`model.width` is 8 there and 16 here"):
        other.start()
    shards.description.unlink()
    with pytest.raises(ValueError, match="holds `1` without a `settings.json`"):
        shards.start()
    assert differing_settings({"a": 1}, {"a": 1, "b": None}) == []


def test_links_long_names_and_modes_stay(tmp_path):
    write_text(tmp_path / "real" / "file", "old")
    (tmp_path / "file").symlink_to("real/file")
    (tmp_path / "folder").symlink_to("real")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").is_symlink() and (tmp_path / "real" / "file").read_text() == "new"
    (tmp_path / "real").chmod(0o750)
    with replacing_folder(tmp_path / "folder") as path:
        (path / "other").write_text("new")
    assert (tmp_path / "folder").is_symlink() and os.listdir(tmp_path / "real") == ["other"]
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o750
    for name in ("a" * 251, "ü" * 125, "a\nb"):
        with replacing_file(tmp_path / name) as path:
            assert is_leftover(path.name)
        assert (tmp_path / name).is_file()


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    write_text(tmp_path / "in" / "file", "mine")
    monkeypatch.chdir(tmp_path / "in")
    for path in (".", tmp_path / "in", tmp_path):
        with pytest.raises(ValueError, match="while this process works in it"), replacing_folder(path):
            pass
    assert os.listdir(".") == ["file"]


def test_a_folder_that_a_kill_moved_away_comes_back(tmp_path):
    write_text(tmp_path / "[1]" / "README.md", "mine")
    with pytest.raises(KeyError), replacing_folder(tmp_path / "[1]") as path:
        write_text(path / "half", "x")
        # As a kill between the two renames leaves it.
        beside = tmp_path / ".[1].a1b2c3d4.unfinished"
        beside.mkdir()
        os.replace(tmp_path / "[1]", beside / "old")
        raise KeyError
    with replacing_folder(tmp_path / "[1]"):
        assert os.listdir(tmp_path / "[1]") == ["README.md"]
    remove_leftovers(tmp_path, of="[1]")
    assert os.listdir(tmp_path) == ["[1]"]


def test_folders_of_others_are_no_leftovers(tmp_path):
    write_text(tmp_path / ".tmpfolder" / "file", "mine")
    write_text(tmp_path / ".tmp_mine_", "mine")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".tmp_mine_", ".tmpfolder"]
    assert differing_settings({"a": float("nan"), "b": 1}, {"a": float("nan"), "b": 1.0}) == []


def test_many_may_replace_a_folder_at_once(tmp_path):
    def write(number: int) -> None:
        for _ in range(40):
            with replacing_folder(tmp_path / "folder") as path:
                (path / "a").write_text(str(number))
                (path / "b").write_text(str(number))

    processes = [get_context("fork").Process(target=write, args=(number,)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "folder" / "a").read_text() == (tmp_path / "folder" / "b").read_text()
    assert os.listdir(tmp_path) == ["folder"]
