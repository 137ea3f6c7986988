"""Whitening: the official numbers, its properties, and saving it with its matrices."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from helpers import assert_close, run_python
from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.distillation.image_processing_zca import ZCA_WEIGHTS_NAME, ZCAImageProcessor


VECTORS = Path(__file__).parents[1] / "vectors" / "distillation"
TENSORS = load_file(VECTORS / "zca.safetensors")
SETTINGS = json.loads((VECTORS / "zca.json").read_text())["settings"]


def photos(count=60, size=(4, 5), channels=3, seed=0):
    """Neighbouring pixels alike, as in photographs."""
    noise = torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(seed))
    return (0.5 + 0.15 * noise.cumsum(-1) / 2).clamp(0, 1)


@pytest.fixture(scope="module")
def registered():
    """As `hf_effml.distillation` does it."""
    both = {"pil": ZCAImageProcessor, "torchvision": ZCAImageProcessor}
    AutoImageProcessor.register(ConvNetConfig, image_processor_classes=both, exist_ok=True)
    ZCAImageProcessor.register_for_auto_class("AutoImageProcessor")


def test_official_numbers():
    processor = ZCAImageProcessor.from_images(TENSORS["images"], epsilon=SETTINGS["eps"])
    for ours, theirs in (("mean", "mean"), ("matrix", "matrix"), ("inverse", "matrix_inverse")):
        assert_close(processor.matrices[ours].flatten(), TENSORS[theirs].flatten(), 1e-6)
    for images, whitened in (("images", "whitened"), ("test_images", "test_whitened")):
        torch.testing.assert_close(processor(TENSORS[images])["pixel_values"], TENSORS[whitened], rtol=2e-4, atol=2e-5)
    assert_close(processor.unwhiten(TENSORS["whitened"]), TENSORS["unwhitened"], 1e-5)


def test_whitened_covariance():
    """It is S / (S + epsilon) along the directions of the images' own covariance."""
    images = photos(500)
    whitened = ZCAImageProcessor.from_images(images, epsilon=0.02)(images)["pixel_values"]
    assert whitened.dtype == torch.float32
    values, vectors = torch.linalg.eigh(images.flatten(1).double().T.cov())
    covariance = vectors.T @ whitened.flatten(1).double().T.cov() @ vectors
    assert_close(covariance, torch.diag(values / (values + 0.02)), 1e-5)
    assert_close(whitened.mean(0), torch.zeros(3, 4, 5), 1e-5)


def test_chunks_change_nothing(monkeypatch):
    images = photos(50)
    whole = ZCAImageProcessor.from_images(images)
    monkeypatch.setattr("hf_effml.distillation.image_processing_zca._CHUNK", 7)
    parts = ZCAImageProcessor.from_images(images)
    assert_close(parts.matrices, whole.matrices, 1e-6)
    whitened = parts(images)["pixel_values"]
    monkeypatch.undo()
    assert_close(whitened, parts(images)["pixel_values"], 1e-6)


