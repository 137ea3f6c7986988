"""Banks of experts, image processors and orders whose files are damaged, of other types or of another bank."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fuzz.outcomes import Case
from hf_effml import ConvNetConfig, TrajectoryBank
from hf_effml.distillation.bank.convert import import_pickled_bank
from hf_effml.distillation.bank.files import expert_name, write_bank, write_expert
from hf_effml.distillation.difficulty import read_order_file
from hf_effml.distillation.flat_student import FlatStudent, build_student
from hf_effml.distillation.image_processing_zca import ZCAImageProcessor


VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2.5,
    2**31,
    2**63,
    float("nan"),
    float("inf"),
    "",
    "x",
    "é" * 300,
    [],
    [None],
    {},
    [[]],
]
STUDENT = ConvNetConfig(image_size=8, depth=1, hidden_size=2)


def cases(generator: random.Random, folder: Path) -> Iterator[Case]:
    bank, processor = folder / "bank", folder / "processor"
    network = FlatStudent(build_student(STUDENT))
    metadata = {
        "num_experts": 2,
        "student": STUDENT.to_dict(),
        "parameters": [{"name": n, "shape": list(s)} for n, s in zip(network.names, network.shapes, strict=True)],
        "epochs": [0, 1, 3],
        "dataset": {"name": "digits", "label_names": ["a", "b"], "image_shape": [3, 8, 8]},
        "history": [[{"epoch": 0, "train_accuracy": 0.5}], []],
    }
    write_bank(bank, metadata)
    for expert in range(2):
        rows = torch.stack([network.flatten() + row for row in range(3)])
        write_expert(bank, expert, rows, json.loads((bank / "bank.json").read_text()))
    ZCAImageProcessor.from_images(torch.rand(9, 3, 4, 4)).save_pretrained(processor)
    ZCAImageProcessor.from_images(torch.rand(9, 3, 8, 8), do_whiten=False).save_pretrained(bank)
    kinds: list[Callable[[random.Random, Path, Path, Path], Case]] = [_bank, _bank, _processor, _order, _buffer]
    while True:
        yield generator.choice(kinds)(generator, folder, bank, processor)


def changed(value: Any, generator: random.Random) -> tuple[Any, str]:
    """A JSON value with one place of it changed, and which."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice(sorted(value))
        if generator.random() < 0.15:
            return {name: each for name, each in value.items() if name != key}, f".{key} gone"
        inner, place = changed(value[key], generator)
        return {**value, key: inner}, f".{key}{place}"
    if isinstance(value, list) and value and generator.random() < 0.5:
        index = generator.randrange(len(value))
        inner, place = changed(value[index], generator)
        return [*value[:index], inner, *value[index + 1 :]], f"[{index}]{place}"
    new = generator.choice(VALUES)
    return new, f" = {str(new)[:20]!r}"


def damaged(path: Path, generator: random.Random) -> str:
    """A file with a piece of it changed, cut off or replaced, and how."""
    data = path.read_bytes()
    kind = generator.choice(["cut", "byte", "empty", "html", "pointer", "zeros"])
    place = generator.randrange(len(data) + 1)
    path.write_bytes(
        {
            "cut": data[:place],
            "byte": data[:place] + bytes([generator.randrange(256)]) + data[place + 1 :],
            "empty": b"",
            "html": b"<!doctype html><html></html>",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
            "zeros": bytes(len(data)),
        }[kind]
    )
    return f"{path.name}: {kind} at {place}"


