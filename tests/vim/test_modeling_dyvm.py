"""DyVM: training equals inference, selecting equals masking, the exact off switch, edge cases, baselines, loading."""

import copy

import pytest
import torch
from torch import nn

from helpers import assert_close, existing_gradients, pixels, randomized, require_package, tiny_vim_fields
from hf_effml import (
    DyVMConfig,
    DyVMForImageClassification,
    DyVMModel,
    RMeeToVimForImageClassification,
    VimConfig,
    VimForImageClassification,
    VimModel,
    apply_token_merging,
)
from hf_effml.vim import dyvm_run, modeling_dyvm, token_selection
from hf_effml.vim.direction_gates import Gating
from hf_effml.vim.losses import dyvm_ratio_losses
from hf_effml.vim.token_selection import TokenLayout


POSITIONS = {
    "middle": {},
    "head": {"cls_token_position": "head"},
    "double": {"cls_token_position": "double"},
    "mean": {"cls_token_position": "none", "pooling": "mean"},
    "last": {"cls_token_position": "none", "pooling": "last"},
}
every_position = pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)


def fields_of(**fields):
    defaults = {"num_hidden_layers": 5, "pruning_layers": [1, 3], "token_keep_ratio": 0.7, "block_gate_bias_init": 0.0}
    return tiny_vim_fields(**defaults | fields)


def build(model_class=DyVMForImageClassification, scale=1.0, **fields):
    torch.manual_seed(0)
    model = randomized(model_class(DyVMConfig(**fields_of(**fields))))
    with torch.no_grad():
        # Blocks that say something, so that decisions matter to the logits.
        for layer in getattr(model, "vim", model).layers:
            layer.mixer.out_proj.weight.mul_(scale)
    return model


def build_vim(model_class=VimForImageClassification, **fields):
    torch.manual_seed(0)
    return randomized(model_class(VimConfig(**tiny_vim_fields(**{"num_hidden_layers": 5, **fields}))))


def random_gates(batch, blocks=5, share=0.6, seed=0):
    return (torch.rand(batch, blocks, 2, generator=torch.Generator().manual_seed(seed)) < share).float()


@torch.no_grad()
def run(model, batch=3, **inputs):
    return model(pixels(model.config, batch), **inputs)


# Training equals inference


@every_position
def test_training_with_the_decisions_of_evaluation_gives_its_logits(position):
    model = build(scale=5.0, **position)
    wanted = run(model)
    assert 0.1 < wanted.block_keep_ratio.mean() < 0.9
    model.train()
    output = run(model, kept_indices=wanted.kept_indices, block_gates=wanted.block_gates)
    assert_close(output.logits, wanted.logits, 1e-5)
    assert_close(output.block_gate_logits, wanted.block_gate_logits, 1e-5)
    assert_close(output.token_keep_ratio, wanted.token_keep_ratio, 1e-6)
    kept = output.token_policy.bool()
    assert torch.equal(output.token_positions[kept].view(3, -1), wanted.token_positions)
    assert_close(model.patch_features(output)[kept], model.patch_features(wanted).flatten(0, 1), 1e-5)


def test_without_rearrangement_it_does_not(monkeypatch):
    """Masks alone, as for ViTs: the convolution sees holes and the state decays over them."""
    model = build(scale=5.0)
    wanted = run(model)
    rearrange = TokenLayout.rearrange

    def in_place(self, stream, order, kept, class_position):
        same = torch.arange(order.shape[1]).expand_as(order)
        return rearrange(self, stream, same, torch.full_like(kept, order.shape[1]), class_position)

    monkeypatch.setattr(TokenLayout, "rearrange", in_place)
    model.train()
    logits = run(model, kept_indices=wanted.kept_indices, block_gates=wanted.block_gates).logits
    assert (logits - wanted.logits).abs().max() > 0.1 * wanted.logits.abs().max()


# Selecting equals masking


@every_position
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_selecting_equals_masking_and_single_images(position, share):
    model = build(**position)
    gates = random_gates(4, share=share)
    selected = run(model, 4, block_gates=gates)
    alone = [
        model(image[None], block_gates=gate[None]).logits
        for image, gate in zip(pixels(model.config, 4), gates, strict=True)
    ]
    assert_close(torch.cat(alone).detach(), selected.logits, 1e-5)
    model.config.inference_mode = "mask"
    assert_close(dict(run(model, 4, block_gates=gates)), dict(selected), 1e-5)


