"""Vim: invariants, initialisation, position tables, edge cases, loss; and the defects of the original are absent."""

import logging
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from helpers import assert_close, pixels, randomized, tiny_vim_config
from hf_effml import (
    ScanStream,
    VimBackbone,
    VimConfig,
    VimForImageClassification,
    VimModel,
    selective_scan_reference,
)
from hf_effml.vim.modeling_vim import interpolate_positions
from hf_effml.vim.vim_blocks import VimBlock, VimMixer


def build(model_class=VimForImageClassification, **fields):
    return randomized(model_class(tiny_vim_config(**fields)))


def build_mixer(**fields):
    return build(VimModel, num_hidden_layers=1, **fields).layers[0].mixer


def tokens(batch=2, length=9, width=16):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def swap_directions(module):
    """Exchange the forward and the backward parameters of every mixer."""
    for mixer in (part for part in module.modules() if isinstance(part, VimMixer)):
        own = dict(mixer.named_parameters())
        for name, parameter in own.items():
            for ending in ("_b.weight", "_b.bias", "_b_log", "_b"):
                if name.endswith(ending):
                    other = own[name.removesuffix(ending) + ending.removeprefix("_b")]
                    parameter.data, other.data = other.data, parameter.data
                    break


# Shape and size


@pytest.mark.parametrize("width, count", [(192, 7_148_008), (384, 25_796_584), (768, 97_598_440)])
def test_parameter_counts(width, count):
    """Counted from the official constructors."""
    with torch.device("meta"):
        model = VimForImageClassification(VimConfig(hidden_size=width, num_labels=1000))
    assert model.num_parameters() == count


@pytest.mark.parametrize(
    "position, places",
    [("middle", [8]), ("head", [0]), ("double", [0, 17]), ("none", [])],
    ids=lambda value: str(value),
)
def test_outputs(position, places):
    model = build(VimModel, cls_token_position=position, pooling="mean" if position == "none" else "cls")
    output = model(pixels(model.config), output_hidden_states=True)
    length = 16 + len(places)
    assert output.last_hidden_state.shape == (2, length, 16)
    assert output.cls_token_index.tolist() == [places, places]
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert all(states.shape == (2, length, 16) and states.is_contiguous() for states in output.hidden_states)
    assert_close(model.norm_f(output.hidden_states[-1]), output.last_hidden_state)
    read_out = output.last_hidden_state[:, places or slice(None)].mean(1)
    assert_close(output.pooler_output, read_out, 1e-6)
    assert model(pixels(model.config)).hidden_states is None


def test_pooling_last():
    model = build(VimModel, cls_token_position="none", pooling="last")
    output = model(pixels(model.config))
    assert_close(output.pooler_output, output.last_hidden_state[:, -1])


def test_every_option_builds_a_working_model():
    options = {
        "patch_stride": 3,
        "image_size": [16, 10],
        "num_channels": 1,
        "state_size": 1,
        "conv_kernel": 2,
        "expand": 1,
        "time_step_rank": 3,
        "use_conv_bias": False,
        "use_bias": True,
        "divide_output": False,
        "layer_scale_init_value": 0.1,
        "use_abs_pos_embed": False,
        "residual_in_fp32": False,
        "time_step_init_scheme": "constant",
    }
    for fields in ({name: value} for name, value in options.items()):
        model = build(**fields)
        assert model(pixels(model.config)).logits.isfinite().all(), fields
    model = build(**options)
    output = model(pixels(model.config), labels=torch.tensor([0, 1]), output_hidden_states=True)
    assert output.hidden_states[0].shape == (2, 5 * 3 + 1, 16)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_num_labels_zero_returns_features():
    model = build(num_labels=0)
    given = pixels(model.config)
    assert_close(model(given).logits, model.vim(given).pooler_output)


# Invariants


@pytest.mark.parametrize("divide_output", [True, False])
def test_reversal_swaps_the_directions(divide_output):
    mixer, given = build_mixer(divide_output=divide_output), tokens()
    features = ("B", "C", "delta")
    with torch.no_grad():
        wanted = [mixer(given, feature=name) for name in features]
        swap_directions(mixer)
        actual = [mixer(given.flip(1), feature=name) for name in features]
    for (output, feature), (wanted_output, wanted_feature) in zip(actual, wanted, strict=True):
        assert_close(output.flip(1), wanted_output, 1e-5)
        assert_close(feature.flip(1), wanted_feature, 1e-5)
    swap_directions(mixer)
    with torch.no_grad():
        assert_close(mixer(given)[0], wanted[0][0])


