"""Command lines: unknown words, options without values, values of the wrong kind, texts that look like options."""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fuzz.outcomes import Case
from fuzz.programs import read_command, some_program


WORDS = [
    *("", "-", "--", "-h", "--help", "--help-all", "--json", "--debug", "--recipe", "--config", "smoke", "=", "--=x"),
    *("help", "methods", "train", "evaluate", "bench", "convert", "push", "--version", "\x00", "\udc80", "a" * 5000),
]


def cases(generator: random.Random, folder: Path) -> Iterator[Case]:
    while True:
        words, options, recipes = some_program(generator)
        argv = list(words)
        if recipes and generator.random() < 0.5:
            argv += ["--recipe", generator.choice(recipes)]
        for name, value in options.items():
            usual = [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}", str(value)]
            others = ([f"--{name}={value}"], [f"--{name}"], [f"--no_{name}"], [str(value)])
            argv += generator.choice((usual, usual, *others))
        if generator.random() < 0.3:
            argv.insert(generator.randrange(len(argv) + 1), generator.choice(WORDS))
        if generator.random() < 0.1:
            generator.shuffle(argv)
        yield Case(f"hf-effml {argv}"[:400], partial(read_command, argv))
