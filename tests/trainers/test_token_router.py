"""Training a router: what it learns and leaves alone, what is saved, and that resuming equals going on."""

import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from helpers import assert_close, require_package, run_python
from hf_effml import (
    TokenRouterConfig,
    TokenRouterLlamaForCausalLM,
    TokenRouterModel,
    TokenRouterTrainer,
    TokenRouterTrainingArguments,
    apply_token_router,
)
from hf_effml.token_router.patching import find_decoder
from hf_effml.utils.text_data import load_text, make_windows
from processes import Job


SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def base(**fields):
    torch.manual_seed(0)
    # A model that has learned nothing ignores its context, and so has nothing to lose.
    return LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.2, **fields)).eval()


def routed(**fields):
    torch.manual_seed(1)
    return TokenRouterModel(base(), TokenRouterConfig(**{"target_sparsity": 0.4, "min_tokens": 0, **fields}))


def texts(count=32, length=24, seed=0):
    return torch.randint(61, (count, length), generator=torch.Generator().manual_seed(seed))


def rows(count=32):
    return [{"input_ids": text} for text in texts(count)]


def make_trainer(folder, model=None, data=None, **arguments):
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TokenRouterTrainingArguments(str(folder), **(defaults | arguments))
    data = rows() if data is None else data
    return TokenRouterTrainer(routed() if model is None else model, args, train_dataset=data, eval_dataset=data[:8])


def router_of(model):
    return {name: value.clone() for name, value in find_decoder(model).token_router.state_dict().items()}


@pytest.mark.parametrize("router_type", ["one_pass", "dynamic"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"selection": "threshold"}, {"kv_policy": "keep"}, {"skip_unit": "mlp"}, {"decode_policy": "keep"}],
    ids=lambda fields: next(iter(fields.values()), "default"),
)
def test_only_the_router_learns(tmp_path, router_type, fields):
    model = routed(router_type=router_type, **fields)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(tmp_path, model, logging_steps=1)
    assert trainer.train().global_step == 4
    for name, value in model.state_dict().items():
        assert value.isfinite().all()
        assert torch.equal(value, weights[name]) != ("token_router" in name), name
    assert all(("token_router" in name) == p.requires_grad for name, p in model.named_parameters())
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 4
    for entry in entries:
        terms = sum(entry[f"loss_{name}"] for name in ("distill", "sparsity", "guide"))
        assert entry["loss"] == pytest.approx(terms, rel=1e-3)
        shares = [entry[f"sparsity/block_{block}"] for block in range(4)]
        assert shares[0] == 0 and entry["sparsity/achieved"] == pytest.approx(sum(shares) / 4)
        if "selection" not in fields:
            # 18 of 24 tokens are the prompt, and floor(18 * 0.4 * 4 / 3) of them skip a block.
            assert shares[1:] == pytest.approx([9 / 18] * 3)
    guides = [entry["loss_guide"] for entry in entries]
    assert guides[0] > guides[-1] > 0


