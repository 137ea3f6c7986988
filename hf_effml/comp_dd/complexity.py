"""How complex images are: the share of each that says nothing for its class, by class activation maps (Comp-DD)."""

import difflib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from hf_effml.distillation.class_activation import MapMethod, explain_images, resize
from hf_effml.distillation.edf import preprocess_pixels
from hf_effml.distillation.feature_layers import find_cam_layer, input_channels, own_size
from hf_effml.distillation.image_pixels import images_to_pixels
from hf_effml.distillation.publishing.pictures import image_grid, map_grid
from hf_effml.utils.plotting import plot_images
from hf_effml.utils.report import Column, Report
from hf_effml.utils.sources.class_labels import are_names, known_classes
from hf_effml.utils.sources.image_splits import column_of

from .subsets import imagenet_classes


__all__ = [
    "ComplexityScores",
    "MapNetwork",
    "class_complexity",
    "complexity_of_maps",
    "draw_complexity",
    "make_subsets",
    "score_complexity",
    "score_images",
    "subset_complexity",
    "translate_classes",
]

# Of ImageNet, as the authors normalise.
_USUAL = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_SYNSET = re.compile(r"\bn\d{8}\b")
_PERCENT: dict[str, Any] = {"format": ".1f", "scale": 100.0}


@dataclass(frozen=True)
class ComplexityScores:
    """What networks say about images.

    Args:
        complexity (`dict[float, np.ndarray]`):
            By threshold, scores of shape `(images, networks)`, float32, from 0 to 1.
        predicted (`np.ndarray` of shape `(images, networks)`):
            The class that each network names, as it numbers them.
        right (`list[np.ndarray | None]`):
            For each network, whether it names the label; `None` where not all labels could be translated.
        labels (`np.ndarray` of shape `(images,)`):
            The labels; -1 where there are none.
    """

    complexity: dict[float, np.ndarray]
    predicted: np.ndarray
    right: list[np.ndarray | None]
    labels: np.ndarray


