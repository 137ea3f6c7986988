"""Texts and multiple-choice questions from files and the Hub, as token windows and as items to score."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .sources.split_files import find_data
from .sources.text_files import need_columns, read_table
from .sources.text_splits import find_text, hold_out_texts, load_text_splits, rows_of_the_hub


@dataclass(frozen=True)
class TextData:
    """Texts for training, or calibrating, and for testing.

    Args:
        name (`str`):
            What to call them.
        train (`list[str]`):
            Texts to train or calibrate on.
        test (`list[str]`):
            Other texts, to measure on.
        hub_id (`str`, *optional*):
            Their id on the Hub, if they came from there.
    """

    name: str
    train: list[str]
    test: list[str]
    hub_id: str | None = None


@dataclass(frozen=True)
class MultipleChoiceItem:
    """One question with its answers, as texts to continue and their continuations.

    Args:
        context (`str` or `list[str]`):
            What stands before the choices; a list, where every choice has a context of its own.
        choices (`list[str]`):
            The continuations to score, with the space before them.
        label (`int`):
            Index of the right one.
    """

    context: str | list[str]
    choices: list[str]
    label: int

    def __post_init__(self) -> None:
        if not 0 <= self.label < len(self.choices):
            raise ValueError(f"`label` must be the number of one of {len(self.choices)} choices; got {self.label}.")

    @property
    def contexts(self) -> list[str]:
        """The context of each choice."""
        return [self.context] * len(self.choices) if isinstance(self.context, str) else self.context


def load_text(name_or_path: str, column: str = "text") -> TextData:
    """Loads texts.

    Args:
        name_or_path (`str`):
            `"pydoc"`, the topics of Python's own `help()`, no download; a `.txt` file, which is one text; a `.parquet`
            or `.jsonl` file with one text per row; a folder of such files with splits named `train` and `validation`
            or `test`; the path of one of these below the folder that the environment variable `HF_EFFML_DATA` names;
            or the id of a data set on the Hub, with a subset as in `"Salesforce/wikitext:wikitext-2-raw-v1"`.
        column (`str`, *optional*, defaults to `"text"`):
            Where the texts stand in tables and in the objects of JSON.

    Returns:
        [`TextData`]: without empty texts. Where the source has no test split, every fifth text is held out, of a
        single one the last fifth.

    Raises:
        ValueError: If there is no such column or no text, or a file holds something else.
        FileNotFoundError: If nothing of that name is found.

    Example:

    ```python
    >>> from hf_effml.utils.text_data import load_text

    >>> data = load_text("pydoc")
    >>> data.name, len(data.train) > 3 * len(data.test) > 30
    ('pydoc', True)

    ```
    """
    path = find_text(name_or_path)
    if name_or_path == "pydoc":
        train, test = hold_out_texts(_pydoc_topics())
    else:
        train, test = load_text_splits(name_or_path, path, column)
    train, test = ([text for text in texts if text.strip()] for texts in (train, test))
    if not train or not test:
        raise ValueError(
            f"`{name_or_path}` must have texts to train and to test on; it has {len(train)}, {len(test)}. Texts "
            "without a test split must be five or more, or one of several lines."
        )
    base = name_or_path.partition(":")[0]
    hub_id = None if name_or_path == "pydoc" or path is not None or find_data(base) is not None else base
    is_file = path is not None and path.is_file()
    name = f"{path.resolve().parent.name}/{path.stem}" if path is not None and is_file else Path(name_or_path).name
    return TextData(hub_id or name, train, test, hub_id)


def tokenize(texts: Iterable[str], tokenizer: Any, single_line_breaks: bool = False) -> Iterator[list[int]]:
    """Makes tokens of texts, the beginning-of-text token in front of each where the tokenizer has one.

    Args:
        texts (`Iterable[str]`):
            The texts.
        tokenizer (`PreTrainedTokenizerBase`):
            Their tokenizer.
        single_line_breaks (`bool`, *optional*, defaults to `False`):
            Replace double line breaks by single ones, as the models trained on TinyStories know them.

    Yields:
        `list[int]`: token ids of a text.

    Example:

    ```python
    >>> ids = next(tokenize(["Once upon a time"], tokenizer))  # doctest: +SKIP
    ```
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for text in texts:
        text = text.replace("\n\n", "\n") if single_line_breaks else text
        # A text may be longer than what the model takes at a time; it is cut later.
        yield start + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def make_windows(
    texts: Iterable[str],
    tokenizer: Any,
    length: int,
    *,
    limit: int | None = None,
    single_line_breaks: bool = False,
    packed: bool = False,
) -> Tensor:
    """Cuts texts into windows of equal length, without overlap.

    Every window is a piece of one text and starts with the beginning-of-text token where the tokenizer has one: like
    the prompts that a model gets, and with the token that attention rests on. What is left at the end of a text is not
    used.

    Args:
        texts (`Iterable[str]`):
            The texts.
        tokenizer (`PreTrainedTokenizerBase`):
            Their tokenizer.
        length (`int`):
            Tokens of a window.
        limit (`int`, *optional*):
            Windows to make at most, from the first texts on.
        single_line_breaks (`bool`, *optional*, defaults to `False`):
            Replace double line breaks by single ones, as the models trained on TinyStories know them.
        packed (`bool`, *optional*, defaults to `False`):
            Join all texts, each with its beginning-of-text token, and cut that: windows go across texts, and start
            anywhere.

    Returns:
        `Tensor` of shape `(windows, length)`: token ids.

    Raises:
        ValueError: If no text is long enough.

    Example:

    ```python
    >>> from hf_effml.utils.text_data import load_text, make_windows

    >>> windows = make_windows(load_text("pydoc").test, tokenizer, 256, limit=64)  # doctest: +SKIP
    ```
    """
    start = 0 if tokenizer.bos_token_id is None else 1
    check_count("length", length, start + 1)
    if limit is not None:
        check_count("limit", limit, 1)
    longest = 0

    def cut() -> Iterator[list[int]]:
        nonlocal longest
        tokenized = tokenize(texts, tokenizer, single_line_breaks)
        if packed:
            joined = list(chain.from_iterable(tokenized))
            longest = len(joined)
            yield from (joined[first : first + length] for first in range(0, longest - length + 1, length))
            return
        for ids in tokenized:
            longest = max(longest, len(ids))
            pieces = range(start, len(ids) - (length - start) + 1, length - start)
            yield from (ids[:start] + ids[first : first + length - start] for first in pieces)

    windows = list(islice(cut(), limit))
    if not windows:
        raise ValueError(
            f"`length` must not be more than the longest text has: {longest} tokens; got {length}. Choose shorter "
            "windows or longer texts."
        )
    return torch.tensor(windows)


