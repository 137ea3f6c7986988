"""R-MeeTo's configuration: schedules of the official code, amounts and their limits, bad values, round trips."""

import json
import logging
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

from helpers import tiny_vim_fields
from hf_effml import VimConfig
from hf_effml.vim.configuration_rmeeto import (
    RMeeToVimConfig,
    merge_schedule,
    merging_blocks,
    reduction_ratio,
    requested_merges,
)
from hf_effml.vim.modeling_rmeeto import TokenMerger


VECTORS = Path(__file__).parents[1] / "vectors" / "rmeeto"
SCHEDULES = json.loads((VECTORS / "schedules.json").read_text())
SETTINGS = json.loads((VECTORS / "manifest.json").read_text())["files"]["vim_tiny.safetensors"]["settings"]


def config_of(case, **fields):
    compare = case.get("compare")
    return RMeeToVimConfig(
        merge_r=case["r"],
        merge_interval=case.get("interval", 2),
        merge_offset=int(case.get("odd", False)),
        merge_legacy_last_target=None if compare is None else 197 - 11 * compare,
        **fields,
    )


@pytest.mark.parametrize("case", SCHEDULES, ids=lambda c: f"{c['model']}-{c['r']}-{c['interval']}-{c['odd']}")
def test_official_schedules(case):
    schedule = merge_schedule(config_of(case))
    assert schedule == case["tokens_per_layer"]
    assert round(reduction_ratio(schedule), 4) == case["reduction_ratio"]


@pytest.mark.parametrize("case", SETTINGS, ids=lambda case: case["name"])
def test_tiny_schedules(case):
    config = config_of(case, image_size=48, patch_size=8, num_hidden_layers=8)
    assert merge_schedule(config) == case["tokens_per_layer"]


@pytest.mark.parametrize("ratio, r", [(0.14, 5), (0.28, 10), (0.31, 11), (0.42, 15), (0.54, 20), (0.001, 0)])
def test_target_ratio_is_solved(ratio, r):
    """The ratios in the paper's figures."""
    config = RMeeToVimConfig(merge_target_ratio=ratio)
    assert merge_schedule(config) == merge_schedule(RMeeToVimConfig(merge_r=r))


def test_target_ratio_out_of_reach():
    config = RMeeToVimConfig(merge_target_ratio=0.9)
    with pytest.raises(ValueError, match="allow 0.83. Lower it, or"):
        merge_schedule(config)
    with pytest.raises(ValueError, match="out of reach"):
        TokenMerger(config)


def test_shares_and_lists():
    share = RMeeToVimConfig(num_hidden_layers=6, merge_r=0.1)
    assert merge_schedule(share) == [197, 197, 178, 178, 161, 161]
    listed = RMeeToVimConfig(num_hidden_layers=6, merge_r=[0, 7, 0, 500])
    assert merge_schedule(listed) == [197, 190, 190, 96, 96, 96]
    assert merging_blocks(listed) == [1, 3]
    assert requested_merges(listed)[3] == (500, 94)


def test_a_plain_vim_keeps_its_tokens():
    config = VimConfig(num_hidden_layers=3)
    assert merge_schedule(config) == [197] * 3
    assert merging_blocks(config) == []
    assert reduction_ratio(merge_schedule(config)) == 0