def test_reversed_image_through_the_whole_model():
    model = build(VimModel)
    given = pixels(model.config)
    with torch.no_grad():
        wanted = model(given).last_hidden_state
        swap_directions(model)
        model.pos_embed.data = model.pos_embed.data.flip(1)
        patches = model.patch_embed.proj.weight
        # Turning the image and every patch in it by half a turn reverses the raster order and nothing else.
        patches.data = patches.data.flip(2, 3)
        assert_close(model(given.flip(2, 3)).last_hidden_state.flip(1), wanted, 1e-5)


def test_zero_output_projection_is_the_identity():
    block, given = build(VimModel).layers[0], tokens()
    with torch.no_grad():
        block.mixer.out_proj.weight.zero_()
        assert_close(block(given)[0], given)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_direction_is_causal(direction):
    mixer, given = build_mixer(), tokens()
    gates = torch.tensor([[1.0, 0.0] if direction == "forward" else [0.0, 1.0]]).expand(2, 2)
    changed = given.clone()
    changed[:, 4] += 1
    with torch.no_grad():
        difference = (
            (mixer(changed, direction_gates=gates)[0] - mixer(given, direction_gates=gates)[0]).abs().amax((0, 2))
        )
    before, after = (difference[:4], difference[5:]) if direction == "forward" else (difference[5:], difference[:4])
    assert before.max() == 0
    assert difference[4] > 1e-4 and after.max() > 1e-6


def test_gates_weigh_the_directions():
    mixer, given = build_mixer(), tokens()
    with torch.no_grad():
        halves = [
            mixer(given, direction_gates=torch.tensor([gate]).expand(2, 2))[0] for gate in ([1.0, 0.0], [0.0, 1.0])
        ]
        assert_close(halves[0] + halves[1], mixer(given)[0], 1e-5)
        per_row = mixer(given, direction_gates=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))[0]
    assert_close(per_row, torch.stack([halves[0][0], halves[1][1]]), 1e-6)


def test_masked_tokens_are_not_seen():
    mixer, given = build_mixer(), tokens()
    mask = torch.ones(2, 9)
    mask[0, 3] = mask[1, 5:7] = 0
    changed = given + torch.randn(given.shape) * (1 - mask).unsqueeze(-1)
    with torch.no_grad():
        masked, masked_changed, seen = mixer(given, mask)[0], mixer(changed, mask)[0], mixer(changed)[0]
        everything = mixer(given, torch.ones(2, 9))[0]
    visible = mask.bool()
    assert_close(masked_changed[visible], masked[visible])
    assert (seen[visible] - masked[visible]).abs().max() > 1e-3
    with torch.no_grad():
        assert_close(everything, mixer(given)[0])


def mix_by_definition(mixer, given, mask):
    """The mixer word for word, the backward direction on flipped tensors: outputs before W_out, features."""
    u, z = mixer.in_proj(given).chunk(2, dim=-1)
    outputs, features = [], []
    for suffix in ("", "_b"):
        conv, dt_proj = getattr(mixer, f"conv1d{suffix}"), getattr(mixer, f"dt_proj{suffix}")
        dt_bias = getattr(mixer, f"time_step{suffix}").bias

        def turned(tensor, backward=bool(suffix)):
            return tensor.flip(1) if backward else tensor

        seen = turned(u * mask)
        convolved = F.conv1d(
            F.pad(seen.mT, (conv.kernel_size[0] - 1, 0)), conv.weight, conv.bias, groups=u.shape[-1]
        ).mT
        c = F.silu(convolved) * turned(mask)
        rank, B, C = getattr(mixer, f"x_proj{suffix}")(c).split(mixer.selection_sizes, dim=-1)
        delta = rank @ dt_proj.weight.T
        A = -getattr(mixer, f"A{suffix}_log").exp()
        y = selective_scan_reference(ScanStream(c, delta, A, B, C, getattr(mixer, f"D{suffix}"), dt_bias))
        outputs.append(turned(y * F.silu(turned(z))))
        features.append({"B": turned(B), "C": turned(C), "delta": turned(delta)})
    return outputs, features


