"""DyVM's configuration: ratios and counts, what travels with a saved model, and every impossible setting."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from helpers import tiny_vim_fields
from hf_effml import DyVMConfig, VimConfig


def test_defaults_are_the_papers():
    config = DyVMConfig()
    assert config.pruning_layers == [6, 12, 18]
    assert config.token_keep_ratio == [0.7, 0.7**2, 0.7**3] and config.block_keep_ratio == 0.8
    assert (config.token_gumbel_tau, config.block_gumbel_tau, config.block_gate_threshold) == (1.0, 2.0, 0.5)
    weights = (config.token_ratio_loss_weight, config.block_ratio_loss_weight, config.distillation_weight)
    assert weights == (10.0, 10.0, 0.5)
    assert (config.block_gate_bias_init, config.block_gate_logit_offset) == (5.0, 0.0)
    assert (config.inference_mode, config.token_selection) == ("select", "learned")


@pytest.mark.parametrize(
    "ratio, kept", [(0.9, [176, 158, 142]), (0.8, [156, 125, 100]), (0.7, [137, 96, 67]), (1, [196] * 3)]
)
def test_counts(ratio, kept):
    """The truncated product."""
    assert DyVMConfig(token_keep_ratio=ratio).tokens_kept_at_default_size == kept


def test_counts_follow_the_size():
    config = DyVMConfig(token_keep_ratio=0.7)
    assert config.tokens_kept(100) == [70, 48, 34]
    assert config.tokens_kept(1) == [1, 1, 1]
    assert DyVMConfig(enable_token_pruning=False).tokens_kept(100) == []


@pytest.mark.parametrize("depth, layers", [(24, [6, 12, 18]), (4, [1, 2, 3]), (3, [1, 2]), (2, [1])])
def test_layers_by_depth(depth, layers):
    config = DyVMConfig(num_hidden_layers=depth)
    assert config.pruning_layers == layers and len(config.token_keep_ratio) == len(layers)


def test_saved_configuration(tmp_path):
    config = DyVMConfig(hidden_size=384, token_keep_ratio=0.7, block_gate_logit_offset=[[0.5, -1]] * 24)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "dyvm" and saved["tokens_kept_at_default_size"] == [137, 96, 67]
    assert saved["token_keep_ratio"][1] == 0.48999999999999994
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, DyVMConfig)
    assert again.block_gate_logit_offset == config.block_gate_logit_offset
    assert again.token_keep_ratio == config.token_keep_ratio
    # The counts are derived: they follow a ratio that is overridden.
    assert DyVMConfig.from_pretrained(tmp_path, token_keep_ratio=0.9).tokens_kept_at_default_size == [176, 158, 142]


def test_plain_vim_folder_is_read(tmp_path):
    VimConfig(**tiny_vim_fields()).save_pretrained(tmp_path)
    config = DyVMConfig.from_pretrained(tmp_path, token_keep_ratio=0.5)
    assert (config.model_type, config.hidden_size, config.tokens_kept_at_default_size) == ("dyvm", 16, [8])
    assert type(AutoConfig.from_pretrained(tmp_path)) is VimConfig


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pruning_layers": [12, 6, 18]}, r"ascending blocks from 1 to 23, each once; got \[12, 6, 18\]"),
        ({"pruning_layers": [6, 6, 18]}, "each once"),
        ({"pruning_layers": [0, 6]}, "Block 0 cannot prune"),
        ({"pruning_layers": [6, 24]}, "from 1 to 23"),
        ({"pruning_layers": []}, "ascending blocks"),
        ({"num_hidden_layers": 1}, "ascending blocks"),
        ({"token_keep_ratio": [0.5, 0.4]}, r"one share per pruning layer \(3\); got \[0.5, 0.4\]"),
        ({"token_keep_ratio": 0.0}, "above 0, at most 1"),
        ({"token_keep_ratio": 1.2}, "above 0, at most 1"),
        ({"token_keep_ratio": [0.5, 0.7, 0.2]}, "may not increase"),
        ({"token_keep_ratio": [0.5, 0.4, 0.005]}, "keeps none of 196 patches. Keep at least 0.0051"),
        ({"token_keep_ratio": "0.7"}, "token_keep_ratio"),
        ({"hidden_size": 190}, "multiple of 4"),
        ({"block_keep_ratio": 0.0}, "`block_keep_ratio` must be above 0 and at most 1; got 0.0"),
        ({"block_keep_ratio": 1.1}, "got 1.1"),
        ({"block_gate_threshold": 1.0}, "between 0 and 1, or None; got 1.0"),
        ({"block_gate_logit_offset": [[0.0, 0.0]]}, r"one pair per block \(24\)"),
        ({"block_gate_logit_offset": [[0.0]] * 24}, "one pair per block"),
        ({"token_gumbel_tau": 0.0}, "`token_gumbel_tau` must be positive"),
        ({"block_gumbel_tau": -1}, "`block_gumbel_tau` must be positive"),
        ({"token_ratio_loss_weight": -1.0}, "at least 0; got -1.0"),
        ({"inference_mode": "fast"}, "inference_mode"),
        ({"token_selection": "best"}, "token_selection"),
    ],
)
def test_impossible_settings(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        DyVMConfig(**fields)


def test_what_is_off_is_not_checked():
    assert DyVMConfig(num_hidden_layers=1, enable_token_pruning=False).tokens_kept_at_default_size == []
    assert DyVMConfig(hidden_size=190, token_selection="even").tokens_kept_at_default_size == [137, 96, 67]
    assert DyVMConfig(block_gate_threshold=None).block_gate_threshold is None
