"""What a program says of an error, and its exit code: 2 where the command is wrong, 1 where something else failed."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hf_effml.utils.imports import explain_failed_import


__all__ = ["INTERRUPTED", "exit_code", "explain", "explain_interruption"]

# What shells give to a program that Ctrl-C has ended.
INTERRUPTED = 130

# Errors that the user can mend; everything else is a failure of the program.
_WRONG_USE = (ValueError, TypeError, ImportError, OSError)
# Which method of a configuration found the mistake.
_VALIDATOR = re.compile(r"^Class validation error for validator '\w+':\s*\w+: ")
# By name: huggingface_hub is slow to import, and its two major versions use different libraries below.
_UNREACHABLE = {"ConnectError", "ConnectionError", "ConnectTimeout", "ReadTimeout", "TransportError"}


def exit_code(error: Exception) -> int:
    """Chooses the exit code of a program that ended in an error.

    Args:
        error (`Exception`):
            The error.

    Returns:
        `int`: 2 for wrong use, 1 for a service that fails and for everything else.
    """
    if _service_error(error) is not None:
        return 1
    return 2 if isinstance(error, _WRONG_USE) or _is_strict(error) else 1


def explain(error: Exception, argv: Sequence[str]) -> str:
    """Says in one line what is wrong, and what can be done about it.

    Args:
        error (`Exception`):
            The error.
        argv (`Sequence[str]`):
            The arguments of the program; where a file fails, the option that names it is said.

    Returns:
        `str`: the line.
    """
    message = " ".join(_message(error, argv).split())
    service = _service_error(error)
    if service is not None:
        # Some messages of ours have looked at the reason themselves.
        said = service.partition(";")[0].removeprefix("The ") in message
        return message if said else f"{message.rstrip('.')}. {service}"
    if not isinstance(error, _WRONG_USE) and not _is_strict(error):
        return f"{type(error).__name__}: {message}" if message else type(error).__name__
    return message or type(error).__name__


def explain_interruption(error: KeyboardInterrupt) -> str:
    """Says that the user ended the program, and how to go on if whoever was interrupted has noted it.

    Args:
        error (`KeyboardInterrupt`):
            With notes, see `BaseException.add_note`.

    Returns:
        `str`: the lines, on a line of their own below any progress bar.
    """
    return "\n".join(["\ninterrupted", *getattr(error, "__notes__", [])])


def _message(error: Exception, argv: Sequence[str]) -> str:
    failed_import = explain_failed_import(error)
    if failed_import:
        return failed_import
    if _is_strict(error):
        return _VALIDATOR.sub("", str(error))
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{_option_of(str(error.filename), argv)}: {error.strerror or type(error).__name__}."
    return str(error)


def _option_of(filename: str, argv: Sequence[str]) -> str:
    """The option whose value is a file or its folder, as typed; the file where none is."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for option, value in zip(["", *words], words, strict=False):
        if value and not value.startswith("-") and Path(filename).is_relative_to(Path(value)):
            inside = "" if Path(filename) == Path(value) else f", `{filename}`"
            return f"`{option} {value}`{inside}" if option.startswith("--") else f"`{value}`{inside}"
    return f"`{filename}`"


def _service_error(error: BaseException) -> str | None:
    """What to do about a service that failed, if one did."""
    for each in _chain(error):
        names = {base.__name__ for base in type(each).__mro__}
        status = getattr(getattr(each, "response", None), "status_code", None)
        if status in (401, 403):
            if not _has_token():
                return f"The Hub answered {status} and there is no token: `hf auth login`, then try again."
            return f"The Hub answered {status}: `hf auth whoami` shows whose token it got; `hf auth login` changes it."
        if status == 429:
            return "The Hub had too many requests (429): wait a few minutes, then try again."
        if isinstance(status, int) and status >= 500:
            return f"The Hub does not work at the moment ({status}): try again later."
        if names & _UNREACHABLE and not os.environ.get("HF_HUB_OFFLINE"):
            return "The Hub cannot be reached; what lies on this machine works without it: give a folder."
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _is_strict(error: BaseException) -> bool:
    """Whether it is what a configuration with an impossible value raises."""
    return any(base.__name__ == "StrictDataclassError" for base in type(error).__mro__)