def check_count(name: str, value: Any, least: int) -> None:
    """Checks that an argument is a whole number that is large enough.

    Args:
        name (`str`):
            Its name.
        value (`Any`):
            Its value.
        least (`int`):
            The smallest allowed.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be a whole number and at least {least}; got {value!r}.")


def load_multiple_choice(name_or_path: str, limit: int | None = None) -> list[MultipleChoiceItem]:
    """Loads multiple-choice questions, written as lm-evaluation-harness writes them without examples.

    Args:
        name_or_path (`str`):
            `"hellaswag"`, `"arc_easy"`, `"arc_challenge"`, `"winogrande"`, `"piqa"` or `"mmlu"`, from the Hub; or a
            parquet file with the columns `question`, `choices` and `label`, also below the folder that the environment
            variable `HF_EFFML_DATA` names. A file whose name begins with one of these names, or with `boolq` or
            `openbookqa`, is written like that set, any other like ARC. WinoGrande's choices go into the blank, and the
            text behind it is scored.
        limit (`int`, *optional*):
            Questions to load at most.

    Returns:
        `list[MultipleChoiceItem]`: the questions.

    Raises:
        ValueError: If the name is not known, or the file has other columns.
        FileNotFoundError: If the data set cannot be loaded from the Hub.

    Example:

    ```python
    >>> from hf_effml.utils.text_data import load_multiple_choice

    >>> item = load_multiple_choice("mcq/arc_easy.parquet")[0]  # doctest: +SKIP
    >>> item.context, item.choices[item.label]  # doctest: +SKIP
    ('Question: Work is a product of force and distance. Which ... is an example of work?\\nAnswer:', ' riding a bike')
    ```
    """
    path = find_text(name_or_path)
    if path is not None and path.is_file():
        if path.suffix.lower() != ".parquet":
            raise ValueError(f"`{name_or_path}` must be a .parquet file of questions; it is a {path.suffix} file.")
        rows = read_table(path)
        need_columns(name_or_path, rows.features, ("question", "choices", "label"))
        name = next((known for known in _WRITERS if path.stem.startswith(known)), "")
        read: Callable[[dict], tuple[str, list[str], int]] = _read_plain
    else:
        name = name_or_path.lower().replace("-", "_")
        rows, read = _load_task(name)
    if limit is not None:
        check_count("limit", limit, 1)
    write = _WRITERS.get(name, _write_question)
    items = []
    for number, row in enumerate(islice(rows, limit)):
        try:
            items.append(write(*read(row)))
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(
                f"`{name_or_path}`, row {number}, is no question with choices and the number of the right one "
                f"({error}). Leave it out, or take a split whose answers are known."
            ) from error
    return items


# From rows of the sets on the Hub to question, choices and the index of the right one.


def _read_plain(row: dict[str, Any]) -> tuple[str, list[str], int]:
    label = row["label"]
    if int(label) != float(label):
        raise ValueError(f"`label` is {label}")
    return row["question"], list(row["choices"]), int(label)


def _read_hellaswag(row: dict[str, Any]) -> tuple[str, list[str], int]:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _without_marks(context), [_without_marks(ending) for ending in row["endings"]], int(row["label"])


def _without_marks(text: str) -> str:
    """Removes the marks of WikiHow that HellaSwag's texts still bear."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _read_arc(row: dict[str, Any]) -> tuple[str, list[str], int]:
    choices = row["choices"]
    return row["question"], list(choices["text"]), list(choices["label"]).index(row["answerKey"])


