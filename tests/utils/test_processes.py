"""Which processes still run, by the files that they hold, and words for a lost one."""

import multiprocessing
import os
import signal

import pytest

from hf_effml.utils.processes import explaining_lost_processes, holding, is_held


def test_the_system_lets_go_of_what_a_killed_process_held(tmp_path):
    assert not is_held(tmp_path / "none")

    def hold(pipe):
        with holding(tmp_path / "lock"):
            pipe.send("held")
            pipe.recv()

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(theirs,))
    process.start()
    assert ours.recv() == "held" and is_held(tmp_path / "lock")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not is_held(tmp_path / "lock")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5172",
            "Another .* has ended.* card",
        ),
        ("sizes differ", "^sizes differ$"),
    ],
)
def test_lost_processes_are_explained(error, said):
    with pytest.raises(RuntimeError, match=said), explaining_lost_processes("for the card"):
        raise RuntimeError(error)
