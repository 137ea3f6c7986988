"""A synthetic data set as a model: its images, soft labels and step size are the parameters."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_distilled_dataset import DistilledDatasetConfig
from .matching import MatchingSettings, match_segments
from .unroll import StudentDerivatives


try:
    from hf_effml.utils.model_kinds import NamesWhatFails
except ImportError:  # a saved folder where the package is not installed

    class NamesWhatFails:  # type: ignore[no-redef]
        """Adds nothing."""


@dataclass
class TrajectoryMatchingOutput(ModelOutput):
    """What [`DistilledDatasetModel`] returns.

    Args:
        loss (`Tensor`):
            Mean matching loss of the segments, differentiable.
        losses (`Tensor` of shape `(segments,)`):
            The loss of every segment.
        took_part (`Tensor` of shape `(segments,)`):
            Whether a segment was within the threshold and has a gradient.
    """

    loss: Tensor | None = None
    losses: Tensor | None = None
    took_part: Tensor | None = None


class DistilledDatasetModel(NamesWhatFails, PreTrainedModel):
    r"""A synthetic data set, trained by trajectory matching (https://huggingface.co/papers/2203.11932).

    A student that trains on it is to go where experts went that trained on the real images.

    `images` has the shape `(images, channels, height, width)`, in the space of the image processor that the experts
    saw; `labels` the shape `(images, classes)`, as logits; `lr` is the step size. Images are sorted by class.

    Args:
        config ([`DistilledDatasetConfig`]):
            The configuration.

    Example:

    ```python
    >>> from hf_effml import DistilledDatasetConfig, DistilledDatasetModel

    >>> model = DistilledDatasetModel(DistilledDatasetConfig(images_per_class=2, image_size=8))
    >>> model.images.shape, model.labels.shape, model.class_ids.tolist()
    (torch.Size([4, 3, 8, 8]), torch.Size([4, 2]), [0, 0, 1, 1])
    ```
    """

    config_class = DistilledDatasetConfig
    base_model_prefix = "distilled_dataset"
    main_input_name = "starts"
    accepts_loss_kwargs = False

    def __init__(self, config: DistilledDatasetConfig):
        # Fields may have been assigned since it was made, as `from_pretrained` does.
        config.validate()
        super().__init__(config)
        self.images = nn.Parameter(torch.empty(config.num_images, config.num_channels, *config.height_and_width))
        self.labels = nn.Parameter(torch.empty(config.num_images, config.num_labels))
        self.lr = nn.Parameter(torch.empty(()))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Noise, one-hot labels as logits, and the initial step size."""
        super()._init_weights(module)
        if module is self:
            init.normal_(self.images)
            one_hot = torch.zeros_like(self.labels)
            if not one_hot.is_meta:
                one_hot[torch.arange(len(one_hot)), self.class_ids.to(one_hot.device)] = 10.0
            init.copy_(self.labels, one_hot)
            init.constant_(self.lr, float(self.config.initial_lr))

    @property
    def class_ids(self) -> Tensor:
        """The class of every image, as integers of shape `(images,)`."""
        classes = torch.arange(self.config.num_labels, device=self.labels.device)
        return classes.repeat_interleave(self.config.images_per_class)

    def set_content(self, images: Tensor, labels: Tensor, lr: float | Tensor | None = None) -> "DistilledDatasetModel":
        """Writes images, soft labels and step size into the model.

        Args:
            images (`Tensor` of shape `(images, channels, height, width)`):
                Preprocessed images, sorted by class.
            labels (`Tensor` of shape `(images, classes)`):
                Soft labels as logits.
            lr (`float` or `Tensor`, *optional*):
                Step size. It stays what it is if unset.

        Returns:
            [`DistilledDatasetModel`]: itself.

        Raises:
            ValueError: If a shape does not fit or a value is not finite.
        """
        for name, value, parameter in (("images", images, self.images), ("labels", labels, self.labels)):
            if value.shape != parameter.shape:
                raise ValueError(
                    f"`{name}` must have the shape {tuple(parameter.shape)}, which the configuration says; got "
                    f"{tuple(value.shape)}."
                )
            if not value.isfinite().all():
                raise ValueError(f"`{name}` must be finite; {(~value.isfinite()).sum()} values are not.")
        with torch.no_grad():
            self.images.copy_(images)
            self.labels.copy_(labels)
            if lr is not None:
                self.lr.fill_(float(lr))
        return self

    def forward(
        self,
        starts: Tensor,
        targets: Tensor,
        seeds: list[int],
        derivatives: StudentDerivatives,
        settings: MatchingSettings,
        **kwargs: Any,
    ) -> TrajectoryMatchingOutput:
        r"""Matches segments of experts' trajectories.

        Args:
            starts (`Tensor` of shape `(segments, parameters)`):
                The experts at the beginning of their segments.
            targets (`Tensor` of shape `(segments, parameters)`):
                The experts at the end.
            seeds (`list[int]`):
                One per segment, of its batches and augmentations.
            derivatives (`StudentDerivatives`):
                Derivatives of the student.
            settings (`MatchingSettings`):
                How to match.

        Returns:
            [`TrajectoryMatchingOutput`]
        """
        loss, losses, took_part = match_segments(
            derivatives, self.images, self.labels, self.lr, starts, targets, seeds, settings
        )
        return TrajectoryMatchingOutput(loss=loss, losses=losses, took_part=took_part)


__all__ = ["DistilledDatasetModel", "TrajectoryMatchingOutput"]
