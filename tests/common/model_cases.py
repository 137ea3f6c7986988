"""The public model classes, each with what the common checks need to know of it."""

import json
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoBackbone, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

import hf_effml
from helpers import pixels, randomized, texts, tiny_language_model, tiny_vim_config, tiny_vim_fields
from hf_effml.distillation.flat_student import FlatStudent, build_student
from hf_effml.distillation.matching import MatchingSettings
from hf_effml.distillation.unroll import StudentDerivatives


class Case(NamedTuple):
    """One class. `without` names the checks that do not apply to it, with the reason."""

    model_class: type
    auto_class: type
    build: Callable[..., Any]  # a model with weights of its own, from a seed and fields of its configuration
    inputs: Callable[..., dict[str, Any]]  # keyword arguments of its forward: model, batch, seed
    labels: Callable[[dict[str, Any]], torch.Tensor] | None = None
    lora_targets: tuple[str, ...] = ()
    # Fields with which a model draws nothing, couples no samples in its loss, decides nothing that rounding flips.
    undecided: dict[str, Any] = {}
    learning_rate: float = 0.5
    dropout: dict[str, Any] = {}
    wide: dict[str, Any] = {}  # enough values of each parameter to compare how they are drawn
    without: dict[str, str] = {}

    def from_config(self, **fields: Any) -> Any:
        return self.model_class(self.config(**fields))

    def config(self, **fields: Any) -> Any:
        return self.build(**fields).config


