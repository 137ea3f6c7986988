"""A synthetic set is a model: it is made, filled, saved and loaded as one, here and where the package is not."""

import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from helpers import run_python
from hf_effml import ConvNetConfig, DistilledDatasetConfig, DistilledDatasetModel, ZCAImageProcessor
from hf_effml.distillation.differentiable_augmentation import AugmentationSettings
from hf_effml.distillation.flat_student import FlatStudent, build_student, student_config
from hf_effml.distillation.matching import MatchingSettings
from hf_effml.distillation.unroll import StudentDerivatives
from hf_effml.hub import write_card


STUDENT = ConvNetConfig(image_size=[8, 6], depth=1, hidden_size=4)


def make_model(**fields):
    config = DistilledDatasetConfig(
        images_per_class=2,
        image_size=(8, 6),
        id2label={0: "cat", 1: "dog"},
        student=STUDENT.to_dict(),
        **{"method": "pad", **fields},
    )
    model = DistilledDatasetModel(config)
    generator = torch.Generator().manual_seed(3)
    return model.set_content(
        torch.randn(4, 3, 8, 6, generator=generator), torch.randn(4, 2, generator=generator), lr=0.0123456789
    )


def bits(model):
    return {name: tensor.view(torch.int32) for name, tensor in model.state_dict().items()}


def assert_same(loaded, model):
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == dict.fromkeys(
        ("images", "labels", "lr"), torch.float32
    )
    for name, tensor in bits(model).items():
        assert torch.equal(bits(loaded)[name], tensor), name


def test_fresh_sets():
    torch.manual_seed(0)
    model = DistilledDatasetModel(DistilledDatasetConfig(images_per_class=2, image_size=8, initial_lr=0.05))
    assert model.images.shape == (4, 3, 8, 8) and 0.9 < model.images.std() < 1.1
    assert model.labels.argmax(1).tolist() == model.class_ids.tolist() == [0, 0, 1, 1]
    assert (model.labels.softmax(1).amax(1) > 0.99).all() and model.lr.item() == pytest.approx(0.05)
    torch.manual_seed(0)
    assert_same(AutoModel.from_config(model.config), model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_content_is_copied():
    model = make_model()
    images, labels = torch.rand(4, 3, 8, 6), torch.rand(4, 2)
    rate = model.lr.item()
    assert model.set_content(images, labels) is model
    assert torch.equal(model.images, images) and torch.equal(model.labels, labels) and model.lr.item() == rate
    images.zero_()
    assert model.images.any()
    assert model.set_content(images, labels, torch.tensor(0.5)).lr.item() == 0.5


@pytest.mark.parametrize(
    "images, labels, remark",
    [
        ((4, 3, 8, 8), (4, 2), r"`images` must have the shape \(4, 3, 8, 6\).* got \(4, 3, 8, 8\)"),
        ((2, 3, 8, 6), (4, 2), r"`images` .* got \(2, 3, 8, 6\)"),
        ((4, 3, 8, 6), (4, 3), r"`labels` must have the shape \(4, 2\).* got \(4, 3\)"),
    ],
)
def test_content_of_another_shape(images, labels, remark):
    model = make_model()
    before = bits(model)
    with pytest.raises(ValueError, match=remark):
        model.set_content(torch.zeros(images), torch.zeros(labels))
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(model).items())


@pytest.mark.parametrize("name", ["images", "labels"])
def test_content_that_is_not_finite(name):
    model = make_model()
    content = {"images": torch.zeros(4, 3, 8, 6), "labels": torch.zeros(4, 2)}
    content[name][1, 0] = torch.nan
    before = bits(model)
    with pytest.raises(ValueError, match=f"`{name}` must be finite; {content[name].isnan().sum()} values are not"):
        model.set_content(**content)
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(model).items())


@pytest.mark.parametrize(
    "fields, remark",
    [
        ({"images_per_class": 0}, "`images_per_class` must be at least 1; got 0"),
        ({"num_channels": 0}, "`num_channels` must be at least 1; got 0"),
        ({"image_size": [8, 8, 8]}, r"`image_size` must be one positive number.* got \[8, 8, 8\]"),
        ({"image_size": 0}, "`image_size` must be one positive number.* got 0"),
        ({"initial_lr": 0}, "`initial_lr` must be finite and positive; got 0"),
        ({"initial_lr": float("nan")}, "`initial_lr` must be finite and positive; got nan"),
        ({"augmentation_strategy": "zoom"}, "'zoom'"),
        ({"augmentation_crop_ratio": 1.0}, "`crop_ratio` must be at least 0 and less than 1; got 1.0"),
        ({"images_per_class": "two"}, "images_per_class"),
    ],
)
def test_impossible_configurations(fields, remark):
    with pytest.raises(StrictDataclassError, match=remark):
        DistilledDatasetConfig(**fields)


