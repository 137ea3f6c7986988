"""What a distillation will need in memory, arithmetic and disk, before it starts; also for the published settings."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.distillation.flat_student import build_student, math_attention, student_config


__all__ = ["CostEstimate", "data_shape", "estimate_cost", "recipe_costs", "student_of_paper"]

_BYTES = 4
# Measured on ConvNets: what the graph of a step that is to be differentiated twice keeps, in values per value that
# comes out of a convolution. Normalisation, activation and pooling are in it.
_KEPT_PER_OUTPUT = 4.5
# Measured there too: what is held for a moment while one step is differentiated, as a share of its graph.
_TEMPORARY = 0.6
# In forward passes: forward 1, backward 2, second order 6; rebuilding a step instead of keeping it adds another 3.
_FORWARDS_OF_FULL_UNROLL = 9
_FORWARDS_OF_ADJOINT = 12
_PRODUCTS = {
    torch.ops.aten.addmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten.bmm,
    torch.ops.aten.convolution,
    torch.ops.aten.mm,
}


@dataclass(frozen=True)
class CostEstimate:
    """What a distillation needs; GB are 10^9 bytes, a FLOP is an addition or a multiplication.

    "Full unroll" is the published code, which keeps the graph of all steps (its two largest settings of CIFAR-10 were
    run with a first-order approximation instead); "ours" is the exact adjoint sweep, which rebuilds one at a time.
    Synthetic images, their gradients and what libraries hold come on top.

    Args:
        parameters (`int`):
            Of the student.
        forward_flop (`int`):
            Of one image.
        outputs (`int`):
            Values that come out of convolutions and matrix products for one image.
        batch (`int`):
            Images in a step.
        steps (`int`):
            Steps on the synthetic set in an iteration.
        num_experts (`int`):
            Trajectories in the bank.
        snapshots (`int`):
            Epochs of each trajectory that are stored if all are, the one before training included.
        kept_snapshots (`int`):
            Those that matching reads.
        iterations (`int`):
            Of the whole distillation.
    """

    parameters: int
    forward_flop: int
    outputs: int
    batch: int
    steps: int
    num_experts: int
    snapshots: int
    kept_snapshots: int
    iterations: int

    @property
    def mb_per_image_step(self) -> float:
        """What the full unroll keeps of each image in each step."""
        return _KEPT_PER_OUTPUT * _BYTES * self.outputs / 1e6

    @property
    def gb_full_unroll(self) -> float:
        """Graph of all steps, and what differentiating one of them holds for a moment."""
        return (self.steps + _TEMPORARY) * self.gb_one_step

    @property
    def gb_one_step(self) -> float:
        """Graph of one step."""
        return self.batch * self.mb_per_image_step / 1e3

    @property
    def gb_states(self) -> float:
        """The student's parameters before the first and after every step."""
        return (self.steps + 1) * self._gb_snapshot

    @property
    def gb_ours(self) -> float:
        """Graph of one step, what differentiating it holds for a moment, and the states of all."""
        return (1 + _TEMPORARY) * self.gb_one_step + self.gb_states

    @property
    def tflop_full_unroll(self) -> float:
        """Of an iteration."""
        return self._tflop_forward * _FORWARDS_OF_FULL_UNROLL

    @property
    def tflop_ours(self) -> float:
        """Of an iteration."""
        return self._tflop_forward * _FORWARDS_OF_ADJOINT

    @property
    def pflop_total(self) -> float:
        """Of all iterations, ours."""
        return self.tflop_ours * self.iterations / 1e3

    @property
    def gb_bank(self) -> float:
        """The bank with every snapshot in it."""
        return self.num_experts * self.snapshots * self._gb_snapshot

    @property
    def gb_bank_kept(self) -> float:
        """The bank with those snapshots in it that matching reads."""
        return self.num_experts * self.kept_snapshots * self._gb_snapshot

    @property
    def _gb_snapshot(self) -> float:
        return _BYTES * self.parameters / 1e9

    @property
    def _tflop_forward(self) -> float:
        return self.forward_flop * self.batch * self.steps / 1e12

    def as_row(self) -> dict[str, float]:
        """The numbers that tables show, to three digits."""
        values = {
            "parameters": self.parameters,
            "MFLOP_per_image": self.forward_flop / 1e6,
            "MB_per_image-step": self.mb_per_image_step,
            "full_unroll_GB": self.gb_full_unroll,
            "ours_GB": self.gb_ours,
            "full_unroll_TFLOP": self.tflop_full_unroll,
            "ours_TFLOP": self.tflop_ours,
            "ours_PFLOP_in_all": self.pflop_total,
            "bank_GB": self.gb_bank,
            "bank_GB_read": self.gb_bank_kept,
        }
        return {name: value if isinstance(value, int) else float(f"{value:.3g}") for name, value in values.items()}


