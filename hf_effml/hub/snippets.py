"""The snippet of a card: where it says what it loads, and what it prints."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO

from transformers.utils import logging


__all__ = ["output_of", "with_id", "with_value"]

logger = logging.get_logger(__name__)


def with_id(snippet: str, variable: str, repo_id: str) -> str:
    """Sets the line that says what is loaded behind the imports of a snippet.

    Args:
        snippet (`str`):
            The code.
        variable (`str`):
            The name under which it expects the id.
        repo_id (`str`):
            The id, or a folder; it becomes a literal whatever is in it.

    Returns:
        `str`: the code, which runs as it stands.
    """
    lines = snippet.splitlines()
    place = next(i for i, line in enumerate(lines) if line and not line.startswith(("import ", "from ")))
    space = ["", ""] if lines[place].startswith(("def ", "class ")) else []
    return "\n".join([*lines[:place], with_value(variable, repo_id), *space, *lines[place:]])


def with_value(variable: str, text: str) -> str:
    """Writes the line that says what is loaded.

    Args:
        variable (`str`):
            A name.
        text (`str`):
            Its value, whatever is in it.

    Returns:
        `str`: an assignment.
    """
    # JSON's escapes are Python's too, but for letters beyond the first 65,536, which it writes as two. No comment
    # begins within the code, as the mark of a section would.
    literal = json.dumps(text, ensure_ascii=False).replace("<!--", r"\u003c!--")
    return f"{variable} = {literal}"


def output_of(snippet: str) -> str | None:
    """Runs a snippet of ours.

    Args:
        snippet (`str`):
            The code of [`with_id`], on a folder of this machine.

    Returns:
        `str` or `None`: what it printed; `None` where it cannot run here.
    """
    printed = StringIO()
    try:
        with redirect_stdout(printed), _quiet():
            exec(snippet, {})
    except Exception as error:
        logger.warning(f"The card shows no output: its snippet failed here with {type(error).__name__}: {error}")
        return None
    text = printed.getvalue().strip()
    # What would end the block of code that it is shown in is not shown.
    return text if text and "```" not in text else None


@contextmanager
def _quiet() -> Iterator[None]:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
