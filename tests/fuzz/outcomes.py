"""What becomes of a fuzzed input: a right result, an error raised on purpose, or one of the three that must not be."""

import math
import signal
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError


ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / name) for name in ("hf_effml", "trainers", "scripts"))
# What users are told by; KeyError, IndexError and AttributeError tell about code. UnicodeError and JSONDecodeError are
# ValueErrors that Python raises itself.
ON_PURPOSE = (ValueError, TypeError, OSError, ImportError, NotImplementedError, SystemExit)
# Where transformers refuses training arguments by name.
VALIDATION = ("/transformers/training_args.py", "/transformers/utils/generic.py", "/transformers/utils/versions.py")


@dataclass(frozen=True)
class Case:
    """An input and what a user does with it: `run` returns nothing, or values that must be finite."""

    text: str
    run: Callable[[], Any]


@dataclass(frozen=True)
class Outcome:
    """`kind` is right, named, deep, nan or hang; `detail` is the error, with where it was raised."""

    kind: str
    text: str
    detail: str = ""


class _Hang(BaseException):
    pass


def try_case(case: Case, seconds: int = 20) -> Outcome:
    """Runs one input."""
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(seconds)
    try:
        result = case.run()
    except _Hang as error:
        return Outcome("hang", case.text, _place(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome("named" if _is_named(error) else "deep", case.text, _place(error))
    finally:
        signal.alarm(0)
    return Outcome("right" if _is_finite(result) else "nan", case.text)


def _stop(*_: Any) -> None:
    raise _Hang


def _is_named(error: BaseException) -> bool:
    # The command line says `FILE: No such file or directory`, with the option that the file was given to.
    if isinstance(error, StrictDataclassError) or (isinstance(error, OSError) and error.filename):
        return True
    innermost = str(Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve())
    ours = innermost.startswith(OURS) or any(part in innermost for part in VALIDATION)
    return isinstance(error, ON_PURPOSE) and ours and bool(str(error))


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    inner = frames[-1]
    ours = [frame for frame in frames if str(Path(frame.filename).resolve()).startswith(OURS)]
    last = f", last in {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}: {str(error)[:300]} ({Path(inner.filename).name}:{inner.lineno}{last})"


def _is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not (value.is_floating_point() or value.is_complex()) or bool(value.isfinite().all())
    if isinstance(value, np.ndarray):
        return value.dtype.kind not in "fc" or bool(np.isfinite(value).all())
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return True
