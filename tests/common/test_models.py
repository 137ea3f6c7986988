"""What every model class promises. A class gets all these checks by its case in `MODELS`."""

import copy
import inspect
import io
import json
from typing import Any

import pytest
import torch
from common.model_cases import MODELS, Case
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoBackbone, AutoConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

import hf_effml
from helpers import assert_close, existing_gradients, in_model, randomized, require_package, run_python


def test_every_public_model_is_here():
    public = [getattr(hf_effml, name) for name in hf_effml.__all__]
    public = {thing for thing in public if inspect.isclass(thing) and issubclass(thing, PreTrainedModel)}
    assert public == {case.model_class for case in MODELS}


def test_checks_that_are_left_out_exist():
    for case in MODELS:
        for name, reason in case.without.items():
            assert f"test_{name}" in globals() and len(reason.split()) > 3, (case.model_class.__name__, name)


ALWAYS_COMPILED = {"ConvNetForImageClassification", "DyVMForImageClassification"}


def every_model(check: Any) -> Any:
    """Run a check with every case that does not say why it has no part in it."""
    name = check.__name__.removeprefix("test_")
    cases = [case for case in MODELS if name not in case.without]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.model_class.__name__)(check)


def every_model_one_of_a_family_first(check: Any) -> Any:
    """The same for what takes seconds: the classifier that does most of its family in every run, the others slowly."""
    name = check.__name__.removeprefix("test_")
    cases = [
        pytest.param(
            case,
            id=case.model_class.__name__,
            marks=[] if case.model_class.__name__ in ALWAYS_COMPILED else pytest.mark.slow,
        )
        for case in MODELS
        if name not in case.without
    ]
    return pytest.mark.parametrize("case", cases)(check)


def run(model: Any, inputs: dict[str, Any], **more: Any) -> tuple:
    """All outputs, without gradients."""
    with torch.no_grad():
        return model(**inputs, return_dict=False, **more)


def first_tensor(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What a loss is computed from where the model has none."""
    output = model(**inputs, return_dict=False)[0]
    return output[0] if isinstance(output, tuple) else output


def rows_of(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples of a batch, as a data set has them."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return [dict(zip(tensors, row, strict=True)) for row in zip(*tensors.values(), strict=True)]


# Saving and loading


@every_model
def test_save_and_load_is_exact(case, tmp_path):
    model = case.build()
    inputs = case.inputs(model)
    expected = run(model, inputs)
    model.save_pretrained(tmp_path)
    auto_class = case.auto_class
    if auto_class is AutoBackbone:  # its `from_pretrained` takes no folders
        auto_class = type(AutoBackbone.from_config(AutoConfig.from_pretrained(tmp_path)))
    for loaded in (case.model_class.from_pretrained(tmp_path), auto_class.from_pretrained(tmp_path)):
        assert type(loaded) is case.model_class
        assert not loaded.training
        assert_close(loaded.state_dict(), model.state_dict())
        assert_close(run(loaded, inputs), expected)
        saved = AutoConfig.from_pretrained(tmp_path).to_dict()
        assert loaded.config.to_dict() | {"_name_or_path": ""} == saved | {"_name_or_path": ""}
    assert not list(tmp_path.glob("*.bin"))


@every_model
def test_sharded_save(case, tmp_path):
    model = case.build()
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_close(case.model_class.from_pretrained(tmp_path).state_dict(), model.state_dict())


@every_model
def test_missing_parameters(case, tmp_path, poisoned_memory):
    """They are reported, and finite."""
    model = case.build()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for start in (0, 1):
        kept = dict(sorted(weights.items())[start::2])
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, report = case.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert set(report["missing_keys"]) == {in_model(name) for name in weights.keys() - kept.keys()}
        state = loaded.state_dict()
        assert_close({name: state[in_model(name)] for name in kept}, kept)
        assert all(value.isfinite().all() for value in state.values())


def assert_initialised_alike(name: str, first: torch.Tensor, other: torch.Tensor) -> None:
    assert first.shape == other.shape and first.dtype == other.dtype, name
    if first.unique().numel() < 10:
        assert torch.equal(first, other), name
        return
    # Random values: the same spread, to within what so many draws allow.
    noise = 6 / first.numel() ** 0.5
    assert abs(first.std() / other.std() - 1) < noise, name
    assert (first.mean() - other.mean()).abs() < noise * first.std(), name


@every_model
def test_config_and_checkpoint_initialise_alike(case, tmp_path, poisoned_memory):
    """Also a parameter that alone is missing, where its module's parent has nothing left to initialise."""
    config = case.config(**case.wide)
    fresh = case.model_class(config)
    fresh.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for missing in (weights, *([name] for name in weights)):
        kept = {name: value for name, value in weights.items() if name not in missing}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded = case.model_class.from_pretrained(tmp_path)
        for name in map(in_model, missing):
            assert_initialised_alike(name, fresh.get_parameter(name), loaded.get_parameter(name))
    for name, parameter in case.auto_class.from_config(config).named_parameters():
        assert_initialised_alike(name, fresh.get_parameter(name), parameter)


@every_model
def test_buffers_after_loading(case, tmp_path, poisoned_memory):
    model = case.build()
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path)
    for name, buffer in model.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name


