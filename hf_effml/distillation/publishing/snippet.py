"""The program on a set's card: networks trained on it and on as many real images, both measured on real ones."""

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.utils.sources.split_files import recorded_name, split_subset


__all__ = ["training_snippet"]

_NORMS = {
    "instance": "nn.GroupNorm(width, width)",
    "batch": "nn.BatchNorm2d(width)",
    "layer": "nn.GroupNorm(1, width)",
    "group": "nn.GroupNorm(4, width)",
    "none": "nn.Identity()",
}
_ACTIVATIONS = {"relu": "nn.ReLU()", "leaky_relu": "nn.LeakyReLU()", "sigmoid": "nn.Sigmoid()"}
_POOLINGS = {"avg": "nn.AvgPool2d(2)", "max": "nn.MaxPool2d(2)", "none": "nn.Identity()"}


def training_snippet(info: Mapping[str, Any], processor: Mapping[str, Any] | None) -> str:
    """Writes the program.

    It needs torch, datasets and transformers, not this package. The network is one like that which the set was made
    with, because others may learn little from it; batch normalisation gets statistics of real images, which those of
    a few synthetic ones are not like.

    Args:
        info (`Mapping`):
            Content of `distillation.json`.
        processor (`Mapping`, *optional*):
            Content of `preprocessor_config.json`. Without it nothing can be measured on real images.

    Returns:
        `str`: Python code, its imports first, that loads the set by its `dataset_id`.
    """
    student = info.get("student") or {}
    plain = _is_of_transformers(student)
    if processor is None:
        return "\n".join([_imports({}, plain), _LOAD, _network(info, plain), _train(calibrated=False), _TRY_ON_ITSELF])
    source = ((info.get("dataset") or {}).get("arguments") or {}).get("name")
    parts = [
        _imports(processor, plain, digits=source == "digits"),
        _LOAD,
        _preprocess(info, processor),
        _DIGITS if source == "digits" else _real_images(info, source),
        _network(info, plain),
        _train(calibrated=plain or student.get("norm") == "batch"),
        _COMPARE,
    ]
    return "\n".join(parts)


def _is_of_transformers(student: Mapping[str, Any]) -> bool:
    """Whether transformers alone builds the network."""
    kind = student.get("model_type")
    return kind in CONFIG_MAPPING and CONFIG_MAPPING[kind].__module__.startswith("transformers.")


def _imports(processor: Mapping[str, Any], plain: bool, digits: bool = False) -> str:
    pillow = "from PIL import Image, ImageOps" if processor.get("resize_mode") == "crop" else "from PIL import Image"
    lines = [
        "import json",
        "from pathlib import Path",
        "",
        "import numpy as np" if processor else "",
        "import torch",
        "from datasets import load_dataset",
        "from huggingface_hub import hf_hub_download",
        pillow if processor else "",
        "from safetensors.torch import load_file" if processor.get("do_whiten") else "",
        "from sklearn.datasets import load_digits" if digits else "",
        "from torch import nn",
        "from transformers import AutoConfig, AutoModelForImageClassification" if plain else "",
    ]
    return "\n".join(line for number, line in enumerate(lines) if line or number == 2) + "\n"


def _preprocess(info: Mapping[str, Any], processor: Mapping[str, Any]) -> str:
    channels, height, width = info["image_shape"]
    mode, size = ("L" if channels == 1 else "RGB"), f"({width}, {height}), Image.Resampling.BILINEAR"
    if processor.get("resize_mode") == "crop":
        resized = f'ImageOps.fit(picture.convert("{mode}"), {size})'
    else:
        resized = f'picture.convert("{mode}").resize({size})'
    settings = 'settings = json.loads(find("preprocessor_config.json").read_text(encoding="utf-8"))'
    if processor.get("do_whiten"):
        learned = 'zca = load_file(find("zca.safetensors"))'
        made = f'((pixels.flatten(1) - zca["mean"]) @ zca["matrix"]).view(-1, {channels}, {height}, {width})'
    else:
        names = '("image_mean", "image_std")'
        learned = f"{settings}\nmean, std = (torch.tensor(settings[name]).view(-1, 1, 1) for name in {names})"
        made = "(pixels - mean) / std"
    return f"""
{learned}


def preprocess(pictures):  # as the real images that the set was made of
    resized = [{resized} for picture in pictures]
    pixels = torch.tensor(np.stack([np.array(picture) for picture in resized]))
    pixels = pixels.view(-1, {height}, {width}, {channels}).permute(0, 3, 1, 2) / 255
    return {made}
"""


