"""What every model class promises. A class gets all these checks by one line in `MODELS`."""

import copy
import inspect
import io
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers import (
    assert_close,
    existing_gradients,
    pixels,
    randomized,
    require_package,
    run_python,
    tiny_vim_config,
    tiny_vim_fields,
)
from hf_effml import (
    DyVMBackbone,
    DyVMConfig,
    DyVMForImageClassification,
    DyVMModel,
    RMeeToVimConfig,
    RMeeToVimForImageClassification,
    RMeeToVimModel,
    VimBackbone,
    VimForImageClassification,
    VimModel,
)


class Case(NamedTuple):
    model_class: type
    auto_class: type
    config: Callable[..., Any]
    lora_targets: list[str]
    # Fields with which a model draws nothing, couples no images in its loss, decides nothing that rounding flips.
    undecided: dict[str, Any] = {}


def tiny_rmeeto_config(**fields: Any) -> RMeeToVimConfig:
    """Merges twice: before block 1 and before block 2."""
    return RMeeToVimConfig(**tiny_vim_fields(**{"num_hidden_layers": 3, "merge_r": 3, "merge_interval": 1, **fields}))


def tiny_dyvm_config(**fields: Any) -> DyVMConfig:
    """Drops tokens twice, before block 1 and before block 2; some of its gates are closed once it is randomised."""
    gates = {"block_gate_bias_init": 0.0, "token_keep_ratio": 0.7}
    return DyVMConfig(**tiny_vim_fields(**{"num_hidden_layers": 3, **gates, **fields}))


_VIM_LORA = ["in_proj", "x_proj", "dt_proj", "out_proj"]
_DYVM_UNDECIDED = {"token_selection": "even", "enable_block_selection": False}
MODELS = [
    Case(VimModel, AutoModel, tiny_vim_config, _VIM_LORA),
    Case(VimForImageClassification, AutoModelForImageClassification, tiny_vim_config, _VIM_LORA),
    Case(VimBackbone, AutoBackbone, tiny_vim_config, _VIM_LORA),
    Case(RMeeToVimModel, AutoModel, tiny_rmeeto_config, _VIM_LORA),
    Case(RMeeToVimForImageClassification, AutoModelForImageClassification, tiny_rmeeto_config, _VIM_LORA),
    Case(DyVMModel, AutoModel, tiny_dyvm_config, _VIM_LORA, _DYVM_UNDECIDED),
    Case(DyVMForImageClassification, AutoModelForImageClassification, tiny_dyvm_config, _VIM_LORA, _DYVM_UNDECIDED),
    Case(DyVMBackbone, AutoBackbone, tiny_dyvm_config, _VIM_LORA, _DYVM_UNDECIDED),
]

every_model = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.model_class.__name__)
models_with_loss = pytest.mark.parametrize(
    "case",
    [case for case in MODELS if "labels" in inspect.signature(case.model_class.forward).parameters],
    ids=lambda case: case.model_class.__name__,
)


