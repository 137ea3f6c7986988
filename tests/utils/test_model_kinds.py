"""Folders of the wrong kind, and `config.json` that holds no configuration, on every road that loads a model."""

import json

import pytest
import torch

import hf_effml
from helpers import tiny_language_model, tiny_vim_config
from hf_effml.distillation.bank.convert import import_distilled_tensors
from hf_effml.distillation.convert_convnet import convert_convnet_checkpoint, to_official
from hf_effml.distillation.evaluation.students import student_by_name
from hf_effml.utils.language_models import load_language_model
from hf_effml.utils.model_kinds import check_model_type, check_task
from hf_effml.vim.convert_vim import read_official_checkpoint


CLASSES = [
    "ConvNetForImageClassification",
    "DistilledDatasetModel",
    "DyVMForImageClassification",
    "RMeeToVimForImageClassification",
    "TokenRouterModel",
    "VimBackbone",
    "VimForImageClassification",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    tiny_language_model().save_pretrained(folder / "llama")
    hf_effml.VimForImageClassification(tiny_vim_config()).save_pretrained(folder / "vim")
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_another_kind_is_named(name, folders):
    kind = "vim" if name == "TokenRouterModel" else "llama"
    wanted = "token_router" if kind == "vim" else getattr(hf_effml, name).config_class.model_type
    with pytest.raises(ValueError, match=f"of the kind '{kind}' .*; needed is .*'{wanted}'.* folder or Hub id of one"):
        getattr(hf_effml, name).from_pretrained(folders / kind)


@pytest.mark.parametrize("name", [*CLASSES, "TokenRouterLlamaForCausalLM"])
def test_config_that_holds_no_configuration(name, tmp_path):
    for content in ([], None, 3, "vim"):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(OSError, match=r"`config.json` of .* holds no configuration"):
            getattr(hf_effml, name).from_pretrained(tmp_path)


def test_programs_ask_before_they_load(folders, tmp_path):
    assert check_model_type(folders / "vim", ("vim", "convnet")) == "vim"
    with pytest.raises(ValueError, match="'vim' .VimForImageClassification.; needed is 'token_router' or 'llama'"):
        check_model_type(folders / "vim", ["token_router", "llama"])
    with pytest.raises(ValueError, match="holds no `config.json`, so no model; needed is 'vim'"):
        check_model_type(tmp_path, "vim")


def test_a_model_for_another_task_is_named(folders, tmp_path):
    assert check_task(folders / "llama", "AutoModelForCausalLM") == "llama"
    assert check_task(folders / "vim", "AutoModelForImageClassification") == "vim"
    with pytest.raises(ValueError, match="of the kind 'vim'; needed is one for `AutoModelForCausalLM`"):
        load_language_model(str(folders / "vim"))
    with pytest.raises(ValueError, match="of the kind 'llama'; needed is one for `AutoModelForImageClassification`"):
        student_by_name(str(folders / "llama"), (8, 8), 3, 10)
    with pytest.raises(ValueError, match="holds no `config.json`, so no model"):
        check_task(tmp_path, "AutoModelForCausalLM")
    router = hf_effml.TokenRouterModel(tiny_language_model(), hf_effml.TokenRouterConfig())
    router.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of the kind 'vim'; needed is one for `AutoModelForCausalLM`"):
        hf_effml.TokenRouterModel.from_pretrained(folders / "vim", tmp_path)
    with pytest.raises(ValueError, match="is a token router already; needed is the language model"):
        load_language_model(str(tmp_path))


def test_a_family_reads_each_other(folders):
    """A plain checkpoint is a start for the methods, and a plain language model for a full checkpoint."""
    assert hf_effml.DyVMConfig.from_pretrained(folders / "vim").model_type == "dyvm"
    assert hf_effml.RMeeToVimConfig.from_pretrained(folders / "vim").model_type == "rmeeto_vim"
    assert hf_effml.TokenRouterLlamaConfig.from_pretrained(folders / "llama").model_type == "token_router_llama"


# Files of weights

READERS = [convert_convnet_checkpoint, read_official_checkpoint, lambda path: import_distilled_tensors(path, path)]
every_reader = pytest.mark.parametrize("read", READERS, ids=["convnet", "vim", "images"])


@every_reader
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize(
    "content, said",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "the pointer that Git LFS keeps"),
        (b"\n<!DOCTYPE html><html><head>", "is a web page, not weights"),
        (b"<HTML>", "is a web page, not weights"),
        (b"", "is damaged, or no file of torch"),
        (b"\x99" * 2000, "is damaged, or no file of torch|holds more than tensors"),
    ],
)
def test_what_is_no_file_of_weights(read, name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / name)


@pytest.mark.parametrize("read", READERS[:2], ids=["convnet", "vim"])
def test_keys_that_are_numbers(read, tmp_path):
    torch.save({"state_dict": {0: torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="no state dict: the names of weights are text, one of its keys is 0"):
        read(tmp_path / "x.pth")


def test_a_checkpoint_of_lightning(tmp_path):
    weights = to_official(hf_effml.ConvNetForImageClassification(hf_effml.ConvNetConfig(hidden_size=4)))
    lightning = {"epoch": 3, "state_dict": {f"model.{name}": value for name, value in weights.items()}}
    torch.save(lightning, tmp_path / "x.ckpt")
    again = to_official(convert_convnet_checkpoint(tmp_path / "x.ckpt"))
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert read_official_checkpoint(tmp_path / "x.ckpt").keys() == weights.keys()
