"""Differentiable augmentation: one operation for a whole batch, with parameters of its own for every image.

The draw and the operation are apart, so that a step can be replayed exactly from a few small tensors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


__all__ = ["OPERATIONS", "AugmentationDraw", "AugmentationSettings", "augment", "draw_augmentation"]

_BRIGHTNESS, _SATURATION, _CONTRAST = 1.0, 2.0, 0.5
_FLIP_PROBABILITY = 0.5
_SCALE = 1.2
_DEGREES = 15.0


@dataclass(frozen=True)
class AugmentationSettings:
    """Which operations are drawn from, and how far they go (DSA, https://huggingface.co/papers/2102.08259).

    Args:
        strategy (`str`, *optional*, defaults to `"color_crop_cutout_flip_scale_rotate"`):
            Names of the operations with `_` between them; `"none"` or `""` is no augmentation at all.
        crop_ratio (`float`, *optional*, defaults to 0.125):
            Largest shift as a share of the height or width.
        cutout_ratio (`float`, *optional*, defaults to 0.5):
            Height and width of the hole as a share of the image's.

    Raises:
        ValueError: If an operation is unknown or a ratio is outside [0, 1).

    Example:

    ```python
    >>> from hf_effml.distillation.differentiable_augmentation import AugmentationSettings

    >>> AugmentationSettings("flip_crop", crop_ratio=0.25).operations
    ('flip', 'crop')
    >>> AugmentationSettings("none").operations
    ()

    ```
    """

    strategy: str = "color_crop_cutout_flip_scale_rotate"
    crop_ratio: float = 0.125
    cutout_ratio: float = 0.5

    def __post_init__(self):
        if not isinstance(self.strategy, str):
            raise ValueError(f"`strategy` must be a text; got {self.strategy!r}.")
        unknown = [name for name in self.operations if name not in OPERATIONS]
        if unknown:
            raise ValueError(
                f"`strategy` must join names of {', '.join(OPERATIONS)} by `_`, or be `none`; "
                f"got {self.strategy!r}, where {', '.join(map(repr, unknown))} is none of them."
            )
        for name in ("crop_ratio", "cutout_ratio"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"`{name}` must be at least 0 and less than 1; got {value!r}.")

    @property
    def operations(self) -> tuple[str, ...]:
        """Names of the operations, each as likely as the others; empty if augmentation is off."""
        return () if self.strategy in ("", "none") else tuple(self.strategy.split("_"))


@dataclass(frozen=True, eq=False)
class AugmentationDraw:
    """What [`augment`] does to one batch. Made by [`draw_augmentation`].

    Args:
        operation (`str`):
            Name of the operation.
        values (`dict[str, Tensor]`):
            Its parameters, tensors of shape `(batch,)`: `u_brightness`, `u_saturation` and `u_contrast` of `color`,
            the shifts `t_h` and `t_w` of `crop`, the centre `o_h` and `o_w` of `cutout`, `u_x` and `u_y` of `scale`,
            and `u` of `flip` and `rotate`. Those with a `u` are uniform in [0, 1), the others are integers.
    """

    operation: str
    values: dict[str, Tensor]

    def to(self, device: torch.device | str) -> "AugmentationDraw":
        """Moves the parameters.

        Args:
            device (`torch.device` or `str`):
                Where to.

        Returns:
            [`AugmentationDraw`]: the same draw there.
        """
        return AugmentationDraw(self.operation, {name: value.to(device) for name, value in self.values.items()})


def draw_augmentation(
    settings: AugmentationSettings,
    batch: int,
    size: int | Sequence[int],
    generator: torch.Generator,
    device: torch.device | str | None = None,
) -> AugmentationDraw | None:
    """Draws an operation and its parameters on the CPU, so that all devices get the same.

    Args:
        settings ([`AugmentationSettings`]):
            What to draw from.
        batch (`int`):
            Number of images.
        size (`int` or `Sequence[int]`):
            Height and width of the images.
        generator (`torch.Generator`):
            Generator on the CPU.
        device (`torch.device` or `str`, *optional*):
            Where the images are; the CPU if unset.

    Returns:
        [`AugmentationDraw`] or `None`: `None` if augmentation is off; then nothing is drawn from the generator.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.distillation.differentiable_augmentation import AugmentationSettings, augment, draw_augmentation

    >>> settings = AugmentationSettings("crop")
    >>> draw = draw_augmentation(settings, batch=2, size=32, generator=torch.Generator().manual_seed(0))
    >>> draw.operation, sorted(draw.values)
    ('crop', ['t_h', 't_w'])
    >>> augment(torch.ones(2, 3, 32, 32), draw, settings).shape
    torch.Size([2, 3, 32, 32])

    ```
    """
    operations = settings.operations
    if not operations:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    operation = operations[int(torch.randint(len(operations), (), generator=generator))]

    def uniform() -> Tensor:
        return torch.rand(batch, generator=generator)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (batch,), generator=generator)

    if operation == "crop":
        reach = {"t_h": _share(height, settings.crop_ratio), "t_w": _share(width, settings.crop_ratio)}
        values = {name: integers(-most, most) for name, most in reach.items()}
    elif operation == "cutout":
        # An even hole has its centre between two pixels, so that there is one place more for it.
        holes = {"o_h": (height, settings.cutout_ratio), "o_w": (width, settings.cutout_ratio)}
        values = {name: integers(0, length - _share(length, ratio) % 2) for name, (length, ratio) in holes.items()}
    else:
        values = {name: uniform() for name in _UNIFORM[operation]}
    draw = AugmentationDraw(operation, values)
    return draw if device is None else draw.to(device)


def augment(images: Tensor, draw: AugmentationDraw | None, settings: AugmentationSettings) -> Tensor:
    """Applies a draw to a batch; differentiable in the images.

    Args:
        images (`Tensor` of shape `(batch, channels, height, width)`):
            Images of any floating-point type. Half precision is computed in float32.
        draw ([`AugmentationDraw`], *optional*):
            What to do, on the device of the images; `None` does nothing.
        settings ([`AugmentationSettings`]):
            The settings that the draw was made with.

    Returns:
        `Tensor` of the shape and type of `images`: the augmented images; `images` itself without a draw.

    Raises:
        ValueError: If the draw is for another number of images, or its operation is unknown.
    """
    if draw is None:
        return images
    if draw.operation not in OPERATIONS:
        raise ValueError(f"`draw.operation` must be one of {', '.join(OPERATIONS)}; got {draw.operation!r}.")
    batch = {len(value) for value in draw.values.values()}
    if batch != {len(images)}:
        raise ValueError(f"`draw` is for a batch of {max(batch)}; got {len(images)} images. Draw for this batch.")
    return _APPLY[draw.operation](images, draw.values, settings).to(images.dtype)


def _share(length: int, ratio: float) -> int:
    return int(length * ratio + 0.5)


def _per_image(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)


def _color(images: Tensor, values: dict[str, Tensor], settings: AugmentationSettings) -> Tensor:
    brightness, saturation, contrast = (_per_image(values[name]) for name in _UNIFORM["color"])
    images = images + (brightness - 0.5) * _BRIGHTNESS
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (saturation * _SATURATION) + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + _CONTRAST) + mean


def _crop(images: Tensor, values: dict[str, Tensor], settings: AugmentationSettings) -> Tensor:
    height, width = images.shape[2:]
    rows, columns = _shifted(height, values["t_h"]), _shifted(width, values["t_w"])
    source = (rows.unsqueeze(2) * (width + 2) + columns.unsqueeze(1)).flatten(1).unsqueeze(1)
    # A border of one zero serves every shift: whatever lies outside is read from there.
    bordered = F.pad(images, (1, 1, 1, 1)).flatten(2)
    return bordered.gather(2, source.expand(-1, images.shape[1], -1)).view_as(images)


def _shifted(length: int, shift: Tensor) -> Tensor:
    """`(batch, length)`: which row or column of the bordered image every one comes from."""
    return (torch.arange(1, length + 1, device=shift.device) + shift.view(-1, 1)).clamp(0, length + 1)


def _cutout(images: Tensor, values: dict[str, Tensor], settings: AugmentationSettings) -> Tensor:
    height, width = images.shape[2:]
    rows = _covered(height, values["o_h"], settings.cutout_ratio)
    columns = _covered(width, values["o_w"], settings.cutout_ratio)
    return images.masked_fill((rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1), 0)


def _covered(length: int, centre: Tensor, ratio: float) -> Tensor:
    """`(batch, length)`: which rows or columns the hole reaches."""
    hole = _share(length, ratio)
    offset = torch.arange(length, device=centre.device) - (centre.view(-1, 1) - hole // 2)
    return (offset >= 0) & (offset < hole)


def _flip(images: Tensor, values: dict[str, Tensor], settings: AugmentationSettings) -> Tensor:
    return torch.where(_per_image(values["u"]) < _FLIP_PROBABILITY, images.flip(3), images)


def _scale(images: Tensor, values: dict[str, Tensor], settings: AugmentationSettings) -> Tensor:
    x, y = (values[name] * (_SCALE - 1 / _SCALE) + 1 / _SCALE for name in ("u_x", "u_y"))
    return _resample(images, x, torch.zeros_like(x), torch.zeros_like(y), y)


def _rotate(images: Tensor, values: dict[str, Tensor], settings: AugmentationSettings) -> Tensor:
    angle = (values["u"] - 0.5) * 2 * math.radians(_DEGREES)
    return _resample(images, angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def _resample(images: Tensor, xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor) -> Tensor:
    """Reads every image at `(xx * x + xy * y, yx * x + yy * y)`, in coordinates of -1 to 1 from border to border."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    zero = torch.zeros_like(xx)
    matrix = torch.stack([xx, xy, zero, yx, yy, zero], dim=1).view(-1, 2, 3).to(images.dtype)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


_UNIFORM = {
    "color": ("u_brightness", "u_saturation", "u_contrast"),
    "flip": ("u",),
    "scale": ("u_x", "u_y"),
    "rotate": ("u",),
}
_APPLY: dict[str, Callable[[Tensor, dict[str, Tensor], AugmentationSettings], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
OPERATIONS = tuple(_APPLY)