_LOAD_ELSEWHERE = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file

root = Path(sys.argv[1])
for name, auto in json.loads(sys.argv[2]).items():
    folder, again = root / name, root / "again" / name
    auto = getattr(transformers, auto)
    if auto is transformers.AutoBackbone:  # its `from_pretrained` takes no folders
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        auto = type(auto.from_config(config, trust_remote_code=True))
    inputs, wanted = load_file(folder / "inputs.safetensors"), load_file(folder / "output.safetensors")["output"]
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    model.save_pretrained(again)
    for place in (model, auto.from_pretrained(again, trust_remote_code=True).eval()):
        with torch.no_grad():
            output = place(**inputs, return_dict=False)[0]
        output = output[0] if isinstance(output, tuple) else output
        difference = (output - wanted).abs().max()
        assert difference == 0, f"{name}: differs by {difference}"
    assert type(model).__module__.startswith("transformers_modules."), type(model)
assert sys.modules["hf_effml"] is None
print("equal")
"""


def test_loads_without_the_package(tmp_path):
    """All classes in one process: `hf_effml` blocked, another folder, saved again there."""
    cases = [case for case in MODELS if "loads_without_the_package" not in case.without]
    for case in cases:
        model, folder = case.build(), tmp_path / case.model_class.__name__
        model.save_pretrained(folder)
        inputs = case.inputs(model)
        output = first_tensor(model, inputs).detach().contiguous()
        save_file(
            {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}, folder / "inputs.safetensors"
        )
        save_file({"output": output}, folder / "output.safetensors")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    autos = json.dumps({case.model_class.__name__: case.auto_class.__name__ for case in cases})
    assert "equal" in run_python(_LOAD_ELSEWHERE, tmp_path, autos, cwd=elsewhere, without_package=True)


@every_model
def test_config_round_trip(case):
    config = case.config()
    again = type(config)(**json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    assert AutoConfig.for_model(**config.to_dict()).to_dict() == config.to_dict()


@every_model
def test_pickle_and_deepcopy(case):
    model = case.build()
    inputs = case.inputs(model)
    before = run(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_close(run(again, inputs), before)


# The forward pass


@every_model
def test_tuple_equals_dict(case):
    model = case.build()
    inputs = case.inputs(model) | {"output_hidden_states": True}
    with torch.no_grad():
        as_dict, as_tuple = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert_close(as_tuple, as_dict.to_tuple())


@every_model
def test_return_dict_by_config(case):
    model = case.build()
    inputs = case.inputs(model)
    expected = run(model, inputs)
    model.config.return_dict = False
    with torch.no_grad():
        by_config = model(**inputs)
    assert isinstance(by_config, tuple)
    assert_close(by_config, expected)


@every_model
def test_hidden_states_by_config(case):
    model = case.build(output_hidden_states=True)
    with torch.no_grad():
        states = model(**case.inputs(model)).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert all(state.shape[0] == 2 and state.shape[2] == model.config.hidden_size for state in states)


@every_model
def test_rows_are_independent(case):
    model = case.build()
    inputs = case.inputs(model, batch=3)
    with torch.no_grad():
        together = first_tensor(model, inputs)
        for row, alone in enumerate(rows_of(inputs)):
            alone = inputs | {name: value.unsqueeze(0) for name, value in alone.items()}
            assert_close(first_tensor(model, alone), together[row : row + 1], 1e-5)


@every_model
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_empty_batch(case, mode):
    model = case.build().train(mode == "train")
    output = first_tensor(model, case.inputs(model, batch=0))
    assert output.shape == (0, *first_tensor(model, case.inputs(model, batch=1)).shape[1:])
    output.sum().backward()
    assert all(gradient.abs().sum() == 0 for gradient in existing_gradients(model).values())


@every_model
def test_deterministic(case):
    model = case.build()
    inputs = case.inputs(model)
    first = run(model, inputs)
    assert_close(run(model, inputs), first)
    assert_close(run(case.build(), inputs), first)


# Number types


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    floating = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    return inputs | {name: value.to(dtype) for name, value in floating.items()}


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(case, dtype, tmp_path):
    model = case.build(**case.undecided)
    model.save_pretrained(tmp_path)
    half = case.model_class.from_pretrained(tmp_path, dtype=dtype)
    strict = case.model_class._keep_in_fp32_modules_strict or ()
    for name, parameter in half.named_parameters():
        kept = any(pattern in name for pattern in strict)
        assert parameter.dtype == (torch.float32 if kept else dtype), name
    for pattern in strict:
        assert any(pattern in name for name, _ in half.named_parameters()), f"{pattern} matches no parameter"
    inputs = case.inputs(model)
    with torch.no_grad():
        output, wanted = first_tensor(half, cast(inputs, dtype)), first_tensor(model, inputs)
        assert_close(first_tensor(half, inputs), output, 0.03)
    assert output.dtype == dtype
    assert_close(output.float(), wanted, 0.1)
    first_tensor(half.train(), cast(inputs, dtype)).float().square().mean().backward()
    assert all(gradient.isfinite().all() for gradient in existing_gradients(half).values())


@every_model
def test_autocast(case):
    model = case.build(**case.undecided)
    inputs = case.inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = first_tensor(model, inputs)
        output.float().square().mean().backward()
    with torch.no_grad():
        assert_close(output.detach().float(), first_tensor(model, inputs), 0.03)
    assert all(gradient.isfinite().all() for gradient in existing_gradients(model).values())


# Training


def loss_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    output = first_tensor(model, inputs).float()
    return F.mse_loss(output, torch.linspace(-1, 1, output.numel()).view_as(output))


def assert_checkpointing_changes_nothing(case: Case, use_reentrant: bool) -> None:
    """With dropout of every kind, so that a block recomputed with other random numbers would show."""
    model = case.build(**case.dropout).train()
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    calls = []
    next(blocks[0].children()).register_forward_hook(lambda *_: calls.append(1))
    inputs = case.inputs(model, batch=4)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(1)
        loss = loss_of(model, inputs)
        loss.backward()
        results.append({"loss": loss.detach(), **existing_gradients(model)})
    assert_close(results[1], results[0], 1e-6)
    assert len(calls) == 1 + 2, "with checkpointing a block runs twice"


@every_model
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_gradient_checkpointing(case):
    assert_checkpointing_changes_nothing(case, use_reentrant=False)


@every_model
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_reentrant_checkpointing(case):
    assert_checkpointing_changes_nothing(case, use_reentrant=True)


@every_model
def test_gradient_accumulation(case, tmp_path):
    """Samples of different lengths, where they have one, so that a mean of means would show."""
    inputs = case.inputs(case.build(**case.undecided), batch=8)
    data = rows_of(inputs | {"labels": case.labels(inputs)})
    weights = []
    for size, steps in ((8, 1), (2, 4)):
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            learning_rate=case.learning_rate,
            optim="sgd",
            max_grad_norm=0.0,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = case.build(**case.undecided)
        Trainer(model, arguments, train_dataset=data).train()
        weights.append(model.state_dict())
    assert_close(weights[1], weights[0], 1e-5)
    with pytest.raises(AssertionError):
        assert_close(weights[0], case.build(**case.undecided).state_dict(), 1e-5)


@every_model
def test_every_parameter_learns(case):
    model = case.build().train()
    inputs = case.inputs(model, batch=4)
    model(**inputs, labels=case.labels(inputs)).loss.backward()
    gradients = existing_gradients(model)
    for name, _ in model.named_parameters():
        assert name in gradients and gradients[name].isfinite().all() and gradients[name].abs().sum() > 0, name


@every_model
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_lora(case):
    peft = require_package("peft")
    model = case.build(**case.undecided)
    inputs = case.inputs(model)
    plain = first_tensor(model, inputs).detach()
    targets = list(case.lora_targets)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    for target in targets:
        assert any(f".{target}.lora_A" in name for name, _ in lora.named_parameters()), f"no adapter on {target}"
    randomized(lora)
    output = first_tensor(lora, inputs)
    output.square().mean().backward()
    gradients = {name: p.grad for name, p in lora.named_parameters() if p.requires_grad}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    merged = lora.merge_and_unload()
    with torch.no_grad():
        assert_close(first_tensor(merged, inputs), output.detach(), 1e-5)
    assert (output - plain).abs().max() > 1e-3


# Compilers


@every_model_one_of_a_family_first
def test_export(case):
    model = case.build()
    inputs = case.inputs(model) | {"return_dict": True}
    program = torch.export.export(model, (), inputs)
    again = case.inputs(model, seed=1)
    with torch.no_grad():
        assert_close(dict(program.module()(**again, return_dict=True)), dict(model(**again)), 1e-5)


@every_model_one_of_a_family_first
def test_compile(case):
    """Traced in one graph, forward and backward; the code generator is left out, which only costs time here."""
    model = case.build()
    inputs = case.inputs(model)
    loss_of(model, inputs).backward()
    wanted = existing_gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(dict(compiled(**inputs)), dict(model(**inputs)), 1e-6)
    loss_of(compiled, inputs).backward()
    # Compiled, a scan that no image wants runs and gets a gradient of zero.
    found = {
        name: gradient for name, gradient in existing_gradients(model).items() if name in wanted or gradient.any()
    }
    assert_close(found, wanted, 1e-5)


@every_model
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_trace(case):
    """The number of images stays free."""
    model = case.build(**case.undecided)
    strict = model.base_model_prefix == "vim"  # others return a dictionary there
    traced = torch.jit.trace(model, tuple(case.inputs(model, batch=1).values()), strict=strict)
    other = case.inputs(model, batch=3, seed=1)
    with torch.no_grad():
        outputs = traced(*other.values())
        outputs = outputs if isinstance(outputs, tuple) else tuple(outputs.values())
        assert_close(outputs, model(**other, return_dict=False), 1e-5)


# Other linear layers in the place of ours


def linear_layers(model: Any) -> dict[str, torch.nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}


@every_model
def test_a_linear_layer_is_one(case):
    """An equal `nn.Linear` in its place changes nothing, on which quantisers and adapters rely."""
    model = case.build()
    inputs = case.inputs(model)
    before = run(model, inputs)
    for name, layer in linear_layers(model).items():
        assert type(layer) is torch.nn.Linear, name
        equal = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        equal.load_state_dict(layer.state_dict())
        model.set_submodule(name, equal)
    assert_close(run(model, inputs), before)


@every_model
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
def test_int8(case):
    """Every linear layer is quantised and called as a module."""
    undecided = case.undecided | ({"merge_matching": "random"} if hasattr(case.config(), "merge_matching") else {})
    for fields in (undecided, {}):
        model = case.build(**fields)
        inputs, names, heard = case.inputs(model), linear_layers(model), set()
        wanted = first_tensor(model, inputs).detach()
        small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        assert not linear_layers(small)
        for name in names:
            small.get_submodule(name).register_forward_hook(lambda *_, name=name, heard=heard: heard.add(name))
        output = first_tensor(small, inputs)
        assert heard == names.keys()
        if fields == undecided:
            assert_close(output, wanted, 0.1)
