"""Calibrated gates: the share of scans wanted runs in evaluation, also on images that were not seen."""

import pytest
import torch
from torch.utils.data import DataLoader

from helpers import randomized, tiny_vim_fields
from hf_effml import DyVMBackbone, DyVMConfig, DyVMForImageClassification, DyVMModel
from hf_effml.vim import gate_calibration


def build(model_class=DyVMForImageClassification, spread=5.0, **fields):
    torch.manual_seed(0)
    model = randomized(model_class(DyVMConfig(**tiny_vim_fields(**{"num_hidden_layers": 4, **fields}))))
    with torch.no_grad():
        # Gates that differ between images, as trained ones do, and matter to later blocks.
        for layer in getattr(model, "vim", model).layers:
            layer.mixer.block_head.weight.mul_(spread)
            layer.mixer.block_head.bias.fill_(0.8)
            layer.mixer.out_proj.weight.mul_(5)
        # Before block 0 the class token has seen nothing of the image: its gates are open for all or for none.
        getattr(model, "vim", model).layers[0].mixer.block_head.bias.fill_(20.0)
    return model


def images(count, seed):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def open_share(model, given):
    return model.eval()(given).block_gates.mean(0)


@pytest.mark.parametrize("model_class", [DyVMForImageClassification, DyVMModel])
@pytest.mark.parametrize("target", [None, 0.5])
def test_held_out_images(model_class, target, tmp_path):
    model = build(model_class).train()
    wanted = 0.8 if target is None else target
    assert abs(open_share(model, images(1024, 1)).mean() - wanted) > 0.02
    model.train()
    table = model.calibrate_block_gates(images(1024, 0).split(256), target)
    assert model.training
    share = open_share(model, images(1024, 1))
    assert abs(share.mean() - wanted) < 0.02
    assert isinstance(model.config.block_gate_logit_offset, float)
    assert table[0]["block"] == "all" and abs(table[0]["after"] - wanted) <= 0.002
    assert abs(table[0]["before"] - wanted) > 0.02
    assert abs(sum(row["after"] for row in table[1:]) / 8 - table[0]["after"]) < 1e-6
    model.save_pretrained(tmp_path)
    assert torch.equal(open_share(model_class.from_pretrained(tmp_path), images(1024, 1)), share)


@pytest.mark.parametrize("per", ["block", "direction"])
def test_every_block_or_direction(per):
    model = build()
    table = model.calibrate_block_gates(images(1024, 0).split(256), 0.7, per=per)
    offsets = model.config.block_gate_logit_offset
    assert [len(pair) for pair in offsets] == [2] * 4
    assert (per == "block") == all(forward == backward for forward, backward in offsets)
    assert [row["offset"] for row in table[1:]] == [offset for pair in offsets for offset in pair]
    assert [(row["block"], row["direction"]) for row in table[1:3]] == [(0, "forward"), (0, "backward")]
    share = open_share(model, images(2048, 1))
    groups = share.mean(1) if per == "block" else share
    assert (groups[1:] - 0.7).abs().max() < 0.04
    model.calibrate_block_gates(images(1024, 0).split(256), 1.0, per=per)
    assert open_share(model, images(1024, 0)).min() == 1


def test_kinds_of_batches():
    results = []
    data = [{"pixel_values": image, "labels": 0} for image in images(64, 0)]
    parts = images(64, 0).split(16)
    for batches in (DataLoader(data, batch_size=16), parts, [(part, 0) for part in parts]):
        model = build()
        model.calibrate_block_gates(batches)
        results.append(model.config.block_gate_logit_offset)
    assert results[0] == results[1] == results[2]
    model = build()
    model.calibrate_block_gates(parts, max_batches=1)
    assert model.config.block_gate_logit_offset != results[0]


@pytest.mark.parametrize(
    "fields, arguments, message",
    [
        ({"enable_block_selection": False}, {}, "no gates to calibrate"),
        ({}, {"target": 0.0}, "`target` must be above 0 and at most 1; got 0.0"),
        ({}, {"per": "layer"}, "one of global, block, direction; got 'layer'"),
        ({}, {"max_batches": 0}, "gave no image"),
        ({}, {"dataloader": (part for part in images(8, 0).split(4))}, "not a generator"),
    ],
)
def test_what_cannot_be(fields, arguments, message):
    model = DyVMForImageClassification(DyVMConfig(**tiny_vim_fields(**fields))).train()
    with pytest.raises(ValueError, match=message):
        model.calibrate_block_gates(**{"dataloader": images(8, 0).split(4), **arguments})
    assert model.config.block_gate_logit_offset == 0.0 and model.training


def test_models_that_report_no_gates():
    backbone = build(DyVMBackbone)
    switched_off = build()
    switched_off.set_pruning(False)
    for model in (backbone, switched_off):
        with pytest.raises(ValueError, match=r"`set_pruning\(True\)`; for a backbone, calibrate the classifier"):
            model.calibrate_block_gates(images(8, 0).split(4))


def test_gates_that_do_not_vary(caplog):
    model = build(spread=0.0)
    with torch.no_grad():
        for layer in model.vim.layers:
            layer.mixer.block_head.bias.fill_(5.0)
    with caplog.at_level("WARNING", gate_calibration.__name__):
        table = model.calibrate_block_gates(images(16, 0).split(8))
    assert "their logits vary too little" in caplog.text
    assert table[0]["after"] == 1.0
