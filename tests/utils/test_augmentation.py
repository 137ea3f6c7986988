"""Augmentation that depends on its seed alone, and mixed batches."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import require_package
from hf_effml import Augmentation, MixupCollator, vim_image_processor
from hf_effml.utils import augmentation as module
from hf_effml.utils.augmentation import seeded


def rows(count, seed=0):
    pixels = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(pixels)]


def test_shift_moves_and_fills_with_black():
    processor = vim_image_processor(8, crop_share=1.0)
    shift = Augmentation(max_shift=2).transform(processor)
    white = processor(Image.new("RGB", (8, 8), "white"), return_tensors="pt")["pixel_values"][0]
    black = processor(Image.new("RGB", (8, 8), "black"), return_tensors="pt")["pixel_values"][0]
    gaps = set()
    for seed in range(300):
        moved = shift(white, seed)
        is_black = torch.isclose(moved, black, atol=1e-5).all(0)
        assert torch.allclose(moved[:, ~is_black], white[:, ~is_black], atol=1e-5)
        top, left = is_black.all(1).sum().item(), is_black.all(0).sum().item()
        assert is_black.sum() == 64 - (8 - top) * (8 - left)
        gaps.add((top, left))
    assert len(gaps) == 9 and max(gaps) == (2, 2)


def test_flip_mirrors_about_half():
    flip = Augmentation(horizontal_flip=True).transform(vim_image_processor(8, crop_share=1.0))
    image = torch.arange(192.0).view(3, 8, 8)
    mirrored = [torch.equal(flip(image, seed), image.flip(-1)) for seed in range(200)]
    assert 60 < sum(mirrored) < 140
    assert all(torch.equal(flip(image, seed), image) for seed, found in enumerate(mirrored) if not found)


def test_nothing_to_do_is_none():
    assert Augmentation().transform(vim_image_processor(8, crop_share=1.0)) is None
    assert Augmentation().collator(10) is None
    assert not Augmentation(max_shift=1, horizontal_flip=True).needs_timm


def test_timm_transform_depends_on_the_seed_alone():
    require_package("timm")
    policy = Augmentation(
        auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, random_erasing=1.0, horizontal_flip=True
    )
    augment = policy.transform(vim_image_processor(32, crop_share=1.0))
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 40, 3), dtype=np.uint8))
    first = augment(image, 5)
    random.random(), np.random.rand(), torch.rand(1)
    assert first.shape == (3, 32, 32)
    assert torch.equal(augment(image, 5), first) and not torch.equal(augment(image, 6), first)


def test_without_timm_the_extra_is_named(monkeypatch):
    def absent(name):
        raise ImportError('Run `pip install "hf-effml[vision]"`.')

    monkeypatch.setattr(module, "require", absent)
    for make in (
        lambda: Augmentation(color_jitter=0.4).transform(vim_image_processor(8, crop_share=1.0)),
        lambda: MixupCollator(10),
    ):
        with pytest.raises(ImportError, match="vision"):
            make()


def test_seeded_puts_the_generators_back():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with seeded(2**40 + 1):
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
    with seeded(2**40 + 1):
        assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_mixed_batches_have_soft_labels(count):
    require_package("timm")
    batch = MixupCollator(5, label_smoothing=0.1)(rows(count))
    assert batch["pixel_values"].shape == (count, 3, 8, 8) and batch["labels"].shape == (count, 5)
    torch.testing.assert_close(batch["labels"].sum(1), torch.ones(count))
    if count % 2:
        # The odd one out stays as it is.
        assert torch.equal(batch["pixel_values"][-1], rows(count)[-1]["pixel_values"])
        assert batch["labels"][-1].max() == pytest.approx(0.92) and batch["labels"][-1].min() == pytest.approx(0.02)


def test_images_are_mixed_as_their_labels():
    require_package("timm")
    data = rows(4)
    batch = MixupCollator(5, mixup=1.0, cutmix=0.0, label_smoothing=0.0)(data)
    share = batch["labels"][0, 0].item()
    assert 0 < share < 1
    expected = share * data[0]["pixel_values"] + (1 - share) * data[3]["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"][0], expected, atol=1e-5, rtol=0)


def test_mixing_depends_on_the_batch_alone():
    require_package("timm")
    collator, before = MixupCollator(5), np.random.get_state()[1].copy()
    first = collator(rows(4))
    np.random.rand(7)
    second, other = collator(rows(4)), collator(rows(4, seed=1))
    assert torch.equal(first["labels"], second["labels"]) and torch.equal(
        first["pixel_values"], second["pixel_values"]
    )
    assert not torch.equal(first["labels"].max(1).values, other["labels"].max(1).values)
    np.random.set_state(("MT19937", before, 624, 0, 0.0))


def test_mixing_needs_something_to_do():
    require_package("timm")
    with pytest.raises(ValueError, match="`mixup` or `cutmix` must be above 0; got 0 and 0"):
        MixupCollator(5, 0, 0)
