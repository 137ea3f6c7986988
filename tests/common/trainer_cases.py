"""The public trainers, each with what the common checks need to know of it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common.model_cases import routed
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

import hf_effml
from helpers import colours, pixels, texts, tiny_vim_config


class Case(NamedTuple):
    """One trainer. `without` names the checks that do not apply to it, with the reason."""

    trainer_class: type
    arguments_class: type
    make: Callable[..., Any]  # a trainer: its arguments, whether its model draws random numbers, callbacks
    defaults: dict[str, Any] = {}
    trained: Callable[[Any], dict[str, torch.Tensor]] = lambda trainer: trainer.model.state_dict()
    output: Callable[[Any], torch.Tensor] | None = None  # what a saved model must say as well
    auto_class: type | None = None
    metric: str = "eval_accuracy"
    card: dict[str, str] = {}
    # For runs that are cut off: arguments, and whether the log shows what they are to show.
    resuming: dict[str, Any] = {}
    telling: Callable[[list[dict[str, float]]], bool] = lambda history: True
    draws: bool = False  # with every step, whatever its settings, so that nothing may draw in between
    without: dict[str, str] = {}

    def arguments(self, folder: Path, **arguments: Any) -> Any:
        return self.arguments_class(str(folder), **(self.defaults | arguments))


TRAINER = {"max_steps": 2, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
STEPS_OF_8 = TRAINER | {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 0}


# Images


def vim(**fields: Any) -> Any:
    return hf_effml.VimForImageClassification(tiny_vim_config(**fields))


def rmeeto_vim(**fields: Any) -> Any:
    return hf_effml.RMeeToVimForImageClassification.from_vim(vim(num_hidden_layers=3, **fields), merge_r=4)


def dyvm(**fields: Any) -> Any:
    return hf_effml.DyVMForImageClassification.from_vim(vim(num_hidden_layers=3, **fields), token_keep_ratio=0.7)


def image_trainer(trainer_class: type, build: Callable[..., Any], args: Any, random: bool, callbacks: Any) -> Any:
    torch.manual_seed(0)
    model = build(**({"drop_path_rate": 0.4, "hidden_dropout_prob": 0.2} if random else {}))
    data = [{"pixel_values": image, "labels": index % 2} for index, image in enumerate(pixels(model.config, 32))]
    return trainer_class(model, args, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks)


def image_case(name: str, build: Callable[..., Any], **others: Any) -> Case:
    trainer_class = getattr(hf_effml, f"{name}Trainer")
    return Case(
        trainer_class,
        getattr(hf_effml, f"{name}TrainingArguments"),
        partial(image_trainer, trainer_class, build),
        STEPS_OF_8,
        output=lambda model: model(pixels(model.config, seed=5)).logits,
        auto_class=AutoModelForImageClassification,
        card={"library_name": "transformers", "pipeline_tag": "image-classification"},
        **others,
    )


DRAWN = "every step draws decisions and aims at a mean of its batch"
NO_MEAN = {"gradient_accumulation": DRAWN, "two_processes_equal_one": DRAWN}


# Texts


def router_trainer(args: Any, random: bool, callbacks: Any) -> Any:
    model = routed(router_type="one_pass", attention_dropout=0.2 if random else 0.0)
    data = [{"input_ids": text} for text in texts(32, 24)[0]]
    return hf_effml.TokenRouterTrainer(model, args, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks)


ROUTER = Case(
    hf_effml.TokenRouterTrainer,
    hf_effml.TokenRouterTrainingArguments,
    router_trainer,
    STEPS_OF_8,
    trained=lambda trainer: trainer.model.token_router.state_dict(),
    output=lambda model: model(texts(2, 24, seed=5)[0]).logits,
    auto_class=AutoModelForCausalLM,
    metric="eval_loss",
    card={"library_name": "transformers", "pipeline_tag": "text-generation"},
    without={"weight_decay_spares_what_the_model_names": "a router is two linear layers, which name nothing"},
)


# Distilled sets


def set_trainer(trainer_class: type, args: Any, random: bool, callbacks: Any) -> Any:
    data, bank = colours()
    model = hf_effml.distilled_from_real(data, bank, 2)
    return trainer_class(model, args, bank=bank, eval_dataset=data.validation, callbacks=callbacks)


def set_case(name: str, **resuming: Any) -> Case:
    trainer_class = getattr(hf_effml, f"{name}Trainer")
    in_its_own = "what is split are segments; `test_processes_batch_and_accumulation_are_the_same`"
    skipping = {"loss_threshold": 0.93, "initial_max_start_epoch": 1, "expansion_steps": 5, "logging_steps": 1}
    return Case(
        trainer_class,
        getattr(hf_effml, f"{name}TrainingArguments"),
        partial(set_trainer, trainer_class),
        TRAINER
        | {"syn_steps": 3, "batch_syn": 4, "max_start_epoch": 4, "lr_img": 20.0, "eval_epochs": 2, "eval_seeds": 1},
        trained=lambda trainer: dict(trainer.model.named_parameters()),
        output=lambda model: model.images,
        auto_class=AutoModel,
        resuming=skipping | resuming,
        telling=lambda history: 0 < sum(entry.get("matched", 0) for entry in history) < 6,
        without={
            "gradient_accumulation": in_its_own,
            "two_processes_equal_one": in_its_own,
            "arguments_that_must_not_matter": "learning rates have other names; it has a test of this name of its own",
            "weight_decay_spares_what_the_model_names": "images do not decay, as `test_optimizer` says",
        },
    )


def expert_trainer(args: Any, random: bool = False, callbacks: Any = None) -> Any:
    config = hf_effml.ConvNetConfig(image_size=8, depth=2, hidden_size=4, num_labels=3)
    return hf_effml.ExpertTrainer(config, args, colours()[0])


NO_TRAINER = "it trains many networks by a loop of its own; `test_expert.py` has this check for them"
EXPERTS = Case(
    hf_effml.ExpertTrainer,
    hf_effml.ExpertTrainingArguments,
    expert_trainer,
    {"num_experts": 2, "num_train_epochs": 2, "disable_tqdm": True, "device": "cpu"},
    without=dict.fromkeys(
        (
            "two_steps",
            "resume_equals_the_straight_run",
            "gradient_accumulation",
            "two_processes_equal_one",
            "arguments_that_must_not_matter",
            "weight_decay_spares_what_the_model_names",
            "card_has_no_placeholder",
            "saved_folders",
        ),
        NO_TRAINER,
    ),
)

TRAINERS = [
    image_case("Vim", vim),
    image_case("RMeeTo", rmeeto_vim),
    image_case("DyVM", dyvm, draws=True, without=NO_MEAN),
    ROUTER,
    set_case("TrajectoryMatching"),
    set_case("PAD"),
    set_case("EDF", cam_interval=3),
    EXPERTS,
]