def test_own_gates_in_both_modes():
    model = build()
    selected = run(model, 6)
    assert 0 < selected.block_gates.mean() < 1
    assert torch.equal(selected.block_gates, (selected.block_gate_logits > 0).float())
    assert torch.equal(selected.block_keep_ratio, selected.block_gates.mean((1, 2)))
    model.config.inference_mode = "mask"
    assert_close(dict(run(model, 6)), dict(selected), 1e-5)


def test_permuted_batch():
    model = build()
    order = torch.tensor([3, 0, 2, 1])
    with torch.no_grad():
        straight, permuted = model(pixels(model.config, 4)), model(pixels(model.config, 4)[order])
    assert_close(permuted.logits, straight.logits[order], 1e-5)
    assert torch.equal(permuted.block_gates, straight.block_gates[order])


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("mode", ["select", "mask", "train"])
def test_small_batches(batch, mode):
    model = build(inference_mode="mask" if mode == "mask" else "select").train(mode == "train")
    output = run(model, batch, block_gates=random_gates(batch))
    assert output.logits.shape == (batch, 2) and output.logits.isfinite().all()
    assert output.block_gates.shape == (batch, 5, 2) and output.token_keep_ratio.shape == (batch, 2)


def test_closed_directions_do_not_run():
    model = build()
    gates = torch.ones(4, 5, 2)
    gates[:, 0] = torch.tensor([[1.0, 0.0]])
    gates[1:, 1, 0] = 0
    rows = {}
    for name, module in model.named_modules():
        if "conv1d" in name:
            module.register_forward_hook(lambda _, inputs, output, name=name: rows.update({name: len(output)}))
    run(model, 4, block_gates=gates)
    mixers = [f"vim.layers.{layer}.mixer.conv1d" for layer in range(5)]
    assert f"{mixers[0]}_b" not in rows
    assert (rows[mixers[0]], rows[mixers[1]], rows[f"{mixers[1]}_b"], rows[mixers[2]]) == (4, 1, 4, 4)


def test_gradients_in_evaluation_agree():
    """Selecting is differentiable too."""
    gates, results = random_gates(4), []
    for mode in ("select", "mask"):
        model = build(inference_mode=mode)
        model(pixels(model.config, 4), block_gates=gates).logits.square().sum().backward()
        results.append({name: value for name, value in existing_gradients(model).items() if value.any()})
    assert_close(results[0], results[1], 1e-5)


# Off switches


@every_position
@pytest.mark.parametrize("training", [False, True])
def test_switched_off_it_is_bit_exactly_the_plain_vim(position, training):
    vim = build_vim(**position).train(training)
    model = DyVMForImageClassification.from_vim(vim, pruning_layers=[1, 3])
    model.set_pruning(False)
    plain, off = run(vim, output_hidden_states=True), run(model, output_hidden_states=True)
    assert torch.equal(off.logits, plain.logits)
    assert_close(off.hidden_states, plain.hidden_states)
    assert off.kept_indices is off.block_gates is off.token_decisions is off.token_keep_ratio is None
    assert torch.equal(off.token_positions, torch.arange(16).expand(3, -1))
    model.set_pruning(True)
    assert not torch.equal(run(model).logits, plain.logits)


def test_open_gates_without_pruning_are_bit_exactly_the_plain_vim():
    vim = build_vim()
    for mode in ("select", "mask"):
        model = DyVMForImageClassification.from_vim(vim, enable_token_pruning=False, inference_mode=mode)
        assert torch.equal(run(model, block_gates=torch.ones(3, 5, 2)).logits, run(vim).logits)
        assert torch.equal(run(model).logits, run(vim).logits)


def test_keeping_every_token_asks_no_predictor():
    vim = build_vim()
    model = DyVMForImageClassification.from_vim(vim, token_keep_ratio=1.0, enable_block_selection=False)
    for predictor in model.vim.score_predictors:
        predictor.register_forward_hook(lambda *_: pytest.fail("asked a predictor"))
    output = run(model)
    assert torch.equal(output.logits, run(vim).logits)
    assert torch.equal(output.kept_indices[1], torch.arange(16).expand(3, -1))


