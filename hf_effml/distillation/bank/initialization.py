"""What a synthetic set starts from: real images that experts understand, and what the experts say about them."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_effml.distillation.configuration_distilled_dataset import DistilledDatasetConfig
from hf_effml.distillation.flat_student import logits_of, seed_from, student_config
from hf_effml.distillation.modeling_distilled_dataset import DistilledDatasetModel


if TYPE_CHECKING:
    from hf_effml.distillation.real_images import RealImageData, RealImages

    from .trajectories import TrajectoryBank

__all__ = ["average_correct_logits", "distilled_from_real", "select_real_images", "soft_labels_from_experts"]

logger = logging.get_logger(__name__)

# Logits of the true class where no expert is right: 90 % of the weight on it among ten classes.
_SMOOTHED = 0.9


def average_correct_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Averages, for every image, what those experts say that classify it correctly (DATM, arXiv 2310.05773).

    Args:
        logits (`Tensor` of shape `(experts, images, classes)`):
            Scores of every expert.
        labels (`Tensor` of shape `(images,)`):
            The true classes.

    Returns:
        `tuple[Tensor, Tensor]`: soft labels as logits of shape `(images, classes)`, and for each image how many
        experts are right. Where none is, the label is the true class with a tenth of the weight spread over all.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.distillation.bank.initialization import average_correct_logits

    >>> logits = torch.tensor([[[2.0, 0.0]], [[4.0, 1.0]], [[0.0, 9.0]]])
    >>> average_correct_logits(logits, torch.tensor([0]))
    (tensor([[3.0000, 0.5000]]), tensor([2]))
    ```
    """
    right = logits.argmax(2) == labels
    counts = right.sum(0)
    mean = torch.where(right[:, :, None], logits, 0).sum(0) / counts.clamp(min=1)[:, None]
    classes = logits.shape[2]
    smoothed = torch.full_like(mean, (1 - _SMOOTHED) / classes)
    smoothed[torch.arange(len(labels)), labels] += _SMOOTHED
    return torch.where((counts > 0)[:, None], mean, smoothed.log()), counts