def build(case: Case, seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    return randomized(case.model_class(case.config(**fields)), seed)


def read(folder: Any) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@torch.no_grad()
def run(model: Any, batch: int = 2, **inputs: Any) -> tuple:
    return model(pixels(model.config, batch), return_dict=False, **inputs)


def first_tensor(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """What a loss is computed from where the model has none."""
    output = model(batch, return_dict=False)[0]
    return output[0] if isinstance(output, tuple) else output


# Saving and loading


@every_model
def test_save_and_load_is_exact(case, tmp_path):
    model = build(case)
    model.save_pretrained(tmp_path)
    auto_class = case.auto_class
    if auto_class is AutoBackbone:  # its `from_pretrained` takes no folders
        auto_class = type(AutoBackbone.from_config(AutoConfig.from_pretrained(tmp_path)))
    for loaded in (case.model_class.from_pretrained(tmp_path), auto_class.from_pretrained(tmp_path)):
        assert type(loaded) is case.model_class
        assert not loaded.training
        assert_close(loaded.state_dict(), model.state_dict())
        assert_close(run(loaded, output_hidden_states=True), run(model, output_hidden_states=True))
        assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    assert not list(tmp_path.glob("*.bin"))


@every_model
def test_sharded_save(case, tmp_path):
    model = build(case)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_close(case.model_class.from_pretrained(tmp_path).state_dict(), model.state_dict())


@every_model
def test_missing_parameters_are_reported_and_finite(case, tmp_path, poisoned_memory):
    model = build(case)
    model.save_pretrained(tmp_path)
    weights = read(tmp_path)
    for start in (0, 1):
        kept = dict(sorted(weights.items())[start::2])
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, report = case.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert set(report["missing_keys"]) == weights.keys() - kept.keys()
        state = loaded.state_dict()
        assert_close({name: state[name] for name in kept}, kept)
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
    config = case.config(hidden_size=64, num_hidden_layers=2)
    fresh = case.model_class(config)
    fresh.save_pretrained(tmp_path)
    weights = read(tmp_path)
    for missing in (weights, *([name] for name in weights)):
        kept = {name: value for name, value in weights.items() if name not in missing}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded = case.model_class.from_pretrained(tmp_path)
        for name in missing:
            assert_initialised_alike(name, fresh.get_parameter(name), loaded.get_parameter(name))
    for name, parameter in case.auto_class.from_config(config).named_parameters():
        assert_initialised_alike(name, fresh.get_parameter(name), parameter)


@every_model
def test_buffers_after_loading(case, tmp_path, poisoned_memory):
    model = build(case)
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
    inputs = load_file(folder / "inputs.safetensors")
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    model.save_pretrained(again)
    for place in (model, auto.from_pretrained(again, trust_remote_code=True).eval()):
        with torch.no_grad():
            output = place(inputs["pixel_values"], return_dict=False)[0]
        output = output[0] if isinstance(output, tuple) else output
        difference = (output - inputs["output"]).abs().max()
        assert difference < 1e-6, f"{name}: differs by {difference}"
    assert type(model).__module__.startswith("transformers_modules."), type(model)
assert sys.modules["hf_effml"] is None
print("equal")
"""


def test_loads_without_the_package(tmp_path):
    """All classes in one process, slow to start as it is: `hf_effml` blocked, another folder, saved again there."""
    for case in MODELS:
        model, folder = build(case), tmp_path / case.model_class.__name__
        model.save_pretrained(folder)
        given = pixels(model.config)
        with torch.no_grad():
            save_file(
                {"pixel_values": given, "output": first_tensor(model, given).contiguous()},
                folder / "inputs.safetensors",
            )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    autos = json.dumps({case.model_class.__name__: case.auto_class.__name__ for case in MODELS})
    assert "equal" in run_python(_LOAD_ELSEWHERE, tmp_path, autos, cwd=elsewhere, without_package=True)


@every_model
def test_config_round_trip(case):
    config = case.config(num_labels=3)
    again = type(config)(**json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    assert again.num_labels == 3
    assert AutoConfig.for_model(**config.to_dict()).to_dict() == config.to_dict()


@every_model
def test_pickle_and_deepcopy(case):
    model = build(case)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_close(run(again), run(model))


# The forward pass


@every_model
def test_tuple_equals_dict(case):
    model = build(case)
    given = pixels(model.config)
    with torch.no_grad():
        as_dict = model(given, output_hidden_states=True)
        as_tuple = model(given, output_hidden_states=True, return_dict=False)
        model.config.return_dict = False
        by_config = model(given, output_hidden_states=True)
    assert isinstance(as_tuple, tuple) and isinstance(by_config, tuple)
    assert_close(as_tuple, as_dict.to_tuple())
    assert_close(by_config, as_dict.to_tuple())


@every_model
def test_hidden_states_by_config(case):
    model = build(case, output_hidden_states=True)
    with torch.no_grad():
        states = model(pixels(model.config)).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert all(state.shape[0] == 2 and state.shape[2] == model.config.hidden_size for state in states)


@every_model
def test_rows_are_independent(case):
    model = build(case)
    given = pixels(model.config, batch=3)
    with torch.no_grad():
        together = first_tensor(model, given)
        for row in range(3):
            assert_close(first_tensor(model, given[row : row + 1]), together[row : row + 1], 1e-5)


@every_model
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_empty_batch(case, mode):
    model = build(case).train(mode == "train")
    output = first_tensor(model, pixels(model.config, batch=0))
    assert output.shape == (0, *first_tensor(model, pixels(model.config, batch=1)).shape[1:])
    output.sum().backward()
    assert all(gradient.abs().sum() == 0 for gradient in existing_gradients(model).values())


@every_model
def test_deterministic(case):
    model = build(case)
    assert_close(run(model), run(model))
    assert_close(run(build(case)), run(model))


# Number types


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(case, dtype, tmp_path):
    model = build(case, **case.undecided)
    model.save_pretrained(tmp_path)
    half = case.model_class.from_pretrained(tmp_path, dtype=dtype)
    strict = case.model_class._keep_in_fp32_modules_strict
    for name, parameter in half.named_parameters():
        kept = any(pattern in name for pattern in strict)
        assert parameter.dtype == (torch.float32 if kept else dtype), name
    for pattern in strict:
        assert any(pattern in name for name, _ in half.named_parameters()), f"{pattern} matches no parameter"
    given = pixels(model.config)
    with torch.no_grad():
        output, wanted = first_tensor(half, given.to(dtype)), first_tensor(model, given)
        assert_close(first_tensor(half, given), output, 0.03)
    assert output.dtype == dtype
    assert_close(output.float(), wanted, 0.1)
    first_tensor(half.train(), given.to(dtype)).float().square().mean().backward()
    assert all(gradient.isfinite().all() for gradient in existing_gradients(half).values())


@every_model
def test_autocast(case):
    model = build(case, **case.undecided)
    given = pixels(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        output = first_tensor(model, given)
        output.float().square().mean().backward()
    with torch.no_grad():
        assert_close(output.detach().float(), first_tensor(model, given), 0.03)
    assert all(gradient.isfinite().all() for gradient in existing_gradients(model).values())


# Training


def loss_of(model: Any, given: torch.Tensor) -> torch.Tensor:
    output = first_tensor(model, given).float()
    return F.mse_loss(output, torch.linspace(-1, 1, output.numel()).view_as(output))


@every_model
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_gradient_checkpointing(case, use_reentrant):
    """With drop path and dropout, so that a block recomputed with other random numbers would show."""
    model = build(case, drop_path_rate=0.5, hidden_dropout_prob=0.2).train()
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    calls = []
    next(blocks[0].children()).register_forward_hook(lambda *_: calls.append(1))
    given = pixels(model.config, batch=4)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(1)
        loss = loss_of(model, given)
        loss.backward()
        results.append({"loss": loss.detach(), **existing_gradients(model)})
    assert_close(results[1], results[0], 1e-6)
    assert len(calls) == 1 + 2, "with checkpointing a block runs twice"


@models_with_loss
def test_gradient_accumulation_with_trainer(case, tmp_path):
    given = pixels(case.config(), batch=8)
    data = [{"pixel_values": image, "labels": index % 2} for index, image in enumerate(given)]
    weights = []
    for size, steps in ((8, 1), (2, 4)):
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            learning_rate=0.5,
            optim="sgd",
            max_grad_norm=0.0,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = build(case, **case.undecided)
        Trainer(model, arguments, train_dataset=data).train()
        weights.append(model.state_dict())
    assert_close(weights[1], weights[0], 1e-5)
    with pytest.raises(AssertionError):
        assert_close(weights[0], build(case, **case.undecided).state_dict(), 1e-5)


@models_with_loss
def test_every_parameter_learns(case):
    model = build(case).train()
    model(pixels(model.config, 4), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    gradients = existing_gradients(model)
    for name, _ in model.named_parameters():
        assert name in gradients and gradients[name].isfinite().all() and gradients[name].abs().sum() > 0, name


@every_model
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_lora(case):
    peft = require_package("peft")
    model = build(case, **case.undecided)
    plain = first_tensor(model, pixels(model.config)).detach()
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=case.lora_targets))
    for target in case.lora_targets:
        assert any(f".{target}.lora_A" in name for name, _ in lora.named_parameters()), f"no adapter on {target}"
    randomized(lora)
    given = pixels(model.config)
    output = first_tensor(lora, given)
    output.square().mean().backward()
    gradients = {name: p.grad for name, p in lora.named_parameters() if p.requires_grad}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    merged = lora.merge_and_unload()
    with torch.no_grad():
        assert_close(first_tensor(merged, given), output.detach(), 1e-5)
    assert (output - plain).abs().max() > 1e-3


# Compilers


@every_model
def test_export(case):
    model = build(case)
    given = pixels(model.config)
    program = torch.export.export(model, (given,), {"return_dict": True})
    again = pixels(model.config, seed=1)
    with torch.no_grad():
        assert_close(dict(program.module()(again, return_dict=True)), dict(model(again)), 1e-5)


@every_model
def test_compile(case):
    """Traced in one graph, forward and backward; the code generator is left out, which only costs time here."""
    model = build(case)
    given = pixels(model.config)
    loss_of(model, given).backward()
    wanted = existing_gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(dict(compiled(given)), dict(model(given)), 1e-5)
    loss_of(compiled, given).backward()
    # Compiled, a scan that no image wants runs and gets a gradient of zero.
    found = {
        name: gradient for name, gradient in existing_gradients(model).items() if name in wanted or gradient.any()
    }
    assert_close(found, wanted, 1e-5)
