"""Multiply-adds: the official formula on the official schedules, and the work that is really done."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import pixels
from hf_effml import DyVMConfig, VimConfig
from hf_effml.vim.configuration_rmeeto import RMeeToVimConfig, merge_schedule, merging_blocks
from hf_effml.vim.evaluation.complexity import count_multiply_adds, tokens_per_block
from hf_effml.vim.modeling_rmeeto import RMeeToVimForImageClassification


VECTORS = Path(__file__).parents[1] / "vectors" / "rmeeto"
SCHEDULES = [case for case in json.loads((VECTORS / "schedules.json").read_text()) if "official_flops" in case]
SETTINGS = json.loads((VECTORS / "manifest.json").read_text())["files"]["vim_tiny.safetensors"]["settings"]
WIDTHS = {"tiny": 192, "small": 384, "base": 768}


def nominal_lengths(config):
    """What the official formula supposes: r tokens less at every merge, even when none are left."""
    blocks, tokens = merging_blocks(config), config.num_patches + 1
    return [tokens - config.merge_r * sum(b <= block for b in blocks) for block in range(config.num_hidden_layers)]


@pytest.mark.parametrize("case", SCHEDULES, ids=lambda case: f"{case['model']}-{case['r']}")
def test_official_formula(case):
    config = RMeeToVimConfig(hidden_size=WIDTHS[case["model"]], merge_r=case["r"], num_labels=1000)
    count = count_multiply_adds(config, nominal_lengths(config))
    assert count["paper_layers"] == case["official_layer_flops"]
    assert count["paper_total"] == case["official_flops"]


@pytest.mark.parametrize("case", SETTINGS, ids=lambda case: case["name"])
def test_official_formula_on_tiny_models(case):
    metric = case.get("metric", "X")
    config = RMeeToVimConfig(
        image_size=48,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=8,
        state_size=8,
        num_labels=10,
        merge_r=case["r"],
        merge_interval=case.get("interval", 2),
        merge_offset=int(case.get("odd", False)),
        merge_metric="hidden" if metric == "X" else metric,
    )
    count = count_multiply_adds(config, nominal_lengths(config))
    assert count["paper_layers"] == case["official_layer_flops_formula"]
    assert count["paper_total"] == case["official_flops_formula"]


@pytest.mark.parametrize("width, work, layers", [(192, 1.82, 1.45), (384, 5.91, 5.08), (768, 20.89, 18.87)])
def test_both_directions(width, work, layers):
    """The paper's baselines count one direction."""
    count = count_multiply_adds(VimConfig(hidden_size=width, num_labels=1000))
    assert round(count["total"] / 1e9, 2) == work
    assert round(count["paper_layers"] / 1e9, 2) == layers
    assert count["matching"] == 0 and count["paper_total"] == count["paper_layers"]


def test_matrix_products_are_counted_as_run():
    config = RMeeToVimConfig(
        image_size=32, patch_size=4, hidden_size=32, num_hidden_layers=5, state_size=4, num_labels=7, merge_r=9
    )
    model = RMeeToVimForImageClassification(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels(config, batch=1))
    count = count_multiply_adds(config)
    products = sum(count[part] for part in ("embedding", "projections", "convolutions", "head", "matching"))
    # The counter sees the matrix products of the scan too, one multiply-add per token, channel, state and direction.
    scan = 2 * sum(merge_schedule(config)) * config.intermediate_size * config.state_size
    measured = sum(counter.get_flop_counts()["Global"].values()) / 2
    assert products <= measured <= products + scan + count["convolutions"]


@pytest.mark.parametrize("matching, pairs", [("bipartite", 98 * 98), ("local", 195), ("random", 0)])
def test_matching(matching, pairs):
    config = RMeeToVimConfig(num_hidden_layers=3, merge_r=11, merge_matching=matching)
    assert count_multiply_adds(config)["matching"] == pairs * 192
    assert count_multiply_adds(RMeeToVimConfig(num_hidden_layers=3))["matching"] == 0


@pytest.mark.parametrize(
    "width, tokens, scans, giga",
    [
        (192, None, 1.0, 1.449),
        (384, None, 1.0, 5.0766),
        (768, None, 1.0, 18.8678),
        (192, 0.9, 0.8, 1.2148),
        (384, 0.7, 0.8, 3.2394),
        (384, 0.7, 1.0, 3.3454),
        (768, 0.7, 0.7, 12.0416),
    ],
)
def test_numbers_of_dyvm(width, tokens, scans, giga):
    """Those of the official counter; without tokens the plain Vim."""
    fields = {"hidden_size": width, "num_labels": 1000}
    config = VimConfig(**fields) if tokens is None else DyVMConfig(**fields, token_keep_ratio=tokens)
    assert count_multiply_adds(config, block_keep_ratio=scans)["paper_dyvm"] / 1e9 == pytest.approx(giga, abs=5e-5)


def test_dyvm_counts_what_it_adds_and_saves():
    config = DyVMConfig(token_keep_ratio=0.7)
    lengths = tokens_per_block(config)
    assert lengths == [197] * 6 + [138] * 6 + [97] * 6 + [68] * 6
    everything, fewer = count_multiply_adds(config), count_multiply_adds(config, block_keep_ratio=0.5)
    assert fewer["scan"] == everything["scan"] / 2 and fewer["convolutions"] == everything["convolutions"] / 2
    assert fewer["gates"] == everything["gates"] == 24 * 2 * 4 * 192
    assert fewer["predictors"] > 0
    random = DyVMConfig(token_keep_ratio=0.7, token_selection="random", enable_block_selection=False)
    assert count_multiply_adds(random)["predictors"] == count_multiply_adds(random)["gates"] == 0
    assert tokens_per_block(DyVMConfig(enable_token_pruning=False), 9) == [10] * 24
