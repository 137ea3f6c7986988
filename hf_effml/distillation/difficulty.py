"""How hard images are by what classifiers early in training make of them, and orders from easy to hard."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from .differentiable_augmentation import AugmentationSettings, augment, draw_augmentation
from .flat_student import build_student, logits_of, seed_from


if TYPE_CHECKING:
    from .real_images import RealImages


__all__ = [
    "DifficultyMethod",
    "check_order",
    "difficulty_from_logits",
    "easy_to_hard",
    "order_from_table",
    "read_order_file",
    "score_difficulty",
]

DifficultyMethod = Literal["el2n", "grand", "loss", "entropy", "least_confidence", "margin"]


def difficulty_from_logits(
    logits: Tensor, labels: Tensor, method: DifficultyMethod = "el2n", features: Tensor | None = None
) -> Tensor:
    """Says how hard images are by what classifiers early in training make of them: the larger, the harder.

    Args:
        logits (`Tensor` of shape `(runs, images, classes)`):
            Class scores of several classifiers; the difficulty is the mean over them.
        labels (`Tensor` of shape `(images,)`):
            True classes.
        method (`str`, *optional*, defaults to `"el2n"`):
            `"el2n"` is the distance of the probabilities from the true class
            (https://huggingface.co/papers/2107.07075), `"grand"` the norm of the loss's gradient, `"loss"`
            cross-entropy, `"entropy"` that of the probabilities, `"least_confidence"` 1 minus the largest of them,
            `"margin"` 1 minus the difference of the largest two.
        features (`Tensor` of shape `(runs, images, features)`, *optional*):
            What went into the last linear layer. With them `"grand"` is the gradient by that layer's weights and
            bias, without them by its output, which equals `"el2n"`.

    Returns:
        `Tensor` of shape `(images,)`: the difficulty, float32.

    Raises:
        ValueError: If the method is unknown, shapes do not fit, or a label is not among the classes.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.distillation.difficulty import difficulty_from_logits

    >>> logits = torch.tensor([[[4.0, 0.0], [0.0, 4.0]]])
    >>> difficulty_from_logits(logits, torch.tensor([0, 0]))
    tensor([0.0254, 1.3888])

    ```
    """
    _check_method(method)
    if logits.ndim != 3 or labels.shape != logits.shape[1:2]:
        raise ValueError(
            "`logits` must be (runs, images, classes) and `labels` (images,); "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    classes = logits.shape[2]
    if labels.numel() and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"`labels` must be 0 to {classes - 1}, as `logits` has {classes} classes; "
            f"got {labels.min().item()} to {labels.max().item()}."
        )
    if features is not None and (features.ndim != 3 or features.shape[:2] != logits.shape[:2]):
        raise ValueError(
            f"`features` must be (runs, images, features) like `logits`, {tuple(logits.shape)}; "
            f"got {tuple(features.shape)}."
        )
    return _difficulty(logits.float(), labels, method, features).mean(dim=0)


def _difficulty(logits: Tensor, labels: Tensor, method: DifficultyMethod, features: Tensor | None) -> Tensor:
    if method == "loss":
        return F.cross_entropy(logits.transpose(1, 2), labels.expand(len(logits), -1), reduction="none")
    probabilities = logits.softmax(dim=-1)
    if method == "entropy":
        return torch.special.entr(probabilities).sum(dim=-1)
    if method == "least_confidence":
        return 1 - probabilities.amax(dim=-1)
    if method == "margin":
        first, second = probabilities.topk(2, dim=-1).values.unbind(dim=-1)
        return 1 - (first - second)
    error = (probabilities - F.one_hot(labels, logits.shape[2])).norm(dim=-1)
    if method == "el2n" or features is None:
        return error
    # The gradient by the weights is the outer product of the error and the features; the bias is a feature of 1.
    return error * (features.float().square().sum(dim=-1) + 1).sqrt()


def _check_method(method: str) -> None:
    if method not in get_args(DifficultyMethod):
        raise ValueError(f"`method` must be one of {', '.join(get_args(DifficultyMethod))}; got {method!r}.")


def score_difficulty(
    images: "RealImages",
    student_config: PreTrainedConfig | Mapping[str, Any],
    method: DifficultyMethod = "el2n",
    n_runs: int = 10,
    epoch: int = 10,
    seed: int = 0,
    *,
    learning_rate: float = 0.01,
    batch_size: int = 256,
    augmentation: AugmentationSettings | None = None,
    device: torch.device | str | None = None,
    disable_tqdm: bool = False,
) -> Tensor:
    """Trains several classifiers for a few epochs, like experts but by plain SGD, and says how hard images are.

    All that is random depends on the seed alone, and the global random state stays as it was.

    Args:
        images ([`RealImages`]):
            Preprocessed training images with labels.
        student_config (`PreTrainedConfig` or `Mapping`):
            The classifier to train.
        method (`str`, *optional*, defaults to `"el2n"`):
            See [`difficulty_from_logits`]; `"grand"` is the gradient by the last linear layer.
        n_runs (`int`, *optional*, defaults to 10):
            Number of classifiers; more give steadier scores.
        epoch (`int`, *optional*, defaults to 10):
            Epochs of training before scoring. Few steps tell little: on a small set raise this or `learning_rate`, or
            lower `batch_size`, until the scores spread.
        seed (`int`, *optional*, defaults to 0):
            Seed of weights, batches, augmentation and dropout.
        learning_rate (`float`, *optional*, defaults to 0.01):
            Learning rate.
        batch_size (`int`, *optional*, defaults to 256):
            Images of a step.
        augmentation ([`AugmentationSettings`], *optional*):
            Augmentation of training, that of experts if unset. Images are scored without any.
        device (`torch.device` or `str`, *optional*):
            Where to train; where the images are if unset.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Show no progress bar.

    Returns:
        `Tensor` of shape `(images,)`: the difficulty, float32, on the CPU. [`easy_to_hard`] makes an order of it.

    Raises:
        ValueError: If an argument is out of range, the classifier has another number of classes, or training diverges.
    """
    _check_method(method)
    for name, value, least in (("n_runs", n_runs, 1), ("epoch", epoch, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}; got {value}.")
    images = images.to(images.images.device if device is None else device)
    total = torch.zeros(len(images.labels))
    with logging.tqdm(total=n_runs * epoch, desc="scoring difficulty", unit="epoch", disable=disable_tqdm) as bar:
        for run in range(n_runs):
            student = build_student(student_config, seed_from(seed, "difficulty student", run))
            if student.config.num_labels != images.num_labels:
                raise ValueError(
                    f"`student_config` must have {images.num_labels} classes like the images; "
                    f"it has {student.config.num_labels}. Set its `num_labels`."
                )
            student.to(images.images.device)
            run_seed = seed_from(seed, "difficulty training", run)
            _train(student, images, epoch, learning_rate, batch_size, augmentation, run_seed, bar)
            total += _score(student, images, method, batch_size).cpu()
    if not total.isfinite().all():
        raise ValueError(f"Training diverged with `learning_rate` {learning_rate}: scores are not finite. Lower it.")
    return total / n_runs


def _train(
    student: nn.Module,
    images: "RealImages",
    epochs: int,
    learning_rate: float,
    batch_size: int,
    augmentation: AugmentationSettings | None,
    seed: int,
    bar: Any,
) -> None:
    pixels, labels = images.images, images.labels
    settings = augmentation or AugmentationSettings()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(student.train().parameters(), lr=learning_rate)
    # Dropout, if the classifier has any, draws from the global state.
    with torch.random.fork_rng(devices=[pixels.device] if pixels.is_cuda else []):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for batch in torch.randperm(len(labels), generator=generator).split(batch_size):
                draw = draw_augmentation(settings, len(batch), pixels.shape[2:], generator, pixels.device)
                batch = batch.to(pixels.device)
                loss = F.cross_entropy(logits_of(student(augment(pixels[batch], draw, settings))), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            bar.update()


@torch.no_grad()
def _score(student: nn.Module, images: "RealImages", method: DifficultyMethod, batch_size: int) -> Tensor:
    student.eval()
    scores = []
    for pixels, labels in zip(images.images.split(batch_size), images.labels.split(batch_size), strict=True):
        if method == "grand":
            logits, features = _logits_and_features(student, pixels)
        else:
            logits, features = logits_of(student(pixels)), None
        scores.append(
            difficulty_from_logits(logits[None], labels, method, None if features is None else features[None])
        )
    return torch.cat(scores)


def _logits_and_features(student: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Class scores and what went into the last linear layer, which must have made them."""
    layers = [layer for layer in student.modules() if isinstance(layer, nn.Linear)]
    calls: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _, given, result: calls.append((given[0], result))) for layer in layers
    ]
    try:
        logits = logits_of(student(pixels))
    finally:
        for hook in hooks:
            hook.remove()
    features, result = calls[-1] if calls else (pixels, pixels)
    if result.shape != logits.shape or not torch.allclose(result, logits, rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            f"`grand` needs a classifier whose last layer is linear; {type(student).__name__} has none. Use `el2n`."
        )
    return logits, features


def easy_to_hard(scores: Tensor, labels: Tensor, num_labels: int | None = None) -> list[Tensor]:
    """Sorts the images of every class by difficulty; equally hard ones stay in their order.

    Args:
        scores (`Tensor` of shape `(images,)`):
            Difficulty, larger is harder.
        labels (`Tensor` of shape `(images,)`):
            Classes.
        num_labels (`int`, *optional*):
            Number of classes; the largest label says if unset.

    Returns:
        `list[Tensor]`: for each class the positions of its images, the easiest first.

    Raises:
        ValueError: If shapes differ, a score is not finite, or a class has no image.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.distillation.difficulty import easy_to_hard

    >>> easy_to_hard(torch.tensor([0.3, 0.9, 0.1, 0.2]), torch.tensor([0, 1, 1, 0]))
    [tensor([3, 0]), tensor([2, 1])]

    ```
    """
    scores, labels = scores.cpu(), labels.cpu()
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"`scores` and `labels` must be (images,); got {tuple(scores.shape)} and {tuple(labels.shape)}."
        )
    if not scores.isfinite().all():
        raise ValueError(f"`scores` must be finite; {int((~scores.isfinite()).sum())} of {len(scores)} are not.")
    ranking = scores.argsort(stable=True)
    classes = int(labels.max()) + 1 if num_labels is None else num_labels
    rows = [ranking[labels[ranking] == label] for label in range(classes)]
    return check_order(rows, labels)


def check_order(order: Sequence[Tensor], labels: Tensor | None = None) -> list[Tensor]:
    """Makes sure that an order lists every training image once, and under its class.

    Args:
        order (`Sequence[Tensor]`):
            For each class the positions of its images.
        labels (`Tensor` of shape `(images,)`, *optional*):
            Classes of the training images, if they shall be compared.

    Returns:
        `list[Tensor]`: the order, int64.

    Raises:
        ValueError: If a class is missing, or the positions are not each of 0 to n - 1 once, or labels disagree.
    """
    rows = [torch.as_tensor(row).long().cpu() for row in order]
    missing = [label for label, row in enumerate(rows) if not len(row)]
    if missing or not rows:
        raise ValueError(f"`order` must have images of every class; class {missing[0] if missing else 0} has none.")
    listed = torch.cat(rows)
    images = len(listed) if labels is None else len(labels)
    if not torch.equal(listed.sort().values, torch.arange(images)):
        absent = (~torch.isin(torch.arange(images), listed)).nonzero()
        detail = f"{int(absent[0])} is missing" if len(absent) else "some are no training image or listed twice"
        raise ValueError(
            f"`order` must list each of the {images} training images, 0 to {images - 1}, once; "
            f"it lists {len(listed)}, and {detail}. Was it made for another data set or split?"
        )
    if labels is not None:
        claimed = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row) for row in rows]))
        wrong = (labels.cpu()[listed] != claimed).nonzero()
        if len(wrong):
            image = int(listed[wrong[0]])
            raise ValueError(
                f"`order` lists image {image} under class {int(claimed[wrong[0]])}, but its label is "
                f"{int(labels[image])}. Index files fit one order of a data set only: score the difficulty anew."
            )
    return rows


def order_from_table(table: Tensor, labels: Tensor | None = None) -> list[Tensor]:
    """Makes an order of a table as the authors publish it: a row for each class, the easiest image first.

    Args:
        table (`Tensor` of shape `(classes, images per class)` or `(images,)`):
            Positions of images. Without rows for the classes, the labels are needed to tell them apart.
        labels (`Tensor` of shape `(images,)`, *optional*):
            Classes of the training images; compared with the table. Positions in another copy of the same data set
            mean other images, which only labels can reveal.

    Returns:
        `list[Tensor]`: for each class the positions of its images, the easiest first.

    Raises:
        ValueError: If the table is no table of whole numbers, or see [`check_order`].
    """
    if table.ndim not in (1, 2) or table.is_floating_point() or table.dtype == torch.bool:
        raise ValueError(
            "An index table must be int64 of shape (classes, images per class) or (images,); "
            f"got {table.dtype} of shape {tuple(table.shape)}."
        )
    if table.ndim == 2:
        return check_order(list(table), labels)
    if labels is None:
        raise ValueError("An index table of shape (images,) has no classes: pass `labels`.")
    table, labels = table.long().cpu(), labels.cpu()
    check_order([table], torch.zeros_like(labels))
    return check_order([table[labels[table] == label] for label in range(int(labels.max()) + 1)], labels)


def read_order_file(path: str | Path, labels: Tensor | None = None) -> list[Tensor]:
    """Reads an index file as the authors publish it, saved by NumPy or PyTorch, and checks it.

    Args:
        path (`str` or `Path`):
            The file, of any name. No code in it is run.
        labels (`Tensor` of shape `(images,)`, *optional*):
            See [`order_from_table`].

    Returns:
        `list[Tensor]`: for each class the positions of its images, the easiest first.

    Raises:
        ValueError: If the file holds anything else, or see [`check_order`].
    """
    path = Path(path)
    with path.open("rb") as file:
        by_numpy = file.read(6) == b"\x93NUMPY"
    try:
        table: Any = (
            np.load(path, allow_pickle=False) if by_numpy else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (pickle.UnpicklingError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"`{path}` is no index table of NumPy or PyTorch, holds more than numbers, or is damaged: {reason}. It "
            "was not opened. Save the table alone, with `np.save` or `torch.save`."
        ) from error
    if isinstance(table, np.ndarray) and table.dtype.kind in "iuf":
        table = torch.from_numpy(table.astype(np.float64 if table.dtype.kind == "f" else np.int64))
    if not isinstance(table, Tensor):
        kind = f"array of {table.dtype}" if isinstance(table, np.ndarray) else type(table).__name__
        raise ValueError(f"{path} must hold one index table; it holds a {kind}.")
    return order_from_table(table, labels)
