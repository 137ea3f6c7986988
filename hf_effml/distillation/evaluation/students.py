"""Networks by name, to train on distilled sets, for any image size and number of classes."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, ResNetConfig, ViTConfig

from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.distillation.flat_student import build_student
from hf_effml.utils.imports import require
from hf_effml.utils.model_kinds import check_task


__all__ = ["STUDENTS", "Student", "StudentFactory", "make_student", "student_by_name", "student_name"]

# What every name means; `student_by_name` says it too when it gets a wrong one.
STUDENTS = {
    "convnet": "ConvNet whose last map has about 4 pixels: depth 3 at 32, 4 at 64, 5 at 128 pixels",
    "convnet-d2": "ConvNet of that depth; `-w64` is its width, `-batchnorm`, `-layernorm`, `-groupnorm` or `-nonorm` "
    "its normalisation instead of instance norm, and suffixes combine",
    "resnet18": "ResNet-18 of transformers, made for photographs: its first layers shrink an image to a quarter",
    "resnet18-small": "ResNet-18 with a 3x3 first convolution and no pooling after it, as tables at 32 pixels have",
    "vit-tiny": "ViT-Ti of transformers, 8 x 8 patches",
    "lenet": "LeNet-5",
    "mlp": "two hidden layers of 128",
    "timm:NAME": "a model of timm: `timm:vgg11_bn` takes 32 pixels too",
    "FOLDER or ORGANISATION/MODEL": "what a config.json there describes, with fresh weights",
}
_NORMS = {f"{name}norm": name for name in ("instance", "batch", "layer", "group")} | {"nonorm": "none"}


@dataclass(frozen=True)
class StudentFactory:
    """A network that no configuration describes.

    Args:
        name (`str`):
            What to call it.
        make (`Callable[[], nn.Module]`):
            Makes one with fresh weights.
    """

    name: str
    make: Callable[[], nn.Module]

    def __call__(self) -> nn.Module:
        """Makes one with fresh weights."""
        return self.make()


# A configuration, its dictionary, or a function without arguments that makes a network with fresh weights.
Student: TypeAlias = PreTrainedConfig | Mapping[str, Any] | Callable[[], nn.Module]


def student_by_name(
    name: str, image_size: int | Sequence[int], num_channels: int, num_labels: int, **fields: Any
) -> PreTrainedConfig | StudentFactory:
    """Finds the network that a name stands for, sized for a data set.

    AlexNet is not among them: timm has none, and torchvision's does not take 32 pixels. Weights are always fresh.

    Args:
        name (`str`):
            One of `STUDENTS`.
        image_size (`int` or `Sequence[int]`):
            Height and width of the images, or one number for both.
        num_channels (`int`):
            Channels of the images.
        num_labels (`int`):
            Number of classes.
        fields (`dict`, *optional*):
            Further fields of the configuration, such as `hidden_size=64`; they have the last word.

    Returns:
        `PreTrainedConfig` or [`StudentFactory`]: a configuration, or what makes the network where there is none
        (`mlp`, `lenet`, `resnet18-small`). [`make_student`] takes both.

    Raises:
        ValueError: If the name is none, or the network cannot have the fields.

    Example:

    ```python
    >>> from hf_effml.distillation.evaluation.students import student_by_name

    >>> student_by_name("convnet", image_size=64, num_channels=3, num_labels=200).depth
    4
    >>> student_by_name("convnet-d2-batchnorm", image_size=32, num_channels=3, num_labels=10).norm
    'batch'
    ```
    """
    size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
    shape = {"num_channels": num_channels, "num_labels": num_labels}
    if name == "convnet" or name.startswith("convnet-"):
        return ConvNetConfig(**_convnet_fields(name, size, num_channels) | shape | fields)
    if name == "resnet18":
        return _resnet18(**shape, **fields)
    if name == "vit-tiny":
        return _vit_tiny(size, shape, fields)
    if name == "resnet18-small":
        config = _resnet18(**shape, **fields)
        return StudentFactory(name, lambda: _small_resnet(config, stride=1 if min(size) <= 32 else 2))
    if name in ("lenet", "mlp"):
        if fields:
            raise ValueError(f"`{name}` has no fields to change; got {', '.join(fields)}.")
        make = _lenet if name == "lenet" else _mlp
        return StudentFactory(name, lambda: make(num_channels, size, num_labels))
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), size, num_channels, num_labels, **fields)
    if "/" in name or Path(name).is_dir():
        return _saved(name, size, num_channels, num_labels, **fields)
    raise ValueError(f"`{name}` is no student. There are: {_described()}.")


def make_student(student: Student, seed: int = 0) -> nn.Module:
    """Makes a network with fresh weights and leaves the global random state as it was.

    Args:
        student (`PreTrainedConfig`, `Mapping` or `Callable[[], nn.Module]`):
            A configuration, its dictionary, or a function that makes a network.
        seed (`int`, *optional*, defaults to 0):
            Seed of the weights.

    Returns:
        `nn.Module`: the network, on the CPU.

    Raises:
        TypeError: If `student` is a network already, or nothing that makes one.

    Example:

    ```python
    >>> from torch import nn
    >>> from hf_effml.distillation.evaluation.students import make_student

    >>> make_student(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), seed=1)[1].out_features
    10
    ```
    """
    if isinstance(student, PreTrainedConfig | Mapping):
        return build_student(student, seed)
    if isinstance(student, nn.Module) or not callable(student):
        raise TypeError(
            "`student` must be a configuration, its dictionary, or a function without arguments that makes a network: "
            f"every seed gets a fresh one. Got a {type(student).__name__}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return student()


def student_name(student: Student) -> str:
    """Says what to call a network in tables.

    Args:
        student (`PreTrainedConfig`, `Mapping` or `Callable[[], nn.Module]`):
            As for [`make_student`].

    Returns:
        `str`: for example `"ConvNet-D3-W128"`, `"resnet"` or `"mlp"`.
    """
    if not isinstance(student, PreTrainedConfig | Mapping):
        return str(getattr(student, "name", None) or getattr(student, "__name__", type(student).__name__))
    fields: Mapping[str, Any] = student.to_dict() if isinstance(student, PreTrainedConfig) else student
    kind = str(fields.get("model_type", "unknown"))
    if kind == "convnet":
        config = ConvNetConfig(**{key: fields[key] for key in ("depth", "hidden_size", "norm") if key in fields})
        suffix = "" if config.norm == "instance" else f"-{'no' if config.norm == 'none' else config.norm}norm"
        return f"ConvNet-D{config.depth}-W{config.hidden_size}{suffix}"
    return str(fields["architecture"]) if kind == "timm_wrapper" else kind


def _described() -> str:
    return "; ".join(f"`{name}` ({meaning})" for name, meaning in STUDENTS.items())


def _convnet_fields(name: str, size: tuple[int, int], num_channels: int) -> dict[str, Any]:
    # The first convolution pads images of one channel to 4 pixels more.
    shorter = min(size) + (4 if num_channels == 1 else 0)
    fields: dict[str, Any] = {"image_size": list(size), "depth": max(1, round(math.log2(shorter)) - 2)}
    for suffix in name.split("-")[1:]:
        if re.fullmatch(r"d\d+", suffix):
            fields["depth"] = int(suffix[1:])
        elif re.fullmatch(r"w\d+", suffix):
            fields["hidden_size"] = int(suffix[1:])
        elif suffix in _NORMS:
            fields["norm"] = _NORMS[suffix]
        else:
            raise ValueError(
                f"`{name}` is no student: `-{suffix}` must be a depth such as `-d3`, a width such as `-w128`, or one "
                f"of -{', -'.join(_NORMS)}."
            )
    return fields


def _resnet18(**fields: Any) -> ResNetConfig:
    shape = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    return ResNetConfig(**shape | fields)


def _small_resnet(config: ResNetConfig, stride: int) -> nn.Module:
    model = AutoModelForImageClassification.from_config(config)
    stem = model.resnet.embedder
    convolution = nn.Conv2d(config.num_channels, config.embedding_size, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    stem.embedder.convolution, stem.pooler = convolution, nn.Identity()
    return model


def _vit_tiny(size: tuple[int, int], shape: dict[str, int], fields: dict[str, Any]) -> ViTConfig:
    patch = max(1, min(size) // 8)
    width = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    return ViTConfig(
        **{"image_size": size[0] if size[0] == size[1] else size, "patch_size": patch, **width} | shape | fields
    )


def _mlp(channels: int, size: tuple[int, int], num_labels: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    width = channels * math.prod(size)
    for _ in range(2):
        layers += [nn.Linear(width, 128), nn.ReLU()]
        width = 128
    return nn.Sequential(*layers, nn.Linear(width, num_labels))


def _lenet(channels: int, size: tuple[int, int], num_labels: int) -> nn.Module:
    # 64 pixels and more are halved at once; below 32 the borders are padded, or nothing would be left.
    stride, padding = (2 if min(size) >= 64 else 1), (2 if min(size) < 32 else 0)
    features = nn.Sequential(
        nn.Conv2d(channels, 6, 5, stride=stride, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    with torch.no_grad():
        width = features(torch.zeros(1, channels, *size)).shape[1]
    head = [nn.Linear(width, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_labels)]
    return nn.Sequential(*features, *head)


def _timm(architecture: str, size: tuple[int, int], channels: int, num_labels: int, **fields: Any) -> PreTrainedConfig:
    timm = require("timm")
    from transformers import TimmWrapperConfig

    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), n=4)
        advice = f"Near it are {', '.join(near)}." if near else "`timm.list_models()` lists them."
        raise ValueError(f"`{architecture}` is no model of timm {timm.__version__}. {advice}")
    arguments: dict[str, Any] = {"in_chans": channels}
    if getattr(timm.get_pretrained_cfg(architecture), "fixed_input_size", False):
        arguments["img_size"] = list(size)
    arguments |= fields.pop("model_args", {})
    return TimmWrapperConfig(architecture=architecture, num_labels=num_labels, model_args=arguments, **fields)


def _saved(name: str, size: tuple[int, int], channels: int, num_labels: int, **fields: Any) -> PreTrainedConfig:
    check_task(name, "AutoModelForImageClassification")
    config = AutoConfig.from_pretrained(name)
    if config.model_type == "timm_wrapper":
        return _timm(config.architecture, size, channels, num_labels, **fields)
    found: dict[str, Any] = {"num_labels": num_labels}
    if hasattr(config, "num_channels"):
        found["num_channels"] = channels
    if hasattr(config, "image_size"):
        found["image_size"] = size[0] if size[0] == size[1] else list(size)
    for key, value in (found | fields).items():
        setattr(config, key, value)
    return config