@pytest.mark.parametrize("mode", ["select", "mask", "train"])
def test_all_gates_closed_leave_the_embedding(mode):
    model = build(inference_mode="mask" if mode == "mask" else "select").train(mode == "train")
    logits = run(model, block_gates=torch.zeros(3, 5, 2)).logits
    with torch.no_grad():
        embedding = model.vim.cls_token[:, 0] + model.vim.pos_embed[:, 8]
        expected = model.classifier(model.vim.norm_f(embedding))
    assert_close(logits, expected.expand(3, -1), 1e-6)


def test_only_one_mechanism():
    tokens_only = build(enable_block_selection=False)
    assert not any("block_head" in name for name in tokens_only.state_dict())
    output = run(tokens_only)
    assert output.block_gates is output.block_gate_logits is output.block_keep_ratio is None
    assert [kept.shape[1] for kept in output.kept_indices] == [11, 7]
    blocks_only = build(enable_token_pruning=False)
    assert not any("score_predictors" in name for name in blocks_only.state_dict())
    output = run(blocks_only)
    assert output.kept_indices is output.token_keep_ratio is None
    assert output.block_gates.shape == (3, 5, 2) and output.last_hidden_state.shape[1] == 17
    for model in (tokens_only, blocks_only):
        model.train()(pixels(model.config), labels=torch.tensor([0, 1])).loss.backward()
        assert existing_gradients(model).keys() == dict(model.named_parameters()).keys()


# What is reported


def test_reports():
    model = build()
    output = run(model, output_hidden_states=True)
    assert [state.shape[1] for state in output.hidden_states] == [17, 17, 12, 12, 8, 8]
    assert [kept.shape for kept in output.kept_indices] == [(3, 11), (3, 7)]
    for kept, before in zip(output.kept_indices[1:], output.kept_indices, strict=False):
        assert (kept.diff(dim=1) > 0).all()
        assert all(set(row.tolist()) <= set(earlier.tolist()) for row, earlier in zip(kept, before, strict=True))
    assert torch.equal(output.token_positions, output.kept_indices[-1])
    assert output.cls_token_index.tolist() == [[3]] * 3
    assert_close(output.token_keep_ratio, torch.tensor([[11 / 16, 7 / 16]]).expand(3, -1), 1e-6)
    assert output.token_decisions is output.token_policy is None
    trained = run(model.train(), output_hidden_states=True)
    assert trained.kept_indices is None
    assert all(state.shape[1] == 17 for state in trained.hidden_states)
    assert torch.equal(trained.token_policy.sum(1), trained.token_decisions[-1].sum(1))
    assert (trained.token_policy.diff(dim=1) <= 0).all(), "kept tokens come first"
    assert (trained.token_decisions[1].sum(1) <= trained.token_decisions[0].sum(1)).all()
    assert torch.equal(trained.token_positions.sort(dim=1).values, torch.arange(16).expand(3, -1))
    names = set(output.keys()) | set(trained.keys())
    assert names - {"logits"} == set(model.config.keys_to_ignore_at_inference)


def test_labels():
    model, labels = build(), torch.tensor([0, 1, 1])
    output = model(pixels(model.config, 3), labels=labels)
    assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    output = model.train()(pixels(model.config, 3), labels=labels)
    expected = nn.functional.cross_entropy(output.logits, labels) + sum(
        dyvm_ratio_losses(output, model.config).values()
    )
    assert_close(output.loss, expected, 1e-6)


# Noise


def test_noise_is_the_generators():
    model = build().train()
    state = torch.get_rng_state()
    outputs = [run(model, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(dict(outputs[1]), dict(outputs[0]))
    assert not torch.equal(outputs[2].token_decisions[0], outputs[0].token_decisions[0])
    torch.manual_seed(3)
    first = run(model)
    torch.manual_seed(3)
    assert_close(dict(run(model)), dict(first))
    assert not torch.equal(run(model).token_decisions[0], first.token_decisions[0])


def test_evaluation_draws_nothing():
    for selection in ("learned", "random", "even"):
        model = build(token_selection=selection)
        state = torch.get_rng_state()
        assert_close(dict(run(model)), dict(run(model)))
        assert torch.equal(torch.get_rng_state(), state)


def test_gates_are_open_as_often_as_their_probability_says():
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, -0.5]]).expand(20000, 2)
    noise = token_selection.sample_exponential((2, 20000, 2), logits.device, None).log()
    gating = Gating(None, None, 0.5, 2.0, noise[1] - noise[0], None, False)
    assert_close(gating.decide(logits).mean(0), torch.sigmoid(logits[0]), 0.01)
    soft = gating._replace(threshold=None).decide(logits)
    assert ((soft > 0) & (soft < 1)).all()
    assert torch.equal(gating._replace(noise=None, threshold=0.8).decide(logits)[0], torch.zeros(2))
    assert torch.equal(gating._replace(noise=None, threshold=0.7).decide(logits)[0], torch.tensor([1.0, 0.0]))