def soft_labels_from_experts(
    bank: "TrajectoryBank",
    images: Tensor,
    labels: Tensor,
    *,
    num_experts: int | None = None,
    only_correct: bool = True,
    batch_size: int = 512,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Labels images with what the experts of a bank say after their last epoch.

    Args:
        bank ([`~hf_effml.distillation.bank.trajectories.TrajectoryBank`]):
            The experts.
        images (`Tensor` of shape `(images, channels, height, width)`):
            Preprocessed as the experts were trained.
        labels (`Tensor` of shape `(images,)`):
            The true classes.
        num_experts (`int`, *optional*):
            How many experts to ask, the first ones of the bank. All of them if unset.
        only_correct (`bool`, *optional*, defaults to `True`):
            Whether only those experts count that classify an image correctly.
        batch_size (`int`, *optional*, defaults to 512):
            Images at a time.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where to compute.

    Returns:
        `Tensor` of shape `(images, classes)`: soft labels as logits.
    """
    logits = torch.stack(
        [
            _predict(bank.network(expert), images, batch_size, device)
            for expert in range(min(num_experts or len(bank), len(bank)))
        ]
    )
    if not only_correct:
        return logits.mean(0)
    soft_labels, counts = average_correct_logits(logits, labels.cpu())
    if not counts.all():
        logger.warning(
            f"No expert classifies {int((counts == 0).sum())} of {len(counts)} images correctly; their labels are the "
            "true class, smoothed."
        )
    return soft_labels


def select_real_images(
    real: "RealImages",
    images_per_class: int,
    *,
    method: Literal["correct", "real"] = "correct",
    bank: "TrajectoryBank | None" = None,
    seed: int = 0,
    batch_size: int = 512,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Chooses the real images that a synthetic set starts from.

    Args:
        real ([`~hf_effml.distillation.real_images.RealImages`]):
            The training images.
        images_per_class (`int`):
            How many of each class.
        method (`"correct"` or `"real"`, *optional*, defaults to `"correct"`):
            `"correct"` goes through a class in random order and keeps images that an expert classifies correctly
            after its last epoch; where one expert does not know enough of them, further ones are asked. `"real"`
            takes any images.
        bank ([`~hf_effml.distillation.bank.trajectories.TrajectoryBank`], *optional*):
            The experts, for `"correct"`.
        seed (`int`, *optional*, defaults to 0):
            Seed of the order.
        batch_size (`int`, *optional*, defaults to 512):
            Images at a time.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where to compute.

    Returns:
        `Tensor` of shape `(classes * images_per_class,)`: indices into `real`, sorted by class.

    Raises:
        ValueError: If a class has too few images, or `"correct"` has no experts.
    """
    if method not in ("correct", "real"):
        raise ValueError(f'`method` must be "correct" or "real"; got "{method}".')
    if method == "correct" and bank is None:
        raise ValueError('`method="correct"` needs the experts: pass `bank`, or choose "real".')
    generator = torch.Generator().manual_seed(seed_from(seed, "initial images"))
    orders = []
    for number, members in enumerate(real.per_class()):
        if len(members) < images_per_class:
            raise ValueError(
                f"Class `{real.label_names[number]}` has {len(members)} images, fewer than `images_per_class`, "
                f"{images_per_class}. Choose at most {min(len(each) for each in real.per_class())}."
            )
        orders.append(members.cpu()[torch.randperm(len(members), generator=generator)])
    if method == "real" or bank is None:
        return torch.cat([order[:images_per_class] for order in orders])
    return _correct_ones(real, orders, images_per_class, bank, batch_size, device)


def _correct_ones(
    real: "RealImages",
    orders: list[Tensor],
    images_per_class: int,
    bank: "TrajectoryBank",
    batch_size: int,
    device: str | torch.device,
) -> Tensor:
    """The first images of every order that some expert knows; one expert is asked after the other."""
    labels = real.labels.cpu()
    known = torch.zeros(len(labels), dtype=torch.bool)
    losses = torch.zeros(len(labels))
    chosen: dict[int, Tensor] = {}
    for expert in range(len(bank)):
        logits = _predict(bank.network(expert), real.images, batch_size, device)
        known |= logits.argmax(1) == labels
        losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        for number, order in enumerate(orders):
            correct = order[known[order]]
            if number not in chosen and len(correct) >= images_per_class:
                chosen[number] = correct[:images_per_class]
        if len(chosen) == len(orders):
            break
    short = [real.label_names[number] for number in range(len(orders)) if number not in chosen]
    if short:
        logger.warning(
            f"Experts classify fewer than {images_per_class} images correctly of the classes {', '.join(short)}; "
            "images of least loss fill up."
        )
    for number, order in enumerate(orders):
        if number not in chosen:
            # What is known comes first, then what is almost known.
            rank = losses[order] + (~known[order]) * (losses.max() + 1)
            chosen[number] = order[rank.argsort(stable=True)[:images_per_class]]
    return torch.cat([chosen[number] for number in range(len(orders))])


def distilled_from_real(
    data: "RealImageData",
    bank: "TrajectoryBank",
    images_per_class: int,
    *,
    method: Literal["correct", "real", "noise"] = "correct",
    seed: int = 0,
    device: str | torch.device = "cpu",
    allow_mismatch: bool = False,
    **config_fields: object,
) -> DistilledDatasetModel:
    """Makes a synthetic set to start from, as DATM, PAD and EDF do: real images with soft labels of the experts.

    Args:
        data ([`~hf_effml.distillation.real_images.RealImageData`]):
            The real images, preprocessed as the experts saw them. The set has the class numbers of the experts.
        bank ([`~hf_effml.distillation.bank.trajectories.TrajectoryBank`]):
            The experts.
        images_per_class (`int`):
            Synthetic images of every class.
        method (`"correct"`, `"real"` or `"noise"`, *optional*, defaults to `"correct"`):
            As in [`select_real_images`]. With `"real"` the labels are the scores of the first expert alone; with
            `"noise"` images are noise and labels one-hot.
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where to compute.
        allow_mismatch (`bool`, *optional*, defaults to `False`):
            Go on, with a warning, where the experts saw other pixels.
        config_fields (`dict`, *optional*):
            Further fields of [`~hf_effml.DistilledDatasetConfig`].

    Returns:
        [`~hf_effml.DistilledDatasetModel`]

    Raises:
        ValueError: If the experts saw other pixels or classes, or a class has too few images.
    """
    data = data if bank.label_names is None else data.aligned_to(bank.label_names)
    real = data.train
    bank.check_preprocessing(data.processor.fingerprint, allow_mismatch)
    channels, *size = real.images.shape[1:]
    config = DistilledDatasetConfig(
        images_per_class=images_per_class,
        num_channels=channels,
        image_size=size[0] if size[0] == size[1] else list(size),
        id2label=dict(enumerate(real.label_names)),
        label2id={name: number for number, name in enumerate(real.label_names)},
        student=student_config(bank.student_config).to_dict(),
        dataset={
            "name": data.name,
            "hub_id": data.hub_id,
            "revision": data.revision,
            "fingerprint": real.fingerprint,
            "arguments": data.arguments,
        },
        preprocessing=data.processor.fingerprint,
        **config_fields,
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed_from(seed, "noise"))
        model = DistilledDatasetModel(config)
    if method == "noise":
        return model
    chosen = select_real_images(real, images_per_class, method=method, bank=bank, seed=seed, device=device)
    images, labels = real.images[chosen].cpu(), real.labels[chosen].cpu()
    first_only = method == "real"
    soft_labels = soft_labels_from_experts(
        bank, images, labels, num_experts=1 if first_only else None, only_correct=not first_only, device=device
    )
    return model.set_content(images, soft_labels)


@torch.no_grad()
def _predict(network: nn.Module, images: Tensor, batch_size: int, device: str | torch.device) -> Tensor:
    """Scores of a network, on the CPU. Batch norm uses the statistics of the batch: banks hold no running ones."""
    network = torch.func.replace_all_batch_norm_modules_(network.eval()).to(device)
    parts = [logits_of(network(part.to(device))).float().cpu() for part in images.split(batch_size)]
    return torch.cat(parts)