@pytest.mark.parametrize("do_whiten", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_inverse(do_whiten, channels):
    # Fewer images than values: most directions have no variance.
    images = photos(20, channels=channels)
    processor = ZCAImageProcessor.from_images(images, num_channels=channels, do_whiten=do_whiten)
    others = photos(6, channels=channels, seed=1)
    values = processor(others)["pixel_values"]
    assert (values - others).abs().max() > 0.1
    assert_close(processor.unwhiten(values), others, 1e-5)
    assert_close(processor.unwhiten(values[2]), others[2], 1e-5)
    assert_close(processor.unwhiten(values.view(2, 3, *values.shape[1:])).flatten(0, 1), others, 1e-5)
    far = values * 9
    assert processor.unwhiten(far).max() > 1.01 and processor.unwhiten(far).min() < -0.01
    assert_close(processor.unwhiten(far, clip=True), processor.unwhiten(far).clamp(0, 1))


def test_normalisation_takes_the_statistics_of_the_images():
    images = photos(100)
    processor = ZCAImageProcessor.from_images(images, do_whiten=False)
    values = processor(images)["pixel_values"]
    assert_close(values.mean((0, 2, 3)), torch.zeros(3), 1e-5)
    assert_close(values.std((0, 2, 3)), torch.ones(3), 1e-5)
    given = ZCAImageProcessor(do_whiten=False, image_mean=0.5, image_std=[0.1, 0.2, 0.4])
    assert given.is_fitted and given.matrices == {}
    assert_close(given(images)["pixel_values"][:, 2], (images[:, 2] - 0.5) / 0.4, 1e-6)
    assert given.fit(images).image_std == [0.1, 0.2, 0.4]
    before = processor.image_mean
    assert processor.fit(photos(100, seed=1)).image_mean != before
    constant = ZCAImageProcessor.from_images(torch.full((3, 1, 2, 2), 0.5), num_channels=1, do_whiten=False)
    assert constant.image_std == [1.0]


def test_takes_the_size_it_was_fitted_to():
    processor = ZCAImageProcessor.from_images(photos(8))
    assert processor.size == {"height": 4, "width": 5}
    mixed = [np.zeros((9, 7, 3), dtype=np.uint8), np.zeros((4, 5), dtype=np.uint8)]
    assert processor(mixed)["pixel_values"].shape == (2, 3, 4, 5)
    assert ZCAImageProcessor.from_images(photos(8), size=3)(photos(1))["pixel_values"].shape == (1, 3, 3, 3)
    assert isinstance(processor(photos(2), return_tensors="np")["pixel_values"], np.ndarray)
    assert_close(processor.preprocess(images=photos(2))["pixel_values"], processor.whiten(photos(2)))


def test_differentiable():
    processor = ZCAImageProcessor.from_images(photos(30, (2, 2)))
    values = photos(2, (2, 2), seed=1).double().requires_grad_()
    for function in (processor.whiten, processor.unwhiten):
        assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("do_whiten", [True, False])
def test_round_trip_is_exact(do_whiten, tmp_path, registered):
    images = photos(30)
    processor = ZCAImageProcessor.from_images(images, do_whiten=do_whiten, resize_mode="squash", epsilon=0.03)
    files = processor.save_pretrained(tmp_path)
    assert (tmp_path / ZCA_WEIGHTS_NAME).exists() == do_whiten == (len(files) == 2)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "ZCAImageProcessor" and saved["size"] == {"height": 4, "width": 5}
    loads = (ZCAImageProcessor.from_pretrained, AutoImageProcessor.from_pretrained)
    for loaded in [load(source) for load in loads for source in (tmp_path, str(tmp_path))]:
        assert type(loaded) is ZCAImageProcessor
        assert loaded.to_dict() == processor.to_dict() and loaded.fingerprint == processor.fingerprint
        assert bool(loaded.matrices) == do_whiten
        for name, value in processor.matrices.items():
            assert_close(loaded.matrices[name], value)
        assert_close(loaded(images)["pixel_values"], processor(images)["pixel_values"])
    assert (
        ZCAImageProcessor.from_pretrained(tmp_path / "preprocessor_config.json").fingerprint == processor.fingerprint
    )
    loaded.save_pretrained(tmp_path / "again")
    assert ZCAImageProcessor.from_pretrained(tmp_path / "again").fingerprint == processor.fingerprint


def test_loads_from_the_local_cache(tmp_path, registered):
    """As the Hub's client lays it out, without asking any server."""
    processor = ZCAImageProcessor.from_images(photos(30))
    repository, commit = tmp_path / "models--alice--white", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    processor.save_pretrained(repository / "snapshots" / commit)
    where = {"cache_dir": tmp_path, "local_files_only": True}
    for load in (ZCAImageProcessor.from_pretrained, AutoImageProcessor.from_pretrained):
        assert load("alice/white", **where).fingerprint == processor.fingerprint
        assert load("alice/white", revision=commit, **where).fingerprint == processor.fingerprint
        (repository / "snapshots" / commit / ZCA_WEIGHTS_NAME).rename(tmp_path / "away")
        with pytest.raises(OSError):
            load("alice/white", **where)
        (tmp_path / "away").rename(repository / "snapshots" / commit / ZCA_WEIGHTS_NAME)


def test_pushes_all_its_files(tmp_path, monkeypatch, registered):
    """What `push_to_hub` uploads is what `save_pretrained` wrote."""
    pushed = {}

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return type("Repository", (), {"repo_id": f"alice/{repo_id}"})

        def create_commit(self, repo_id, operations, **kwargs):
            pushed[repo_id] = {operation.path_in_repo for operation in operations}

        def __getattr__(self, name):
            return lambda *arguments, **kwargs: None

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: ModelCard("A card."))
    processor = ZCAImageProcessor.from_images(photos(30))
    processor.push_to_hub("pushed")
    processor.save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert pushed.keys() == {"alice/pushed", "alice/saved"}
    for files in pushed.values():
        assert {"preprocessor_config.json", ZCA_WEIGHTS_NAME, "image_processing_zca.py", "image_pixels.py"} <= files


