"""Saved folders of every kind with damaged weights or configuration, loaded and used, and weights to convert."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.model_cases import CONVNET, SET, VIMS, WRAPPER, full_case
from common.model_cases import Case as ModelCase
from safetensors.torch import load, save

from fuzz.configurations import VALUES
from fuzz.outcomes import Case
from hf_effml.distillation.convert_convnet import convert_convnet_checkpoint, to_official
from hf_effml.vim.convert_vim import convert_vim_checkpoint


STRANGE = [
    b"",
    b"{}",
    b"\x00" * 200,
    b"<!DOCTYPE html>",
    b"version https://git-lfs.github.com/spec/v1\n",
    b"\x80\x02.",
]
CONFIGS = [b"", b"[]", b"null", b"3", b'"vim"', b"{", b"\xff\xfe", b'{"model_type": []}', b'{"model_type": "llama"}']


def cases(generator: random.Random, folder: Path) -> Iterator[Case]:
    kinds = [VIMS[1], VIMS[2], VIMS[4], VIMS[6], CONVNET, SET, WRAPPER, full_case("Llama")]
    for kind in kinds:
        kind.build().save_pretrained(folder / kind.model_class.__name__)
    official = {name.removeprefix("vim."): value for name, value in load(_weights(folder, VIMS[1])).items()}
    convnet = to_official(CONVNET.build())
    while True:
        if generator.random() < 0.3:
            state, convert = generator.choice([(official, _convert_vim), (convnet, convert_convnet_checkpoint)])
            text, content = _damaged_pickle(state, generator)
            yield Case(f"{convert.__name__} of {text}", partial(_convert, convert, folder / "x.pth", content))
            continue
        kind = generator.choice(kinds)
        source = folder / kind.model_class.__name__
        name = generator.choice(["model.safetensors", "model.safetensors", "config.json"])
        damage = _damaged_weights if name.endswith("safetensors") else _damaged_config
        text, raw = damage((source / name).read_bytes(), generator)
        yield Case(
            f"{kind.model_class.__name__}, {name}: {text}", partial(_load, kind, source, folder / "work", name, raw)
        )


def _weights(folder: Path, kind: ModelCase) -> bytes:
    return (folder / kind.model_class.__name__ / "model.safetensors").read_bytes()


def _damaged_bytes(raw: bytes, generator: random.Random) -> tuple[str, bytes]:
    place = generator.randrange(len(raw)) if generator.random() < 0.5 else generator.randrange(min(len(raw), 60))
    what = generator.choice(["cut", "changed", "inserted"])
    rest = {
        "cut": b"",
        "changed": bytes([generator.randrange(256)]) + raw[place + 1 :],
        "inserted": b"7" + raw[place:],
    }
    return f"{what} at {place}", raw[:place] + rest[what]


def _damaged_state(state: dict[str, Any], generator: random.Random) -> tuple[str, dict[str, Any]]:
    """Values that are not finite are left out: the weights of a network may hold them, as torch has it."""
    state = dict(state)
    name = generator.choice(sorted(state))
    what = generator.choice(["missing", "shape", "scalar", "empty", "int64", "float64", "bool", "extra", "none left"])
    tensor = state[name]
    if what == "none left":
        return what, {}
    state[f"{name}.more" if what == "extra" else name] = {
        "shape": lambda: torch.zeros(*tensor.shape, 2),
        "scalar": lambda: torch.zeros(()),
        "empty": lambda: torch.zeros(0),
        "int64": lambda: tensor.long(),
        "float64": lambda: tensor.double(),
        "bool": lambda: tensor.bool(),
    }.get(what, lambda: tensor.clone())()
    if what == "missing":
        del state[name]
    return f"{name} {what}", state


def _damaged_weights(raw: bytes, generator: random.Random) -> tuple[str, bytes]:
    kind = generator.randrange(5)
    if kind == 0:
        strange = generator.choice(STRANGE)
        return repr(strange[:40]), strange
    if kind == 1:
        return _damaged_bytes(raw, generator)
    text, state = _damaged_state(load(raw), generator)
    return text, save(state, metadata={"format": "pt"})


def _damaged_config(raw: bytes, generator: random.Random) -> tuple[str, bytes]:
    kind = generator.randrange(4)
    if kind == 0:
        strange = generator.choice(CONFIGS)
        return repr(strange), strange
    if kind == 1:
        return _damaged_bytes(raw, generator)
    fields = json.loads(raw)
    # Of a whole checkpoint only the router's part is ours.
    ours = {"token_router"} & fields.keys() or fields.keys() - {"transformers_version", "dtype"}
    name = generator.choice(sorted(ours))
    if generator.random() < 0.3:
        del fields[name]
        return f"without {name}", json.dumps(fields).encode()
    value = generator.choice([value for value in VALUES if not isinstance(value, bytes)])
    return f"{name} {value!r}", json.dumps(fields | {name: value}).encode()


def _damaged_pickle(state: dict[str, Any], generator: random.Random) -> tuple[str, Any]:
    kind = generator.randrange(6)
    if kind == 0:
        content = generator.choice(
            [None, 3, [], [1], {"state_dict": 1}, {0: torch.zeros(1)}, {"model": {}}, {"a": "b"}]
        )
        return repr(content), content
    if kind == 1:
        strange = generator.choice(STRANGE)
        return repr(strange[:40]), strange
    text, state = _damaged_state(state, generator)
    level = generator.choice([None, "model", "state_dict", "module"])
    return f"{text} in {level}", state if level is None else {level: state}


def _load(kind: ModelCase, source: Path, work: Path, name: str, raw: bytes) -> Any:
    shutil.copytree(source, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py"))
    (work / name).write_bytes(raw)
    model = kind.model_class.from_pretrained(work).eval()
    if kind is SET:
        return [model.images, model.labels, model.lr]
    if sum(parameter.numel() for parameter in model.parameters()) > 10**6:
        return None
    with torch.no_grad():
        return dict(model(**kind.inputs(model)))


def _convert(convert: Callable[[Path], Any], path: Path, content: Any) -> Any:
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    model = convert(path)
    kind = CONVNET if convert is convert_convnet_checkpoint else VIMS[1]
    with torch.no_grad():
        return dict(model(**kind.inputs(model)))


def _convert_vim(path: Path) -> Any:
    return convert_vim_checkpoint(path, path.parent / "converted", trained_image_size=16)