@pytest.mark.slow
def test_training_finds_back_to_what_works(tmp_path, shared_data):
    """A router that keeps the oldest tokens and drops what the continuation needs learns the opposite."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "llama-stories260k")
    windows = make_windows(load_text(str(shared_data / "text/tinystories")).train, tokenizer, 256, limit=500)
    language_model = AutoModelForCausalLM.from_pretrained(shared_data / "llama-stories260k")
    model = TokenRouterModel(language_model, TokenRouterConfig(target_sparsity=0.4, decode_policy="keep"))
    with torch.no_grad():
        model.token_router.fc2.weight.neg_()
    data = [{"input_ids": window} for window in windows]
    options = {"per_device_train_batch_size": 4, "learning_rate": 0.01, "guide_weight": 0.0, "sparsity_weight": 0.0}
    trainer = make_trainer(tmp_path, model, data[100:], max_steps=100, **options)
    trainer.eval_dataset = data[:100]
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.25 * before
    # Of the prompts, which are three quarters of the texts.
    assert model.routing_report.sparsity == pytest.approx(0.75 * 0.4, abs=0.01)


def test_evaluation_is_what_users_get(tmp_path):
    model = routed()
    trainer = make_trainer(tmp_path, model, per_device_eval_batch_size=8)
    found = trainer.evaluate()["eval_loss"]
    given = texts()[:8]
    generated = torch.zeros_like(given, dtype=torch.bool)
    generated[:, -6:] = True
    with torch.no_grad():
        student = model(given, generated=generated).logits[:, -7:-1].log_softmax(-1)
        with model.disable_routing():
            teacher = model(given).logits[:, -7:-1].log_softmax(-1)
    assert found == pytest.approx((teacher.exp() * (teacher - student)).sum(-1).mean().item(), rel=1e-4)


def test_all_tokens_are_routed_without_a_continuation(tmp_path):
    trainer = make_trainer(tmp_path, continuation_share=0.0, logging_steps=1)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["sparsity/block_1"] == pytest.approx(int(24 * 0.4 * 4 / 3) / 24)


def test_completion_mask_and_left_padding(tmp_path):
    """A padded batch of texts with completions of their own has the loss of the texts alone."""
    model = routed().train()
    trainer = make_trainer(tmp_path, model, max_steps=1)
    lengths, prompts = (24, 15), (20, 9)
    ids = texts(2)
    mask, completion = (torch.zeros(2, 24, dtype=torch.long) for _ in range(2))
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        mask[row, 24 - length :] = 1
        completion[row, 24 - length + prompt :] = 1
    trainer.train()
    batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
    model.eval()
    together = trainer.compute_loss(model, batch).item()
    alone = []
    for row, length in enumerate(lengths):
        alone.append(
            trainer.compute_loss(model, {name: value[row : row + 1, 24 - length :] for name, value in batch.items()})
        )
    # The mean is over tokens: four completion tokens predict in the one, six in the other.
    assert together == pytest.approx((4 * alone[0].item() + 6 * alone[1].item()) / 10, rel=1e-4)


def test_hidden_states_as_target(tmp_path):
    trainer = make_trainer(tmp_path, distillation="hidden")
    trainer.train()
    assert 0 < trainer.evaluate()["eval_loss"] < 10


PROGRAM = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from transformers import TrainerCallback
sys.path.insert(0, {folder!r})
from test_token_router import make_trainer

folder, kill_at, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
torch.set_num_threads(1)

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = make_trainer(folder, max_steps=8, save_strategy="steps", save_steps=3, logging_steps=1,
                       per_device_train_batch_size=2, gradient_accumulation_steps=2)
trainer.add_callback(Kill())
# As on a command line.
trainer.train(resume_from_checkpoint="true" if resume else None)
trainer.save_model()
trainer.save_state()
"""


def test_killed_and_resumed_equals_straight(tmp_path):
    folder = os.path.dirname(__file__)
    code = PROGRAM.format(tests=os.path.dirname(folder), folder=folder)

    def run(name, kill_at=-1, resume="start"):
        job = Job(code, tmp_path / name, kill_at, resume, cwd=tmp_path, package=True)
        return job.wait(), job.stderr

    assert run("straight")[0] == 0
    assert run("killed", kill_at=5)[0] == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint-3").is_dir() and not (tmp_path / "killed" / "model.safetensors").exists()
    code_, error = run("killed", resume="resume")
    assert code_ == 0, error
    for name in ("model.safetensors", "checkpoint-6/model.safetensors"):
        expected, found = (load_file(tmp_path / kind / name) for kind in ("straight", "killed"))
        assert_close(found, expected)
        assert sum(tensor.numel() for tensor in found.values()) == 450


