"""The wrapper: saves the router alone, loads it onto its base model, here and where the package is missing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import assert_close, run_python, texts, tiny_language_model
from hf_effml import (
    TokenRouterConfig,
    TokenRouterLlamaForCausalLM,
    TokenRouterModel,
    TokenRouterQwen2ForCausalLM,
    TokenRouterQwen3ForCausalLM,
    apply_token_router,
)
from hf_effml.token_router.patching import find_decoder


IDS, MASK = texts(2, 20, (0, 6))
FULL = {
    "Llama": TokenRouterLlamaForCausalLM,
    "Qwen2": TokenRouterQwen2ForCausalLM,
    "Qwen3": TokenRouterQwen3ForCausalLM,
}
every_family = pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Qwen3Moe", "Gemma"])


def wrapped(family="Llama", seed=0, **fields):
    """A wrapper whose router is not a fresh one; its base has weights of its own seed."""
    fields = {"target_sparsity": 0.4, "router_type": "dynamic", "min_tokens": 0} | fields
    model = TokenRouterModel(tiny_language_model(family, seed), TokenRouterConfig(**fields))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.token_router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def logits_of(model):
    return model(IDS, attention_mask=MASK).logits


@pytest.fixture
def folders(tmp_path):
    """A base model and its router, each in a folder; the router names its base."""
    base, router = tmp_path / "base", tmp_path / "router"
    tiny_language_model().save_pretrained(base)
    model = wrapped(base_model_name_or_path=str(base))
    model.save_pretrained(router)
    return base, router, model


def test_the_folder_is_small(folders):
    _, router, model = folders
    weights = load_file(router / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in weights.items()} == {
        "fc1.weight": (64, 4),
        "fc1.bias": (64,),
        "fc2.weight": (2, 64),
        "fc2.bias": (2,),
    }
    assert (router / "model.safetensors").stat().st_size < 3000
    config = json.loads((router / "config.json").read_text())
    assert config["num_hidden_layers"] == 4 and config["model_type"] == "token_router"
    assert not list(router.glob("*.bin"))
    for again in (AutoConfig.from_pretrained(router), TokenRouterConfig.from_pretrained(router)):
        assert type(again) is TokenRouterConfig and again.schedule == model.config.schedule


def test_every_way_to_load(folders):
    base, router, model = folders
    wanted = logits_of(model)
    loaded = (
        TokenRouterModel.from_pretrained(router),
        TokenRouterModel.from_pretrained(str(base), str(router)),
        TokenRouterModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), router),
        TokenRouterModel.from_pretrained(
            tiny_language_model(), router, config=TokenRouterConfig.from_pretrained(router)
        ),
        AutoModelForCausalLM.from_pretrained(router),
    )
    for again in loaded:
        assert type(again) is TokenRouterModel and not again.training
        assert_close(again.state_dict(), model.state_dict())
        assert torch.equal(logits_of(again), wanted)
    assert not torch.equal(logits_of(wrapped(seed=1)), wanted)


def test_loading_onto_another_base(folders):
    """The router is that of the folder, everything else that of the model given."""
    _, router, model = folders
    other = TokenRouterModel.from_pretrained(tiny_language_model("Qwen3", seed=5), router)
    assert_close(other.token_router.state_dict(), model.token_router.state_dict())
    assert torch.equal(logits_of(other), logits_of(wrapped("Qwen3", seed=5)))


def test_saving_again_changes_nothing(folders, tmp_path):
    _, router, model = folders
    TokenRouterModel.from_pretrained(router).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (router / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(folders, dtype):
    """The base in half precision, the router and its decisions in float32."""
    _, router, model = folders
    half = TokenRouterModel.from_pretrained(router, dtype=dtype)
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if "token_router" in name else dtype), name
    logits = logits_of(half)
    assert logits.dtype == dtype and logits.isfinite().all()
    assert_close(half.token_router.state_dict(), model.token_router.state_dict())


def test_routers_of_a_half_precision_base_are_float32():
    model = TokenRouterModel(tiny_language_model().to(torch.bfloat16), TokenRouterConfig(min_tokens=0))
    assert {parameter.dtype for parameter in model.token_router.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.decoder.layers.parameters()} == {torch.bfloat16}


def test_state_dicts():
    model, other = wrapped(), TokenRouterModel(tiny_language_model(seed=1), wrapped().config)
    other.load_state_dict(model.token_router.state_dict())
    assert_close(other.token_router.state_dict(), model.token_router.state_dict())
    assert not torch.equal(logits_of(other), logits_of(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other), logits_of(model))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**other.token_router.state_dict(), "fc1.bias": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"fc1.bias": torch.zeros(64)})


def test_incomplete_files_are_refused(folders):
    """A router with some of its weights left as they were would decide something else."""
    _, router, _ = folders
    weights = load_file(router / "model.safetensors")
    bias = weights.pop("fc2.bias")
    for changed, said in (
        ({}, r"`fc2.bias` is missing and should be \(2,\)"),
        ({"fc2.bias": bias[:1]}, r"`fc2.bias` is \(1,\) and should be \(2,\)"),
        ({"fc2.bias": bias, "fc3.bias": bias.clone()}, r"`fc3.bias` is \(2,\) and should be absent"),
        ({"fc2.bias": bias * torch.nan}, "values in `fc2.bias` that are not finite"),
    ):
        save_file(weights | changed, router / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=said):
            TokenRouterModel.from_pretrained(router)
    (router / "model.safetensors").write_bytes(b"\xff" * 99)
    with pytest.raises(ValueError, match="is no file of weights"):
        TokenRouterModel.from_pretrained(router)


def test_a_batch_of_nothing_is_named():
    for shape in ((0, 20), (2, 0), (20,)):
        with pytest.raises(ValueError, match=r"at least one text of at least one token, \(batch, tokens\); got"):
            wrapped().decoder(torch.zeros(shape, dtype=torch.long))


def test_parts():
    model = wrapped()
    assert model.decoder is model.model.model is find_decoder(model)
    assert model.token_router is model.decoder.token_router
    assert model.get_input_embeddings() is model.model.get_input_embeddings()
    assert model.get_output_embeddings() is model.model.lm_head
    assert model.config is model.decoder.token_routing_hook.config
    again = TokenRouterModel(model.model)
    assert again.config is model.config and torch.equal(logits_of(again), logits_of(model))
    with torch.no_grad():
        as_tuple = model(IDS, attention_mask=MASK, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], logits_of(model))


# Full checkpoints


@every_family
@pytest.mark.parametrize("tied", [False, True])
def test_full_checkpoint_of_a_wrapper(family, tied, tmp_path):
    base = tiny_language_model(family, tie_word_embeddings=tied)
    model = TokenRouterModel(base, TokenRouterConfig(target_sparsity=0.4, min_tokens=0))
    if family not in FULL:
        with pytest.raises(
            TypeError, match=f"no full checkpoint of a `{family}ForCausalLM`; there are of LlamaForCausalLM"
        ):
            model.to_full_checkpoint()
        return
    full = model.to_full_checkpoint()
    assert type(full) is FULL[family] and not full.training
    assert full.model.embed_tokens.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr()
    assert (full.lm_head.weight is full.model.embed_tokens.weight) is tied
    assert torch.equal(logits_of(full), logits_of(model))
    for name, buffer in base.named_buffers():
        assert torch.equal(full.get_buffer(name), buffer), name
    full.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is FULL[family]
    assert_close(again.state_dict(), full.state_dict())
    assert torch.equal(logits_of(again), logits_of(model))
    assert again.config.token_router["num_hidden_layers"] == 4
    assert again.config.to_dict()["model_type"] == f"token_router_{family.lower()}"


def test_full_checkpoint_keeps_kernel_and_mode():
    base = tiny_language_model(attn_implementation="eager").train()
    full = TokenRouterModel(apply_token_router(base, TokenRouterConfig(min_tokens=0))).to_full_checkpoint()
    assert full.config._attn_implementation == "eager" and full.training
    assert full.generation_config is base.generation_config


_LOAD_ELSEWHERE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
inputs = load_file(root / "inputs.safetensors")
for name in sys.argv[2:]:
    again = root / "again" / name
    model = AutoModelForCausalLM.from_pretrained(root / name, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    model.save_pretrained(again)
    for place in (model, AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()):
        with torch.no_grad():
            output = place(inputs["ids"], attention_mask=inputs["mask"]).logits
        difference = (output - inputs[name]).abs().max()
        assert difference < 1e-5, f"{name}: differs by {difference}"
        tokens = place.generate(inputs["ids"], attention_mask=inputs["mask"], max_new_tokens=4, do_sample=False)
        assert torch.equal(tokens, inputs[name + ".tokens"]), name
    assert place.routing_report.sparsity > 0.3
assert sys.modules["hf_effml"] is None
print("equal")
"""


def test_loads_without_the_package(folders, tmp_path):
    """A router on its base, and full checkpoints of all families, in a process that cannot import `hf_effml`."""
    _, _, model = folders
    models = {"router": model} | {family: wrapped(family).to_full_checkpoint() for family in FULL}
    inputs = {"ids": IDS, "mask": MASK}
    for name, each in models.items():
        if name != "router":
            each.save_pretrained(tmp_path / name)
        inputs[name] = logits_of(each).contiguous()
        tokens = each.generate(IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False)
        inputs[f"{name}.tokens"] = tokens
    save_file(inputs, tmp_path / "inputs.safetensors")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "equal" in run_python(_LOAD_ELSEWHERE, tmp_path, *models, cwd=elsewhere, without_package=True)
