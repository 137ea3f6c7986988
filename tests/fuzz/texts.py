"""Texts and questions: files cut, damaged, of odd kinds and names, and odd settings of windows and examples."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet

from fuzz.outcomes import Case
from helpers import tiny_tokenizer
from hf_effml.utils.sources.text_examples import make_examples
from hf_effml.utils.text_data import load_multiple_choice, load_text, make_windows


TOKENIZER = tiny_tokenizer(bos_token="<s>")
TEXTS = ("Once upon a time", "a\nb\nc\n", "", " ", "\n\n", "é\u2028ü", "\ud800", "x" * 3000, "\0", "<s>", "\ufeffa")
VALUES = (None, 0, -1, 1.5, float("nan"), float("inf"), True, [], ["a"], {}, {"text": "a"}, 2**63, b"a")
NAMES = ("train", "test", "validation", "val", "a test", "train test", "notes", "data-00000-of-00001", "é", "config")
ENDINGS = (".txt", ".jsonl", ".json", ".parquet")
LENGTHS = (4, 4, 4, 8, 1, 2, 0, -1, 5000, 2**63, None, 2.5, "4", True)


def cases(generator: random.Random, folder: Path) -> Iterator[Case]:
    datasets.disable_progress_bars()
    kinds = (_file, _file, _file, _folder, _folder, _questions, _windows, _windows)
    for number in range(2**31):
        text, run = generator.choice(kinds)(generator, folder / f"{number}")
        yield Case(text[:500].encode("utf-8", "backslashreplace").decode(), run)


def _use(path: Path, column: str) -> Any:
    data = load_text(str(path), column)
    return make_windows([*data.train, *data.test], TOKENIZER, 4)


def _text(generator: random.Random, odd: float = 0.15) -> Any:
    if generator.random() < odd:
        return generator.choice((*TEXTS, *VALUES))
    return f"text {generator.randrange(100)} with some words"


def _content(generator: random.Random, ending: str, odd: float) -> Any:
    """What a file holds: bytes, or the columns of a table."""
    field = "text" if generator.random() < 0.9 else generator.choice(["story", "", "Text"])
    rows = [_text(generator, odd) for _ in range(generator.choice([0, 1, 2, 6, 9]))]
    if ending == ".parquet":
        return {field: rows}
    if ending == ".txt":
        data = "\n".join(map(str, rows)).encode("utf-8", "surrogatepass")
    else:
        plain = [row.decode() if isinstance(row, bytes) else row for row in rows]
        whole = json.dumps([{field: row} for row in plain])
        lines = "\n".join(json.dumps({field: row}) for row in plain)
        data = (whole if generator.random() < 0.2 else lines).encode()
    if generator.random() < odd and data:
        place = generator.randrange(len(data))
        data = generator.choice(
            [data[:place], data[:place] + b"\xff" + data[place:], b"[" * 5000, b"\xff\xfea\0", b"{"]
        )
    return data


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    try:
        parquet.write_table(pyarrow.table(content), path)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, TypeError):
        path.write_bytes(b"PAR1 no table")


def _file(generator: random.Random, path: Path) -> tuple[str, Callable[[], Any]]:
    ending = generator.choice((*ENDINGS, ".jsonl", ".txt", ".JSONL"))
    content = _content(generator, ending.lower(), generator.choice([0, 0.2]))

    def run() -> Any:
        _write(path.with_suffix(ending), content)
        return _use(path.with_suffix(ending), "text")

    return f"file {ending} {content!r}", run


def _folder(generator: random.Random, path: Path) -> tuple[str, Callable[[], Any]]:
    usual = generator.random() < 0.5
    ending = generator.choice(ENDINGS)
    names = [f"train{ending}", f"test{ending}"] if usual else []
    for _ in range(0 if usual else generator.randint(0, 4)):
        place = generator.choice(["", "", "train/", "test/", ".hidden/", "latest test/"])
        names.append(place + generator.choice(NAMES) + generator.choice((ending, *ENDINGS, ".csv", "")))
    files = {name: _content(generator, Path(name).suffix or ".txt", 0.0 if usual else 0.1) for name in names}

    def run() -> Any:
        path.mkdir(parents=True)
        for name, content in files.items():
            _write(path / name, content)
        return _use(path, "text")

    return f"folder {files!r}", run


def _questions(generator: random.Random, path: Path) -> tuple[str, Callable[[], Any]]:
    usual = {"question": "1 + 1_ is?", "choices": ["1", "2"], "label": 1}
    row: dict[str, Any] = dict(usual)
    if generator.random() < 0.7:
        row[generator.choice([*usual])] = generator.choice((*VALUES, "", "1", "é", ["1", None], [1, 2], 2))
    if generator.random() < 0.1:
        row.pop(generator.choice([*usual]))
    name = generator.choice(["arc", "hellaswag", "boolq", "winogrande", "mmlu", "openbookqa"])
    limit = generator.choice([None, None, 1, 0, -1])
    path = path / f"{name}.parquet"

    def run() -> Any:
        _write(path, {key: [value] for key, value in row.items()})
        return [item.label for item in load_multiple_choice(str(path), limit)]

    return f"questions {name} {limit} {row!r}", run


def _windows(generator: random.Random, path: Path) -> tuple[str, Callable[[], Any]]:
    texts = [generator.choice(TEXTS[:4]) if generator.random() < 0.9 else _text(generator) for _ in range(3)]
    length, packed = generator.choice(LENGTHS), generator.random() < 0.5
    marker = generator.choice([None, "upon", "", "\n", "nowhere", 3])
    limit = generator.choice([None, None, 1, 0, -1, 2**63])

    def run() -> Any:
        if marker is None:
            return make_windows(texts, TOKENIZER, length, limit=limit, packed=packed)
        return [list(row.values()) for row in make_examples(texts, TOKENIZER, length, completion_marker=marker)]

    return f"windows {texts!r} {length!r} {limit} {packed} {marker!r}", run