@pytest.mark.parametrize("router_type", ["one_pass", "dynamic"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_gradient_checkpointing(tmp_path, router_type):
    found = []
    for checkpointing in (False, True):
        model = routed(router_type=router_type)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        make_trainer(tmp_path, model).train()
        found.append(router_of(model))
    assert_close(found[1], found[0], 1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_reentrant_checkpointing_is_refused(tmp_path):
    model = routed()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match='The router got no gradient.*"use_reentrant": False'):
        make_trainer(tmp_path, model).train()


def test_saved_folder_and_checkpoint(tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = TokenRouterModel(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), TokenRouterConfig(target_sparsity=0.4, min_tokens=0)
    )
    trainer = make_trainer(tmp_path / "out", model, save_strategy="steps", save_steps=4)
    trainer.train()
    trainer.save_model()
    given = texts(2)
    with torch.no_grad():
        wanted = model.eval()(given).logits
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-4"):
        assert (folder / "model.safetensors").stat().st_size < 3000
        for loaded in (
            TokenRouterModel.from_pretrained(folder),
            AutoModelForCausalLM.from_pretrained(folder),
            TokenRouterModel.from_pretrained(base(), folder),
        ):
            with torch.no_grad():
                assert_close(loaded(given).logits, wanted)
    code = (
        "import sys, torch\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "kept = load_file(sys.argv[2])\n"
        "with torch.no_grad(): logits = model(kept['given']).logits\n"
        "assert type(model).__module__.startswith('transformers_modules.')\n"
        "print((logits - kept['wanted']).abs().max().item())\n"
    )
    from safetensors.torch import save_file

    save_file({"given": given, "wanted": wanted}, tmp_path / "kept.safetensors")
    printed = run_python(code, tmp_path / "out", tmp_path / "kept.safetensors", cwd=tmp_path, without_package=True)
    assert float(printed.split()[-1]) < 1e-6


def test_full_checkpoint(tmp_path):
    model = routed().to_full_checkpoint()
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is TokenRouterLlamaForCausalLM
    assert_close(router_of(loaded), router_of(model))
    assert any(not torch.equal(value, router_of(routed())[name]) for name, value in router_of(model).items())


def test_adapters_and_router_together(tmp_path):
    peft = require_package("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["token_router"])

    def adapted():
        torch.manual_seed(2)
        patched = apply_token_router(base(), TokenRouterConfig(target_sparsity=0.4, min_tokens=0))
        return peft.get_peft_model(patched, config), patched

    model, patched = adapted()
    trainer = make_trainer(tmp_path, model, learning_rate=0.05)
    trainer.train()
    trainer.save_model()
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert any("token_router" in name for name in weights) and any("lora_B" in name for name in weights)
    assert all(value.abs().sum() > 0 for name, value in weights.items() if "lora_B" in name)
    for name, value in base().state_dict().items():
        wrapped = name.replace("q_proj", "q_proj.base_layer").replace("down_proj", "down_proj.base_layer")
        assert torch.equal(patched.state_dict()[wrapped], value), name
    again = apply_token_router(base(), TokenRouterConfig(target_sparsity=0.4, min_tokens=0))
    loaded = peft.PeftModel.from_pretrained(again, tmp_path)
    given = texts(2)
    with torch.no_grad():
        assert_close(loaded.eval()(given).logits, model.eval()(given).logits)
        assert not torch.equal(loaded(given).logits, base()(given).logits)


def test_teacher_has_no_adapters(tmp_path):
    peft = require_package("peft")
    patched = apply_token_router(base(), TokenRouterConfig(target_sparsity=0.4, min_tokens=0))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["token_router"], init_lora_weights=False)
    model = peft.get_peft_model(patched, config)
    trainer = make_trainer(tmp_path, model)
    given = texts(2)
    with torch.no_grad(), trainer._teaching(model):
        assert_close(model(given).logits, base()(given).logits)
    assert model.training


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: routed(router_type="static"), ValueError, '`router_type="static"` has nothing to train'),
        (lambda: routed(target_sparsity=0.0), ValueError, "No block skips any token"),
        (base, TypeError, "The model must have a token router; got a bare `LlamaForCausalLM`"),
        (
            lambda: apply_token_router(base(), TokenRouterConfig(target_sparsity=0.3)),
            TypeError,
            "would be saved without its router's configuration",
        ),
    ],
)
def test_nothing_to_train(tmp_path, build, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make_trainer(tmp_path, build())


def test_frozen_router_in_peft(tmp_path):
    peft = require_package("peft")
    patched = apply_token_router(base(), TokenRouterConfig(target_sparsity=0.3))
    model = peft.get_peft_model(patched, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        make_trainer(tmp_path, model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"continuation_share": 1.0}, "`continuation_share` must be at least 0 and less than 1; got 1.0"),
        ({"guide_weight": -1.0}, "`guide_weight` must not be negative; got -1.0"),
        ({"sparsity_weight": -0.5}, "`sparsity_weight` must not be negative"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenRouterTrainingArguments(str(tmp_path), **arguments)


def test_wrong_kind_of_arguments(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="`args` must be `TokenRouterTrainingArguments`; got a `TrainingArguments`"):
        TokenRouterTrainer(routed(), TrainingArguments(str(tmp_path)))
