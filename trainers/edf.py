"""EDF: gradients weighted towards what tells classes apart, and a loss without the parameters that fit already."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging

from hf_effml.distillation.class_activation import class_activation_map
from hf_effml.distillation.edf import area_weights, constant_maps, for_map_network, map_class_ids
from hf_effml.distillation.feature_layers import demanded_size, on_device
from hf_effml.distillation.flat_student import seed_from
from hf_effml.utils.files import write_safetensors
from hf_effml.utils.sources.class_labels import are_names, known_classes, match_classes

from .trajectory_matching import TrajectoryMatchingTrainer
from .trajectory_matching_arguments import TrajectoryMatchingTrainingArguments


logger = logging.get_logger(__name__)

_MAPS_NAME = "activation_maps.safetensors"
# By images per class, up to and including; above the last the last holds. From the authors' settings.
_DROP_RATIOS = ((1, 0.0), (10, 0.25), (50, 0.375))


@dataclass
class EDFTrainingArguments(TrajectoryMatchingTrainingArguments):
    """How to distil with EDF; what is not said here is as in [`TrajectoryMatchingTrainingArguments`].

    Args:
        mask (`"none"`, `"depth"` or `"loss"`, *optional*, defaults to `"loss"`):
            Which parameters the loss leaves out. With `drop_ratio` 0 it makes no difference.
        drop_ratio (`float`, *optional*):
            Share of the parameters that the loss leaves out. Unset, it follows the images per class as in the authors'
            settings: 0 for 1, 0.25 for up to 10, 0.375 for more.
        loss_threshold (`float`, *optional*, defaults to 1.5):
            Segments with a larger loss contribute nothing; larger than 1, because what is left out are small errors.
        beta (`float`, *optional*, defaults to 1.0):
            What is added to a map where it is above its threshold, to weight the gradient of the pixels there.
        act_threshold (`float`, *optional*):
            That threshold, the same for all images; the mean of each map if unset.
        cam_interval (`int`, *optional*, defaults to 100):
            Steps from one computation of the maps to the next.
        cam_method (`"gradcam"`, `"hirescam"` or `"smoothgradcampp"`, *optional*):
            How maps are made. The paper says Grad-CAM, the authors' code uses Smooth Grad-CAM++ with noise. Unset,
            it is Grad-CAM for a `cam_model` of your own, and HiResCAM for an expert of the bank, in whose flattened
            maps Grad-CAM may miss the object.
        cam_layer (`str`, *optional*):
            Name of the module whose output is explained; the last stage with a feature map if unset.
        cam_batch_size (`int`, *optional*, defaults to 64):
            Images at a time.
        cam_class (`"label"` or `"legacy"`, *optional*, defaults to `"label"`):
            Which score of the network is explained: that of the image's class, or, as in the authors' code, that of
            the network's class with the same number, whatever it means.
    """

    rarely_changed = (
        *TrajectoryMatchingTrainingArguments.rarely_changed,
        "act_threshold",
        "cam_method",
        "cam_layer",
        "cam_batch_size",
        "cam_class",
    )

    mask: str = field(default="loss", metadata={"help": "Parameters to leave out: loss, depth or none."})
    drop_ratio: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Share of the parameters to leave out; by images per class if unset."}
    )
    loss_threshold: float = field(default=1.5, metadata={"help": "Segments with a larger loss contribute nothing."})
    beta: float = field(default=1.0, metadata={"help": "Added to a map above its threshold, as weight of pixels."})
    act_threshold: float | None = field(default=None, metadata={"help": "Threshold; the mean of each map if unset."})
    cam_interval: int = field(default=100, metadata={"help": "Steps from one set of maps to the next."})
    cam_method: str | None = field(
        default=None, metadata={"help": "gradcam, hirescam, or smoothgradcampp as in their code."}
    )
    cam_layer: str | None = field(default=None, metadata={"help": "Module whose output is explained."})
    cam_batch_size: int = field(default=64, metadata={"help": "Images at a time."})
    cam_class: str = field(default="label", metadata={"help": "label, or legacy: classes of equal number."})

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise ValueError(f"`beta` must be at least 0; got {self.beta}. The papers use 1 and 2.")
        if self.act_threshold is not None and not 0 < self.act_threshold <= 1:
            raise ValueError(
                f"`act_threshold` must be above 0 and at most 1; got {self.act_threshold}. Leave it out for the mean "
                "of each map, for which the authors' settings write 0."
            )
        if self.cam_interval < 1 or self.cam_batch_size < 1:
            raise ValueError(
                f"`cam_interval` and `cam_batch_size` must be at least 1; got {self.cam_interval} and "
                f"{self.cam_batch_size}."
            )
        methods = (None, "gradcam", "hirescam", "smoothgradcampp")
        for name, allowed in (("cam_method", methods), ("cam_class", ("label", "legacy"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(filter(None, allowed))}; got {getattr(self, name)!r}."
                )
        super().__post_init__()


def _usual_drop_ratio(images_per_class: int) -> float:
    return next((ratio for most, ratio in _DROP_RATIOS if images_per_class <= most), _DROP_RATIOS[-1][1])


def _matching_classes(cam_model: nn.Module, config: Any, cam_class: str) -> list[int]:
    """The number of every class of the set among those of the classifier."""
    theirs = getattr(cam_model, "config", cam_model)
    known = getattr(theirs, "num_labels", config.num_labels)
    names = known_classes(theirs) if hasattr(theirs, "id2label") else []
    if cam_class != "label" or not names or not (are_names(names) and are_names(known_classes(config))):
        if cam_class == "label" and known != config.num_labels:
            raise ValueError(
                f"`cam_model` tells {known} classes apart, the synthetic set has {config.num_labels}. Say by "
                '`cam_label_map` which of its classes belongs to each, or choose `cam_class="legacy"` for those of '
                "equal number."
            )
        return list(range(config.num_labels))
    try:
        return match_classes("the synthetic set", known_classes(config), theirs)
    except ValueError as error:
        raise ValueError(f"{error} Or say by `cam_label_map` which class of `cam_model` belongs to each.") from error


class EDFTrainer(TrajectoryMatchingTrainer):
    """Distils a data set with EDF (https://huggingface.co/papers/2410.17193).

    EDF does two things to trajectory matching. Common pattern dropout leaves out of the loss what the student matches
    best already. Discriminative area enhancement multiplies the gradient of a pixel by a class activation map of its
    image, where that is high.

    Args:
        model ([`DistilledDatasetModel`]):
            The synthetic set.
        args ([`EDFTrainingArguments`]):
            How to train.
        bank ([`TrajectoryBank`]):
            The experts.
        cam_model (`nn.Module`, *optional*):
            The classifier that maps are made with. Defaults to the bank's first expert after its last epoch.
        cam_processor (`Any`, *optional*):
            Image processor of `cam_model`. Defaults to that of the synthetic images.
        cam_label_map (`Mapping[int, int]`, *optional*):
            The class of `cam_model` for each class of the set. Defaults to the one of the same name, and where either
            names none to the same number.
        kwargs (`dict`, *optional*):
            Further arguments of [`TrajectoryMatchingTrainer`].

    Raises:
        ValueError: If the map of classes is not complete, or missing where the numbers of classes differ.

    Example:

    ```python
    >>> args = EDFTrainingArguments("edf-imagenette", max_start_epoch=20, beta=1.0)  # doctest: +SKIP
    >>> EDFTrainer(distilled_from_real(data, bank, 10), args, bank=bank).train()  # doctest: +SKIP
    ```
    """

    _name = "EDF"
    _paper = "2410.17193"
    _method = "edf"

    def __init__(
        self,
        model: Any,
        args: EDFTrainingArguments,
        *,
        bank: Any,
        cam_model: nn.Module | None = None,
        cam_processor: Any = None,
        cam_label_map: Mapping[int, int] | None = None,
        **kwargs: Any,
    ):
        # The caller's arguments may serve for another set.
        args = copy.copy(args)
        if args.drop_ratio is None:
            args.drop_ratio = 0.0 if args.mask == "none" else _usual_drop_ratio(model.config.images_per_class)
        if args.cam_method is None:
            args.cam_method = "hirescam" if cam_model is None else "gradcam"
        super().__init__(model, args, bank=bank, **kwargs)
        self.cam_model = on_device(cam_model if cam_model is not None else bank.network(0), args.device)
        self._cam_processor, self._cam_size = cam_processor, None
        if cam_processor is not None:
            self._cam_size = demanded_size(self.cam_model, model.config.height_and_width)
        elif cam_model is not None:
            logger.warning(
                "`cam_model` sees the synthetic images as they were preprocessed for the students. If it was trained "
                "on other ones, pass its image processor as `cam_processor`."
            )
        if args.cam_class == "legacy" or cam_label_map is None:
            cam_label_map = dict(enumerate(_matching_classes(self.cam_model, model.config, args.cam_class)))
        # Complains at once if a class is missing.
        map_class_ids(torch.arange(model.config.num_labels), cam_label_map)
        self._cam_label_map = cam_label_map
        self.maps: Tensor | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains the synthetic set, with the maps of the checkpoint that training goes on from.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                As for [`TrajectoryMatchingTrainer`].
            kwargs (`dict`, *optional*):
                Likewise.

        Returns:
            `TrainOutput`: steps, loss and timings.
        """
        checkpoint = self.find_checkpoint(resume_from_checkpoint)
        self.maps = None
        if checkpoint is not None and Path(checkpoint, _MAPS_NAME).exists():
            self.maps = load_file(Path(checkpoint, _MAPS_NAME))["maps"].to(self.args.device)
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the synthetic set and, into checkpoints, the maps: those of an earlier step are still in use.

        Args:
            output_dir (`str`, *optional*):
                Folder to write. Defaults to `args.output_dir`.
        """
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.maps is not None and self.args.should_save and output_dir is not None:
            write_safetensors(Path(output_dir) / _MAPS_NAME, {"maps": self.maps})

    def before_step(self) -> None:
        """Makes new maps when it is time."""
        if self.maps is None or self.state.global_step % self.args.cam_interval == 0:
            self.maps = self.compute_maps()

    def compute_maps(self) -> Tensor:
        """Makes the activation maps of the synthetic images as they are now.

        Returns:
            `Tensor` of shape `(images, height, width)`: values from 0 to 1.
        """
        own = self.accelerator.unwrap_model(self.model)
        pixels = own.images.detach()
        if self._cam_processor is not None:
            pixels = for_map_network(pixels, self.processing_class, self._cam_processor, self._cam_size)
        seed = seed_from(self.args.seed, "maps", self.state.global_step)
        maps = class_activation_map(
            self.cam_model,
            pixels,
            map_class_ids(own.labels.detach().argmax(1), self._cam_label_map),
            layer=self.args.cam_layer,
            method=self.args.cam_method,
            size=own.config.height_and_width,
            batch_size=self.args.cam_batch_size,
            generator=torch.Generator().manual_seed(seed),
        )
        if constant_maps(maps).any():
            logger.warning_once("Some activation maps are constant; the gradient of their images is not weighted.")
        return broadcast(maps)

    def before_update(self) -> None:
        """Weights the gradient of the pixels, before momentum sees it."""
        gradient = self.accelerator.unwrap_model(self.model).images.grad
        if gradient is not None and self.maps is not None:
            gradient.mul_(area_weights(self.maps, self.args.beta, self.args.act_threshold))
        super().before_update()
