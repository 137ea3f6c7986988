"""The state of the environment: which parts work, which are absent, which are broken and what to do about it."""

import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

from .imports import OPTIONAL_PACKAGES, how_to_install, torchvision_mismatch


CORE_PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "huggingface_hub": "huggingface-hub",
    "safetensors": "safetensors",
    "jinja2": "jinja2",
    "PIL": "pillow",
}
# What shows that a package works, where importing its top is not enough.
_CHECKS = {
    "mamba_ssm": "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn",
    "transformers": "from transformers import PreTrainedModel, Trainer",
}
_CHECK_SECONDS = 180


@dataclass(frozen=True)
class Part:
    """One package and how it fares.

    Args:
        name (`str`):
            Its name on the package index.
        version (`str` or `None`):
            The installed version.
        extra (`str` or `None`):
            The extra of hf-effml it belongs to; `None` for the core.
        state (`str`):
            `"works"`, `"absent"`, `"broken"`, or `"slow"` when its import did not end in time.
        reason (`str`):
            Why it is broken, or how long its import was waited for.
        remedy (`str`):
            What to run when it does not work.
    """

    name: str
    version: str | None
    extra: str | None
    state: Literal["works", "absent", "broken", "slow"]
    reason: str = ""
    remedy: str = ""


def check_environment() -> Iterator[Part]:
    """Imports every package the library can use, each in a process of its own.

    Returns:
        `Iterator[Part]`: the core first, then the optional packages, as the results arrive.
    """
    packages: list[tuple[str, str, str | None]] = [(module, name, None) for module, name in CORE_PACKAGES.items()]
    packages += [(module, name, extra) for module, (name, extra) in OPTIONAL_PACKAGES.items()]
    with ThreadPoolExecutor(max_workers=4) as pool:
        yield from pool.map(lambda package: _check(*package), packages)


def describe_system() -> dict[str, str]:
    """Names what an issue report should name besides the packages.

    Returns:
        `dict[str, str]`: versions of hf-effml, Python and the platform.
    """
    return {
        "hf-effml": _installed_version("hf-effml") or "not installed",
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _check(module: str, name: str, extra: str | None) -> Part:
    if find_spec(module) is None:
        remedy = how_to_install(extra) if extra else f"`pip install {name}`"
        return Part(name, None, extra, "absent", remedy=remedy)
    # -P: a folder of the same name in the current directory must not be imported instead.
    command = [sys.executable, "-P", "-c", _CHECKS.get(module, f"import {module}")]
    try:
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        reason, remedy = f"its import took more than {_CHECK_SECONDS} s", f"`{sys.executable} -c 'import {module}'`"
        return Part(name, _installed_version(name), extra, "slow", reason, f"{remedy} waits until it ends")
    if outcome.returncode == 0:
        return Part(name, _installed_version(name), extra, "works")
    reason, remedy = _diagnose(name, outcome.returncode, outcome.stderr)
    return Part(name, _installed_version(name), extra, "broken", reason, remedy)


def _diagnose(name: str, returncode: int, stderr: str) -> tuple[str, str]:
    """Reads a failed import's traceback; a torchvision that does not fit breaks its importers under other names."""
    mismatch = torchvision_mismatch() if "torchvision" in stderr else None
    if mismatch is not None:
        return mismatch
    lines = [line for line in stderr.splitlines() if re.match(r"\w[\w.]*(Error|Exception)\b", line)]
    reason = lines[-1] if lines else f"its import ended with code {returncode}"
    if reason.startswith("ModuleNotFoundError"):
        return reason, f"`pip install {name}` for what it requires"
    # With its dependencies, pip would reinstall torch as well.
    return reason, f"`pip install --force-reinstall --no-deps {name}`"


def _installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
