"""Configuration files with wrong values, wrong shapes and text that is no YAML, given to every program."""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import yaml

from fuzz.outcomes import Case
from fuzz.programs import VALUES, read_command, some_program


def cases(generator: random.Random, folder: Path) -> Iterator[Case]:
    number = 0
    while True:
        number += 1
        words, options, recipes = some_program(generator)
        content: dict = dict(options)
        if generator.random() < 0.1:
            content[generator.choice([None, 1, True, "moed", "about", "recipe", "config"])] = generator.choice(VALUES)
        text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
        raw = _damaged(text.encode(), generator) if generator.random() < 0.3 else text.encode()
        path = folder / f"{number % 10}.yaml"
        start = ["--recipe", generator.choice(recipes)] if recipes and generator.random() < 0.7 else []
        yield Case(f"{words} {start} --config of {raw[:300]!r}", partial(_read, path, raw, words, start))


def _read(path: Path, raw: bytes, words: list[str], start: list[str]) -> object:
    path.write_bytes(raw)
    return read_command([*words, *start, "--config", str(path)])


def _damaged(raw: bytes, generator: random.Random) -> bytes:
    kind = generator.randrange(7)
    if kind == 0:
        return raw[: generator.randrange(len(raw) + 1)]
    if kind == 1:
        position = generator.randrange(len(raw) + 1)
        return raw[:position] + bytes([generator.randrange(256)]) + raw[position + 1 :]
    if kind == 2:
        return raw + raw
    if kind == 3:
        return b"- " + raw
    if kind == 4:
        depth = generator.choice((5, 50, 5000))
        return b"seed: " + b"[" * depth + b"]" * depth
    if kind == 5:
        lines = [b"a0: &a0 [x]", *(b"a%d: &a%d [*a%d, *a%d]" % (n, n, n - 1, n - 1) for n in range(1, 40))]
        return b"\n".join(lines)
    return bytes(generator.randrange(256) for _ in range(generator.randrange(200)))