def estimate_cost(
    config: PreTrainedConfig | Mapping[str, Any],
    image_shape: tuple[int, int, int],
    num_classes: int,
    ipc: int,
    *,
    syn_steps: int,
    batch_syn: int | None = None,
    num_experts: int = 100,
    snapshots: int = 101,
    kept_snapshots: int | None = None,
    iterations: int = 10_000,
) -> CostEstimate:
    """Counts what a distillation needs, from one image's pass through a student without weights.

    Args:
        config (`PreTrainedConfig` or `Mapping`):
            Configuration of the student.
        image_shape (`tuple[int, int, int]`):
            Channels, height and width of the images; replaces what `config` says.
        num_classes (`int`):
            Classes; replaces what `config` says.
        ipc (`int`):
            Synthetic images per class.
        syn_steps (`int`):
            Steps on the synthetic set in an iteration.
        batch_syn (`int`, *optional*):
            Images in a step; all if unset or larger than their number.
        num_experts (`int`, *optional*, defaults to 100):
            Trajectories in the bank.
        snapshots (`int`, *optional*, defaults to 101):
            Epochs that each expert is trained for, and one more for its start.
        kept_snapshots (`int`, *optional*):
            How many of them matching reads: the largest start epoch less the smallest, plus the epochs in between
            start and target. All if unset.
        iterations (`int`, *optional*, defaults to 10000):
            Of the whole distillation.

    Returns:
        [`CostEstimate`]: the estimate. Its memory rests on measurements of ConvNets, where it is right within a
        tenth for one step's graph; other students differ by up to a half, small ones with many parameters by more.

    Raises:
        ValueError: If a number is not positive.

    Example:

    ```python
    >>> from hf_effml.distillation.configuration_convnet import ConvNetConfig
    >>> from hf_effml.distillation.evaluation.cost import estimate_cost

    >>> cost = estimate_cost(ConvNetConfig(), (3, 32, 32), num_classes=10, ipc=50, syn_steps=80, batch_syn=500)
    >>> round(cost.gb_full_unroll), round(cost.gb_ours, 1), round(cost.tflop_ours)
    (125, 2.6, 49)

    ```
    """
    numbers = {"num_classes": num_classes, "ipc": ipc, "syn_steps": syn_steps, "batch_syn": batch_syn}
    numbers |= {"num_experts": num_experts, "snapshots": snapshots, "kept_snapshots": kept_snapshots}
    for name, value in {**numbers, "iterations": iterations}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1; got {value}.")
    parameters, forward_flop, outputs = _count(_for_data(config, image_shape, num_classes), image_shape)
    images = ipc * num_classes
    return CostEstimate(
        parameters=parameters,
        forward_flop=forward_flop,
        outputs=outputs,
        batch=min(batch_syn or images, images),
        steps=syn_steps,
        num_experts=num_experts,
        snapshots=snapshots,
        kept_snapshots=min(kept_snapshots or snapshots, snapshots),
        iterations=iterations,
    )


# Classes, image size and depth of the student; subsets of ImageNet have 10, 128 and 5.
_SUBSETS = ("imagenette", "imagewoof", "imagemeow", "imageyellow", "imagesquawk", "imagefruit", "comp-dd")
_OF_COMP_DD = tuple(
    f"{category}_{difficulty}" for category in ("bird", "car", "dog") for difficulty in ("easy", "hard")
)
_EXPERTS = {
    "expert-cifar10": (10, 32, 3),
    "expert-cifar100": (100, 32, 3),
    "expert-tiny-imagenet": (200, 64, 4),
    **{f"expert-{name}": (10, 128, 5) for name in (*_SUBSETS, *_OF_COMP_DD)},
}
# Channels, image size and classes of what recipes of experts are trained on.
_DATA = {
    "digits": (1, 8, 10),
    "uoft-cs/cifar10": (3, 32, 10),
    "uoft-cs/cifar100": (3, 32, 100),
    "zh-plus/tiny-imagenet": (3, 64, 200),
    "ILSVRC/imagenet-1k": (3, 224, 1000),
    "comp-dd:bird_easy": (3, 128, 10),
}


