"""Distilled sets, published or as models, whose files are damaged or describe something else."""

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fuzz.banks import changed, damaged, other_tensors
from fuzz.outcomes import Case
from hf_effml import (
    ConvNetConfig,
    DistilledDatasetConfig,
    DistilledDatasetModel,
    ZCAImageProcessor,
    load_distilled,
    save_distilled_dataset,
)
from hf_effml.distillation.card import add_evaluations
from hf_effml.distillation.evaluation.protocols import get_protocol
from hf_effml.distillation.evaluation.training import train_student
from hf_effml.distillation.publishing.sets import INFO_NAME
from hf_effml.hub import render_card


STUDENT = ConvNetConfig(image_size=8, depth=1, hidden_size=2)


def cases(generator: random.Random, folder: Path) -> Iterator[Case]:
    processor = ZCAImageProcessor.from_images(torch.rand(9, 3, 8, 8))
    config = DistilledDatasetConfig(
        images_per_class=1, image_size=8, student=STUDENT.to_dict(), preprocessing=processor.fingerprint
    )
    model = DistilledDatasetModel(config)
    published = save_distilled_dataset(model, folder / "published", processor)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    number = 0
    while True:
        number += 1
        source = generator.choice([published, published, folder / "model"])
        copy = folder / f"set-{number % 2}"
        how = _change(source, copy, generator)
        files = {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        use = generator.choice([_train, _train, _render, _add])
        yield Case(f"{source.name}, {how}, {use.__name__}", lambda c=copy, f=files, u=use: u(_written(c, f)))


def _change(source: Path, copy: Path, generator: random.Random) -> str:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    description = copy / (INFO_NAME if source.name == "published" else "config.json")
    kind = generator.random()
    if kind < 0.6:
        content, how = changed(json.loads(description.read_text()), generator)
        description.write_text(json.dumps(content))
        return how
    files = sorted(path for path in copy.rglob("*") if path.suffix in (".json", ".safetensors", ".parquet"))
    file = generator.choice(files)
    how = (other_tensors if file.suffix == ".safetensors" and kind < 0.85 else damaged)(file, generator)
    name = file.relative_to(copy).as_posix()
    if description.name == INFO_NAME and name != INFO_NAME and generator.random() < 0.7:
        # As somebody would publish it who made the damage.
        info = json.loads(description.read_text())
        if name in info["files"]:
            info["files"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
            description.write_text(json.dumps(info))
            how += ", digest renewed"
    return how


def _written(copy: Path, files: dict[Path, bytes]) -> Path:
    shutil.rmtree(copy, ignore_errors=True)
    for name, data in files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    return copy


def _train(folder: Path) -> Any:
    found = load_distilled(folder)
    images, _, soft_labels, rate, _ = found.training_set
    student = ConvNetConfig(image_size=list(images.shape[2:]), num_channels=images.shape[1], depth=1, hidden_size=2)
    student.num_labels = len(found.label_names)
    network = train_student(found.training_set, student, get_protocol("tm", epochs=1), disable_tqdm=True)
    pixels = torch.rand(1, *images.shape[1:])
    scores = network(pixels if found.processor is None else found.processor(pixels)["pixel_values"]).logits
    return {"images": images, "labels": soft_labels, "rate": rate, "scores": scores.detach()}


def _render(folder: Path) -> Any:
    assert render_card(folder).text


def _add(folder: Path) -> Any:
    if (folder / INFO_NAME).is_file():
        add_evaluations(folder, [])
    return load_distilled(folder).training_set.images
