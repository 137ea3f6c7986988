"""Patching and un-patching: nothing is renamed, copied models and other threads are on their own."""

import copy
import io
import threading

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers import assert_close, require_package, texts, tiny_language_model
from hf_effml import TokenRouterConfig, TokenRouterModel, apply_token_router, disable_routing, remove_token_router
from hf_effml.token_router import patching
from hf_effml.token_router.patching import find_decoder, is_patched, make_routing_report
from routing_reference import slow_run


FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Qwen3Moe", "Gemma"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def config(**fields):
    return TokenRouterConfig(**({"target_sparsity": 0.4, "min_tokens": 0} | fields))


@torch.no_grad()
def logits_of(model, **more):
    ids, mask = texts(2, 20, (0, 6))
    return model(ids, attention_mask=mask, **more).logits


@every_family
def test_unpatching_restores_everything(family):
    model, plain = tiny_language_model(family), tiny_language_model(family)
    forwards = [type(block).forward for block in model.model.layers]
    apply_token_router(model, config())
    assert not torch.equal(logits_of(model), logits_of(plain))
    names = plain.state_dict().keys()
    added = {f"model.token_router.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
    assert model.state_dict().keys() == names | added
    for block, was in zip(model.model.layers, plain.model.layers, strict=True):
        assert type(block) is not type(was) and isinstance(block, type(was))
        assert isinstance(block, GradientCheckpointingLayer)
    assert remove_token_router(model) is model
    assert [type(block) for block in model.model.layers] == [type(block) for block in plain.model.layers]
    assert [type(block).forward for block in model.model.layers] == forwards
    assert model.model.__dict__.keys() == plain.model.__dict__.keys()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert not model.model._forward_pre_hooks and not is_patched(model.model)
    assert_close(model.state_dict(), plain.state_dict())
    assert torch.equal(logits_of(model), logits_of(plain))


def test_two_families_at_once_and_again():
    models = [apply_token_router(tiny_language_model(family), config()) for family in ("Llama", "Qwen3")]
    assert type(models[0].model.layers[0]) is not type(models[1].model.layers[0])
    first = logits_of(models[0])
    again = apply_token_router(remove_token_router(models[0]), config())
    assert type(again.model.layers[0]).__mro__.count(patching.TokenSkipMixin) == 1
    assert torch.equal(logits_of(again), first)


def test_replacing_a_router():
    model = apply_token_router(tiny_language_model(), config())
    apply_token_router(model, config(target_sparsity=0.2, router_type="static"), exist_ok=True)
    assert len(model.model._forward_pre_hooks) == 1
    logits_of(model)
    assert make_routing_report(model).sparsity_per_block[1] == pytest.approx(8 / 34)
    assert torch.equal(logits_of(remove_token_router(model)), logits_of(tiny_language_model()))


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
def test_copies_are_independent(way, wrapped, family, monkeypatch):
    model = apply_token_router(tiny_language_model(family), config(router_type="dynamic"))
    model = TokenRouterModel(model) if wrapped else model
    # With a training step behind it, whose decisions carry a graph.
    ids, _ = texts(2, 20)
    model.train()(ids).logits.sum().backward()
    model.eval()
    wanted = logits_of(model)
    model.train()(ids)
    model.eval()
    if way == "deepcopy":
        again = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        # As in a process that has patched nothing yet.
        monkeypatch.delattr(patching, f"TokenSkip{family}DecoderLayer")
        again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(logits_of(again), wanted)
    assert make_routing_report(again).keep_masks.shape == (4, 2, 20)
    with disable_routing(again):
        assert torch.equal(logits_of(model), wanted)
        dense = logits_of(again)
    assert torch.equal(logits_of(remove_token_router(again)), dense)
    assert is_patched(find_decoder(model)) and torch.equal(logits_of(model), wanted)
    assert torch.equal(logits_of(remove_token_router(model)), dense)


def test_unknown_names_of_the_module():
    for name in ("TokenSkipOPTDecoderLayer", "something"):
        with pytest.raises(AttributeError, match=name):
            getattr(patching, name)


def test_disabled_routing():
    model = apply_token_router(tiny_language_model(), config())
    other = apply_token_router(tiny_language_model(), config())
    routed, dense = logits_of(model), logits_of(tiny_language_model())
    with disable_routing(model):
        assert torch.equal(logits_of(model), dense)
        assert torch.equal(logits_of(other), routed)
        with disable_routing(model), disable_routing(other):
            assert torch.equal(logits_of(other), dense)
        assert torch.equal(logits_of(model), dense)
        assert torch.equal(logits_of(model, keep_mask={1: torch.zeros(2, 20, dtype=torch.bool)}), dense)
    with pytest.raises(ZeroDivisionError), disable_routing(model):
        raise ZeroDivisionError
    assert torch.equal(logits_of(model), routed)


def test_threads_do_not_disturb_one_another():
    """One thread runs dense, another routed, on the same model, block by block in turn."""
    model = apply_token_router(tiny_language_model(), config(router_type="dynamic"))
    wanted = {"routed": logits_of(model), "dense": logits_of(tiny_language_model())}
    barrier, found = threading.Barrier(2, timeout=20), {}
    handles = [block.register_forward_pre_hook(lambda *_: [barrier.wait()].clear()) for block in model.model.layers]

    def work(name):
        if name == "dense":
            with disable_routing(model):
                found[name] = [logits_of(model) for _ in range(3)]
        else:
            found[name] = [logits_of(model) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    for name, logits in wanted.items():
        assert len(found[name]) == 3 and all(torch.equal(one, logits) for one in found[name]), name


@every_family
def test_hidden_states_are_recorded(family):
    model = apply_token_router(tiny_language_model(family), config())
    ids, mask = texts(2, 20, (0, 6))
    with torch.no_grad():
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    slow = slow_run(model, ids, make_routing_report(model).keep_masks, mask)
    assert len(states) == 5
    for state, wanted in zip(states[:-1], slow.hidden[:-1], strict=True):
        assert_close(state * mask[..., None], wanted, 1e-5)


def test_decoder_alone():
    """The inner model is patched as well as one with a head."""
    model = tiny_language_model()
    apply_token_router(model.model, config())
    routed = logits_of(model)
    assert torch.equal(logits_of(apply_token_router(tiny_language_model(), config())), routed)
    ids, mask = texts(2, 20, (0, 6))
    with torch.no_grad():
        wanted = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        # Arguments by position, and a cache by the name of older versions.
        assert torch.equal(model.model(ids, mask).last_hidden_state, wanted)
        first = model.model(ids[:, :12], mask[:, :12], use_cache=True)
        cache = getattr(first, patching.CACHE_ARGUMENT)
        rest = model.model(ids[:, 12:], mask, past_key_values=cache)
    keep = make_routing_report(model).keep_masks
    assert keep.shape == (4, 2, 8) and rest.last_hidden_state.shape == (2, 8, 32)


# PEFT


def lora_model(**fields):
    peft = require_package("peft")
    model = apply_token_router(tiny_language_model(), config(**fields))
    lora = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj", "down_proj"],
        modules_to_save=["token_router"],
        init_lora_weights=False,
    )
    return peft, peft.get_peft_model(model, lora).eval()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("router_type", ["one_pass", "dynamic"])
def test_lora_and_router_together(router_type, tmp_path):
    peft, model = lora_model(router_type=router_type)
    router = find_decoder(model).token_router
    with torch.no_grad():
        for parameter in router.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    wanted = logits_of(model)
    masks = make_routing_report(model).keep_masks
    unlike = apply_token_router(tiny_language_model(), config(router_type=router_type))
    logits_of(unlike)
    assert not torch.equal(masks, make_routing_report(unlike).keep_masks), "the trained router decides"
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(unlike, tmp_path)
    assert torch.equal(logits_of(again), wanted)
    assert torch.equal(make_routing_report(again).keep_masks, masks)
    merged = again.merge_and_unload()
    assert is_patched(merged.model)
    assert_close(logits_of(merged), wanted, 1e-5)
    assert torch.equal(make_routing_report(merged).keep_masks, masks)
    report = make_routing_report(merged)
    plain = remove_token_router(merged)
    assert [type(block).__name__ for block in plain.model.layers] == ["LlamaDecoderLayer"] * 4
    assert report.kv_bytes < report.dense_kv_bytes


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_lora_and_router_learn_together():
    _, model = lora_model()
    ids, mask = texts(2, 20, (0, 6))
    model.train()(ids, attention_mask=mask, labels=ids).loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert any("lora_" in name for name in gradients) and any("token_router" in name for name in gradients)
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.isfinite().all(), name
    assert sum(value.abs().sum() for name, value in gradients.items() if "token_router" in name) > 0
    assert all(value.grad is None for value in model.parameters() if not value.requires_grad)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_report_inside_lora():
    _, model = lora_model()
    plain = apply_token_router(tiny_language_model(), config())
    logits_of(model), logits_of(plain)
    found, wanted = make_routing_report(model), make_routing_report(plain)
    assert (found.kv_bytes, found.dense_kv_bytes) == (wanted.kv_bytes, wanted.dense_kv_bytes)
    assert found.flop_ratio == pytest.approx(wanted.flop_ratio, abs=0.01)
    with disable_routing(model):
        dense = logits_of(model)
    assert not torch.equal(dense, logits_of(model))
