"""The picture of merged tokens: colours, class tokens wherever they stand, pruned tokens, grids."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import pixels, tiny_vim_fields
from hf_effml.vim.configuration_dyvm import DyVMConfig
from hf_effml.vim.configuration_rmeeto import RMeeToVimConfig
from hf_effml.vim.evaluation.visualize import visualize_merge, visualize_selection
from hf_effml.vim.modeling_dyvm import DyVMForImageClassification
from hf_effml.vim.modeling_rmeeto import RMeeToVimForImageClassification
from hf_effml.vim.token_reduction import MergeInfo


COLOURS = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [200, 200, 0], [0, 200, 200], [90, 90, 90]], np.uint8)


def picture(rows=2, columns=3, patch=40):
    """One flat colour per patch."""
    cells = COLOURS[: rows * columns].reshape(rows, columns, 3)
    return Image.fromarray(cells.repeat(patch, 0).repeat(patch, 1))


def info(slots, class_index):
    tokens = max(slots) + 1
    return MergeInfo(
        torch.ones(1, tokens, 1), torch.tensor([slots]), torch.tensor([class_index]), [len(slots), tokens]
    )


def centres(drawn, rows=2, columns=3):
    """Colours in the middle of every patch, in the left and in the right picture."""
    width = (drawn.width - 16) // 2
    cell = width // columns
    values = np.asarray(drawn).astype(int)
    middle = [(cell // 2 + row * cell, cell // 2 + column * cell) for row in range(rows) for column in range(columns)]
    return np.array([[values[y, x + left] for y, x in middle] for left in (0, width + 16)])


@pytest.mark.parametrize(
    "slots, class_index",
    [
        ([0, 1, 2, 3, 2, 4], []),
        ([0, 1, 2, 3, 4, 3, 5], [0]),
        ([0, 1, 2, 3, 4, 2, 5], [3]),
        ([0, 1, 2, 3, 4, 3, 5, 6], [0, 6]),
    ],
    ids=["no class token", "head", "middle", "double"],
)
def test_groups_share_their_mean_colour(slots, class_index):
    """Whatever the place of the class token; the official plot always drops token 0."""
    before, after = centres(visualize_merge(picture(), info(slots, class_index)))
    assert np.abs(before - COLOURS).max() <= 1
    expected = COLOURS.astype(float)
    expected[[2, 4]] = (expected[2] + expected[4]) / 2
    assert np.abs(after - expected).max() <= 2


def test_groups_have_an_outline_and_single_patches_none():
    drawn = np.asarray(visualize_merge(picture(), info([0, 0, 1, 2, 3, 4], [])))
    right = drawn[:, (drawn.shape[1] - 16) // 2 + 16 :]
    cell = right.shape[1] // 3
    group, single = right[:cell, : 2 * cell], right[cell:, :cell]
    inside = group[cell // 2, cell // 2]
    assert (group[0] != inside).any(1).all() and (group[:, 0] != inside).any(1).all()
    assert (group[5:-5, cell - 3 : cell + 3] == inside).all()
    assert np.abs(single[10:-10, :-10].astype(int) - COLOURS[3]).max() <= 1


def test_pruned_patches_turn_grey():
    """The official plot paints them like group 0."""
    _, after = centres(visualize_merge(picture(), info([0, -1, 1, 2, -1, 3], [])))
    assert all(len(set(colour)) == 1 for colour in after[[1, 4]].tolist())
    assert np.abs(after[[0, 2, 3, 5]] - COLOURS[[0, 2, 3, 5]]).max() <= 1


def test_grids():
    six = info([0, 1, 2, 3, 4, 5], [])
    assert visualize_merge(picture(), six).size == (2 * 447 + 16, 298)
    assert visualize_merge(picture(3, 2), six).size == (2 * 298 + 16, 447)
    assert visualize_merge(picture(), six, grid_size=(1, 6)).size == (2 * 450 + 16, 75)
    with pytest.raises(ValueError, match="2x2 does not hold 6 patches"):
        visualize_merge(picture(), six, grid_size=(2, 2))
    with pytest.raises(ValueError, match="5 patches do not fill"):
        visualize_merge(picture(), info([0, 1, 2, 3, 4], []))


@pytest.mark.parametrize("position", ["middle", "head", "double", "none"])
def test_a_model(position):
    fields = {"cls_token_position": position, "pooling": "mean" if position == "none" else "cls"}
    config = RMeeToVimConfig(**tiny_vim_fields(num_hidden_layers=3, merge_r=4, image_size=[16, 24], **fields))
    with torch.no_grad():
        merged = RMeeToVimForImageClassification(config)(pixels(config), output_merge_info=True).merge_info
    drawn = visualize_merge(Image.new("L", (24, 16)), merged, index=1)
    assert drawn.mode == "RGB" and drawn.size == (2 * 450 + 16, 300)


# DyVM


def dyvm_outputs(**fields):
    config = DyVMConfig(**tiny_vim_fields(num_hidden_layers=4, pruning_layers=[1, 3], image_size=[8, 12], **fields))
    gates = torch.ones(2, 4, 2)
    gates[1, 2, 0] = gates[1, 0, 1] = 0
    model = DyVMForImageClassification(config).eval()
    with torch.no_grad():
        return model, model(pixels(config), block_gates=gates if config.enable_block_selection else None)


def test_selection_of_tokens_and_scans():
    _, outputs = dyvm_outputs(token_keep_ratio=0.5)
    drawn = visualize_selection(picture(), outputs, index=1)
    assert drawn.size == (3 * 288 + 2 * 16, 192 + 2 * 16 + 2 * 28)
    values = np.asarray(drawn).astype(int)
    for panel, kept in enumerate([torch.arange(6), *(stage[1] for stage in outputs.kept_indices)]):
        for patch in range(6):
            row, column = divmod(patch, 3)
            colour = values[48 + 96 * row, panel * 304 + 48 + 96 * column]
            if patch in kept:
                assert np.abs(colour - COLOURS[patch]).max() <= 1
            else:
                assert len(set(colour.tolist())) == 1
    step = (drawn.width - 64) / 4
    for direction, top in enumerate((208, 244)):
        for block in range(4):
            red, green, blue = values[top + 14, int(64 + (block + 0.5) * step)]
            assert (red == green == blue) == (outputs.block_gates[1, block, direction] == 0)


def test_selection_with_one_mechanism():
    _, outputs = dyvm_outputs(enable_block_selection=False)
    assert visualize_selection(picture(), outputs).size == (3 * 288 + 32, 192)
    _, outputs = dyvm_outputs(enable_token_pruning=False)
    assert visualize_selection(picture(), outputs).size == (288, 280)


def test_selection_refuses():
    model, outputs = dyvm_outputs()
    with pytest.raises(ValueError, match="2x2 does not hold 6 patches"):
        visualize_selection(picture(), outputs, grid_size=(2, 2))
    with pytest.raises(ValueError, match="outputs are from training"):
        visualize_selection(picture(), model.train()(pixels(model.config)))