@pytest.mark.parametrize("divide_output", [True, False])
def test_mixer_by_definition(divide_output):
    """Output, token mask, gates, and the features that a later block may match tokens on."""
    block, given = build(VimModel, divide_output=divide_output, layer_scale_init_value=0.5).layers[0], tokens()
    mask, gates = torch.rand(2, 9).round(decimals=1), torch.rand(2, 2)
    share = 0.5 if divide_output else 1.0
    mixer, normed = block.mixer, block.norm(given)
    with torch.no_grad():
        (forward, backward), features = mix_by_definition(mixer, normed, mask.unsqueeze(-1))
        wanted = gates[:, 0].view(2, 1, 1) * forward + gates[:, 1].view(2, 1, 1) * backward
        wanted = mixer.out_proj(wanted) * share * mixer.gamma
        output, nothing = block(given, mask, direction_gates=gates)
        assert nothing is None
        assert_close(output, given + wanted, 1e-5)
        hidden = block(given, mask, direction_gates=gates, feature="hidden")[1]
        assert_close(hidden, wanted, 1e-5)
        for name, width in (("B", 4), ("C", 4), ("delta", 32)):
            same, feature = block(given, mask, direction_gates=gates, feature=name)
            assert feature.shape == (2, 9, width)
            assert_close(same, output)
            assert_close(feature, (features[0][name] + features[1][name]) * share, 1e-5)


def test_short_sequences():
    """One token, and fewer tokens than the convolution is long."""
    block = build(VimModel).layers[0]
    for length in (1, 2, 3):
        given = tokens(length=length).requires_grad_()
        output = block(given)[0]
        output.sum().backward()
        assert output.shape == given.shape and given.grad.isfinite().all()
    model = build(image_size=4, cls_token_position="none", pooling="mean")
    assert model(pixels(model.config)).logits.shape == (2, 2)


# Initialisation


def assert_uniform(tensor, bound, what):
    assert tensor.abs().max() <= bound, what
    assert tensor.abs().max() > 0.9 * bound, what
    assert abs(tensor.std().item() / (bound / math.sqrt(3)) - 1) < 2 / tensor.numel() ** 0.5, what


@pytest.mark.parametrize("symmetric", [False, True])
def test_initial_mixers(symmetric):
    model = VimModel(tiny_vim_config(hidden_size=64, num_hidden_layers=4, symmetric_dt_init=symmetric))
    rank, inner = 4, 128
    for layer in model.layers:
        mixer = layer.mixer
        assert (layer.norm.weight == 1).all()
        for name in ("A_log", "A_b_log"):
            assert_close(
                getattr(mixer, name).detach(), torch.tensor([1.0, 2.0, 3.0, 4.0]).log().expand(inner, 4), 1e-6
            )
        assert (mixer.D == 1).all() and (mixer.D_b == 1).all()
        assert_uniform(mixer.in_proj.weight, 64**-0.5, "in_proj")
        assert_uniform(mixer.out_proj.weight, (inner * 4) ** -0.5, "out_proj is scaled by the depth")
        for suffix in ("", "_b"):
            assert_uniform(getattr(mixer, f"x_proj{suffix}").weight, inner**-0.5, "x_proj")
            assert_uniform(getattr(mixer, f"conv1d{suffix}").weight, 4**-0.5, "conv1d")
            assert_uniform(getattr(mixer, f"conv1d{suffix}").bias, 4**-0.5, "conv1d bias")
            assert_uniform(getattr(mixer, f"dt_proj{suffix}").weight, rank**-0.5, "dt_proj")
        steps = F.softplus(mixer.time_step.bias)
        assert steps.min() >= 0.00099 and steps.max() <= 0.101 and steps.max() / steps.min() > 20
        if symmetric:
            assert F.softplus(mixer.time_step_b.bias).max() <= 0.101
        else:
            assert (mixer.time_step_b.bias == 0).all()
    assert not torch.equal(model.layers[0].mixer.in_proj.weight, model.layers[1].mixer.in_proj.weight)


