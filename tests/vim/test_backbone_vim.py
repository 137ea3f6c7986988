"""Vim as a backbone: feature maps in the image's layout, and a segmentation model of transformers on top."""

import pytest
import torch
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from helpers import assert_close, pixels, randomized, tiny_vim_config
from hf_effml import VimBackbone, VimModel


def build(**fields):
    return randomized(VimBackbone(tiny_vim_config(**fields)))


@pytest.mark.parametrize("position", ["middle", "head", "double", "none"])
def test_maps_are_the_residual_stream_without_class_tokens(position):
    fields = {"cls_token_position": position, "pooling": "mean" if position == "none" else "cls"}
    backbone = build(out_features=["stem", "stage2"], **fields)
    model = VimModel(backbone.config)
    model.load_state_dict(backbone.state_dict(), strict=False)
    given = pixels(backbone.config)
    with torch.no_grad():
        output = model(given, output_hidden_states=True)
        maps = backbone(given).feature_maps
    patches = [row for row in range(output.last_hidden_state.shape[1]) if row not in output.cls_token_index[0]]
    assert len(maps) == 2
    for given_map, states in zip(maps, (output.hidden_states[0], output.hidden_states[2]), strict=True):
        assert given_map.shape == (2, 16, 4, 4)
        for row in range(4):
            for column in range(4):
                assert_close(given_map[:, :, row, column], states[:, patches[4 * row + column]])


def test_choosing_stages():
    assert build().out_features == ["stage2"]
    assert build(out_indices=[0, 1]).out_features == ["stem", "stage1"]
    backbone = build(out_features=["stage1", "stage2"])
    assert backbone.channels == [16, 16]
    assert backbone.out_indices == [1, 2]
    with pytest.raises(ValueError, match="stage9"):
        build(out_features=["stage9"])


def test_any_image_size():
    backbone = build(patch_stride=2, out_features=["stage1"])
    (feature_map,) = backbone(torch.randn(1, 3, 10, 24)).feature_maps
    assert feature_map.shape == (1, 16, 4, 11)


def test_upernet():
    config = UperNetConfig(
        backbone_config=tiny_vim_config(out_features=["stem", "stage1", "stage2"]),
        hidden_size=8,
        pool_scales=[1, 2],
        auxiliary_in_channels=16,
        auxiliary_channels=8,
        auxiliary_num_convs=1,
        use_auxiliary_head=True,
        auxiliary_loss_weight=0.4,
        num_labels=5,
    )
    model = UperNetForSemanticSegmentation(config)
    assert isinstance(model.backbone, VimBackbone)
    output = model(torch.randn(2, 3, 32, 32), labels=torch.randint(5, (2, 32, 32)))
    assert output.logits.shape == (2, 5, 32, 32)
    output.loss.backward()
    unused = {name for name, parameter in model.backbone.named_parameters() if parameter.grad is None}
    assert not unused


def test_upernet_saves_and_loads(tmp_path):
    config = UperNetConfig(
        backbone_config=tiny_vim_config(out_features=["stage1", "stage2"]),
        hidden_size=8,
        pool_scales=[1],
        use_auxiliary_head=False,
    )
    model = UperNetForSemanticSegmentation(config).eval()
    model.save_pretrained(tmp_path)
    given = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert_close(UperNetForSemanticSegmentation.from_pretrained(tmp_path)(given).logits, model(given).logits)
