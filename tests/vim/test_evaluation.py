"""One loop measures plain, merging and dropping Vims; rows, cards and refusals."""

import pytest
import torch

from helpers import require_package, tiny_vim_fields
from hf_effml import (
    DyVMForImageClassification,
    RMeeToVimForImageClassification,
    VimConfig,
    VimForImageClassification,
    apply_token_merging,
    draw_patches,
    evaluate_vim,
    remove_token_merging,
    vim_image_processor,
)
from hf_effml.utils.image_data import load_image_data
from hf_effml.vim.evaluation.complexity import count_multiply_adds
from hf_effml.vim.evaluation.measure import amount_of_work, classify, kept_shares


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    vim = VimForImageClassification(VimConfig(**tiny_vim_fields(num_hidden_layers=5, num_labels=4))).eval()
    merged = RMeeToVimForImageClassification.from_vim(vim, merge_r=4)
    dropping = DyVMForImageClassification.from_vim(vim, token_keep_ratio=0.5).eval()
    return {"dense": vim, "merged": merged, "dropping": dropping}


@pytest.fixture(scope="module")
def images(models):
    config, generator = models["dense"].config, torch.Generator().manual_seed(1)
    shape = (7, config.num_channels, config.image_size, config.image_size)
    return [
        {"pixel_values": image, "labels": index % 4}
        for index, image in enumerate(torch.randn(shape, generator=generator))
    ]


def test_rows_are_what_the_models_do(models, images):
    report = evaluate_vim(models, images, batch_size=3, rounds=1, where="a desk")
    assert list(report.rows) == list(models)
    pixels, labels = (torch.stack([torch.as_tensor(row[key]) for row in images]) for key in images[0])
    for name, model in models.items():
        with torch.no_grad():
            output = model(pixels)
        row = report.rows[name]
        assert row["accuracy"] == pytest.approx((output.logits.argmax(-1) == labels).float().mean().item())
        shares = getattr(output, "block_keep_ratio", None)
        assert row["block_keep_ratio"] == pytest.approx(1.0 if shares is None else shares.mean().item())
        assert row["latency"] > 0
    dense = report.rows["dense"]
    assert dense["speed_up"] == 1 and dense["tokens"] == dense["tokens"] // 1
    assert all(report.rows[name]["multiply_adds"] < dense["multiply_adds"] for name in ("merged", "dropping"))
    names = [result.name for result in report.card_results("dropping", beside="dense")]
    assert names[0] == "Accuracy" and "Share of the scans that run" in names
    assert names[-1] == "Latency (ms per image, a desk)"


def test_work_follows_the_switches(models):
    vim, merged, dropping = (VimForImageClassification(models["dense"].config), models["merged"], models["dropping"])
    full, tokens = amount_of_work(vim)
    apply_token_merging(vim, r=4)
    assert amount_of_work(vim) == amount_of_work(merged)
    remove_token_merging(vim)
    assert amount_of_work(vim) == (full, tokens)
    assert kept_shares(dropping) and not kept_shares(vim)
    dropping.set_pruning(False)
    off, all_tokens = amount_of_work(dropping)
    assert (off["total"], all_tokens, kept_shares(dropping)) == (full["total"], tokens, [])
    dropping.set_pruning(True)
    assert amount_of_work(dropping, 0.5)[0] == count_multiply_adds(dropping.config, block_keep_ratio=0.5)


def test_training_mode_and_no_images_are_refused(models, images):
    fresh = VimForImageClassification(models["dense"].config).train()
    with pytest.raises(ValueError, match="in evaluation mode; call `eval\\(\\)` of fresh"):
        evaluate_vim({"dense": models["dense"], "fresh": fresh}, images)
    with pytest.raises(ValueError, match="at least one image"):
        evaluate_vim({"dense": models["dense"]}, [])
    assert 0 <= classify(models["dense"], images)[0] <= 1


@pytest.mark.parametrize("kind", ["merged", "dropping"])
def test_sheet_of_images(tmp_path, kind):
    require_package("sklearn")
    require_package("matplotlib")
    processor = vim_image_processor(16, crop_share=1.0)
    data = load_image_data("digits", processor)
    vim = VimForImageClassification(VimConfig(**tiny_vim_fields(num_hidden_layers=5, num_labels=10))).eval()
    changed = {
        "merged": lambda: RMeeToVimForImageClassification.from_vim(vim, merge_r=2),
        "dropping": lambda: DyVMForImageClassification.from_vim(vim, token_keep_ratio=0.5).eval(),
    }
    draw_patches(changed[kind](), data, processor, tmp_path / "sheet.png", indices=(0, 3))
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
