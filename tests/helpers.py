"""Comparisons and builders that tests share."""

import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from processes import Job


def require_package(name: str) -> ModuleType:
    """Import an optional package, or skip, also where a broken one raises what `importorskip` lets through."""
    try:
        return import_module(name)
    except Exception as error:
        pytest.skip(f"{name} is absent or broken ({type(error).__name__}: {error})")


def tiny_vim_fields(**overrides: Any) -> dict[str, Any]:
    """Fields of a Vim with 17 tokens that runs in milliseconds."""
    return {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, **overrides}


def tiny_vim_config(**overrides: Any) -> Any:
    """A `VimConfig` of `tiny_vim_fields`."""
    from hf_effml import VimConfig

    return VimConfig(**tiny_vim_fields(**overrides))


def pixels(config: Any, batch: int = 2, seed: int = 0) -> Tensor:
    """Normalised random images of the size that `config` asks for."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.num_channels, height, width, generator=generator)


def tiny_language_model(family: str = "Llama", seed: int = 0, **fields: Any) -> Any:
    """A causal language model of 4 blocks, 2 heads to a key, whose attention is far from uniform; evaluation mode."""
    shape = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    shape |= {
        "Qwen3": {"head_dim": 12},
        "Gemma": {"head_dim": 12},
        "Mistral": {"sliding_window": None},
        "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    }.get(family, {})
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**(shape | fields))
    return randomized(getattr(transformers, f"{family}ForCausalLM")(config), seed)


def tiny_tokenizer(**special_tokens: str) -> Any:
    """A tokenizer of bytes, `<pad>` 256 and `<s>` 257; arguments like `bos_token="<s>"` give them a meaning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<pad>", "<s>"]
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def texts(batch: int, tokens: int, padding: Sequence[int] = (), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random token ids of 60 words and their mask; `padding` columns of each sample are left padding."""
    ids = torch.randint(1, 61, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for sample, columns in enumerate(padding):
        mask[sample, :columns] = 0
    return ids * mask, mask


@cache
def colours() -> tuple[Any, Any]:
    """Real images of 8 pixels and three classes, 60 to train on, and a bank of three experts with epochs 0 to 8."""
    from hf_effml import ConvNetConfig, ExpertTrainer, ExpertTrainingArguments, TrajectoryBank, ZCAImageProcessor
    from hf_effml.distillation.real_images import RealImageData, RealImages

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    images = torch.rand(3, 3, 8, 8, generator=generator)[labels]
    images = (images + 0.4 * torch.rand(90, 3, 8, 8, generator=generator)) / 1.4
    processor = ZCAImageProcessor.from_images(images[:60])
    real = RealImages(processor.whiten(images), labels, ["red", "green", "blue"])
    data = RealImageData("colours", *(real.subset(range(*part)) for part in ((60,), (60, 75), (75, 90))), processor)
    config = ConvNetConfig(image_size=8, depth=2, hidden_size=4, num_labels=3)
    folder = str(Path(os.environ["HF_HOME"]) / "expert-bank")
    settings = {"train_batch_size": 20, "learning_rate": 0.05, "disable_tqdm": True, "device": "cpu", "seed": 1}
    ExpertTrainer(config, ExpertTrainingArguments(folder, num_experts=3, num_train_epochs=8, **settings), data).train()
    return data, TrajectoryBank.from_pretrained(folder)


def randomized(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter away from its initial value, so that equal outputs prove equal weights; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.05)
    return model.eval()


def in_model(name: str) -> str:
    """The name in a model of a parameter that has its official name in a file."""
    return re.sub(r"dt_proj(_b)?\.bias$", r"time_step\1.bias", name)


def tensors_of(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested outputs, with a name that says where it was found."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors_of(part, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from tensors_of(part, f"{name}[{index}]")


def assert_close(actual: Any, expected: Any, tolerance: float = 0.0, what: str = "") -> None:
    """
    Compare outputs tensor by tensor: equal shapes and types, and a largest difference of at most `tolerance` times
    `max(1, largest expected value)`. A tolerance of 0 means equal values; NaN never passes.
    """
    actual, expected = dict(tensors_of(actual)), dict(tensors_of(expected))
    assert actual.keys() == expected.keys(), what
    assert actual, "nothing to compare"
    for name, wanted in expected.items():
        given, where = actual[name], f"{what} {name}".strip()
        assert given.shape == wanted.shape, f"{where}: {tuple(given.shape)} instead of {tuple(wanted.shape)}"
        assert given.dtype == wanted.dtype, f"{where}: {given.dtype} instead of {wanted.dtype}"
        if not wanted.numel():
            continue
        difference = (given.double() - wanted.double()).abs().max().item()
        allowed = tolerance * max(1.0, wanted.double().abs().max().item())
        assert difference <= allowed, f"{where}: differs by {difference:.3g}, allowed {allowed:.3g}"


def existing_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients by parameter name, of those parameters that have one."""
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def run_python(code: str, *arguments: str | Path, cwd: Path, without_package: bool = False) -> str:
    """Run code in a process of its own, there with `hf_effml` not importable if asked for; its standard output."""
    if without_package:
        code = "import sys\nsys.modules['hf_effml'] = None\n" + code
    job = Job(code, *arguments, cwd=cwd)
    assert job.wait() == 0, job.stdout + job.stderr
    return job.stdout