def other_tensors(path: Path, generator: random.Random) -> str:
    """A safetensors file with one of its tensors changed, and how."""
    tensors = load_file(path)
    name = generator.choice(sorted(tensors))
    kind = generator.choice(["nan", "inf", "gone", "half", "integer", "shape", "empty", "name"])
    value = tensors.pop(name).clone()
    if kind in ("nan", "inf"):
        value.view(-1)[generator.randrange(value.numel())] = float(kind)
    new = {
        "half": value.half,
        "integer": lambda: value.nan_to_num().long(),
        "shape": lambda: value.reshape(-1)[: value.numel() // 2].clone(),
        "empty": lambda: value.new_zeros(0),
    }.get(kind, lambda: value)()
    if kind != "gone":
        tensors["x" if kind == "name" else name] = new
    header = generator.choice(
        [None, {"format": "pt"}, {"hf_effml": generator.choice(["null", "{}", "[1]", "{", "3"])}]
    )
    save_file(tensors, path, metadata=header)
    return f"{path.name}: {name} {kind}, header {header}"


def _bank(generator: random.Random, folder: Path, bank: Path, processor: Path) -> Case:
    seed, copy = generator.random(), folder / "a-bank"

    def run(text: list[str] | None = None) -> Any:
        ours = random.Random(seed)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(bank, copy)
        file = copy / ours.choice(["bank.json", "bank.json", expert_name(1), "preprocessor_config.json"])
        if file.suffix == ".json" and ours.random() < 0.8:
            content, how = changed(json.loads(file.read_text()), ours)
            file.write_text(json.dumps(content))
        elif file.suffix == ".safetensors" and ours.random() < 0.7:
            how = other_tensors(file, ours)
        else:
            how = damaged(file, ours)
        if text is not None:
            text.append(f"{file.name} {how}")
            return None
        found = TrajectoryBank.from_pretrained(copy)
        preprocessed = found.image_processor
        network = found.network(1)
        return {
            "rows": found.read(1, found.epochs[:1]),
            "scores": network(torch.zeros(2, 3, 8, 8)).logits,
            "pixels": None if preprocessed is None else preprocessed(torch.rand(1, 3, 8, 8))["pixel_values"],
            "accuracy": found.mean_accuracy("train"),
        }

    text: list[str] = []
    run(text)
    return Case(f"bank, {text[0]}", run)


def _processor(generator: random.Random, folder: Path, bank: Path, processor: Path) -> Case:
    copy = folder / "a-processor"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(processor, copy)
    settings, weights = copy / "preprocessor_config.json", copy / "zca.safetensors"
    kind = generator.randrange(4)
    if kind == 0:
        content, how = changed(json.loads(settings.read_text()), generator)
        settings.write_text(json.dumps(content))
    else:
        how = (
            damaged(generator.choice([settings, weights]), generator)
            if kind == 1
            else other_tensors(weights, generator)
        )
    files = {path.name: path.read_bytes() for path in (settings, weights)}

    def run() -> Any:
        for name, data in files.items():
            (copy / name).write_bytes(data)
        return ZCAImageProcessor.from_pretrained(copy)(torch.rand(1, 3, 4, 4))["pixel_values"]

    return Case(f"processor, {how}", run)


def _order(generator: random.Random, folder: Path, bank: Path, processor: Path) -> Case:
    path, labels = folder / "order", torch.arange(6) % 2
    table = [[0, 2, 4], [1, 3, 5]]
    kind = generator.choice(["right", "type", "value", "list", "damaged", "text"])
    values: Any = torch.tensor(table)
    if kind == "type":
        values = values.to(generator.choice([torch.float32, torch.bool, torch.int32, torch.uint8, torch.complex64]))
    elif kind == "value":
        values[generator.randrange(2), generator.randrange(3)] = generator.choice([-1, 6, 2**31, 2**63 - 1, 0])
    elif kind == "list":
        values = generator.choice([table, {"table": values}, None, "x", values[0], values[None], values[:, :0]])
    numpy = generator.random() < 0.4 and isinstance(values, torch.Tensor)
    with path.open("wb") as file:
        np.save(file, values.numpy()) if numpy else torch.save(values, file)
    how = damaged(path, generator) if kind == "damaged" else kind
    if kind == "text":
        path.write_text(generator.choice(["[[0, 2], [1, 3]]", "cos\nsystem\n(S'id'\ntR.", "0 2 4\n1 3 5\n"]))
    data = path.read_bytes()
    return Case(f"order, {how}, {'NumPy' if numpy else 'torch'}", partial(_read_order, path, data, labels))


def _read_order(path: Path, data: bytes, labels: torch.Tensor) -> Any:
    path.write_bytes(data)
    return read_order_file(path, labels)


def _buffer(generator: random.Random, folder: Path, bank: Path, processor: Path) -> Case:
    source, output = folder / "buffers", folder / "imported"
    source.mkdir(exist_ok=True)
    parameters = [value.detach() for value in build_student(STUDENT).parameters()]
    content: Any = [[parameters, parameters]]
    kind = generator.choice(["right", "flat", "less", "nan", "type", "damaged"])
    if kind == "flat":
        content = generator.choice(
            [[], [[]], [[[]]], parameters, [parameters], {"a": content}, None, [[parameters, 3]]]
        )
    elif kind == "less":
        content = [[parameters, parameters[:-1]]]
    elif kind == "nan":
        content = [[[value * float("nan") for value in parameters]]]
    elif kind == "type":
        content = [[[value.long() for value in parameters]], [parameters]]
    torch.save(content, source / "replay_buffer_0.pt")
    how = damaged(source / "replay_buffer_0.pt", generator) if kind == "damaged" else kind
    data = (source / "replay_buffer_0.pt").read_bytes()
    epochs = generator.choice([None, None, [0], [0, 1], [5], [-1], []])

    def run() -> Any:
        shutil.rmtree(output, ignore_errors=True)
        (source / "replay_buffer_0.pt").write_bytes(data)
        return import_pickled_bank(source, output, STUDENT, epochs=epochs).read(0, -1)

    return Case(f"buffer, {how}, epochs {epochs}", run)
