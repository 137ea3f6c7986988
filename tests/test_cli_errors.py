"""What a program says when something fails, and its exit code: wrong use, a service that is down, Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from hf_effml.cli.main import main
from hf_effml.cli.parsing import run_script


TRAIN = "train vim --recipe smoke --num_train_epochs 40 --save_strategy steps --save_steps 5 --eval_strategy no"


def _run(error, capsys, *argv):
    def program(_):
        raise error

    code = run_script(program, list(argv))
    return code, capsys.readouterr().err


def test_a_missing_file_names_its_option(capsys):
    error = FileNotFoundError(2, "No such file or directory", "data/order.pt")
    assert _run(error, capsys, "--order_file", "data/order.pt")[1].startswith(
        "error: `--order_file data/order.pt`: No such file or directory."
    )
    assert _run(error, capsys, "--data=data")[1].startswith("error: `--data data`, `data/order.pt`: No such file")
    assert _run(error, capsys, "--seed", "3")[1].startswith("error: `data/order.pt`: No such file or directory.")


def test_what_is_said_already_is_not_said_twice(capsys, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for message in ("No bank here, and the Hub cannot be reached.", "No bank here."):
        error = FileNotFoundError(message)
        error.__cause__ = ConnectionError()
        code, text = _run(error, capsys)
        assert code == 1 and text.count("Hub cannot be reached") == 1


def test_an_interruption_has_its_own_line_and_says_how_to_go_on(capsys):
    error = KeyboardInterrupt()
    error.add_note("The same command goes on.")
    assert _run(error, capsys) == (130, "\ninterrupted\nThe same command goes on.\n")


@pytest.fixture
def service():
    """A Hub that answers everything with one status."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self):
            self.send_response(self.server.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_POST = _answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.hub
@pytest.mark.parametrize(
    "status, message",
    [
        (401, "The Hub answered 401 and there is no token: `hf auth login`"),
        (429, "The Hub had too many requests (429): wait"),
        (503, "The Hub does not work at the moment (503): try again later."),
        (None, "The Hub cannot be reached"),
    ],
)
def test_a_service_that_fails_is_not_wrong_use(service, status, message, tmp_path):
    """Without a status, nothing listens."""
    service.status = status
    port = service.server_port if status else 9
    code = (
        "import sys; from huggingface_hub import HfApi; from hf_effml.cli.parsing import run_script\n"
        "import huggingface_hub.utils._http as http; http.time.sleep = lambda _: None\n"
        "sys.exit(run_script(lambda _: HfApi().model_info('me/model'), []))"
    )
    hidden = ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path)}
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert outcome.returncode == 1, outcome.stderr
    assert message in outcome.stderr


@pytest.mark.slow
def test_ctrl_c_ends_a_training_with_how_to_resume(tmp_path):
    words = [sys.executable, "-m", "hf_effml", *TRAIN.split(), "--output_dir", str(tmp_path)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < end:
        time.sleep(0.1)
    refused = subprocess.run(words, capture_output=True, text=True)
    assert refused.returncode == 2
    assert f"Another run is at work in `{tmp_path}`" in refused.stderr
    os.killpg(process.pid, signal.SIGINT)
    lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130
    assert "interrupted" in lines and "Traceback" not in "\n".join(lines)
    assert lines[-1].startswith(
        f"The same command with `--resume_from_checkpoint true` goes on from `{tmp_path}/checkpoint-"
    )


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:x"])
def test_devices_that_are_not_there(device, capsys):
    for program in ("rmeeto", "token-router"):
        assert main(["evaluate", program, "model", "--device", device]) == 2
        assert f"error: `--device {device}` cannot be used: " in capsys.readouterr().err


def test_no_steps_are_not_all_steps(capsys):
    assert main(["train", "vim", "--recipe", "smoke", "--max_steps", "0"]) == 2
    assert "`max_steps` must be at least 1, or -1 for all of `num_train_epochs`; got 0." in capsys.readouterr().err