@pytest.mark.slow
def test_ratio_losses_reach_their_targets():
    model = build(token_keep_ratio=[0.6, 0.3], block_keep_ratio=0.7).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(200):
        output = model(torch.randn(16, 3, 16, 16, generator=generator), generator=generator)
        sum(dyvm_ratio_losses(output, model.config).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(torch.cat([output.token_keep_ratio.mean(0), output.block_keep_ratio.mean(0, keepdim=True)]))
    assert_close(torch.stack(seen[-50:]).mean(0), torch.tensor([0.6, 0.3, 0.7]), 0.03)


# Edge cases


@every_position
def test_images_that_keep_no_token(position, monkeypatch):
    model = build(**position).train()
    drawn = dyvm_run.sample_decisions

    def draw(log_probs, tau, generator):
        factors = torch.tensor([0.0, 1.0, 1.0]).unsqueeze(1)
        return drawn(log_probs, tau, generator) * factors

    monkeypatch.setattr(dyvm_run, "sample_decisions", draw)
    output = model(pixels(model.config, 3), labels=torch.tensor([0, 1, 0]))
    assert output.token_policy[0].sum() == 0 and output.token_policy[1].sum() > 0
    assert output.logits.isfinite().all()
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in existing_gradients(model).values())


@pytest.mark.parametrize("size, kept", [((32, 24), [33, 23]), ((4, 8), [1, 1]), ((4, 4), [1, 1])])
def test_other_image_sizes(size, kept):
    model = build()
    with torch.no_grad():
        output = model(torch.randn(2, 3, *size), interpolate_pos_encoding=True)
        model.train()
        forced = model(torch.randn(2, 3, *size), interpolate_pos_encoding=True, kept_indices=output.kept_indices)
    assert [patches.shape[1] for patches in output.kept_indices] == kept
    assert output.logits.isfinite().all() and forced.logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_half_precision(dtype, residual_in_fp32):
    model = build(residual_in_fp32=residual_in_fp32)
    wanted = run(model)
    half = copy.deepcopy(model).to(dtype)
    given = pixels(model.config, 3).to(dtype)
    with torch.no_grad():
        assert half(given).logits.isfinite().all()
        output = half(given, kept_indices=wanted.kept_indices, block_gates=wanted.block_gates)
    assert output.logits.dtype == dtype
    assert_close(output.logits.float(), wanted.logits, 0.1)
    half.train()(given, labels=torch.tensor([0, 1, 1])).loss.backward()
    gradients = existing_gradients(half)
    assert gradients.keys() == dict(half.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("training", [False, True])
def test_autocast(training):
    model = build()
    wanted = run(model)
    model.train(training)
    forced = {"kept_indices": wanted.kept_indices, "block_gates": wanted.block_gates}
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixels(model.config, 3), **forced)
        free = model(pixels(model.config, 3))
    assert_close(output.logits.float(), wanted.logits, 0.03)
    assert free.block_gate_logits.dtype == torch.float32
    free.logits.float().square().mean().backward()
    assert all(gradient.isfinite().all() for gradient in existing_gradients(model).values())


@pytest.mark.slow
def test_compiled_training_step():
    model = build(num_hidden_layers=3, pruning_layers=[1, 2]).train()
    given, generator = pixels(model.config, 3), random_gates(3, blocks=3)
    kept = run(model.eval()).kept_indices
    model.train()
    wanted = model(given, kept_indices=kept, block_gates=generator).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(given, kept_indices=kept, block_gates=generator).logits, wanted, 1e-5)
    output = compiled(given, labels=torch.tensor([0, 1, 1]))
    output.loss.backward()
    assert output.token_decisions[0].unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"kept_indices": (torch.arange(4).expand(3, -1),)}, r"one \(batch, kept\) tensor per stage \(2\); got 1"),
        ({"block_gates": torch.ones(3, 4, 2)}, r"must be \(3, 5, 2\); got \(3, 4, 2\)"),
        (
            {"kept_indices": (torch.arange(4).expand(3, -1), torch.arange(3, 6).expand(3, -1))},
            "that no earlier stage has dropped",
        ),
    ],
)
def test_impossible_decisions(inputs, message):
    with pytest.raises(ValueError, match=message):
        run(build(), **inputs)


