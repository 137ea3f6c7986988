"""Routers, full checkpoints and adapters pushed from one process and loaded in another one with an empty cache."""

import shutil

import pytest
from hub.conftest import ALICE

from helpers import require_package


pytestmark = pytest.mark.hub

TOOLS = """
import json, torch
from safetensors.torch import load_file, save_file

prompt = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))

def probe(model):
    tokens = model.eval().generate(prompt, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        return {"logits": model(prompt).logits, "tokens": tokens}

def remember(model, name):
    save_file({key: value.contiguous() for key, value in probe(model).items()}, f"{name}.safetensors")

def check(model, name):
    expected = load_file(f"{name}.safetensors")
    for key, value in probe(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)
"""

PUSH = (
    TOOLS
    + """
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from hf_effml import TokenRouterConfig, TokenRouterModel

shape = dict(vocab_size=61, hidden_size=32, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None,
             eos_token_id=None)
LlamaForCausalLM(LlamaConfig(**shape)).push_to_hub("alice/base")
base = AutoModelForCausalLM.from_pretrained("alice/base")
model = TokenRouterModel(base, TokenRouterConfig(target_sparsity=0.45, min_tokens=0))
model.config.sparsity_schedule = [0.0, 0.3, 0.8, 0.7]
torch.nn.init.normal_(model.token_router.fc2.weight)
assert model.config.base_model_name_or_path == "alice/base"
remember(model, "router")
model.push_to_hub("alice/router")
HfApi().create_tag("alice/router", tag="v1")
full = model.to_full_checkpoint()
remember(full, "full")
full.push_to_hub("alice/full")
"""
)

PUSH_ADAPTER = (
    TOOLS
    + """
import peft
from transformers import AutoModelForCausalLM
from hf_effml import TokenRouterConfig, apply_token_router

base = apply_token_router(AutoModelForCausalLM.from_pretrained("alice/base"),
                          TokenRouterConfig(target_sparsity=0.4, min_tokens=0))
adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False,
                                                    modules_to_save=["token_router"]))
router = base.model.token_router.modules_to_save["default"]
torch.nn.init.normal_(router.fc2.weight)
remember(adapted, "adapter")
adapted.push_to_hub("alice/adapter")
"""
)

LOAD_WITHOUT_PACKAGE = (
    TOOLS
    + """
from transformers import AutoModelForCausalLM as Auto

for name in ("router", "full"):
    model = Auto.from_pretrained(f"alice/{name}", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    check(model, name)
assert 0.4 < Auto.from_pretrained("alice/router", revision="v1", trust_remote_code=True).config.target_sparsity < 0.5
try:
    Auto.from_pretrained("alice/router")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("loaded remote code unasked")
"""
)

LOAD_WITH_PACKAGE = (
    TOOLS
    + """
import hf_effml
from transformers import AutoModelForCausalLM as Auto

for model in (
    Auto.from_pretrained("alice/router"),
    hf_effml.TokenRouterModel.from_pretrained("alice/router", revision="v1"),
    hf_effml.TokenRouterModel.from_pretrained("alice/base", "alice/router"),
    hf_effml.TokenRouterModel.from_pretrained(Auto.from_pretrained("alice/base"), "alice/router"),
):
    assert type(model) is hf_effml.TokenRouterModel
    check(model, "router")
full = Auto.from_pretrained("alice/full")
assert type(full) is hf_effml.TokenRouterLlamaForCausalLM
check(full, "full")
"""
)

LOAD_ADAPTER = (
    TOOLS
    + """
import peft
from transformers import AutoModelForCausalLM
from hf_effml import TokenRouterConfig, apply_token_router

base = apply_token_router(AutoModelForCausalLM.from_pretrained("alice/base"),
                          TokenRouterConfig(target_sparsity=0.4, min_tokens=0))
check(peft.PeftModel.from_pretrained(base, "alice/adapter"), "adapter")
"""
)


def test_push_here_load_there(hub, client):
    require_package("peft")
    client.run(PUSH + PUSH_ADAPTER, home="pusher", token=ALICE)
    shutil.rmtree(client.folder / "pusher")
    (weights,) = [path for path in hub.paths("alice/router") if path.endswith(".safetensors")]
    assert weights == "model.safetensors" and client.leaks() == []
    client.run(LOAD_WITHOUT_PACKAGE, home="stranger", without_package=True)
    client.run(LOAD_WITH_PACKAGE + LOAD_ADAPTER, home="friend")
    hub.stop()
    client.run(LOAD_WITHOUT_PACKAGE, home="stranger", without_package=True, offline=True)