def _real_images(info: Mapping[str, Any], source: str | None) -> str:
    """Real images by the names of their classes, in whichever column and order they are."""
    dataset = info.get("dataset") or {}
    if dataset.get("hub_id"):
        revision = f", revision={dataset['revision']!r}" if dataset.get("revision") else ""
        subset = split_subset(str(recorded_name(dataset)))[1]
        wanted = f", {subset!r}" if subset else ""
        load = f"real = load_dataset({dataset['hub_id']!r}{wanted}{revision})"
    else:
        where = repr(source or "real-images")
        load = f'real = load_dataset("imagefolder", data_dir={where})  # train/CLASS and test/CLASS, the real images'
    return f"""
{load}
test_split = next(name for name in ("test", "validation", "valid", "val") if name in real)


def real_images(split, most):
    kinds = {{type(kind).__name__: name for name, kind in split.features.items()}}
    names = split.features[kinds["ClassLabel"]].names
    wanted = [row for row, label in enumerate(split[kinds["ClassLabel"]]) if names[label] in info["classes"]]
    chosen = split.select(wanted).shuffle(seed=0).select(range(min(most, len(wanted))))
    labels = torch.tensor([info["classes"].index(names[label]) for label in chosen[kinds["ClassLabel"]]])
    return preprocess(chosen[kinds["Image"]]), labels


(train_images, train_labels), (test_images, test_labels) = (
    real_images(real[name], 50 * len(info["classes"])) for name in ("train", test_split)
)
"""


def _network(info: Mapping[str, Any], plain: bool) -> str:
    student, classes = info.get("student") or {}, len(info["classes"])
    if plain:
        return """

def make_network():  # like the one that the set was made with
    fields = dict(info["student"])
    return AutoModelForImageClassification.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
"""
    channels, height, width = info["image_shape"]
    if student.get("model_type") == ConvNetConfig.model_type:
        # What a configuration lets through is no code.
        network = ConvNetConfig.from_dict(dict(student))
    else:
        network = ConvNetConfig(depth=max(1, min(height, width).bit_length() - 3), image_size=[height, width])
    norm, activation, pooling = _NORMS[network.norm], _ACTIVATIONS[network.activation], _POOLINGS[network.pooling]
    padding = "3 if block == 0 else 1" if channels == 1 else "1"
    return f"""

def make_network():  # like the one that the set was made with
    layers, channels, width = [], {channels}, {network.hidden_size}
    for block in range({network.depth}):
        layers += [nn.Conv2d(channels, width, 3, padding={padding}), {norm}]
        layers += [{activation}, {pooling}]
        channels = width
    network = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear({classes}))
    network(images[:2])
    return network
"""


def _train(calibrated: bool) -> str:
    return f"""

def scores_of(network, pixels):
    output = network(pixels)
    return getattr(output, "logits", output)


def train(pixels, targets, seed, steps=300):
    torch.manual_seed(seed)
    network = make_network().train()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=info["learning_rate"], momentum=rules["momentum"], weight_decay=rules["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2])
    for _ in range(steps):  # the whole protocol, which also augments: `rules`
        batch = torch.randperm(len(pixels))[: rules["batch_size"]]
        loss = nn.functional.cross_entropy(scores_of(network, pixels[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
{_CALIBRATE if calibrated else ""}    return network.eval()
"""


_LOAD = """

def find(name):
    local = Path(dataset_id, name)
    return local if local.exists() else Path(hf_hub_download(dataset_id, name, repo_type="dataset"))


table = str(find("data/train-00000-of-00001.parquet"))
rows = load_dataset("parquet", data_files=table, split="train").with_format("torch")
images, soft_labels = rows["image"][:], rows["soft_label"][:].softmax(-1)
info = json.loads(find("distillation.json").read_text(encoding="utf-8"))
rules = info["protocol"]"""

_DIGITS = """
digits = load_digits()
order = np.random.RandomState(0).permutation(len(digits.target))  # the set was made of the first thousand
order = [row for row in order if str(digits.target[row]) in info["classes"]]
pixels = preprocess([Image.fromarray(np.uint8(digits.images[row] * 255 / 16)) for row in order])
labels = torch.tensor([info["classes"].index(str(digits.target[row])) for row in order])
train_images, test_images = pixels[: len(order) // 2], pixels[-len(order) * 2 // 5 :]
train_labels, test_labels = labels[: len(order) // 2], labels[-len(order) * 2 // 5 :]
"""

_CALIBRATE = """    # Statistics of batch normalisation: those of a few synthetic images fit no real ones.
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        network(train_images[:512])
"""

_COMPARE = """

def accuracy(network):
    with torch.no_grad():
        return (scores_of(network, test_images).argmax(-1) == test_labels).float().mean().item()


def as_many_real(seed):
    order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(seed))
    rows = [order[train_labels[order] == c][: info["images_per_class"]] for c in range(len(info["classes"]))]
    return train_images[torch.cat(rows)], train_labels[torch.cat(rows)]


networks = [train(images, soft_labels, seed) for seed in range(3)]
others = [train(*as_many_real(seed), seed) for seed in range(3)]
this, real_ones = (sum(map(accuracy, trained)) / 3 for trained in (networks, others))
print(f"accuracy on {len(test_labels)} real test images: {this:.1%} trained on this set")
print(f"{real_ones:.1%} trained on as many real images ({info['images_per_class']} per class) in the same way")"""

_TRY_ON_ITSELF = """

network = train(images, soft_labels, seed=0)
right = (scores_of(network, images).argmax(-1) == rows["label"][:]).float().mean().item()
print(f"{right:.1%} of its own images; how real ones are to be preprocessed is not known")"""
