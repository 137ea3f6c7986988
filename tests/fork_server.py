"""A program that imports the slow libraries once and runs each job in a fork of itself, as fresh as an interpreter.

It is started as `python fork_server.py SOCKET...`, one socket for each of `STAGES`, and ends with its standard input.
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from importlib import import_module
from types import ModuleType


# A job on the first stage may set what huggingface_hub and transformers read when they are imported; one on the second
# may make this package unimportable. A stage is imported when somebody first asks for it.
STAGES = [
    ["torch._dynamo", "safetensors.torch", "jinja2", "PIL.Image", "tokenizers", "sklearn.metrics", "pyarrow.parquet"],
    ["transformers.trainer", "transformers.modeling_utils", "transformers.generation"],
    [
        "hf_effml",
        "hf_effml.trainers.rmeeto",
        "hf_effml.trainers.dyvm",
        "hf_effml.trainers.edf",
        "hf_effml.trainers.token_router",
    ],
]


def main() -> None:
    listeners = [socket.socket(socket.AF_UNIX) for _ in STAGES]
    for listener, path in zip(listeners, sys.argv[1:], strict=True):
        listener.bind(path)
        listener.listen(64)
    print("listening", flush=True)
    for stage, names in enumerate(STAGES):
        wait_for(listeners[stage:])
        for name in names:
            with suppress(ImportError):
                import_module(name)
        if stage + 1 == len(STAGES) or os.fork():
            break
    gc.freeze()  # a collection in a fork would copy all memory
    become(**next_job(listeners[stage]))


def wait_for(listeners: list[socket.socket]) -> None:
    if sys.stdin in select.select([sys.stdin, *listeners], [], [])[0]:
        os._exit(0)


def next_job(listener: socket.socket) -> dict:
    """Take jobs for ever; returns only in forks, which have one to run. A parent of each tells how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        wait_for([listener])
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            job = json.loads(connection.makefile().readline())
            pid = os.fork()
            if pid == 0:
                connection.close()
                return job
            connection.sendall(f"{pid}\n".encode())
            connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
            os._exit(0)
        connection.close()


def become(code: str, arguments: list[str], cwd: str, environment: dict[str, str], output: list[str]) -> None:
    """Be what `python -c code arguments` is in that folder and environment, with its output and errors in files."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    sys.argv, sys.path[0] = ["-c", *arguments], ""
    module = sys.modules["__main__"] = ModuleType("__main__")
    try:
        exec(compile(code, "<string>", "exec"), module.__dict__)
        status: object = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    # The rest of an interpreter's end is taking memory apart, which takes seconds.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    main()