def _read_winogrande(row: dict[str, Any]) -> tuple[str, list[str], int]:
    return row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1


def _read_piqa(row: dict[str, Any]) -> tuple[str, list[str], int]:
    return row["goal"], [row["sol1"], row["sol2"]], int(row["label"])


def _read_mmlu(row: dict[str, Any]) -> tuple[str, list[str], int]:
    return row["question"], list(row["choices"]), int(row["answer"])


# name -> id on the Hub, subset, split, how to read a row
_TASKS: dict[str, tuple[str, str | None, str, Callable[[dict], tuple[str, list[str], int]]]] = {
    "hellaswag": ("Rowan/hellaswag", None, "validation", _read_hellaswag),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", _read_arc),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", _read_arc),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", _read_winogrande),
    # The original, ybisk/piqa, is a program, which `datasets` does not run any more.
    "piqa": ("baber/piqa", None, "validation", _read_piqa),
    "mmlu": ("cais/mmlu", "all", "test", _read_mmlu),
}


# From question, choices and the index of the right one to texts.


def _write_question(question: str, choices: list[str], label: int) -> MultipleChoiceItem:
    return _write_text(f"Question: {question.strip()}\nAnswer:", choices, label)


def _write_passage(question: str, choices: list[str], label: int) -> MultipleChoiceItem:
    """A passage that ends with its question."""
    return _write_text(f"{question.strip()}\nAnswer:", choices, label)


def _write_text(context: str, choices: list[str], label: int) -> MultipleChoiceItem:
    return MultipleChoiceItem(context.strip(), [f" {choice.strip()}" for choice in choices], label)


def _write_letters(question: str, choices: list[str], label: int) -> MultipleChoiceItem:
    letters = "ABCDEFGHIJ"[: len(choices)]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    return MultipleChoiceItem(f"{question.strip()}\n{listed}\nAnswer:", [f" {letter}" for letter in letters], label)


def _write_blank(question: str, choices: list[str], label: int) -> MultipleChoiceItem:
    before, blank, after = question.partition("_")
    if not blank or not after.strip():
        raise ValueError(f"A WinoGrande question must have text after its blank `_`; got `{question}`.")
    return MultipleChoiceItem([before + choice for choice in choices], [f" {after.strip()}"] * len(choices), label)


_WRITERS: dict[str, Callable[[str, list[str], int], MultipleChoiceItem]] = {
    "hellaswag": _write_text,
    "openbookqa": _write_text,
    "boolq": _write_passage,
    "winogrande": _write_blank,
    "mmlu": _write_letters,
}


def _load_task(name: str) -> tuple[Any, Callable[[dict], tuple[str, list[str], int]]]:
    if name not in _TASKS:
        nearest = get_close_matches(name, _TASKS, n=1)
        advice = f" Did you mean `{nearest[0]}`?" if nearest else ""
        raise ValueError(
            f"`{name}` is no set of questions; there are {', '.join(_TASKS)}, and parquet files with the columns "
            f"`question`, `choices` and `label`.{advice}"
        )
    hub_id, subset, split, read = _TASKS[name]
    return rows_of_the_hub(hub_id, subset)[split], read


def _pydoc_topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
