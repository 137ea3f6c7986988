"""DyVM's feature maps: dropped tokens keep their last value, training equals evaluation, dense equals Vim."""

import pytest
import torch
from transformers import AutoBackbone, UperNetConfig, UperNetForSemanticSegmentation

from helpers import assert_close, pixels, randomized, tiny_vim_fields
from hf_effml import DyVMBackbone, DyVMConfig, VimBackbone, VimConfig


STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]


def build(**fields):
    torch.manual_seed(0)
    defaults = {"num_hidden_layers": 4, "pruning_layers": [1, 3], "out_features": STAGES, "block_gate_bias_init": 0.0}
    return randomized(DyVMBackbone(DyVMConfig(**tiny_vim_fields(**defaults | fields))))


@torch.no_grad()
def maps_of(model, **inputs):
    return model(pixels(model.config, 3), **inputs).feature_maps


@pytest.mark.parametrize("position", ["middle", "head", "double", "none"])
def test_dropped_tokens_keep_their_last_value(position):
    pooling = "mean" if position == "none" else "cls"
    model = build(cls_token_position=position, pooling=pooling, token_keep_ratio=0.5, block_gate_bias_init=9.0)
    maps = maps_of(model)
    assert [map_.shape for map_ in maps] == [(3, 16, 4, 4)] * 5
    # Stages of 8 and 4 tokens of 16, before blocks 1 and 3.
    pairs = zip(maps, maps[1:], strict=False)
    changed = [(after != before).any(1).flatten(1).sum(1).tolist() for before, after in pairs]
    assert changed == [[16] * 3, [8] * 3, [8] * 3, [4] * 3]


def test_maps_of_some_stages_are_the_same():
    every = dict(zip(STAGES, maps_of(build()), strict=True))
    some = maps_of(build(out_features=["stage2", "stage4"]))
    assert_close(some, (every["stage2"], every["stage4"]))


def test_training_equals_evaluation_at_even_tokens():
    model = build(token_selection="even", block_gate_bias_init=100.0)
    assert_close(maps_of(model.train()), maps_of(model.eval()), 1e-5)


def test_switched_off_it_is_the_plain_backbone():
    torch.manual_seed(0)
    vim = randomized(VimBackbone(VimConfig(**tiny_vim_fields(num_hidden_layers=4, out_features=STAGES))))
    model = DyVMBackbone.from_vim(vim, pruning_layers=[1, 3], out_features=STAGES)
    model.set_pruning(False)
    assert_close(maps_of(model), maps_of(vim))


def test_segmentation():
    config = DyVMConfig(**tiny_vim_fields(num_hidden_layers=4, out_features=STAGES[1:]))
    assert type(AutoBackbone.from_config(config)) is DyVMBackbone
    model = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=config, hidden_size=16, num_labels=3, auxiliary_in_channels=16)
    )
    for training in (True, False):
        assert model.train(training)(torch.randn(2, 3, 24, 16)).logits.shape == (2, 3, 24, 16)
