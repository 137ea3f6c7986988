"""The program that scores data, on folders as they are built; with a real network where there is one."""

import io
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from helpers import randomized, require_package
from hf_effml.comp_dd import SUBSETS, MapNetwork, class_complexity, score_images, subset_complexity
from hf_effml.scripts import comp_dd_score
from hf_effml.utils.image_data import load_image_processor
from hf_effml.utils.sources.split_files import find_data


SAMPLE = "images/imagenet_samples/comp_dd_classes.parquet"


def build(folder, config, classes, images=2):
    datasets = require_package("datasets")
    names, synsets = SUBSETS[config].names[:classes], SUBSETS[config].synsets[:classes]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    random = torch.Generator().manual_seed(len(config))
    arrays = torch.randint(0, 256, (classes * images, 24, 32, 3), generator=random, dtype=torch.uint8).numpy()
    pictures = [Image.fromarray(array) for array in arrays]
    for split in ("train", "validation"):
        own = [picture.rotate(180) for picture in pictures] if split == "validation" else pictures
        rows = datasets.Dataset.from_dict({"image": own, "label": [*range(classes)] * images}, features=features)
        (folder / config).mkdir(parents=True, exist_ok=True)
        rows.to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
    (folder / config / "comp_dd.json").write_text(json.dumps({"config": config, "synsets": list(synsets)}))
    lines = [
        f"- config_name: {path.name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {path.name}/{split}-*\n" for split in ("train", "validation"))
        for path in sorted(folder.iterdir())
        if path.is_dir()
    ]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(lines) + "---\n")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A built folder of two subsets, and a network that knows some classes of theirs."""
    folder = tmp_path_factory.mktemp("score")
    for config in ("bird_easy", "bird_hard"):
        build(folder / "built", config, 3)
    known = [*SUBSETS["bird_easy"].synsets[:3], *SUBSETS["bird_hard"].synsets[:3]]
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    config.id2label = dict(enumerate(known))
    randomized(ResNetForImageClassification(config)).save_pretrained(folder / "network")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "network")
    return folder


def test_all_subsets_of_a_folder(places, tmp_path):
    groups = tmp_path / "groups.yaml"
    groups.write_text(json.dumps({"bird": [*SUBSETS["bird_easy"].names[:3], SUBSETS["bird_hard"].names[0]]}))
    options = ["--model", str(places / "network"), "--output_dir", str(tmp_path / "out"), "--groups", str(groups)]
    with pytest.warns(UserWarning, match="`k` is 2 instead of 5"):
        found = comp_dd_score.main(
            [str(places / "built"), *options, "--threshold", "0.5", "0.3", "--k", "5", "--target", "label"]
        )
    rows = {row["name"]: row for row in found["rows"]}
    assert [*rows] == ["bird_easy", "bird_hard"] and rows["bird_hard"]["published"] == 74.5
    assert all(row["complexity_0.3"] <= row["complexity_0.5"] and row["images"] == 6 for row in rows.values())
    assert len(found["classes"]) == 6 and [*found["subsets"]] == ["bird_easy", "bird_hard"]
    assert "categories" in found["notes"][0] and len(found["subsets"]["bird_hard"]) == 2
    table = require_package("datasets").Dataset.from_parquet(str(tmp_path / "out" / "comp_dd_score.parquet"))
    assert len(table) == 12 and table["subset"][6] == "bird_hard" and {"right", "complexity_0.3"} <= {*table.features}
    assert json.loads((tmp_path / "out" / "comp_dd_score.json").read_text())["rows"] == found["rows"]


def test_one_subset_and_two_networks(places, tmp_path):
    model = str(places / "network")
    found = comp_dd_score.main(
        [f"{places / 'built'}:bird_hard", "--model", model, model, "--output_dir", str(tmp_path), "--figure", "False"]
    )
    assert [row["name"] for row in found["rows"]] == ["bird_hard"] and "network_2" in found["classes"][0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--threshold", "1"], r"\(0, 1\); got 1.0"),
        (["--layer", "nowhere"], "'nowhere' is not in ResNet"),
        (["--groups", "groups.json"], "`penguin` is no class of the data"),
        (["--no_model"], "must name an image classifier"),
        (["--model", "empty"], "holds no `config.json`"),
    ],
)
def test_bad_input_is_refused_before_scoring(places, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    Path("groups.json").write_text('{"bird": ["penguin", "flamingo"]}')
    Path("empty").mkdir()
    model = ["--model", str(places / "network")] if "--model" not in options else []
    if "--no_model" in options:
        model, options = [], []
    with pytest.raises(ValueError, match=said):
        comp_dd_score.main([str(places / "built"), *model, *options])
    assert not Path("comp-dd-scores").exists()


@pytest.mark.slow
def test_real_network_finds_hard_categories_harder():
    require_package("timm")
    usual = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "hf-effml-efficientnet-lite0").expanduser()
    folder, sample = Path(os.environ.get("HF_EFFML_EFFICIENTNET", usual)), find_data(SAMPLE)
    if not (folder / "model.safetensors").is_file() or sample is None:
        pytest.skip(f"needs an ImageNet classifier in `{folder}` and `{SAMPLE}` below $HF_EFFML_DATA")
    from transformers import AutoModelForImageClassification

    by_class = {
        row["label"]: row["image"] for row in require_package("pyarrow.parquet").read_table(sample).to_pylist()
    }
    order = [index for subset in SUBSETS.values() for index in subset.indices]
    data = [{"image": Image.open(io.BytesIO(by_class[i]["bytes"])), "label": n} for n, i in enumerate(order)]
    synsets = [synset for subset in SUBSETS.values() for synset in subset.synsets]
    network = MapNetwork(AutoModelForImageClassification.from_pretrained(folder), load_image_processor(folder))
    scores = score_images(data, [network], synsets, thresholds=(0.3, 0.5), batch_size=32)
    assert scores.right[0].mean() > 0.75
    for values in scores.complexity.values():
        table = class_complexity(values, scores.labels, synsets)
        means = {name: subset_complexity(table, subset.synsets)[0] for name, subset in SUBSETS.items()}
        categories = {subset.category for subset in SUBSETS.values()}
        assert len(categories) == 8 and sum(means[f"{c}_hard"] > means[f"{c}_easy"] for c in categories) >= 5