def test_initial_embeddings_and_head():
    model = VimForImageClassification(tiny_vim_config(hidden_size=256, num_hidden_layers=1, num_labels=100))
    assert abs(model.vim.patch_embed.proj.weight.std() * math.sqrt(3 * 4 * 4) - 1) < 0.05
    assert (model.vim.patch_embed.proj.bias == 0).all() and (model.classifier.bias == 0).all()
    for weight in (model.vim.pos_embed, model.vim.cls_token, model.classifier.weight):
        assert abs(weight.std() / 0.02 - 1) < 0.15
    assert (model.vim.norm_f.weight == 1).all()


def test_time_step_options():
    model = VimModel(tiny_vim_config(time_step_floor=0.05, time_step_init_scheme="constant", time_step_scale=3))
    mixer = model.layers[0].mixer
    assert F.softplus(mixer.time_step.bias).min() > 0.0499
    assert (mixer.dt_proj.weight == 3.0).all()


def test_layer_scale_starts_at_its_value():
    assert (VimModel(tiny_vim_config(layer_scale_init_value=1e-3)).layers[1].mixer.gamma == 1e-3).all()


@pytest.mark.parametrize("depth, rates", [(1, [0.3]), (2, [0.0, 0.3]), (4, [0.0, 0.1, 0.2, 0.3])])
def test_drop_path_rates(depth, rates):
    model = VimModel(tiny_vim_config(num_hidden_layers=depth, drop_path_rate=0.3))
    assert [layer.drop_path_rate for layer in model.layers] == pytest.approx(rates)