def test_loads_without_the_package(tmp_path, registered):
    processor = ZCAImageProcessor.from_images(photos(30))
    processor.save_pretrained(tmp_path / "folder")
    torch.save(processor(photos(2, seed=1))["pixel_values"], tmp_path / "expected.pt")
    torch.save(photos(2, seed=1), tmp_path / "images.pt")
    code = (
        "import sys, torch\n"
        "from transformers.models.auto.image_processing_auto import AutoImageProcessor as Auto\n"
        "for source in ('folder', 'again'):\n"
        "    processor = Auto.from_pretrained(source, trust_remote_code=True)\n"
        "    assert type(processor).__module__.startswith('transformers_modules'), type(processor).__module__\n"
        "    whitened = processor(torch.load('images.pt'))['pixel_values']\n"
        "    assert torch.equal(whitened, torch.load('expected.pt'))\n"
        "    processor.save_pretrained('again')\n"
        "print(processor.fingerprint)"
    )
    assert processor.fingerprint in run_python(code, cwd=tmp_path, without_package=True)


def test_fingerprints():
    images = photos(30)
    base = {"images": images, "size": None}
    changes = ({}, {"images": photos(30, seed=1)}, {"size": 4}, {"do_whiten": False}, {"epsilon": 0.2})
    changes += ({"resize_mode": "squash"}, {"num_channels": 1}, {"do_whiten": False, "images": photos(30, seed=1)})
    found = [ZCAImageProcessor.from_images(**{**base, **change}).fingerprint for change in changes]
    assert len(set(found)) == len(found)
    assert ZCAImageProcessor.from_images(**base).fingerprint == found[0]


def test_unfitted(tmp_path):
    processor = ZCAImageProcessor(size=4)
    for use in (processor, processor.unwhiten, lambda images: processor.save_pretrained(tmp_path)):
        with pytest.raises(RuntimeError, match="has not seen training images yet"):
            use(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="at least two images; got 1"):
        processor.fit(torch.zeros(1, 3, 4, 4))


def test_matrices_of_another_size(tmp_path):
    ZCAImageProcessor.from_images(photos(30)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"for images of 60 values; 3 channels of \(8, 8\) pixels have 192"):
        ZCAImageProcessor.from_pretrained(tmp_path, size=8)
    processor = ZCAImageProcessor.from_pretrained(tmp_path)
    for shape in ((2, 3, 5, 4), (2, 1, 4, 5), (4, 5)):
        with pytest.raises(ValueError, match="must have the shape"):
            processor.unwhiten(torch.zeros(shape))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"size": 0}, "`size` must be one positive number"),
        ({"size": (4, 4, 4)}, "`size` must be one positive number"),
        ({"size": {"shortest_edge": 4}}, "`size` must be one positive number"),
        ({"resize_mode": "pad"}, '"crop" or "squash"; got \'pad\''),
        ({"num_channels": 4}, "`num_channels` must be 1 or 3; got 4"),
        ({"epsilon": 0}, "`epsilon` must be positive"),
        ({"image_mean": 0.5}, "both `image_mean` and `image_std`"),
        ({"image_mean": [0.5], "image_std": [1.0]}, "one number per channel, 3; got 1"),
        ({"image_mean": 0, "image_std": 0}, "`image_std` must be positive"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ZCAImageProcessor(**settings)
    with pytest.raises(TypeError, match="no setting `do_witen`"):
        ZCAImageProcessor(do_witen=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"matrix": None}, "zca.safetensors` has no tensor `matrix`.*it holds inverse, mean"),
        ({"mean": torch.full((12,), torch.nan)}, "`mean` in `.*zca.safetensors` holds values that are not finite"),
        ({"inverse": torch.zeros(3, 3)}, r"`inverse` in `.*` must be float32 of shape \(12, 12\)"),
        ({"matrix": torch.zeros(12, 12, dtype=torch.float64)}, "`matrix` in .* got torch.float64"),
    ],
)
def test_damaged_matrices_are_refused(tmp_path, change, said):
    ZCAImageProcessor.from_images(torch.rand(20, 3, 2, 2)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / ZCA_WEIGHTS_NAME) | change
    save_file({name: value for name, value in tensors.items() if value is not None}, tmp_path / ZCA_WEIGHTS_NAME)
    with pytest.raises(ValueError, match=said):
        ZCAImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"image_mean": [NaN, 0, 0], "image_std": [1, 1, 1]}', '{"size": "a"}']
)
def test_damaged_settings_are_refused(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match="preprocessor_config.json|`image_mean` must be finite|`size` must be"):
        ZCAImageProcessor.from_pretrained(tmp_path)


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    processor = ZCAImageProcessor.from_images(torch.rand(20, 3, 2, 2))
    processor.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(tensors, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_effml.distillation.image_processing_zca.save_file", half)
    with pytest.raises(OSError, match="No space left"):
        ZCAImageProcessor.from_images(torch.rand(20, 3, 2, 2)).save_pretrained(tmp_path)
    monkeypatch.setattr(Path, "write_text", lambda path, *_, **__: half(None, path))
    with pytest.raises(OSError, match="No space left"):
        ZCAImageProcessor.from_images(torch.rand(20, 3, 2, 2), do_whiten=False).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
