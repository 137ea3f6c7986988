"""Configuration of a synthetic data set that is trained like a model."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_convnet import check_classes
from .differentiable_augmentation import AugmentationSettings


try:
    from hf_effml.utils.model_kinds import read_config_dict
except ImportError:  # a saved folder, which brings its own kind, where the package is not installed

    def read_config_dict(read: Any, wanted: Any, *args: Any, **options: Any) -> Any:  # type: ignore[misc]
        """Reads a configuration as it is."""
        return read(*args, **options)


# Far above any set: what is larger is a slip, and would fill the memory before it failed.
_MOST_VALUES = 10**10


@strict
class DistilledDatasetConfig(PreTrainedConfig):
    r"""Configuration of [`DistilledDatasetModel`]: the shape of the synthetic set, and what it was made from and for.

    Args:
        images_per_class (`int`, *optional*, defaults to 1):
            Synthetic images of every class, "IPC" in the papers.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the images.
        image_size (`int` or `list[int]`, *optional*, defaults to 32):
            Height and width in pixels, or one number.
        initial_lr (`float`, *optional*, defaults to 0.01):
            Step size that students start with; it is learned.
        augmentation_strategy (`str`, *optional*, defaults to `"color_crop_cutout_flip_scale_rotate"`):
            How images are augmented whenever a student trains on them.
        augmentation_crop_ratio (`float`, *optional*, defaults to 0.125):
            Largest shift, as a share of the size.
        augmentation_cutout_ratio (`float`, *optional*, defaults to 0.5):
            Side of the hole, as a share of the size.
        student (`dict`, *optional*):
            Configuration of the network that the set is distilled for.
        dataset (`dict`, *optional*):
            The real data: name, Hub id, revision and fingerprint.
        preprocessing (`str`, *optional*):
            Fingerprint of the image processor that made pixels of the real images; the synthetic ones are in its
            space.
        method (`str`, *optional*):
            `"pad"`, `"edf"` or `"tm"`, plain trajectory matching.

    Raises:
        StrictDataclassError: If a field has the wrong type or an impossible value; the message names both.

    Example:

    ```python
    >>> from hf_effml import DistilledDatasetConfig

    >>> config = DistilledDatasetConfig(images_per_class=2, image_size=8, id2label={0: "cat", 1: "dog"})
    >>> config.num_images, config.height_and_width
    (4, (8, 8))
    ```
    """

    model_type = "distilled_dataset"

    images_per_class: int = 1
    num_channels: int = 3
    image_size: int | list[int] | tuple[int, ...] = 32
    initial_lr: float | int = 0.01
    augmentation_strategy: str = "color_crop_cutout_flip_scale_rotate"
    augmentation_crop_ratio: float | int = 0.125
    augmentation_cutout_ratio: float | int = 0.5
    student: dict | None = None
    dataset: dict | None = None
    preprocessing: str | None = None
    method: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_classes(self.id2label, kwargs.get("num_labels"))
        if isinstance(self.image_size, tuple):
            self.image_size = list(self.image_size)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a saved configuration; that of another kind of model is refused."""
        return read_config_dict(super().get_config_dict, cls.model_type, *args, **kwargs)

    def validate_shape(self) -> None:
        """Check ranges; called by `strict` on construction, and where a model is made."""
        for name in ("images_per_class", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {getattr(self, name)}.")
        size = [self.image_size] * 2 if isinstance(self.image_size, int) else list(self.image_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"`image_size` must be one positive number, or height and width; got {self.image_size}.")
        if self.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"Distillation is of images of one class each; got `problem_type={self.problem_type!r}`. Leave it out."
            )
        values = self.num_images * (self.num_channels * math.prod(size) + self.num_labels)
        if values > _MOST_VALUES:
            raise ValueError(
                f"`images_per_class` {self.images_per_class}, {self.num_labels} classes, `num_channels` "
                f"{self.num_channels} and `image_size` {self.image_size} make {values:.2g} values, of at most "
                f"{_MOST_VALUES:.0e}. Make them smaller."
            )
        if not 0 < self.initial_lr < math.inf:
            raise ValueError(f"`initial_lr` must be finite and positive; got {self.initial_lr}.")
        # Says what is wrong by itself.
        _ = self.augmentation

    @property
    def num_images(self) -> int:
        """Number of synthetic images."""
        return self.images_per_class * self.num_labels

    @property
    def height_and_width(self) -> tuple[int, int]:
        """Both sides of the images."""
        height, width = [self.image_size] * 2 if isinstance(self.image_size, int) else self.image_size
        return height, width

    @property
    def augmentation(self) -> AugmentationSettings:
        """How images are augmented."""
        return AugmentationSettings(
            self.augmentation_strategy, self.augmentation_crop_ratio, self.augmentation_cutout_ratio
        )


__all__ = ["DistilledDatasetConfig"]
