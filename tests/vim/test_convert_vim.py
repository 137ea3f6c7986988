"""Official checkpoints: reading them safely, detecting their configuration, converting and resizing them."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from hf_effml import load_image_processor
from hf_effml.vim import convert_vim_checkpoint, vim_image_processor
from hf_effml.vim.convert_vim import detect_vim_config, read_official_checkpoint


VECTORS = Path(__file__).parents[1] / "vectors" / "vim"
TENSORS = load_file(VECTORS / "vim.safetensors")
CASES = json.loads((VECTORS / "vim.json").read_text())["cases"]


def official_state(case):
    prefix = f"{case}/params/"
    return {key.removeprefix(prefix): value for key, value in TENSORS.items() if key.startswith(prefix)}


def save_pth(path, case="base_midcls", **extra):
    torch.save({"model": official_state(case), "args": argparse.Namespace(lr=1.0), "epoch": 3, **extra}, path)
    return path


@pytest.mark.parametrize("case", ["base_midcls", "stride_overlap_nodiv", "headcls", "nocls_meanpool", "doublecls"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_convert_reloads_with_equal_logits(case, suffix, tmp_path):
    source = tmp_path / f"official.{suffix}"
    if suffix == "pth":
        save_pth(source, case)
    else:
        save_file({f"module.{key}": value.contiguous() for key, value in official_state(case).items()}, source)
    hidden = {"divide_output": CASES[case]["config"]["if_divide_out"]}
    if case == "headcls":
        hidden["cls_token_position"] = "head"
    convert_vim_checkpoint(source, tmp_path / "out", trained_image_size=CASES[case]["image_size"], **hidden)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    logits = model(TENSORS[f"{case}/in/pixel_values"]).logits
    torch.testing.assert_close(logits, TENSORS[f"{case}/out/logits"], atol=5e-5, rtol=0)
    assert not list((tmp_path / "out").glob("*.bin"))


def test_detection_of_the_published_sizes():
    width, inner = 192, 384
    state = {
        "patch_embed.proj.weight": torch.zeros(width, 3, 16, 16),
        "cls_token": torch.zeros(1, 1, width),
        "norm_f.weight": torch.zeros(width),
        "head.weight": torch.zeros(1000, width),
        "layers.0.mixer.A_log": torch.zeros(inner, 16),
        "layers.0.mixer.conv1d.weight": torch.zeros(inner, 1, 4),
        "layers.0.mixer.conv1d.bias": torch.zeros(inner),
        "layers.0.mixer.dt_proj.weight": torch.zeros(inner, 12),
        "layers.0.mixer.in_proj.weight": torch.zeros(2 * inner, width),
    }
    for tokens, stride in ((197, 16), (730, 8)):
        config = detect_vim_config({**state, "pos_embed": torch.zeros(1, tokens, width)})
        assert (config.patch_stride, config.num_labels, config.time_step_rank) == (stride, 1000, 12)
    with pytest.raises(ValueError, match="No patch stride gives 200 patches"):
        detect_vim_config({**state, "pos_embed": torch.zeros(1, 201, width)})


def test_moving_average_is_taken_on_request(tmp_path):
    average = {key: value + 1 for key, value in official_state("base_midcls").items()}
    source = save_pth(tmp_path / "x.pth", model_ema=average)
    plain, ema = (read_official_checkpoint(source, use_ema=use_ema) for use_ema in (False, True))
    assert torch.equal(ema["cls_token"], plain["cls_token"] + 1)
    with pytest.raises(ValueError, match="no `model_ema`"):
        read_official_checkpoint(save_pth(tmp_path / "y.pth"), use_ema=True)


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize("content", ["evil", "garbage", "list"])
def test_untrusted_files_are_refused(content, tmp_path, capsys):
    source = tmp_path / "x.pth"
    if content == "evil":
        torch.save({"model": Evil()}, source)
    elif content == "garbage":
        source.write_bytes(pickle.dumps(3)[:-1] + b"garbage")
    else:
        torch.save([1, 2], source)
    with pytest.raises(ValueError, match=r"x\.pth"):
        read_official_checkpoint(source)
    assert "never run" not in capsys.readouterr().out


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*absent\.pth"):
        read_official_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"missing or of another shape: .*A_log"):
        detect_vim_config({"cls_token": torch.zeros(1)})
    state = official_state("base_midcls")
    state["rope.freqs_cos"] = state.pop("layers.1.mixer.conv1d_b.weight")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"Missing: .*layers\.1\.mixer\.conv1d_b\.weight.*unexpected: .*rope"):
        convert_vim_checkpoint(tmp_path / "x.safetensors", tmp_path / "out", trained_image_size=32)


def test_other_image_size_keeps_the_class_row_in_the_middle(tmp_path):
    source = save_pth(tmp_path / "x.pth")
    model = convert_vim_checkpoint(source, tmp_path / "out", trained_image_size=32, image_size=48)
    assert model.config.image_size == 48
    positions, official = model.vim.pos_embed, official_state("base_midcls")["pos_embed"]
    assert positions.shape[1] == 37
    assert torch.equal(positions[:, 18], official[:, 8])


def test_image_processor_is_the_official_transform(tmp_path):
    vim_image_processor(224).save_pretrained(tmp_path)
    processor = load_image_processor(tmp_path)
    assert (processor.size["shortest_edge"], processor.crop_size["height"], processor.resample) == (256, 224, 3)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    image = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    assert processor(image, return_tensors="pt").pixel_values.shape == (1, 3, 224, 224)


# DyVM

DYVM_TENSORS = load_file(VECTORS.parent / "dyvm" / "dyvm.safetensors")


def dyvm_state():
    return {key.removeprefix("vim/params/"): value for key, value in DYVM_TENSORS.items() if "vim/params/" in key[:11]}


def test_dyvm_reloads_with_equal_logits(tmp_path):
    save_file(dyvm_state(), tmp_path / "official.safetensors")
    model = convert_vim_checkpoint(
        tmp_path / "official.safetensors",
        tmp_path / "out",
        trained_image_size=48,
        pruning_layers=[2, 4],
        token_keep_ratio=0.7,
        block_keep_ratio=0.8,
    )
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model) and loaded.config.model_type == "dyvm"
    assert loaded.config.tokens_kept_at_default_size == [25, 17]
    logits = loaded(DYVM_TENSORS["vim/in/pixel_values"]).logits
    torch.testing.assert_close(logits, DYVM_TENSORS["vim/eval/logits"], atol=5e-5, rtol=0)


def test_dyvm_defaults_are_those_of_the_scripts(caplog):
    state = dyvm_state()
    with caplog.at_level("WARNING", "hf_effml.vim.convert_vim"):
        config = detect_vim_config(state, 48)
    assert "do not show how much it keeps" in caplog.text
    assert (config.pruning_layers, config.token_keep_ratio[0], config.block_keep_ratio) == ([2, 4], 0.7, 0.8)
    token_only = detect_vim_config({key: value for key, value in state.items() if "block_head" not in key}, 48)
    assert token_only.enable_token_pruning and not token_only.enable_block_selection
    block_only = detect_vim_config({key: value for key, value in state.items() if "score_" not in key}, 48)
    assert block_only.enable_block_selection and not block_only.enable_token_pruning
