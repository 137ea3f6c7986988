"""Folders of the wrong kind, and `config.json` that holds no configuration, on every road that loads a model."""

import json

import pytest

import hf_effml
from helpers import tiny_language_model, tiny_vim_config
from hf_effml.utils.model_kinds import check_model_type


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


def test_a_family_reads_each_other(folders):
    """A plain checkpoint is a start for the methods, and a plain language model for a full checkpoint."""
    assert hf_effml.DyVMConfig.from_pretrained(folders / "vim").model_type == "dyvm"
    assert hf_effml.RMeeToVimConfig.from_pretrained(folders / "vim").model_type == "rmeeto_vim"
    assert hf_effml.TokenRouterLlamaConfig.from_pretrained(folders / "llama").model_type == "token_router_llama"
