"""Other interpreters for tests: real processes, which start in a moment because their libraries are imported."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path

from fork_server import STAGES


_numbers = count()


class Job:
    """A program in a process of its own, `python -c code arguments` in all but the time it takes to start.

    With `environment`, it imports the Hugging Face libraries itself, in what that holds; with `package`, ours has been
    imported before it starts. With `merged`, its errors are part of its output.
    """

    def __init__(
        self,
        code: str,
        *arguments: object,
        cwd: Path,
        environment: dict[str, str] | None = None,
        package: bool = False,
        merged: bool = False,
    ):
        folder, _ = _server()
        number = next(_numbers)
        self._output = [str(folder / f"{number}.{kind}") for kind in ("out", "out" if merged else "err")]
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(folder / str(0 if environment is not None else 1 + package)))
        job = {"code": code, "arguments": list(map(str, arguments)), "cwd": str(cwd), "output": self._output}
        connection.sendall(json.dumps(job | {"environment": environment or dict(os.environ)}).encode() + b"\n")
        self._connection, self._answers = connection, connection.makefile()
        connection.settimeout(120)
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def wait(self, seconds: float = 300) -> int:
        """Wait for its end; its exit status, negative for a signal."""
        if self.returncode is None:
            self._connection.settimeout(seconds)
            try:
                self.returncode = int(self._answers.readline())
            except TimeoutError:
                self.kill()
                raise
            finally:
                self._connection.close()
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    @property
    def stdout(self) -> str:
        return Path(self._output[0]).read_text()

    @property
    def stderr(self) -> str:
        return Path(self._output[1]).read_text()


@cache
def _server() -> tuple[Path, subprocess.Popen]:
    """The folder of the sockets of this session's server. It ends with the session, when its standard input closes."""
    folder = Path(os.environ["HF_HOME"]) / "jobs"
    folder.mkdir()
    command = [sys.executable, Path(__file__).with_name("fork_server.py")]
    command += [folder / str(stage) for stage in range(len(STAGES))]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "listening\n"
    return folder, server


def run_together(target: Callable[[int], None], count: int = 2, seconds: float = 120) -> list[int | None]:
    """Forks processes that know of each other as those of `torchrun` do; their exit codes, negative for a signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def in_process(index: int) -> None:
        os.environ.update(where, RANK=str(index), LOCAL_RANK=str(index))
        target(index)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=in_process, args=(index,)) for index in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]
