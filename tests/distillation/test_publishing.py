"""A distilled set as files: exact, complete, checked when it is written and when it is read."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import DatasetCard
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig

from helpers import assert_close, require_package, run_python, tiny_vim_config
from hf_effml import (
    ConvNetConfig,
    DistilledDatasetConfig,
    DistilledDatasetModel,
    VimForImageClassification,
    ZCAImageProcessor,
    load_distilled,
    save_distilled_dataset,
    to_dataset,
)
from hf_effml.distillation.bank.files import write_bank
from hf_effml.distillation.card import add_evaluations
from hf_effml.distillation.differentiable_augmentation import AugmentationSettings
from hf_effml.distillation.evaluation.measure import evaluate_distilled
from hf_effml.distillation.evaluation.training_sets import TrainingSet
from hf_effml.distillation.publishing import sets
from hf_effml.distillation.publishing.description import describe_distillation
from hf_effml.distillation.publishing.run import DistillationRun
from hf_effml.distillation.publishing.sets import INFO_NAME
from hf_effml.distillation.publishing.snippet import training_snippet
from hf_effml.distillation.publishing.tables import check_distilled
from hf_effml.distillation.real_images import RealImages
from hf_effml.hub import check_folder, render_card, write_card
from hf_effml.hub.checks import files_to_push, what_stays_here
from hf_effml.scripts.train_pad import main as train_pad


NAMES = ["cat", "dog"]
DATA = {"name": "cifar10", "hub_id": "uoft-cs/cifar10", "revision": "abc", "splits": {"train": 9}}


def make_model(processor=None, channels=3, ipc=2, seed=0, **fields):
    student = ConvNetConfig(num_channels=channels, image_size=8, depth=2, hidden_size=4)
    fields = {"id2label": dict(enumerate(NAMES)), **fields}
    config = DistilledDatasetConfig(
        images_per_class=ipc,
        num_channels=channels,
        image_size=8,
        augmentation_crop_ratio=0.25,
        preprocessing=None if processor is None else processor.fingerprint,
        **{"method": "pad", "dataset": DATA, "student": student.to_dict(), **fields},
    )
    model = DistilledDatasetModel(config)
    generator = torch.Generator().manual_seed(seed)
    images = 3 * torch.randn(model.images.shape, generator=generator)
    # Values that a detour through other types would not survive.
    images[0, 0, 0, :3] = torch.tensor([1e-42, -0.0, 16777217.0])
    return model.set_content(images, torch.randn(model.labels.shape, generator=generator), lr=0.0123456789)


@pytest.fixture(scope="module")
def processor():
    return ZCAImageProcessor.from_images(torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def folder(processor, tmp_path):
    require_package("datasets")
    return save_distilled_dataset(make_model(processor), tmp_path / "set", processor)


def bits(tensor):
    return tensor.detach().view(torch.int32)


def test_data_set_is_exact(processor, tmp_path):
    datasets = require_package("datasets")
    model = make_model(processor)
    rows = to_dataset(model, processor)
    assert rows.column_names == ["image", "preview", "soft_label", "label"]
    assert rows.features["image"] == datasets.Array3D((3, 8, 8), "float32")
    assert rows.features["soft_label"] == datasets.List(datasets.Value("float32"), length=2)
    assert rows.features["label"].names == NAMES
    rows.to_parquet(tmp_path / "rows.parquet")
    for found in (rows, datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))):
        tensors = found.with_format("torch")
        assert torch.equal(bits(tensors["image"][:]), bits(model.images))
        assert torch.equal(bits(tensors["soft_label"][:]), bits(model.labels))
        assert found["label"][:] == [0, 0, 1, 1]
        picture = found["preview"][2]
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (8, 8))
        shown = processor.unwhiten(model.images[2].detach()).clamp(0, 1).mul(255).round().permute(1, 2, 0)
        assert_close(torch.tensor(np.array(picture)), shown.byte())
    assert to_dataset(model, preview=False).column_names == ["image", "soft_label", "label"]


def test_grey_set(tmp_path):
    require_package("datasets")
    processor = ZCAImageProcessor.from_images(torch.rand(9, 1, 8, 8), num_channels=1, do_whiten=False)
    model = make_model(processor, channels=1)
    found = load_distilled(save_distilled_dataset(model, tmp_path, processor))
    assert torch.equal(found.training_set.images, model.images) and found.processor.image_mean is not None
    assert to_dataset(model, processor)["preview"][0].mode == "L"
    assert not (tmp_path / "zca.safetensors").exists()
    assert 'picture.convert("L")' in render_card(tmp_path).text


def test_round_trip(folder, processor):
    model = make_model(processor)
    found = load_distilled(folder)
    training_set, info, loaded = found
    assert torch.equal(bits(training_set.images), bits(model.images))
    assert torch.equal(bits(training_set.soft_labels), bits(model.labels))
    assert training_set.class_ids.tolist() == [0, 0, 1, 1] and training_set.class_ids.dtype == torch.int64
    assert training_set.learning_rate == model.lr.item() and found.label_names == NAMES
    assert training_set.augmentation == AugmentationSettings(crop_ratio=0.25)
    assert loaded.fingerprint == processor.fingerprint == info["preprocessing"]
    assert (info["method"], info["images_per_class"], info["student"]["depth"]) == ("pad", 2, 2)
    assert info["dataset"]["splits"] == {"train": 9} and info["results"] == []
    assert info["value_range"] == [model.images.min().item(), model.images.max().item()]


def test_what_lies_in_the_folder(folder):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "data/train-00000-of-00001.parquet",
        "distillation.json",
        "images.png",
        "preprocessor_config.json",
        "zca.safetensors",
    }
    assert "auto_map" not in (folder / "preprocessor_config.json").read_text()
    assert Image.open(folder / "images.png").width > 100


def test_a_killed_writer_leaves_the_old_set(folder, processor, monkeypatch):
    """And what somebody else put there, in either case."""
    before = load_distilled(folder).training_set.images
    (folder / "README.md").write_text("My own words.")
    (folder / "notes").mkdir()
    (folder / "notes" / "one.txt").write_text("one")
    (folder.parent / f".{folder.name}.abcdefgh.unfinished").mkdir()
    model = make_model(processor)
    with monkeypatch.context() as patched:
        patched.setattr(sets, "_digest", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_distilled_dataset(model, folder, processor)
    assert torch.equal(load_distilled(folder).training_set.images, before)
    save_distilled_dataset(model.set_content(model.images + 1, model.labels), folder, processor)
    assert torch.equal(load_distilled(folder).training_set.images, model.images)
    assert (folder / "README.md").read_text() == "My own words." and (
        folder / "notes" / "one.txt"
    ).read_text() == "one"
    assert not list(folder.parent.glob(".*")) and not list(folder.glob(".*"))


def test_the_folder_that_one_stands_in(processor, tmp_path, monkeypatch):
    require_package("datasets")
    monkeypatch.chdir(tmp_path)
    save_distilled_dataset(make_model(processor), ".", processor)
    assert Path.cwd() == tmp_path and load_distilled(".").label_names == NAMES


def test_saving_again_leaves_nothing_old(folder, processor):
    save_distilled_dataset(make_model(processor, seed=1), folder, processor, maps=torch.rand(4, 8, 8))
    assert (folder / "maps.png").is_file()
    assert torch.equal(load_distilled(folder).training_set.images, make_model(processor, seed=1).images)
    save_distilled_dataset(make_model(processor, seed=2), folder)
    assert load_distilled(folder).processor is None
    assert not any((folder / name).exists() for name in ("maps.png", "zca.safetensors", "preprocessor_config.json"))


def test_other_processors_are_refused(processor, tmp_path):
    require_package("datasets")
    other = ZCAImageProcessor.from_images(torch.rand(20, 3, 8, 8))
    with pytest.raises(ValueError, match="preprocessed in another way .* `bank.image_processor`"):
        save_distilled_dataset(make_model(processor), tmp_path / "a", other)
    with pytest.raises(TypeError, match="must be a ZCAImageProcessor, .* got a dict"):
        save_distilled_dataset(make_model(processor), tmp_path / "a", {})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "change, remark",
    [
        ({"images": torch.zeros(4, 3, 8)}, r"float32 of shape .*\(4, 3, 8\)"),
        ({"images": torch.zeros(4, 3, 8, 8, dtype=torch.float64)}, "float32 .* torch.float64"),
        ({"images": torch.full((4, 3, 8, 8), torch.inf)}, "images of 4 of 4 images hold values that are not finite"),
        ({"soft_labels": torch.tensor([[0, 0], [0, torch.nan]] * 2)}, "soft labels of 2 of 4 images .* not finite"),
        ({"soft_labels": torch.zeros(4, 3)}, r"shape \(4, 2\), one per class; got \(4, 3\)"),
        ({"soft_labels": None}, "got none"),
        ({"class_ids": torch.tensor([0, 0, 0, 1])}, "must have 2 image.*there are 3 of class 0, 1 of class 1"),
        ({"class_ids": torch.tensor([0, 0, 1, 2])}, "there are 1 of class 1, 1 of class 2"),
        ({"learning_rate": -0.1}, "step size .* positive and finite; got -0.1"),
        ({"learning_rate": float("nan")}, "step size .* positive and finite; got nan"),
    ],
)
def test_what_is_no_set(change, remark):
    good = TrainingSet(torch.zeros(4, 3, 8, 8), torch.tensor([0, 0, 1, 1]), torch.zeros(4, 2))
    check_distilled(good, NAMES, 2)
    with pytest.raises(ValueError, match=remark):
        check_distilled(good._replace(**change), NAMES, 2)


def test_a_failed_set_is_not_written(processor, tmp_path):
    require_package("datasets")
    model = make_model(processor)
    with torch.no_grad():
        model.labels[1, 0] = torch.nan
    with pytest.raises(ValueError, match="soft labels of 1 of 4 images"):
        save_distilled_dataset(model, tmp_path / "set", processor)
    assert not (tmp_path / "set").exists()


def test_damage_is_noticed(folder):
    data = folder / "data" / "train-00000-of-00001.parquet"
    content = data.read_bytes()
    data.write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match="parquet` is missing or not the file .* damaged"):
        load_distilled(folder)
    data.write_bytes(content)
    info = json.loads((folder / INFO_NAME).read_text())
    for text, remark in (
        ("{", "does not describe a distilled set"),
        ("[]", "does not describe a distilled set"),
        (json.dumps({key: info[key] for key in info if key != "files"}), r"distilled set \(KeyError\('files'\)\)"),
        (json.dumps(info | {"format_version": 2, "hf_effml_version": "9.0"}), r"later version of hf-effml \(9.0\)"),
        (json.dumps(info | {"classes": ["a", "b", "c"]}), r"shape \(4, 3\), one per class"),
    ):
        (folder / INFO_NAME).write_text(text)
        with pytest.raises(ValueError, match=remark):
            load_distilled(folder)


def test_a_model_is_a_set_too(processor, tmp_path):
    model = make_model(processor)
    model.save_pretrained(tmp_path / "bare")
    training_set, info, found = load_distilled(tmp_path / "bare")
    assert torch.equal(bits(training_set.images), bits(model.images)) and found is None
    assert (info["classes"], info["dataset"]["hub_id"]) == (NAMES, "uoft-cs/cifar10")
    processor.save_pretrained(tmp_path / "bare")
    assert load_distilled(tmp_path / "bare").processor.fingerprint == processor.fingerprint


def test_what_is_no_distilled_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no distilled set"):
        load_distilled(tmp_path)
    VimForImageClassification(tiny_vim_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a model of type `vim`, no distilled set"):
        load_distilled(tmp_path)


def test_info_is_plain_and_complete(expert_bank):
    data, bank = expert_bank
    model = make_model(dataset={"name": "colours", "hub_id": None})
    facts = {"steps": 9, "seed": 3, "arguments": {"lr_img": 1.0}, "processes": 2, "seconds": 1.26}
    info = describe_distillation(model, bank=bank, license="mit", run=DistillationRun(device="cpu", **facts))
    assert json.loads(json.dumps(info)) == info
    assert info["dataset"] == {"name": "colours", "license": "mit", "splits": {"train": 60, "validation": 15}}
    assert info["bank"] == bank.folder.name and info["experts"]["number"] == 3
    assert info["experts"]["training"]["epochs"] == 8 and info["experts"]["epochs"] == [0, 8]
    assert (info["steps"], info["seed"], info["seconds"], info["processes"]) == (9, 3, 1.3, 2)
    assert info["device"] and info["versions"]["torch"] and "command" not in info
    assert "_name_or_path" not in info["student"]
    rules = info["protocol"]
    assert (rules["epochs"], rules["drop_epoch"], rules["batch_size"], rules["momentum"]) == (1001, 501, 128, 0.9)
    assert rules["augmentation"]["crop_ratio"] == 0.25 and rules["learning_rate"] == model.lr.item()


# The card.


def reports(seeds=(0, 1)):
    generator = torch.Generator().manual_seed(0)
    real, test = (RealImages(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 2, NAMES) for _ in "ab")
    config = ConvNetConfig(image_size=8, depth=1, hidden_size=2)
    options = {"real": real, "draws": 1, "full_epochs": 1, "disable_tqdm": True, "seeds": seeds}
    from hf_effml.distillation.evaluation.protocols import get_protocol

    return [evaluate_distilled(make_model(), config, test, protocol=get_protocol("tm", epochs=2), **options)]


def test_card(folder):
    card = DatasetCard.load(write_card(folder, "alice/cats"))
    assert re.findall(r"^#+ (.*)$", card.text, flags=re.M) == [
        "cats", "Use", "Results", "How it was made", "Limits", "Versions", "Citation"
    ]  # fmt: skip
    tags = ["dataset-distillation", "synthetic", "image-classification", "pad"]
    assert card.data.tags == [*tags, "arxiv:2408.03360", "arxiv:2203.11932", "arxiv:2310.05773"]
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "data/train-*"}]
    assert card.data.source_datasets == ["uoft-cs/cifar10"] and card.data.license is None
    assert 'dataset_id = "alice/cats"\n' in card.text and "![The synthetic images](images.png)" in card.text
    assert "has not been evaluated" in card.text and "license of the real images is not stated" in card.text
    assert "ConvNet-D2-W4" in card.text and "[PAD](https://huggingface.co/papers/2408.03360)" in card.text
    assert not re.search(r"more information needed|None|\{\{|\{%|\n{4,}|maps.png|curves.png", card.text, flags=re.I)


def test_card_shows_results_with_their_rules(folder):
    write_card(folder, "alice/cats")
    text = (folder / "README.md").read_text().replace("## Limits", "My own words.\n\n## Limits")
    (folder / "README.md").write_text(text)
    report = reports()[0]
    add_evaluations(folder, [report.to_dict()])
    renewed = (folder / "README.md").read_text()
    mean, std = report.accuracy, report.std
    assert f"| ConvNet-D1-W2 | tm (1) | 8 test images | {100 * mean:.1f} ± {100 * std:.1f} (2) |" in renewed
    header = next(line for line in renewed.splitlines() if line.startswith("| network"))
    for column in ("this set", "this set, hard labels", "random real, hard labels", "all real, hard labels", "HLR"):
        assert f"| {column} |" in header, header
    assert "- tm (1): labels soft, 2 epochs, batches of 128, sgd with learning rate 0.01235, momentum 0.9" in renewed
    assert "learning rate divided by ten at epoch 1" in renewed and "crop 0.25, cutout 0.5" in renewed
    # Nothing else changed.
    assert "has not been evaluated" not in renewed and "Without a `bank`" in renewed
    cut = re.compile(r"<!-- hf-effml: results .*?<!-- end of results -->", flags=re.S)
    assert cut.sub("", renewed) == cut.sub("", text)
    # The same once more replaces; other rules are another row.
    other = report.to_dict() | {"student": "/home/alice/nets/mine"}
    longer = report.to_dict()
    longer["protocol"] = longer["protocol"] | {"epochs": 300}
    add_evaluations(folder, [report.to_dict(), other, longer])
    renewed = (folder / "README.md").read_text()
    assert renewed.count("| ConvNet-D1-W2 | tm (1) |") == renewed.count("| ConvNet-D1-W2 | tm (2) |") == 1
    assert "| mine | tm (1) |" in renewed and "tm (2): labels soft, 300 epochs" in renewed
    assert len(load_distilled(folder).info["results"]) == 3
    assert "/home/alice" not in (folder / INFO_NAME).read_text()


def test_card_of_a_whole_run(processor, tmp_path):
    require_package("datasets")
    model = make_model(processor, method="edf", dataset=None)
    rules = describe_distillation(model)["protocol"]
    chosen = {"step": 300, "rule": "best accuracy", "accuracy": 0.8312, "images": 90, "seeds": 1, "protocol": rules}
    run = DistillationRun(
        steps=400,
        selected=chosen,
        arguments={"lr_img": 100.0},
        command="hf-effml train edf",
        device="cpu",
        seconds=4000,
        peak_memory_bytes=2**30,
        seed=7,
    )
    info = describe_distillation(model, license="mit", run=run)
    save_distilled_dataset(model, tmp_path, processor, info=info, maps=torch.rand(4, 8, 8))
    card = render_card(tmp_path)
    assert card.data.license == "mit" and "have the license `mit`" in card.text
    assert "step 300: best accuracy (83.1% of 90 images, protocol `tm`, 1001 epochs, 1 network(s))" in card.text
    for fact in ("| Steps | 400 |", "4,000 s", "at most 1,024 MiB", "| `lr_img` | `100.0` |", "hf-effml train edf"):
        assert fact in card.text, fact
    assert "![Activation maps](maps.png)" in card.text and "2410.17193" in card.text
    assert "distilled from a data set of images" in card.text


def test_card_needs_a_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="no `distillation.json`. Write it with `save_distilled_dataset`"):
        add_evaluations(tmp_path, [])


def test_card_takes_no_facts(folder):
    with pytest.raises(TypeError, match="card of a distilled data set is made from its own files; got `method`"):
        render_card(folder, method="pad")


def test_snippets_run_without_the_package(tmp_path):
    """On a folder of real pictures: cats are light, and class names stand in another order than in the set."""
    require_package("datasets")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 128, (20, 3, 8, 8), generator=generator)
    pixels[:10] += 127
    pixels = pixels / 255
    for index, image in enumerate(pixels):
        split = "train" if index % 10 < 5 else "test"
        path = tmp_path / "photos" / split / ("cat" if index < 10 else "a dog") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy()).save(path)
    code = "import os; os.environ['HF_HOME'] = os.getcwd() + '/home'\nfrom safetensors.torch import save_file\n"
    processors, source = {}, {"name": "photos", "arguments": {"name": "photos"}}
    resnet = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    for name, whiten, mode, student in (
        ("whitened", True, "crop", ConvNetConfig(image_size=8, depth=2, hidden_size=4, norm="batch")),
        ("normalised", False, "squash", resnet),
    ):
        processor = processors[name] = ZCAImageProcessor.from_images(pixels, do_whiten=whiten, resize_mode=mode)
        model = make_model(processor, dataset=source, student=student.to_dict(), id2label={0: "cat", 1: "a dog"})
        images = processor.whiten(pixels[[0, 1, 10, 11]])
        model.set_content(images, 4 * torch.eye(2).repeat_interleave(2, 0), lr=0.02)
        folder = save_distilled_dataset(model, tmp_path / name, processor)
        code += "\n".join(re.findall(r"```python\n(.*?)```", write_card(folder).read_text(), flags=re.S))
        code += "seen = {'images': images, 'labels': soft_labels}\n"
        code += "seen['cat'] = preprocess([Image.open('photos/train/cat/0.png')])\n"
        code += "seen = {name: tensor.contiguous() for name, tensor in seen.items()}\n"
        code += f"save_file(seen, '{name}.safetensors')\n"
    printed = run_python(code.replace("steps=300", "steps=80"), cwd=tmp_path, without_package=True)
    said = (
        r"accuracy on 10 real test images: ([\d.]+)% trained on this set\n[\d.]+% trained on as many .*\n(cat|a dog)$"
    )
    assert [float(found[0]) for found in re.findall(said, printed, flags=re.M)] > [90, 90], printed
    for name, processor in processors.items():
        seen = load_file(tmp_path / f"{name}.safetensors")
        assert torch.equal(bits(seen["images"]), bits(processor.whiten(pixels[[0, 1, 10, 11]])))
        assert_close(seen["labels"], (4 * torch.eye(2).repeat_interleave(2, 0)).softmax(-1), 1e-6)
        assert_close(seen["cat"], processor(pixels[:1])["pixel_values"], 1e-5)


@pytest.mark.slow
def test_snippet_of_a_set_of_digits_is_better_than_real_images(tmp_path):
    """The smoke recipe, read by somebody who has not got this package."""
    require_package("datasets")
    train_pad(
        ["--recipe", "smoke", "--output_dir", str(tmp_path / "pad"), "--test_seeds", "0", "--disable_tqdm", "true"]
    )
    card = (tmp_path / "pad" / "dataset" / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, flags=re.S)[0]
    code = code.replace('dataset_id = "pad"', 'dataset_id = "pad/dataset"')
    printed = run_python(code, cwd=tmp_path, without_package=True)
    ours, real = map(float, re.findall(r"([\d.]+)% trained on", printed))
    assert ours > real + 10 and ours > 60, printed


def test_snippet_without_preprocessing_says_so(tmp_path):
    require_package("datasets")
    card = write_card(save_distilled_dataset(make_model(), tmp_path / "bare")).read_text()
    assert "nothing can be measured on real ones" in card
    code = "\n".join(re.findall(r"```python\n(.*?)```", card, flags=re.S))
    assert "of its own images" in run_python(code, cwd=tmp_path, without_package=True)


def test_snippet_takes_real_images_from_where_the_set_took_them(folder):
    info = json.loads((folder / INFO_NAME).read_text())
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert "load_dataset('uoft-cs/cifar10', revision='abc')" in training_snippet(info, settings)
    here = info | {"dataset": {"name": "digits", "arguments": {"name": "digits"}}}
    assert "digits = load_digits()" in training_snippet(here, settings)
    unknown = training_snippet(info | {"dataset": None, "student": {"model_type": "vim"}}, settings)
    assert "data_dir='real-images'" in unknown and "nn.Conv2d" in unknown
    with pytest.raises(StrictDataclassError, match="hidden_size"):
        training_snippet(info | {"student": info["student"] | {"hidden_size": "16; import os"}}, settings)


# What is pushed.


def test_a_finished_folder_passes(folder):
    write_card(folder)
    check_folder(folder)


def test_a_run_is_pushed_without_what_lies_in_its_folder(processor, tmp_path):
    """Experts, the published set and pictures of the course stay here, whatever they are called; the push says so."""
    require_package("datasets")
    model, run = make_model(processor), tmp_path / "run"
    model.save_pretrained(run)
    processor.save_pretrained(run)
    write_card(run)
    kept = set(files_to_push(run))
    write_bank(run / "my-experts", {"num_experts": 1, "student": {}, "parameters": [], "epochs": []})
    save_distilled_dataset(model, run / "published", processor)
    for name in ("images/step-1.png", "checkpoint-1/model.safetensors"):
        (run / name).parent.mkdir()
        (run / name).write_bytes(b"1234")
    assert set(files_to_push(run)) == kept and "model.safetensors" in kept
    stays = what_stays_here(run)
    assert set(stays) == {"my-experts/", "published/", "images/", "checkpoint-1/"} and stays["images/"] == 4
    write_card(run / "published")
    assert {"images.png", "data/train-00000-of-00001.parquet"} <= set(files_to_push(run / "published"))


@pytest.mark.parametrize(
    "name, content, remark",
    [
        ("README.md", None, "write one with `hf_effml.hub.write_card"),
        ("data/train-00000-of-00001.parquet", None, "no `data/train-00000-of-00001.parquet`"),
        ("data/train-00000-of-00001.parquet", "x", "parquet` is not as it was checked and saved"),
        ("zca.safetensors", "x", "zca.safetensors` is not as it was checked"),
        ("data/more.parquet", "x", "`data/more.parquet` does not belong to the set"),
        ("set.py", "print()", "`set.py` is a program"),
        ("weights.pt", "x", "`weights.pt` may be a pickle"),
        ("distillation.json", "{}", "does not list the set's files"),
        ("README.md", "From /home/alice/photos.", "names a folder of this machine"),
    ],
)
def test_what_is_refused(folder, name, content, remark):
    write_card(folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match="is not ready for the Hub") as error:
        check_folder(folder)
    assert remark in str(error.value)


# The trainer.


def test_trainer_writes_the_set(expert_bank, tmp_path):
    require_package("datasets")
    from hf_effml.distillation.bank.initialization import distilled_from_real
    from hf_effml.trainers.trajectory_matching import TrajectoryMatchingTrainer, TrajectoryMatchingTrainingArguments

    data, bank = expert_bank
    args = TrajectoryMatchingTrainingArguments(
        str(tmp_path / "run"),
        syn_steps=2,
        max_steps=4,
        max_start_epoch=3,
        hub_token="hf_" + "A" * 34,
        eval_strategy="steps",
        eval_steps=2,
        eval_epochs=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        logging_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        lr_img=1.0,
    )
    model = distilled_from_real(data, bank, 1)
    model.config.dataset["name"] = str(tmp_path / "photos")
    trainer = TrajectoryMatchingTrainer(model, args, bank=bank, eval_dataset=data.validation)
    trainer.train()
    folder = trainer.save_dataset(license="mit")
    assert folder == Path(args.output_dir, "dataset")
    training_set, info, processor = load_distilled(folder)
    assert torch.equal(bits(training_set.images), bits(trainer.model.images))
    assert processor.fingerprint == data.processor.fingerprint
    chosen = info["selected"]
    assert chosen["step"] == trainer.state.best_global_step in (2, 4) and chosen["images"] == 15
    assert chosen["accuracy"] == trainer.state.best_metric and chosen["protocol"]["epochs"] == 2
    assert (info["method"], info["steps"], info["seed"], info["processes"]) == ("tm", 4, 42, 1)
    shaping = info["arguments"]
    assert (shaping["syn_steps"], shaping["lr_img"], shaping["lr_y"], shaping["max_steps"]) == (2, 1.0, 2.0, 4)
    assert "output_dir" not in shaping and info["seconds"] > 0 and info["peak_memory_bytes"] > 2**20
    text = (folder / INFO_NAME).read_text() + (folder / "README.md").read_text()
    assert str(tmp_path) not in text and "hf_AAAA" not in text and info["dataset"]["name"] == "photos"
    check_folder(folder)
    # The model's own card.
    trainer.save_model()
    trainer.create_model_card()
    text = Path(args.output_dir, "README.md").read_text()
    assert "Measured on 15 held-out images with 1 fresh network(s) (ConvNet-D2-W4) that were trained" in text
    assert (
        "protocol `tm-short`, 2 epochs" in text and "a distilled data set as a model (3 images of 3 classes)" in text
    )
    assert not re.search(r"more information needed|Speed depends|\{\{", text, flags=re.I)


def test_last_step_where_nothing_was_chosen(expert_bank, tmp_path):
    require_package("datasets")
    from hf_effml.distillation.bank.initialization import distilled_from_real
    from hf_effml.trainers.trajectory_matching import TrajectoryMatchingTrainer, TrajectoryMatchingTrainingArguments

    data, bank = expert_bank
    args = TrajectoryMatchingTrainingArguments(str(tmp_path), max_start_epoch=3, report_to="none", use_cpu=True)
    trainer = TrajectoryMatchingTrainer(distilled_from_real(data, bank, 1), args, bank=bank)
    folder = trainer.save_dataset(tmp_path / "elsewhere")
    assert load_distilled(folder).info["selected"] == {"step": 0, "rule": "the last one"}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("images", torch.nan, "`images` in the `model.safetensors` of `.*` holds 1 value.* not finite"),
        ("labels", torch.inf, "`labels` in the `model.safetensors`"),
        ("lr", torch.nan, "`lr` in the `model.safetensors`"),
        ("lr", -1.0, "`lr` in the `model.safetensors` of `.*` must be positive"),
        ("images", None, "lack `images`"),
    ],
)
def test_a_model_that_cannot_be_trained_on_is_refused(tmp_path, name, value, said):
    make_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name].view(-1)[0] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said):
        load_distilled(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ([], "does not describe a distilled set"),
        ({"classes": 3}, "`classes` in `.*distillation.json` must be a list of names; got 3"),
        ({"results": "good"}, "`results` in .* must be a list of reports"),
        ({"learning_rate": float("nan")}, "`learning_rate` in .* must be a positive number; got nan"),
        ({"protocol": {"augmentation": None}}, "`protocol` in .* must be a protocol with its `augmentation`"),
        ({"image_shape": [3, 8]}, "`image_shape` in .* must be channels, height and width"),
    ],
)
def test_descriptions_of_another_type_are_named(folder, change, said):
    info = json.loads((folder / INFO_NAME).read_text())
    (folder / INFO_NAME).write_text(json.dumps(change if isinstance(change, list) else info | change))
    for use in (load_distilled, render_card, lambda path: add_evaluations(path, [])):
        with pytest.raises(ValueError, match=said):
            use(folder)