# Baselines


def test_even_selection():
    model = build(token_selection="even", token_keep_ratio=[0.5, 0.25])
    assert not any("score_predictors" in name for name in model.state_dict())
    output = run(model)
    assert output.kept_indices[0].tolist() == [[1, 3, 5, 7, 9, 11, 13, 15]] * 3
    assert output.kept_indices[1].tolist() == [[3, 7, 11, 15]] * 3
    model.train()
    trained = run(model, block_gates=output.block_gates)
    assert_close(trained.logits, output.logits, 1e-5)
    assert trained.token_decisions[0][0].tolist() == [0, 1] * 8


@pytest.mark.parametrize("tokens, kept", [(16, 11), (5, 5), (7, 1), (196, 137)])
def test_even_ranks(tokens, kept):
    ranks = token_selection.fixed_ranks("even", tokens, kept, "")
    assert len(set(ranks)) == kept and min(ranks) >= 0 and max(ranks) < tokens
    gaps = [after - before for before, after in zip(ranks, ranks[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_random_selection():
    model = build(token_selection="random")
    output = run(model)
    assert torch.equal(output.kept_indices[0], output.kept_indices[0][:1].expand(3, -1)), "the same for all images"
    assert torch.equal(run(build(token_selection="random")).kept_indices[1], output.kept_indices[1])
    other = run(build(token_selection="random", token_selection_seed=1))
    assert not torch.equal(other.kept_indices[0], output.kept_indices[0])
    trained = [run(model.train()) for _ in range(2)]
    for first, count in zip(trained[0].token_decisions, (11, 7), strict=True):
        assert first.sum(1).tolist() == [count] * 3
    assert not torch.equal(trained[0].token_decisions[0], trained[1].token_decisions[0])
    assert not torch.equal(trained[0].token_decisions[0][0], trained[0].token_decisions[0][1])


def test_selection_cannot_be_changed_without_predictors():
    model = build(token_selection="even")
    model.config.token_selection = "learned"
    with pytest.raises(RuntimeError, match="has no token predictors"):
        run(model)


# Making and loading


@pytest.mark.parametrize("classes", [(DyVMForImageClassification, VimForImageClassification), (DyVMModel, VimModel)])
def test_from_vim(classes, tmp_path):
    dynamic_class, plain_class = classes
    vim = build_vim(plain_class, drop_path_rate=0.1)
    before, fields = copy.deepcopy(vim.state_dict()), vim.config.to_dict()
    model = dynamic_class.from_vim(vim, token_keep_ratio=0.5, drop_path_rate=0.0)
    assert model.config.tokens_kept_at_default_size == [8, 4, 2] and model.config.drop_path_rate == 0
    assert not model.training
    assert_close({name: model.state_dict()[name] for name in before}, before)
    fresh = {name: value for name, value in model.named_parameters() if name not in before}
    assert fresh and all("score_predictors" in name or "block_head" in name for name in fresh)
    for name, value in fresh.items():
        if "block_head" in name:
            assert (value == (5 if name.endswith("bias") else 0)).all()
        elif name.endswith("in_conv.1.weight"):
            assert 0.01 < value.std() < 0.03
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(vim.state_dict(), before)
    assert vim.config.to_dict() == fields
    vim.save_pretrained(tmp_path)
    for source in (str(tmp_path), tmp_path):
        again = dynamic_class.from_vim(source)
        assert_close({name: again.state_dict()[name] for name in before}, before)


def test_from_vim_keeps_type_and_mode():
    vim = build_vim().to(torch.bfloat16).train()
    model = DyVMForImageClassification.from_vim(vim)
    assert model.training and {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_from_vim_leaves_merging_out():
    vim = build_vim()
    merging = RMeeToVimForImageClassification.from_vim(vim, merge_r=3)
    model = DyVMForImageClassification.from_vim(merging)
    assert "merge_r" not in model.config.to_dict()
    model.set_pruning(False)
    assert torch.equal(run(model).logits, run(vim).logits)


def test_from_vim_refuses():
    with pytest.raises(TypeError, match="needs a plain `VimForImageClassification`; got a `VimModel`"):
        DyVMForImageClassification.from_vim(build_vim(VimModel))
    with pytest.raises(TypeError, match="got a `DyVMForImageClassification`"):
        DyVMForImageClassification.from_vim(build())
    with pytest.raises(TypeError, match="Unknown field keep of `DyVMConfig`"):
        DyVMForImageClassification.from_vim(build_vim(), keep=0.5)


def test_plain_vim_folder(tmp_path, caplog):
    vim = build_vim()
    vim.save_pretrained(tmp_path)
    model, report = DyVMForImageClassification.from_pretrained(
        tmp_path, pruning_layers=[1, 3], output_loading_info=True
    )
    modeling_dyvm.logger.warning_once.cache_clear()
    fresh = ("vim.score_predictors.", ".block_head.")
    assert report["missing_keys"] and not report["unexpected_keys"]
    assert all(any(part in name for part in fresh) for name in report["missing_keys"])
    with caplog.at_level("WARNING", modeling_dyvm.__name__):
        run(model)
        assert caplog.text.count("predictors of this DyVM are untrained") == 1
    model.set_pruning(False)
    assert torch.equal(run(model).logits, run(vim).logits)


@pytest.mark.parametrize("case", ["trained", "training", "off", "even"])
def test_no_warning_without_a_reason(case, caplog):
    model = DyVMForImageClassification.from_vim(build_vim(), token_selection="even" if case == "even" else "learned")
    modeling_dyvm.logger.warning_once.cache_clear()
    if case == "trained":
        randomized(model)
    model.train(case == "training").set_pruning(case != "off")
    with caplog.at_level("WARNING", modeling_dyvm.__name__):
        run(model)
    assert "untrained" not in caplog.text


def test_set_token_keep_ratio(tmp_path):
    model = build()
    model.set_token_keep_ratio(0.5)
    output = run(model)
    assert [kept.shape[1] for kept in output.kept_indices] == [8, 4]
    assert torch.equal(output.logits, run(build(token_keep_ratio=0.5)).logits)
    for impossible in (1.5, 0.01, [0.5], [0.5, 0.8]):
        with pytest.raises(ValueError, match="token_keep_ratio"):
            model.set_token_keep_ratio(impossible)
        assert model.config.token_keep_ratio == [0.5, 0.25]
    model.set_token_keep_ratio([0.9, 0.5])
    model.save_pretrained(tmp_path)
    again = DyVMForImageClassification.from_pretrained(tmp_path)
    assert again.config.token_keep_ratio == [0.9, 0.5]
    assert torch.equal(run(again).logits, run(model).logits)


def test_offsets_shift_the_gates():
    model = build()
    plain = run(model).block_gate_logits[:, 0]
    model.config.block_gate_logit_offset = [[1.0, -2.0]] + [[0.0, 0.0]] * 4
    assert_close(run(model).block_gate_logits[:, 0], plain + torch.tensor([1.0, -2.0]), 1e-6)
    model.config.block_gate_logit_offset = 100
    assert run(model).block_keep_ratio.tolist() == [1, 1, 1]


def test_token_merging_is_refused():
    model = build()
    before = run(model).logits
    for switch in (
        lambda: apply_token_merging(model, r=2),
        lambda: RMeeToVimForImageClassification.from_vim(model, merge_r=2),
    ):
        with pytest.raises(TypeError, match="A DyVM drops tokens itself"):
            switch()
    assert torch.equal(run(model).logits, before)


def test_lora_on_predictors_and_gates():
    peft = require_package("peft")
    model = build()
    targets = ["block_head", "in_conv.1", "out_conv.0", "in_proj"]
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets)).train()
    randomized(lora).train()
    output = lora(pixels(model.config, 3), labels=torch.tensor([0, 1, 1]))
    output.loss.backward()
    trained = {name: p.grad for name, p in lora.named_parameters() if p.requires_grad}
    assert all(f".{target}.lora_A" in " ".join(trained) for target in targets)
    assert all(gradient is not None and gradient.any() for gradient in trained.values())