@pytest.mark.parametrize("tokens", [17, 2, 1, 50, 4097])
def test_other_lengths(tokens):
    """Without the official code's constant of 197 tokens."""
    schedule = merge_schedule(RMeeToVimConfig(merge_r=11), tokens)
    before = tokens
    for block, length in enumerate(schedule):
        removed = min(11, (before - 1) // 2) if block > 0 and block % 2 == 0 else 0
        assert length == before - max(removed, 0)
        before = length


def test_the_official_last_block_rule_is_off_by_default():
    """It cuts Vim-tiny to 76 tokens whatever r is, even for r = 0."""
    assert merge_schedule(RMeeToVimConfig(merge_r=5))[-1] == 142
    assert merge_schedule(RMeeToVimConfig(merge_r=5, merge_legacy_last_target=76))[-1] == 76
    assert merge_schedule(RMeeToVimConfig(merge_r=0, merge_legacy_last_target=76)) == [197] * 24


def test_class_tokens_take_no_part_in_the_limit():
    fields = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3, "merge_r": 100}
    assert merge_schedule(RMeeToVimConfig(**fields)) == [17, 17, 9]
    assert merge_schedule(RMeeToVimConfig(**fields, cls_token_position="double")) == [18, 18, 10]
    assert merge_schedule(RMeeToVimConfig(**fields, cls_token_position="none", pooling="mean")) == [16, 16, 8]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"merge_r": -1}, "`merge_r`.*got -1"),
        ({"merge_r": 0.5}, "a share below 0.5; got 0.5"),
        ({"merge_r": [0, 2.5]}, "merge_r"),
        ({"merge_r": [0, -2]}, r"non-negative.*\[0, -2\]"),
        ({"merge_r": [0] * 3}, r"per block \(2\)"),
        ({"merge_r": [3, 3]}, r"Block 0 has no previous block.*got 3"),
        ({"merge_r": 3, "merge_target_ratio": 0.3}, "either `merge_r` or `merge_target_ratio`; got 3 and 0.3"),
        ({"merge_target_ratio": 1}, "between 0 and 1; got 1"),
        ({"merge_interval": 0}, "`merge_interval` must be at least 1; got 0"),
        ({"merge_offset": 2}, "`merge_offset` must be from 0 to `merge_interval` - 1 = 1; got 2"),
        ({"merge_offset": 1, "merge_interval": 1, "merge_metric": "B"}, "`merge_offset`.*got 1"),
        ({"merge_metric": "X"}, "'hidden', 'B', 'C', 'delta'.*got X"),
        ({"merge_distance": "dot"}, "'cosine', 'l1', 'l2'.*got dot"),
        ({"merge_mode": "hybrid"}, "'merge', 'prune'.*got hybrid"),
        ({"merge_reduce": "sum"}, "got sum"),
        ({"merge_reduce": "amax", "merge_metric": "B"}, 'needs `merge_metric="hidden"`'),
        ({"merge_matching": "greedy"}, "got greedy"),
        ({"merge_class_position": "exact", "merge_keep_order": False}, "needs `merge_keep_order=True`"),
        ({"merge_legacy_last_target": 0}, "positive number of tokens"),
        ({"merge_legacy_last_target": 9, "merge_r": [0, 2]}, "without a list"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        RMeeToVimConfig(**tiny_vim_fields(**fields))


def test_assigned_values_are_checked_by_the_merger():
    config = RMeeToVimConfig(**tiny_vim_fields())
    config.merge_r = -3
    with pytest.raises(ValueError, match="got -3"):
        TokenMerger(config)


@pytest.mark.parametrize(
    "fields", [{"merge_r": [0, 2]}, {"merge_r": 0.25}, {"merge_target_ratio": 0.2}, {"merge_r": 3}]
)
def test_round_trip(tmp_path, fields):
    config = RMeeToVimConfig(
        **tiny_vim_fields(**fields, merge_metric="C", merge_offset=1, merge_class_position="exact")
    )
    config.save_pretrained(tmp_path)
    loaded = RMeeToVimConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert type(loaded.merge_r) is type(config.merge_r)
    assert merge_schedule(loaded) == merge_schedule(config)


def test_a_plain_vims_file_is_taken_without_a_warning(tmp_path, caplog):
    VimConfig(**tiny_vim_fields()).save_pretrained(tmp_path)
    logging.getLogger("transformers").addHandler(caplog.handler)
    config = RMeeToVimConfig.from_pretrained(tmp_path, merge_r=3)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert (config.model_type, config.merge_r, config.hidden_size) == ("rmeeto_vim", 3, 16)
    assert not caplog.records