def test_drop_path_drops_whole_samples():
    block, given = VimBlock(tiny_vim_config(), 0.5), tokens(batch=400)
    torch.nn.init.constant_(block.mixer.D, 1.0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        full, dropped = block.eval()(given)[0] - given, block.train()(given)[0] - given
    kept = dropped.flatten(1).abs().amax(1) > 0
    assert 0.4 < kept.float().mean() < 0.6
    assert_close(dropped[kept], 2 * full[kept], 1e-5)


def test_names_without_weight_decay():
    """Class tokens, positions and vectors; `A_log` and `A_b_log` are decayed, as in the official runs."""
    model = build(cls_token_position="double", layer_scale_init_value=1.0)
    exempt = model.no_weight_decay()
    assert {
        "vim.cls_token_head",
        "vim.cls_token_tail",
        "vim.pos_embed",
        "vim.norm_f.weight",
        "classifier.bias",
    } < exempt
    in_block = {name.removeprefix("vim.layers.1.") for name in exempt if name.startswith("vim.layers.1.")}
    assert in_block == {
        "norm.weight",
        *(
            f"mixer.{name}"
            for name in ("D", "D_b", "gamma", "time_step.bias", "time_step_b.bias", "conv1d.bias", "conv1d_b.bias")
        ),
    }
    decayed = {name for name, _ in model.named_parameters()} - exempt
    assert {
        "vim.patch_embed.proj.weight",
        "vim.layers.0.mixer.A_log",
        "vim.layers.0.mixer.A_b_log",
        "classifier.weight",
    } < decayed


# Position tables


LAYOUTS = [("middle", [8], 4 * 6 // 2), ("head", [0], 0), ("double", [0, 17], None), ("none", [], None)]


@pytest.mark.parametrize("position, rows, _", LAYOUTS)
def test_interpolation_is_the_identity_on_equal_grids(position, rows, _):
    table = torch.randn(1, 16 + len(rows), 3)
    assert interpolate_positions(table, rows, (4, 4), (4, 4)) is table


@pytest.mark.parametrize("position, rows, place", LAYOUTS)
def test_interpolation_keeps_class_rows_apart(position, rows, place):
    patch_rows = [row for row in range(16 + len(rows)) if row not in rows]
    table = torch.zeros(1, 16 + len(rows), 3)
    table[:, patch_rows] = grid = torch.randn(1, 16, 3)
    table[:, rows] = 1e6 * torch.arange(1, len(rows) + 1).view(1, -1, 1)
    resized = interpolate_positions(table, rows, (4, 4), (4, 6))
    assert resized.shape == (1, 24 + len(rows), 3)
    new_rows = [0, 25] if position == "double" else rows if place is None else [place]
    assert_close(resized[:, new_rows], table[:, rows]) if rows else None
    image = grid.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    wanted = F.interpolate(image, (4, 6), mode="bicubic", align_corners=False).flatten(2).mT
    assert_close(resized[:, [row for row in range(24 + len(rows)) if row not in new_rows]], wanted, 1e-6)


def test_interpolation_keeps_constants_and_types():
    table = torch.full((1, 17, 3), 0.7, dtype=torch.bfloat16)
    resized = interpolate_positions(table, [8], (4, 4), (7, 5))
    assert resized.dtype == torch.bfloat16
    assert (resized == table[0, 0, 0]).all()


@pytest.mark.parametrize("position", ["middle", "head", "double", "none"])
@pytest.mark.parametrize("stride", [4, 2])
def test_other_image_sizes(position, stride):
    model = build(patch_stride=stride, cls_token_position=position, pooling="mean" if position == "none" else "cls")
    for height, width in ((20, 20), (16, 24), (9, 30), (4, 4)):
        given = torch.randn(2, 3, height, width)
        output = model(given, interpolate_pos_encoding=True, output_hidden_states=True)
        count = ((height - 4) // stride + 1) * ((width - 4) // stride + 1)
        assert output.hidden_states[-1].shape[1] == count + model.config.num_class_tokens
        assert output.logits.isfinite().all()
    given = pixels(model.config)
    assert_close(model(given, interpolate_pos_encoding=True).logits, model(given).logits)


def test_224_to_256():
    model = build(VimModel, image_size=224, patch_size=16, num_hidden_layers=1)
    output = model(torch.randn(1, 3, 256, 256), interpolate_pos_encoding=True)
    assert output.last_hidden_state.shape[1] == 257
    assert output.cls_token_index.tolist() == [[128]]


# Edge cases


@pytest.mark.parametrize(
    "given, message",
    [
        (torch.zeros(1, 3, 16, 20), "16x20 .* `image_size` 16x16.*interpolate_pos_encoding=True"),
        (torch.zeros(1, 1, 16, 16), r"\(batch, 3, height, width\); got \(1, 1, 16, 16\)"),
        (torch.zeros(3, 16, 16), r"\(batch, 3, height, width\); got \(3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "floating point; got torch.uint8.*image processor"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.long), "floating point; got torch.int64"),
        (torch.zeros(1, 3, 3, 16), "3x16 pixels are smaller than `patch_size` 4"),
    ],
    ids=["size", "channels", "3-d", "bytes", "integers", "smaller than a patch"],
)
@pytest.mark.parametrize("model_class", [VimModel, VimForImageClassification])
def test_wrong_pixels(model_class, given, message):
    model = build(model_class)
    with pytest.raises(ValueError, match=message):
        model(given)


def test_smaller_than_a_patch_even_with_interpolation():
    for model_class, options in ((VimModel, {"interpolate_pos_encoding": True}), (VimBackbone, {})):
        with pytest.raises(ValueError, match="smaller than `patch_size`"):
            build(model_class)(torch.zeros(1, 3, 16, 2), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_extreme_pixels_in_half_precision(dtype, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    half = VimForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    logits = half((1e3 * pixels(model.config).clamp(-1, 1)).to(dtype)).logits
    assert logits.dtype == dtype and logits.isfinite().all()


def test_the_recurrence_stays_float32_in_half_precision(tmp_path):
    build().save_pretrained(tmp_path)
    half = VimForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name for name, parameter in half.vim.layers[1].named_parameters() if parameter.dtype == torch.float32}
    names = ("A_log", "A_b_log", "D", "D_b", "time_step.bias", "time_step_b.bias")
    assert kept == {f"mixer.{name}" for name in names}
    states = half(pixels(half.config), output_hidden_states=True).hidden_states
    assert all(state.dtype == torch.float32 for state in states)


def test_nothing_is_printed(capfd):
    model = build()
    model(pixels(model.config), labels=torch.tensor([0, 1])).loss.backward()
    assert capfd.readouterr() == ("", "")


def test_no_warning_on_the_cpu(caplog):
    """The torch path is the intended one there."""
    with caplog.at_level(logging.INFO):
        model = build()
        model(pixels(model.config))
    assert not caplog.records


# Loss


def test_loss_of_class_numbers():
    model = build(num_labels=5)
    given, labels = pixels(model.config, 3), torch.tensor([0, 4, 2])
    output = model(given, labels=labels)
    assert_close(output.loss, F.cross_entropy(output.logits, labels))
    assert_close(model(given, labels=labels, return_dict=False)[:2], (output.loss, output.logits))


def test_loss_of_soft_labels():
    """Not the multi-label loss that transformers picks for floating-point labels and then stores in the config."""
    model = build(num_labels=5)
    given = pixels(model.config, 3)
    soft = torch.rand(3, 5).softmax(-1)
    output = model(given, labels=soft)
    assert_close(output.loss, -(soft * output.logits.log_softmax(-1)).sum(-1).mean(), 1e-6)
    one_hot = F.one_hot(torch.tensor([0, 4, 2]), 5).float()
    assert_close(model(given, labels=one_hot).loss, model(given, labels=torch.tensor([0, 4, 2])).loss, 1e-6)
    assert model.config.problem_type is None
    with pytest.raises(ValueError, match=r"shape \(3, 5\); got \(3,\).*integers"):
        model(given, labels=torch.rand(3))
    with pytest.raises(ValueError, match=r"shape \(3, 5\); got \(3, 4\)"):
        model(given, labels=torch.rand(3, 4))


def test_loss_is_float32_in_half_precision():
    model = build().to(torch.bfloat16)
    assert model(pixels(model.config), labels=torch.tensor([0, 1])).loss.dtype == torch.float32


# Moving weights between classes


def test_weights_move_between_classes(tmp_path):
    classifier = build()
    classifier.save_pretrained(tmp_path)
    given = pixels(classifier.config)
    with torch.no_grad():
        wanted = classifier.vim(given, output_hidden_states=True)
        assert_close(VimModel.from_pretrained(tmp_path)(given).pooler_output, wanted.pooler_output)
        backbone = VimBackbone.from_pretrained(tmp_path)
        patches = [row for row in range(17) if row != 8]
        maps = wanted.hidden_states[-1][:, patches].mT.unflatten(2, (4, 4))
        assert_close(backbone(given).feature_maps[0], maps)
        VimModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "base")
        assert_close(
            VimForImageClassification.from_pretrained(tmp_path / "base").vim(given).pooler_output, wanted.pooler_output
        )


def test_new_number_of_labels(tmp_path):
    model = build(num_labels=2)
    model.save_pretrained(tmp_path)
    changed = VimForImageClassification.from_pretrained(tmp_path, num_labels=10, ignore_mismatched_sizes=True)
    assert changed(pixels(model.config)).logits.shape == (2, 10)
    assert changed.classifier.weight.std() < 0.05
    assert_close(changed.vim.state_dict(), model.vim.state_dict())


# Training on the digits


def train_on_digits(digits, folder, **arguments):
    train, _ = digits
    config = VimConfig(
        image_size=8, patch_size=3, patch_stride=1, num_channels=1, hidden_size=40, num_hidden_layers=4, num_labels=10
    )
    assert config.num_patches == 36
    torch.manual_seed(0)
    trainer = Trainer(
        VimForImageClassification(config),
        TrainingArguments(
            folder,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            weight_decay=0.05,
            warmup_steps=30,
            lr_scheduler_type="cosine",
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=train,
    )
    trainer.train()
    return trainer


@pytest.mark.slow
def test_loss_falls_on_digits(digits, tmp_path):
    trainer = train_on_digits(digits, tmp_path, max_steps=25)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0] and losses[0] == pytest.approx(math.log(10), rel=0.1)


@pytest.mark.slow
def test_accuracy_on_digits(digits, tmp_path):
    trainer = train_on_digits(digits, tmp_path, num_train_epochs=14)
    prediction = trainer.predict(digits[1])
    accuracy = (prediction.predictions.argmax(-1) == prediction.label_ids).mean()
    assert accuracy > 0.94, accuracy