def built(model_class: type, config: Callable[..., Any], seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    return randomized(model_class(config(**fields)), seed)


# Images


def image_inputs(model: Any, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    return {"pixel_values": pixels(model.config, batch, seed)}


def image_labels(inputs: dict[str, Any]) -> torch.Tensor:
    return torch.arange(len(inputs["pixel_values"])) % 2


def tiny_rmeeto_config(**fields: Any) -> Any:
    """Merges twice: before block 1 and before block 2."""
    fields = {"num_hidden_layers": 3, "merge_r": 3, "merge_interval": 1, **fields}
    return hf_effml.RMeeToVimConfig(**tiny_vim_fields(**fields))


def tiny_dyvm_config(**fields: Any) -> Any:
    """Drops tokens twice, before block 1 and before block 2; some of its gates are closed once it is randomised."""
    gates = {"block_gate_bias_init": 0.0, "token_keep_ratio": 0.7}
    return hf_effml.DyVMConfig(**tiny_vim_fields(**{"num_hidden_layers": 3, **gates, **fields}))


NO_LABELS = "it takes no labels"


def vim_case(name: str, auto_class: type, config: Callable[..., Any], **others: Any) -> Case:
    model_class = getattr(hf_effml, name)
    classifies = auto_class is AutoModelForImageClassification
    without = {} if classifies else dict.fromkeys(("gradient_accumulation", "every_parameter_learns"), NO_LABELS)
    if auto_class is AutoModel:
        without |= dict.fromkeys(("export", "compile"), "the classifier of its family holds it")
    return Case(
        model_class,
        auto_class,
        partial(built, model_class, config),
        image_inputs,
        image_labels if classifies else None,
        ("in_proj", "x_proj", "dt_proj", "out_proj"),
        dropout={"drop_path_rate": 0.5, "hidden_dropout_prob": 0.2},
        wide={"hidden_size": 64, "num_hidden_layers": 2},
        without=without,
        **others,
    )


DYVM_UNDECIDED = {"token_selection": "even", "enable_block_selection": False}
VIMS = [
    vim_case("VimModel", AutoModel, tiny_vim_config),
    vim_case("VimForImageClassification", AutoModelForImageClassification, tiny_vim_config),
    vim_case("VimBackbone", AutoBackbone, tiny_vim_config),
    vim_case("RMeeToVimModel", AutoModel, tiny_rmeeto_config),
    vim_case("RMeeToVimForImageClassification", AutoModelForImageClassification, tiny_rmeeto_config),
    vim_case("DyVMModel", AutoModel, tiny_dyvm_config, undecided=DYVM_UNDECIDED),
    vim_case(
        "DyVMForImageClassification", AutoModelForImageClassification, tiny_dyvm_config, undecided=DYVM_UNDECIDED
    ),
    vim_case("DyVMBackbone", AutoBackbone, tiny_dyvm_config, undecided=DYVM_UNDECIDED),
]


def tiny_convnet_config(**fields: Any) -> Any:
    fields = {"image_size": 8, "depth": 2, "hidden_size": 4, "num_labels": 2, **fields}
    return hf_effml.ConvNetConfig(**fields)


CONVNET = Case(
    hf_effml.ConvNetForImageClassification,
    AutoModelForImageClassification,
    partial(built, hf_effml.ConvNetForImageClassification, tiny_convnet_config),
    image_inputs,
    image_labels,
    ("features.4",),
    wide={"hidden_size": 32, "num_labels": 40},
    without={
        "gradient_checkpointing": "its layers are no blocks to compute twice",
        "reentrant_checkpointing": "its layers are no blocks to compute twice",
        "hidden_states_by_config": "its maps have other shapes; `test_outputs_and_losses` counts them",
    },
)


# Texts


def text_inputs(model: Any, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    ids, mask = texts(batch, 20, range(0, 3 * batch, 3), seed)
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def text_labels(inputs: dict[str, Any]) -> torch.Tensor:
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def tiny_full_config(family: str, token_router: dict[str, Any] | None = None, **fields: Any) -> Any:
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.3}
    shape |= {"head_dim": 12} if family == "Qwen3" else {}
    router = {"target_sparsity": 0.4, "min_tokens": 0, "router_type": "dynamic", **(token_router or {})}
    return getattr(hf_effml, f"TokenRouter{family}Config")(**(shape | fields), token_router=router)


NO_PROGRAM = "how many tokens a block keeps depends on the data"
OF_TEXTS = {
    "reentrant_checkpointing": "refused, as `test_reentrant_checkpointing_is_refused` says",
    "return_dict_by_config": "the language models of transformers fail with it",
    "empty_batch": "a batch without texts has no lengths to route by",
    "export": NO_PROGRAM,
    "compile": NO_PROGRAM,
    "trace": NO_PROGRAM,
    "int8": "rounding flips decisions; `test_a_quantised_router_is_heard` quantises a router",
}


def full_case(family: str) -> Case:
    model_class = getattr(hf_effml, f"TokenRouter{family}ForCausalLM")
    return Case(
        model_class,
        AutoModelForCausalLM,
        partial(built, model_class, partial(tiny_full_config, family)),
        text_inputs,
        text_labels,
        ("q_proj", "down_proj"),
        undecided={"token_router": {"router_type": "static"}, "initializer_range": 0.1},
        learning_rate=0.05,
        dropout={"attention_dropout": 0.2},
        wide={"num_hidden_layers": 2},
        without=OF_TEXTS,
    )


@cache
def base_folder() -> str:
    folder = Path(os.environ["HF_HOME"]) / "tiny-llama"
    tiny_language_model().save_pretrained(folder)
    return str(folder)


def routed(seed: int = 0, router_type: str = "dynamic", **fields: Any) -> Any:
    """A wrapper that finds its base model again; `fields` are the base model's."""
    config = hf_effml.TokenRouterConfig(
        target_sparsity=0.4, min_tokens=0, router_type=router_type, base_model_name_or_path=base_folder()
    )
    model = hf_effml.TokenRouterModel(tiny_language_model(**fields), config).eval()
    randomized(model.token_router, seed)
    return model


WRAPPER = Case(
    hf_effml.TokenRouterModel,
    AutoModelForCausalLM,
    routed,
    text_inputs,
    text_labels,
    ("q_proj", "down_proj"),
    undecided={"router_type": "static", "initializer_range": 0.1},
    learning_rate=0.05,
    dropout={"attention_dropout": 0.2},
    without=OF_TEXTS
    | {
        "sharded_save": "one small file holds a router",
        "missing_parameters": "refused, as `test_incomplete_files_are_refused` says",
        "config_and_checkpoint_initialise_alike": "it is made of a base model, not of a configuration",
        "hidden_states_by_config": "its configuration is the router's, not the base model's",
        "half_precision": "its base model alone changes; `test_modeling_token_router.py` says how",
    },
)


# Distilled sets


def segments(model: Any, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Segments to match: where a student starts and where an expert went from there."""
    student = FlatStudent(build_student(tiny_convnet_config(), seed=1))
    starts = student.flatten().expand(batch, -1)
    return {
        "starts": starts,
        "targets": starts + 0.01,
        "seeds": list(range(seed, seed + batch)),
        "derivatives": StudentDerivatives(student),
        "settings": MatchingSettings(syn_steps=2, loss_threshold=100.0, augmentation=model.config.augmentation),
    }


def tiny_set_config(**fields: Any) -> Any:
    fields = {"images_per_class": 2, "image_size": 8, "id2label": {0: "cat", 1: "dog"}, **fields}
    student = json.loads(tiny_convnet_config().to_json_string())
    return hf_effml.DistilledDatasetConfig(student=student, **fields)


SET = Case(
    hf_effml.DistilledDatasetModel,
    AutoModel,
    partial(built, hf_effml.DistilledDatasetModel, tiny_set_config),
    segments,
    without={
        **dict.fromkeys(("gradient_accumulation", "every_parameter_learns"), NO_LABELS),
        **dict.fromkeys(
            ("gradient_checkpointing", "reentrant_checkpointing"), "it has no blocks; its steps are stored"
        ),
        **dict.fromkeys(("export", "compile", "trace"), "its forward trains a student and differentiates that"),
        **dict.fromkeys(("a_linear_layer_is_one", "int8"), "it has no layers at all"),
        "loads_without_the_package": "its forward needs a student; its own test brings one",
        "tuple_equals_dict": "its output is of one kind",
        "return_dict_by_config": "its output is of one kind",
        "hidden_states_by_config": "it has no hidden states",
        "rows_are_independent": "its inputs are segments, which share the images",
        "empty_batch": "a step without a segment is no step",
        "half_precision": "it is matched in float32 whatever its type",
        "lora": "it has no layers to adapt",
    },
)

MODELS = [*VIMS, CONVNET, *(full_case(family) for family in ("Llama", "Qwen2", "Qwen3")), WRAPPER, SET]