class MapNetwork:
    """A classifier with all that its maps need: the layer, looked for once, and what its images look like.

    Args:
        model (`nn.Module`):
            Returns class scores or an object with `logits`.
        processor (image processor, *optional*):
            Its mean, standard deviation and size are used: images are squashed to the size, not cropped. Unset, timm's
            settings of the model, or else ImageNet's statistics.
        layer (`str`, *optional*):
            Name of the module whose map is looked at; found by [`find_cam_layer`] if unset.
        method (`str`, *optional*, defaults to `"gradcam"`):
            See [`class_activation_map`].

    Raises:
        TypeError: If the processor does not say how it normalises.
        ValueError: If there is no such layer, it has no map, or the processor is for other channels.
    """

    def __init__(
        self, model: nn.Module, processor: Any = None, layer: str | None = None, method: MapMethod = "gradcam"
    ):
        config = getattr(model, "pretrained_cfg", None)
        if processor is None:
            processor = SimpleNamespace(**({"data_config": config} if config else _USUAL))
        self.model, self.processor, self.method = model, processor, method
        self.size, self.channels = _input_size(processor, model), input_channels(model)
        probe = torch.rand(1, self.channels, *self.size, generator=torch.Generator().manual_seed(0))
        if preprocess_pixels(probe, processor).shape[1] != self.channels:
            raise ValueError(
                f"`processors` must be for images of {self.channels} channels as {type(model).__name__} is; pass the "
                "image processor of the network."
            )
        # Tried here, not after hours.
        self.layer = find_cam_layer(model, probe) if layer is None else layer
        explain_images(model, probe, None, self.layer, method)
        has_names = hasattr(getattr(model, "config", None), "id2label")
        names = known_classes(model.config) if has_names else list((config or {}).get("label_names") or [])
        self.class_names = names if are_names(names) else []

    def __call__(
        self, images: Sequence[Any], class_ids: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws the maps of pictures, `(images, h, w)`, and says which classes the network names, `(images,)`."""
        pixels = preprocess_pixels(self.pixels(images), self.processor)
        maps, scores = explain_images(
            self.model, pixels, class_ids, self.layer, self.method, len(pixels), generator=generator
        )
        return maps, scores.argmax(1)

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """Squashes pictures to the network's size, `(images, channels, height, width)`, in [0, 1]."""
        return torch.cat([images_to_pixels(image, self.channels, self.size, "squash") for image in images])


def complexity_of_maps(maps: Tensor, threshold: float = 0.5) -> Tensor:
    """Computes the share of each map that is below a threshold (Comp-DD, arXiv 2410.17193).

    Args:
        maps (`Tensor` of shape `(images, height, width)`):
            From [`class_activation_map`]; a constant map there is 0 everywhere and so as complex as can be.
        threshold (`float`, *optional*, defaults to 0.5):
            What counts as active: this and above.

    Returns:
        `Tensor` of shape `(images,)`: float32, from 0 to 1.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.comp_dd import complexity_of_maps

    >>> complexity_of_maps(torch.tensor([[[0.0, 0.2], [0.5, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]))
    tensor([0.5000, 1.0000])

    ```
    """
    return 1 - (maps >= threshold).float().mean(dim=(1, 2))


def score_images(
    dataset: Any,
    networks: Sequence[MapNetwork],
    class_names: Sequence[str] | None = None,
    target: Literal["prediction", "label"] = "prediction",
    thresholds: Sequence[float] = (0.5,),
    upsample: bool = False,
    batch_size: int = 64,
) -> ComplexityScores:
    """Scores pictures with several networks and thresholds, one forward pass each.

    Args:
        dataset:
            Anything with `len` whose `[i]` is `{"image": PIL image, "label": int}`; without labels nothing is right.
        networks (`Sequence[MapNetwork]`):
            The networks.
        class_names (`Sequence[str]`, *optional*):
            Synsets or names of the labels, by which those are found among the classes of a network.
        target (`str`, *optional*, defaults to `"prediction"`):
            Which class is explained: the one that the network names, or the `"label"`.
        thresholds (`Sequence[float]`, *optional*, defaults to `(0.5,)`):
            See [`complexity_of_maps`]; each in (0, 1).
        upsample (`bool`, *optional*, defaults to `False`):
            Whether to count pixels of the map enlarged to the network's image size instead of the map's own.
        batch_size (`int`, *optional*, defaults to 64):
            Images at a time.

    Returns:
        [`ComplexityScores`]

    Raises:
        ValueError: If an argument is impossible, or labels are to be explained and a network does not know one.
    """
    _check(dataset, target, thresholds, batch_size)
    translated = [translate_classes(class_names or [], network.class_names) for network in networks]
    if target == "label":
        _check_translated(class_names, translated, networks)
    scores = {limit: np.ones((len(dataset), len(networks)), np.float32) for limit in thresholds}
    predicted = np.zeros((len(dataset), len(networks)), np.int64)
    labels = np.full(len(dataset), -1)
    # The noise of Smooth Grad-CAM++ goes on from batch to batch.
    generators = [torch.Generator().manual_seed(0) for _ in networks]
    progress = logging.tqdm(total=len(dataset), desc="Scoring", unit="image", leave=False)
    for start in range(0, len(dataset), batch_size):
        part = slice(start, min(start + batch_size, len(dataset)))
        rows = [dataset[index] for index in range(part.start, part.stop)]
        labels[part] = [-1 if row.get("label") is None else row["label"] for row in rows]
        for number, network in enumerate(networks):
            ids = None if target == "prediction" else torch.tensor([translated[number][i] for i in labels[part]])
            maps, named = network([row["image"] for row in rows], ids, generators[number])
            if upsample:
                maps = resize(maps.unsqueeze(1), network.size).squeeze(1)
            for limit in thresholds:
                scores[limit][part, number] = complexity_of_maps(maps, limit).numpy()
            predicted[part, number] = named.numpy()
        progress.update(len(rows))
    progress.close()
    right = [
        None if not ids or None in ids or labels.min() < 0 else np.array(ids)[labels] == predicted[:, number]
        for number, ids in enumerate(translated)
    ]
    return ComplexityScores(scores, predicted, right, labels)


def score_complexity(
    dataset: Any,
    models: nn.Module | Sequence[nn.Module],
    processors: Any = None,
    *,
    target: Literal["prediction", "label"] = "prediction",
    threshold: float = 0.5,
    layer: str | None = None,
    method: MapMethod = "gradcam",
    upsample: bool = False,
    batch_size: int = 64,
) -> Any:
    """Adds to a data set how complex each image is: 1 - the share of its class activation map that is active.

    Images are squashed to the size of the network, as by the authors of Comp-DD (arXiv 2410.17193), who took
    Smooth Grad-CAM++ of a ResNet-18; here the default is Grad-CAM, which does not depend on noise.

    Args:
        dataset (`datasets.Dataset`):
            Rows with a picture, `image` or `img`, and, for `target="label"`, a ClassLabel, `label`. A column `synset`
            says best which classes these are.
        models (`nn.Module` or `Sequence[nn.Module]`):
            Image classifiers; the scores of several are averaged.
        processors (image processor or `Sequence` of them, *optional*):
            One for each, see [`MapNetwork`].
        target, threshold, upsample, batch_size (*optional*):
            As for [`score_images`].
        layer, method (*optional*):
            As for [`MapNetwork`].

    Returns:
        `datasets.Dataset`: with a column `complexity`, float32.

    Raises:
        ValueError: As [`score_images`] and [`MapNetwork`].

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from transformers import AutoImageProcessor, AutoModelForImageClassification

    >>> network = "microsoft/resnet-18"
    >>> model = AutoModelForImageClassification.from_pretrained(network)  # doctest: +SKIP
    >>> processor = AutoImageProcessor.from_pretrained(network)  # doctest: +SKIP
    >>> birds = load_dataset("comp-dd", "bird_easy", split="train")  # doctest: +SKIP
    >>> score_complexity(birds, model, processor)["complexity"][0]  # doctest: +SKIP
    0.673469364643097
    ```
    """
    models = [models] if isinstance(models, nn.Module) else list(models)
    processors = list(processors) if isinstance(processors, list | tuple) else [processors] * len(models)
    column = column_of("dataset", dataset.features, ("image", "img"))
    rows = dataset if column == "image" else dataset.rename_column(column, "image")
    _check(rows, target, (threshold,), batch_size)
    networks = [MapNetwork(*pair, layer, method) for pair in zip(models, processors, strict=True)]
    kept = [column for column in ("image", "label") if column in rows.features]
    names = _names_of(rows)
    found = score_images(rows.select_columns(kept), networks, names, target, (threshold,), upsample, batch_size)
    if "complexity" in dataset.features:
        dataset = dataset.remove_columns("complexity")
    return dataset.add_column("complexity", found.complexity[threshold].mean(1).astype(np.float32))


def translate_classes(names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """Finds classes of data among those of a network by synset or name, never by position.

    Args:
        names (`Sequence[str]`):
            Classes of the data: synsets, or names such as `"tench"` or `"tench, Tinca tinca"`.
        known (`Sequence[str]`):
            Those of the network, likewise.

    Returns:
        `list[int | None]`: the network's number of each class; `None` where no class or several are meant.

    Example:

    ```python
    >>> from hf_effml.comp_dd import translate_classes

    >>> translate_classes(["goldfish", "tench", "sofa"], ["n01440764", "n01443537"])
    [1, 0, None]

    ```
    """
    meanings: dict[tuple[str, str], set[int]] = {}
    for number, name in enumerate(known):
        for form in _forms(name):
            meanings.setdefault(form, set()).add(number)
    found = ([meanings.get(form, set()) for form in _forms(name)] for name in names)
    return [next((min(numbers) for numbers in each if len(numbers) == 1), None) for each in found]


def class_complexity(scores: np.ndarray, labels: Sequence[int] | np.ndarray, names: Sequence[str]) -> Report:
    """Averages the scores of every class.

    Args:
        scores (`np.ndarray` of shape `(images,)` or `(images, networks)`):
            How complex each image is.
        labels (`Sequence[int]`):
            The class of each image.
        names (`Sequence[str]`):
            Names of the classes.

    Returns:
        [`Report`]: one row per class that has images, with `label`, `images`, `complexity`, its `standard_error` over
        images (`None` of a single one) and, of several networks, `network_1` and so on.
    """
    scores, labels = np.asarray(scores, dtype=np.float64).reshape(len(labels), -1), np.asarray(labels)
    columns = {"images": Column("images"), "complexity": Column("complexity (%)", **_PERCENT)}
    columns["standard_error"] = Column("standard error", **_PERCENT)
    networks = [f"network_{number + 1}" for number in range(scores.shape[1])] if scores.shape[1] > 1 else []
    table = Report(
        "classes", columns | {each: Column(f"{each.replace('_', ' ')} (%)", **_PERCENT) for each in networks}
    )
    for label, name in enumerate(names):
        own = scores[labels == label]
        if len(own):
            error = own.mean(1).std(ddof=1) / len(own) ** 0.5 if len(own) > 1 else None
            single = dict(zip(networks, own.mean(0), strict=False))
            table.add(name, label=label, images=len(own), complexity=own.mean(), standard_error=error, **single)
    return table


def subset_complexity(table: Report, names: Sequence[str] | None = None) -> tuple[float, float | None]:
    """Averages classes.

    Args:
        table ([`Report`]):
            From [`class_complexity`].
        names (`Sequence[str]`, *optional*):
            Which of its classes; all of them if unset.

    Returns:
        `tuple[float, float | None]`: the mean, and its standard error by the spread of the classes, `None` of one.
    """
    means = np.array([table.rows[name]["complexity"] for name in (table.rows if names is None else names)])
    return float(means.mean()), float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None


def make_subsets(table: Report, groups: Mapping[str, Sequence[str]], k: int = 10) -> dict[str, list[str]]:
    """Picks the least and the most complex classes of every group.

    Args:
        table ([`Report`]):
            From [`class_complexity`].
        groups (`Mapping[str, Sequence[str]]`):
            Names of classes by the name of their group.
        k (`int`, *optional*, defaults to 10):
            Classes to pick each time; fewer, with a warning, where a group has less than twice as many.

    Returns:
        `dict[str, list[str]]`: for a group `bird` the classes of `bird_easy`, the least complex first, and those of
        `bird_hard`, the most complex first. Of equal classes the first one in the table counts as less complex.

    Raises:
        ValueError: If a class is unknown or in a group twice, or a group has no two classes.

    Warns:
        `UserWarning`: If the gap between both is not larger, by its standard error, than what picking extremes makes
        of the errors of the class means alone; or if nothing is known of those.
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1; got {k}.")
    place = {name: number for number, name in enumerate(table.rows)}
    chosen: dict[str, list[str]] = {}
    for group, members in groups.items():
        _check_group(group, members, place)
        count = min(k, len(members) // 2)
        if count < k:
            warnings.warn(f"`{group}` has {len(members)} classes: `k` is {count} instead of {k}.", stacklevel=2)
        ordered = sorted(members, key=lambda name: (table.rows[name]["complexity"], place[name]))
        chosen |= {f"{group}_easy": ordered[:count], f"{group}_hard": ordered[::-1][:count]}
        doubt = _doubt(table, ordered, count)
        if doubt:
            warnings.warn(f"`{group}_easy` and `{group}_hard`: {doubt}", stacklevel=2)
    return chosen


def draw_complexity(
    dataset: Any,
    network: MapNetwork,
    scores: np.ndarray,
    names: Sequence[str],
    path: str | Path,
    each: int = 4,
    title: str = "Complexity of images: the least, the middle and the most",
) -> None:
    """Draws pictures beside their maps, the least complex, those in the middle and the most complex.

    Args:
        dataset:
            As for [`score_images`].
        network ([`MapNetwork`]):
            Draws the maps, of the class that it names itself.
        scores (`np.ndarray` of shape `(images,)`):
            How complex each image is.
        names (`Sequence[str]`):
            Names of the labels.
        path (`str` or `Path`):
            PNG file to write.
        each (`int`, *optional*, defaults to 4):
            Pictures of each kind, a row each.
        title (`str`, *optional*):
            What the figure shows.
    """
    order, each = np.argsort(scores, kind="stable"), min(each, max(1, len(scores) // 3))
    middle = (len(order) - each) // 2
    picked = [*order[:each], *order[middle : middle + each], *order[-each:]] if len(order) >= 3 else [*order]
    rows = [dataset[int(index)] for index in picked]
    pictures, captions = [], []
    for index, row in zip(picked, rows, strict=True):
        pixels, (maps, _) = network.pixels([row["image"]]), network([row["image"]])
        # The very cells that are counted, not blurred.
        heat = nn.functional.interpolate(maps.unsqueeze(1), network.size, mode="nearest").squeeze(1)
        pair = [image_grid(pixels).convert("RGB"), map_grid(pixels, heat)]
        picture = Image.new("RGB", (pair[0].width + pair[1].width, pair[0].height), "white")
        for number, part in enumerate(pair):
            picture.paste(part, (number * pair[0].width, 0))
        pictures.append(picture)
        label = row.get("label")
        captions.append(f"{'' if label is None else names[label] + ', '}{scores[index]:.1%}")
    plot_images(pictures, captions, path, columns=each, title=title)


def _input_size(processor: Any, model: nn.Module) -> tuple[int, int]:
    """What is left of an image after the processor's resizing and cropping."""
    settings = getattr(processor, "data_config", None) or {}
    cropped = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    for size in (settings.get("input_size"), cropped, getattr(processor, "size", None)):
        if isinstance(size, int):
            return size, size
        if isinstance(size, tuple | list):
            return int(size[-2]), int(size[-1])
        if size is not None:
            values = {key: value for key, value in dict(size).items() if value}
            side = values.get("shortest_edge", 224)
            return values.get("height", side), values.get("width", side)
    size = getattr(processor, "image_size", None)
    return ((size, size) if isinstance(size, int) else size) or own_size(model) or (224, 224)


def _forms(name: str) -> list[tuple[str, str]]:
    """Whatever a class may be found by, the surest first."""
    text = " ".join(str(name).replace("_", " ").lower().split())
    match = _SYNSET.search(text)
    text = _names_of_synsets().get(match[0], text) if match else text
    parts = text.split(", ")
    own = [("synset", match[0])] if match else []
    return [*own, ("all", text), ("first", parts[0]), *(("any", part) for part in parts)]


@cache
def _names_of_synsets() -> dict[str, str]:
    return {synset: names.lower() for synset, names in imagenet_classes()}


def _names_of(rows: Any) -> list[str] | None:
    """Synsets of the labels where rows have them, or else their names."""
    names = list(getattr(rows.features.get("label"), "names", None) or [])
    if names and "synset" in rows.features:
        names = [dict(zip(rows["label"], rows["synset"], strict=True)).get(i, name) for i, name in enumerate(names)]
    return names or None


def _check(dataset: Any, target: str, thresholds: Sequence[float], batch_size: int) -> None:
    if not len(dataset):
        raise ValueError("`dataset` is empty. Pass at least one image.")
    if target not in ("prediction", "label"):
        raise ValueError(f'`target` must be "prediction" or "label"; got {target!r}.')
    wrong = [limit for limit in thresholds if not 0 < limit < 1]
    if wrong or not thresholds:
        raise ValueError(f"`threshold` must lie in (0, 1); got {wrong[0] if wrong else 'none'}. The authors use 0.5.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")


def _check_translated(
    names: Sequence[str] | None, translated: list[list[int | None]], networks: Sequence[MapNetwork]
) -> None:
    if not names:
        raise ValueError('`target="label"` needs labels with names. Pass `class_names`, or take "prediction".')
    for ids, network in zip(translated, networks, strict=True):
        missing = [name for name, index in zip(names, ids, strict=True) if index is None]
        if missing:
            raise ValueError(
                f'`target="label"`: {type(network.model).__name__} has no class, or more than one, for '
                f"{', '.join(f'`{name}`' for name in missing[:5])}. Name classes by synset, set `id2label` of its "
                'configuration, or take `target="prediction"`.'
            )


def _check_group(group: str, members: Sequence[str], known: Mapping[str, int]) -> None:
    for name in members:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"`groups`: the class `{name}` of `{group}` has no score.{hint}")
    if len(set(members)) != len(members) or len(members) < 2:
        raise ValueError(f"`groups`: `{group}` must be at least two different classes; got {list(members)[:12]}.")


def _doubt(table: Report, ordered: Sequence[str], count: int) -> str:
    """Why the gap between both ends of a group may be nothing but noise, if it may."""
    values = [table.rows[name]["complexity"] for name in ordered]
    errors = [table.rows[name]["standard_error"] for name in ordered]
    if None in errors:
        return "classes of one image have no standard error, so nobody knows whether the gap is real."
    gap = float(np.mean(values[-count:]) - np.mean(values[:count]))
    squares = np.square(errors)
    error = float(squares[:count].sum() + squares[-count:].sum()) ** 0.5 / count
    # What the extremes of equal classes would differ by, by Blom's formula for the order of normal errors.
    normal = [NormalDist().inv_cdf((rank + 0.625) / (len(ordered) + 0.25)) for rank in range(len(ordered))]
    chance = float(squares.mean()) ** 0.5 * (np.mean(normal[-count:]) - np.mean(normal[:count]))
    if gap - chance > error or error == 0 < gap:
        return ""
    return (
        f"the gap of {gap:.1%} has a standard error of {error:.1%}, and picking extremes of equally complex classes "
        f"gives {chance:.1%}. Score more images of each class, or average several networks."
    )
