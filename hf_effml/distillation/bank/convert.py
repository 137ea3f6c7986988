"""Banks and distilled images in the files of the original programs: read without unpickling objects, and written."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import logging

from hf_effml.distillation.flat_student import FlatStudent, build_student, student_config
from hf_effml.distillation.real_images import RealImageData
from hf_effml.utils.files import replacing_file
from hf_effml.utils.model_kinds import load_weights

from .experts import describe_data, trainable_config
from .files import write_bank, write_expert
from .trajectories import TrajectoryBank


__all__ = ["DistilledTensors", "export_pickled_bank", "import_distilled_tensors", "import_pickled_bank"]

_BUFFER = re.compile(r"replay_buffer_(\d+)\.pt")


@dataclass(frozen=True, eq=False)
class DistilledTensors:
    """A distilled set as the original programs store it.

    Args:
        images (`Tensor` of shape `(images, channels, height, width)`):
            The synthetic images, preprocessed.
        labels (`Tensor`):
            Class numbers `(images,)`, int64, or soft labels `(images, classes)`, which are logits.
        learning_rate (`float`, *optional*):
            The learned step size.
    """

    images: Tensor
    labels: Tensor
    learning_rate: float | None = None

    @property
    def soft(self) -> bool:
        """Whether the labels are logits."""
        return self.labels.ndim == 2

    @property
    def class_ids(self) -> Tensor:
        """The class of every image: its label, or the largest of its logits."""
        return self.labels.argmax(1) if self.soft else self.labels


def import_pickled_bank(
    folder: str | Path,
    output: str | Path,
    config: PreTrainedConfig | Mapping[str, Any],
    epochs: Sequence[int] | None = None,
    data: RealImageData | None = None,
    training: Mapping[str, Any] | None = None,
) -> TrajectoryBank:
    """Makes a bank of the `replay_buffer_0.pt`, `replay_buffer_1.pt` ... of MTT, FTD, TESLA, DATM, PAD or EDF.

    Such a file is a pickle. Only tensors and lists are read from it; anything else is refused, and no code of it runs.

    Args:
        folder (`str` or `Path`):
            Folder of the files.
        output (`str` or `Path`):
            Folder of the new bank.
        config (`PreTrainedConfig` or `Mapping`):
            Configuration of the networks, which the files do not tell: [`ConvNetConfig`] for the published ones.
        epochs (`Sequence[int]`, *optional*):
            Epochs to take over; all by default.
        data ([`RealImageData`], *optional*):
            The images that the experts were trained on, preprocessed as they were then: the files do not tell. Their
            description and image processor become part of the bank, and distilling needs both.
        training (`Mapping`, *optional*):
            How the experts were trained, for the description.

    Returns:
        [`TrajectoryBank`]: the bank.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file holds something else, or networks of another architecture.

    Example:

    ```python
    >>> from hf_effml import ConvNetConfig
    >>> from hf_effml.distillation.bank.convert import import_pickled_bank
    >>> from hf_effml.distillation.real_images import load_real_images

    >>> config = ConvNetConfig(num_labels=10)
    >>> data = load_real_images("uoft-cs/cifar10", validation_share=0)  # doctest: +SKIP
    >>> bank = import_pickled_bank("buffers/CIFAR10/ConvNet", "cifar10-bank", config, data=data)  # doctest: +SKIP
    ```
    """
    files = sorted((int(found[1]), path) for path in Path(folder).glob("*") if (found := _BUFFER.fullmatch(path.name)))
    if not files:
        raise FileNotFoundError(f"`{folder}` has no `replay_buffer_0.pt`, which the original programs write.")
    if any(Path(output).glob("expert-*.safetensors")):
        raise ValueError(f"`{output}` holds a bank already. Choose another `output`.")
    config = student_config(config) if data is None else trainable_config(config, data.train)
    student = FlatStudent(build_student(config))
    metadata: dict[str, Any] = {
        "num_experts": 0,
        "student": {key: value for key, value in config.to_dict().items() if key != "transformers_version"},
        "parameters": [{"name": n, "shape": list(s)} for n, s in zip(student.names, student.shapes, strict=True)],
        "dtype": "float32",
        "dataset": None if data is None else describe_data(data),
        "preprocessing": None if data is None else data.processor.fingerprint,
        "training": dict(training or {}),
    }
    Path(output).mkdir(parents=True, exist_ok=True)
    try:
        for path in logging.tqdm([path for _, path in files], desc="Files", unit="file", delay=2):
            for snapshots in _experts(path):
                kept = _kept(snapshots, epochs, metadata.get("epochs"), path)
                metadata["epochs"] = kept
                rows = [_flat(snapshots[epoch], student, path) for epoch in kept]
                write_expert(output, metadata["num_experts"], torch.stack(rows), metadata)
                metadata["num_experts"] += 1
    except BaseException:
        for path in Path(output).glob("expert-*.safetensors"):
            path.unlink()
        raise
    write_bank(output, metadata)
    if data is not None:
        data.processor.save_pretrained(output)
    return TrajectoryBank.from_pretrained(output)


def export_pickled_bank(bank: TrajectoryBank, folder: str | Path, experts_per_file: int = 10) -> list[Path]:
    """Writes a bank in the files that the original programs read.

    Args:
        bank ([`TrajectoryBank`]):
            The bank.
        folder (`str` or `Path`):
            Where they go.
        experts_per_file (`int`, *optional*, defaults to 10):
            Experts in a file; all of them are in memory at once.

    Returns:
        `list[Path]`: the files.

    Raises:
        ValueError: If a file would have no expert, or the bank has gaps, which the format cannot tell.
    """
    if experts_per_file < 1:
        raise ValueError(f"`experts_per_file` must be at least 1; got {experts_per_file}.")
    if bank.epochs != list(range(len(bank.epochs))):
        raise ValueError(
            f"The original format numbers epochs from 0 without gaps; the bank keeps {bank.epochs}. Train experts "
            "that keep all epochs."
        )
    student = FlatStudent(build_student(bank.student_config))
    paths = []
    for number, first in enumerate(range(0, len(bank), experts_per_file)):
        experts = [bank.read(e, bank.epochs) for e in range(first, min(first + experts_per_file, len(bank)))]
        content = [[list(student.split(row).values()) for row in rows] for rows in experts]
        paths.append(Path(folder) / f"replay_buffer_{number}.pt")
        with replacing_file(paths[-1]) as unfinished:
            torch.save(content, unfinished)
    return paths


def import_distilled_tensors(
    images: str | Path, labels: str | Path, learning_rate: str | Path | None = None
) -> DistilledTensors:
    """Reads `images_best.pt`, `labels_best.pt` and `lr_best.pt`, as the original programs write them.

    No code in them runs. Labels of DATM, PAD and EDF are logits and stay so: a network is trained on their softmax.
    Labels of MTT are class numbers. A table of zeros and ones is taken for logits, too, because nothing in the file
    tells it from them; take `class_ids` of it if it was meant as probabilities.

    Args:
        images (`str` or `Path`):
            File of the images.
        labels (`str` or `Path`):
            File of the labels.
        learning_rate (`str` or `Path`, *optional*):
            File of the learned step size.

    Returns:
        [`DistilledTensors`]: what they hold; float32, and int64 for class numbers.

    Raises:
        ValueError: If a file holds something else, or they do not fit together.
    """
    pixels, targets = _tensor(images), _tensor(labels)
    if pixels.ndim != 4 or not pixels.is_floating_point():
        raise ValueError(
            f"`{images}` must hold floating-point images (images, channels, height, width); got {pixels.dtype} of "
            f"shape {tuple(pixels.shape)}."
        )
    if len(targets) != len(pixels) or targets.ndim != (2 if targets.is_floating_point() else 1):
        raise ValueError(
            f"`{labels}` must hold a class number for each of the {len(pixels)} images, or logits of shape "
            f"({len(pixels)}, classes); got {targets.dtype} of shape {tuple(targets.shape)}."
        )
    step = None if learning_rate is None else _tensor(learning_rate)
    if step is not None and step.numel() != 1:
        raise ValueError(f"`{learning_rate}` must hold one number; got the shape {tuple(step.shape)}.")
    return DistilledTensors(
        pixels.float(),
        targets.float() if targets.is_floating_point() else targets.long(),
        None if step is None else step.item(),
    )


def _kept(snapshots: list[Any], epochs: Sequence[int] | None, before: list[int] | None, path: Path) -> list[int]:
    """The epochs to take over of an expert."""
    there = list(range(len(snapshots)))
    kept = there if epochs is None else sorted(set(epochs))
    if not kept or not set(kept) <= set(there):
        raise ValueError(f"An expert of `{path}` has epochs 0 to {there[-1]}; `epochs` asks for {list(epochs or [])}.")
    if before not in (None, kept):
        raise ValueError(
            f"An expert of `{path}` has epochs 0 to {there[-1]}, others have {len(before or [])}. Name in `epochs` "
            "those that all of them have."
        )
    return kept


def _experts(path: Path) -> Iterator[list[list[Tensor]]]:
    content = load_weights(path)
    if not _is_nested(content, depth=3):
        raise ValueError(
            f"`{path}` must hold a list of experts, each a list of epochs, each a list of tensors. It is no buffer of "
            "trajectories."
        )
    yield from content


def _is_nested(value: Any, depth: int) -> bool:
    if depth == 0:
        return isinstance(value, Tensor)
    return isinstance(value, list | tuple) and len(value) > 0 and all(_is_nested(each, depth - 1) for each in value)


def _flat(tensors: list[Tensor], student: FlatStudent, path: Path) -> Tensor:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if shapes != student.shapes:
        wrong = next((i for i, pair in enumerate(zip(shapes, student.shapes)) if pair[0] != pair[1]), None)  # noqa: B905
        name = type(student.module).__name__
        what = (
            f"{len(shapes)} parameters, a {name} of `config` has {len(student.shapes)}"
            if wrong is None
            else f"a parameter of shape {shapes[wrong]} where a {name} of `config` has `{student.names[wrong]}` of "
            f"shape {student.shapes[wrong]}"
        )
        raise ValueError(f"`{path}` holds another architecture: {what}. Change `config`.")
    flat = torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors])
    if not flat.isfinite().all():
        raise ValueError(f"`{path}` holds parameters that are not finite. Train that expert again, or leave it out.")
    return flat


def _tensor(path: str | Path) -> Tensor:
    content = load_weights(path)
    if not isinstance(content, Tensor | float | int):
        raise ValueError(f"`{path}` must hold a tensor; got a {type(content).__name__}.")
    return torch.as_tensor(content).detach()