def student_of_paper(bank: str) -> tuple[ConvNetConfig, tuple[int, int, int], int] | None:
    """Says what the experts of a published setting are, without looking for them.

    Args:
        bank (`str`):
            Name of the bank in our recipes, as `expert-cifar10`.

    Returns:
        `tuple` or `None`: the network, the shape of an image and the number of classes; `None` for other names.
    """
    found = _EXPERTS.get(bank.removesuffix("-pad"))
    if found is None:
        return None
    num_classes, size, depth = found
    return ConvNetConfig(depth=depth, hidden_size=128, image_size=size), (3, size, size), num_classes


def data_shape(settings: Mapping[str, Any]) -> tuple[tuple[int, int, int], int] | None:
    """Says what the images of a recipe of experts are, without reading them.

    Args:
        settings (`Mapping`):
            A recipe of `hf-effml train expert`.

    Returns:
        `tuple` or `None`: the shape of an image and the number of classes; `None` for data that is not known here.
    """
    found = _DATA.get(settings.get("data", "digits"))
    if found is None:
        return None
    channels, size, num_classes = found
    size = settings.get("image_size") or size
    classes = settings.get("classes")
    return (settings.get("num_channels") or channels, size, size), len(classes) if classes else num_classes


def recipe_costs(recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, CostEstimate]:
    """Estimates what the settings of the papers need: their 100 experts of 100 epochs, ConvNets of width 128.

    Args:
        recipes (`Mapping[str, Mapping]`):
            Settings of `hf-effml train datm`, `pad` or `edf` by name, as [`~hf_effml.cli.recipes.read_recipes`] has
            them. Those for digits, whose experts are other ones, are left out.

    Returns:
        `dict[str, CostEstimate]`: by name.
    """
    return {
        name: _cost_of_recipe(settings)
        for name, settings in recipes.items()
        if settings.get("bank", "expert-digits") != "expert-digits"
    }


def _cost_of_recipe(settings: Mapping[str, Any]) -> CostEstimate:
    found = student_of_paper(settings["bank"])
    if found is None:
        raise ValueError(f"`{settings['bank']}` is no bank of the papers; there are {', '.join(_EXPERTS)}.")
    return estimate_cost(
        *found,
        settings["images_per_class"],
        syn_steps=settings["syn_steps"],
        batch_syn=settings.get("batch_syn"),
        kept_snapshots=settings["max_start_epoch"]
        - settings.get("min_start_epoch", 0)
        + settings.get("expert_epochs", 2),
    )


def _for_data(
    config: PreTrainedConfig | Mapping[str, Any], image_shape: tuple[int, int, int], num_classes: int
) -> PreTrainedConfig:
    config = copy.deepcopy(student_config(config))
    config.num_labels = num_classes
    channels, height, width = image_shape
    size = height if height == width else (height, width)
    for name, value in {"num_channels": channels, "image_size": size}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def _count(config: PreTrainedConfig, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Parameters, FLOP of one image, and values that come out of convolutions and matrix products."""
    try:
        return _count_on("meta", config, image_shape)
    # Not every operator works on tensors without data.
    except RuntimeError:
        return _count_on("cpu", config, image_shape)


def _count_on(device: str, config: PreTrainedConfig, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    with torch.device(device):
        student = build_student(config)
        with torch.no_grad(), math_attention(), _OutputCounter() as outputs, FlopCounterMode(display=False) as flop:
            student(torch.zeros(1, *image_shape))
    return sum(parameter.numel() for parameter in student.parameters()), flop.get_total_flops(), outputs.values


class _OutputCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in _PRODUCTS:
            self.values += output.numel()
        return output
