"""Honest comparisons: outputs are checked first, timings are interleaved in one process, the machine is on record."""

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


# A sample shorter than this measures the clock; short functions are called several times per sample.
_SAMPLE_SECONDS = 0.02


@dataclass
class Timing:
    """Times of one function, in milliseconds per call, one entry per round.

    Args:
        wall (`list[float]`):
            By the clock.
        cpu (`list[float]`):
            Of the process, all threads added.
    """

    wall: list[float]
    cpu: list[float]

    @property
    def median(self) -> float:
        """Median wall time."""
        return statistics.median(self.wall)

    @property
    def spread(self) -> float:
        """Distance between the quartiles of the wall time."""
        if len(self.wall) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.wall, n=4, method="inclusive")
        return high - low

    def speedup(self, of: "Timing") -> float:
        """How many times as fast as this one `of` is: the median over the rounds, whose two calls ran side by side.

        Args:
            of ([`Timing`]):
                From the same call of [`compare`].

        Returns:
            `float`: More than 1 if `of` takes less time.
        """
        return statistics.median(own / other for own, other in zip(self.wall, of.wall, strict=True))

    def as_row(self) -> dict[str, float]:
        """The numbers that tables show."""
        cpu = statistics.median(self.cpu)
        return {"ms": round(self.median, 3), "spread_ms": round(self.spread, 3), "cpu_ms": round(cpu, 3)}


def compare(
    functions: Mapping[str, Callable[[], Any]],
    agree: Sequence[Sequence[str]],
    *,
    rounds: int = 7,
    threads: int = 1,
    tolerance: float = 1e-4,
) -> dict[str, Timing]:
    """Time functions in turn, round after round, once it is certain that they compute the same.

    Args:
        functions (`Mapping[str, Callable]`):
            What to time, by name; tensors (or nested lists of them) are returned.
        agree (`Sequence[Sequence[str]]`):
            Groups of names whose outputs must agree.
        rounds (`int`, *optional*, defaults to 7):
            Samples per function, after a warm-up of two calls.
        threads (`int`, *optional*, defaults to 1):
            Threads of torch meanwhile; restored afterwards.
        tolerance (`float`, *optional*, defaults to 1e-4):
            Largest difference over the largest magnitude.

    Returns:
        `dict[str, Timing]`: By name.

    Raises:
        RuntimeError: If outputs differ; nothing is reported then. The message names the pair and the difference.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.utils.benchmark import compare
    >>> x = torch.ones(8)
    >>> timings = compare({"sum": lambda: x + x, "product": lambda: 2 * x}, agree=[["sum", "product"]], rounds=3)
    >>> len(timings["product"].wall)
    3

    ```
    """
    with _torch_threads(threads):
        outputs = {name: function() for name, function in functions.items()}
        for group in agree:
            check_agreement({name: outputs[name] for name in group}, tolerance)
        del outputs
        calls = {name: _calls_per_sample(function) for name, function in functions.items()}
        timings = {name: Timing([], []) for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                wall, cpu = _sample(function, calls[name])
                timings[name].wall.append(wall)
                timings[name].cpu.append(cpu)
    return timings


def check_agreement(outputs: Mapping[str, Any], tolerance: float) -> None:
    """Refuse outputs that are not the same up to rounding.

    Args:
        outputs (`Mapping[str, Any]`):
            Tensors, or nested lists of them, by name; all are compared with the first.
        tolerance (`float`):
            Largest difference allowed, relative to the largest magnitude in the first one's tensor.

    Raises:
        RuntimeError: If two differ by more, in shape, or one is not finite.
    """
    (first, expected), *others = ((name, list(_tensors(output))) for name, output in outputs.items())
    for name, actual in others:
        pair = f"outputs of `{first}` and `{name}`"
        if len(actual) != len(expected):
            raise RuntimeError(f"Nothing is reported: the {pair} are {len(expected)} and {len(actual)} tensors.")
        for index, (left, right) in enumerate(zip(expected, actual, strict=True)):
            where = f"tensor {index} of the {pair}"
            if left.shape != right.shape:
                raise RuntimeError(f"Nothing is reported: {where} are {tuple(left.shape)} and {tuple(right.shape)}.")
            error = _relative_error(left.double(), right.double())
            # Not a number compares as false, so it is refused too.
            if not error <= tolerance:
                raise RuntimeError(f"Nothing is reported: {where} differ by {error:.1e}, allowed is {tolerance:.1e}.")


def peak_memory(function: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Largest amount of tensor memory that a call holds beyond what was held before it.

    On a CPU every allocation and release of torch is counted, also those inside of operators, as the profiler sees
    them; CUDA keeps the count itself.

    Args:
        function (`Callable`):
            What to call; once as a warm-up, once for the measurement.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where the memory is.

    Returns:
        `int`: Bytes.
    """
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Without it the profiler writes an error line on machines that have no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        profile.export_chrome_trace(path)
        events = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        peak = max(peak, held)
    return peak


def describe_run(
    *, seed: int, rounds: int | None = None, threads: int = 1, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """What a reader needs to judge or repeat a measurement.

    Args:
        seed (`int`):
            Of inputs and weights.
        rounds (`int`, *optional*):
            As for [`compare`], where something was timed.
        threads (`int`, *optional*, defaults to 1):
            As for [`compare`].
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where it runs.

    Returns:
        `dict[str, Any]`: Machine, its load at the moment, versions, commit and the arguments; JSON-plain.
    """
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("hf-effml", "torch", "transformers", "timm", "mamba-ssm")},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "seed": seed,
        "rounds": rounds,
        "threads": threads,
    }


def one_line(run: Mapping[str, Any]) -> str:
    """The most important of what [`describe_run`] returned, to print under a table.

    Args:
        run (`Mapping[str, Any]`):
            From [`describe_run`].

    Returns:
        `str`: One line.
    """
    device = run["processor"] if run["device"] == "cpu" else run["device"]
    timed = f"medians of {run['rounds']} interleaved rounds, " if run["rounds"] else ""
    return (
        f"{device}, {run['threads']} thread(s), torch {run['versions']['torch']}, commit {run['commit']}, "
        f"seed {run['seed']}, {timed}{run['date']}"
    )


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sample(function: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Wall and CPU milliseconds of one call, over several."""
    _synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        function()
    _synchronize()
    return (time.perf_counter() - wall) * 1e3 / calls, (time.process_time() - cpu) * 1e3 / calls


def _calls_per_sample(function: Callable[[], Any]) -> int:
    seconds = _sample(function, 1)[0] / 1e3
    return max(1, min(1000, round(_SAMPLE_SECONDS / max(seconds, 1e-6))))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _relative_error(expected: Tensor, actual: Tensor) -> float:
    if not expected.numel():
        return 0.0
    return ((expected - actual).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output.detach()
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _tensors(item)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout this file is in, with a `+` if it has changes; `None` where it is installed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")


__all__ = [
    "Timing",
    "check_agreement",
    "compare",
    "describe_run",
    "one_line",
    "peak_memory",
]