def test_configuration_survives_a_file(tmp_path):
    config = make_model(dataset={"name": "cifar10"}, preprocessing="abc", augmentation_crop_ratio=0.25).config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DistilledDatasetConfig and loaded.height_and_width == (8, 6) and loaded.num_images == 4
    assert loaded.augmentation == AugmentationSettings(crop_ratio=0.25)
    for field in ("images_per_class", "dataset", "preprocessing", "method", "id2label"):
        assert getattr(loaded, field) == getattr(config, field), field
    assert student_config(loaded.student).to_diff_dict() == STUDENT.to_diff_dict()
    assert AutoModel.from_config(loaded).class_ids.tolist() == [0, 0, 1, 1]


def test_a_missing_part_is_fresh(tmp_path, poisoned_memory):
    model = make_model()
    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    for name in kept:
        save_file(
            {key: value for key, value in kept.items() if key != name},
            tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )
        loaded = DistilledDatasetModel.from_pretrained(tmp_path)
        for key, tensor in bits(model).items():
            assert torch.equal(bits(loaded)[key], tensor) is (key != name), (name, key)
        assert all(tensor.isfinite().all() for tensor in loaded.state_dict().values())
        if name == "labels":
            assert loaded.labels.argmax(1).tolist() == [0, 0, 1, 1]
        if name == "lr":
            assert loaded.lr.item() == pytest.approx(model.config.initial_lr)


def match(model):
    student = FlatStudent(build_student(STUDENT, seed=1))
    start = student.flatten()
    settings = MatchingSettings(syn_steps=3, loss_threshold=100.0, augmentation=model.config.augmentation)
    return model(
        starts=start[None],
        targets=(start + 0.01)[None],
        seeds=[5],
        derivatives=StudentDerivatives(student),
        settings=settings,
    )


def test_forward_has_gradients_for_all_parts():
    model = make_model()
    output = match(model)
    assert output.loss.shape == () and output.losses.shape == output.took_part.shape == (1,)
    output.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


WITHOUT_PACKAGE = """
import torch
from safetensors.torch import save_file
from transformers import AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

model = AutoModel.from_pretrained("set", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert model.class_ids.tolist() == [0, 0, 1, 1] and model.config.augmentation.crop_ratio == 0.25
# The Auto class of older versions of transformers asks for torchvision.
processor = get_class_from_dynamic_module("image_processing_zca.ZCAImageProcessor", "set").from_pretrained("set")
pixels = processor.unwhiten(model.images.detach())
# It can be matched there as well, and saved once more.
import sys
code = sys.modules[type(model).__module__]
derive = code.StudentDerivatives
sibling = type(model).__module__.rpartition(".")[0]
FlatStudent = sys.modules[sibling + ".flat_student"].FlatStudent
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 2))
student = FlatStudent(network)
start = student.flatten()
settings = code.MatchingSettings(syn_steps=2, loss_threshold=100.0, augmentation=model.config.augmentation)
loss = model(start[None], (start + 0.01)[None], [1], derive(student), settings).loss
loss.backward()
assert model.images.grad.abs().sum() > 0
model.save_pretrained("again")
again = AutoModel.from_pretrained("again", trust_remote_code=True)
seen = {name: tensor.clone() for name, tensor in again.state_dict().items()}
save_file(seen | {"pixels": pixels}, "seen.safetensors")
"""


def test_loads_without_the_package(tmp_path):
    model = make_model(augmentation_crop_ratio=0.25)
    processor = ZCAImageProcessor.from_images(torch.rand(9, 3, 8, 6))
    model.save_pretrained(tmp_path / "set")
    processor.save_pretrained(tmp_path / "set")
    text = write_card(tmp_path / "set", method="pad").read_text()
    snippet = re.search(r"```python\n(.*?)```", text, flags=re.S)[1]
    code = f"import os; os.environ['HF_HOME'] = {str(tmp_path / 'home')!r}\n{snippet}\n{WITHOUT_PACKAGE}"
    printed = run_python(code, cwd=tmp_path, without_package=True)
    assert printed == "4 images, to train on with a learning rate of 0.0123\n"
    seen = load_file(tmp_path / "seen.safetensors")
    assert torch.allclose(seen.pop("pixels"), processor.unwhiten(model.images.detach()), atol=1e-6)
    assert seen.keys() == bits(model).keys()
    for name, tensor in bits(model).items():
        assert torch.equal(seen[name].view(torch.int32), tensor), name
