"""R-MeeTo's re-training: a Vision Mamba with merged tokens learns from labels and from its un-merged self."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from hf_effml.vim.classification_loss import problem_type_of
from hf_effml.vim.configuration_rmeeto import requested_merges
from hf_effml.vim.losses import logit_divergence
from hf_effml.vim.modeling_rmeeto import TokenMerger, remove_token_merging
from hf_effml.vim.modeling_vim import VimModel

from .vision import TaughtTrainer, TaughtTrainingArguments


@dataclass
class RMeeToTrainingArguments(TaughtTrainingArguments):
    """How to re-train a model with merged tokens.

    The defaults are the paper's (https://huggingface.co/papers/2412.12496) for Vim-S and Vim-B on ImageNet with a
    global batch of 512, so 128 on each of 4 devices; Vim-Ti trains for 30 epochs. The learning rate goes with the
    global batch. Three things differ on purpose: the cosine falls with every step instead of every epoch, weight decay
    spares what the model's `no_weight_decay()` names, and the teacher is in evaluation mode.

    Args:
        teacher (`str`, *optional*, defaults to `"self"`):
            `"self"` is a frozen copy of the model as it comes, without merging. Otherwise the folder or Hub id of an
            image classifier with the same classes, or `"none"`.
        distill_weight (`float`, *optional*, defaults to 0.5):
            Weight of the divergence from the teacher beside the cross-entropy.
        distill_temperature (`float`, *optional*, defaults to 1.0):
            Divides both scores before the softmax; the divergence is multiplied by its square.
        merge_warmup (`float`, *optional*, defaults to 0.0):
            Share of the steps over which merging grows to its full amount, see [`MergeWarmupCallback`]. Not in the
            paper.
    """

    distill_weight: float = field(default=0.5, metadata={"help": "Weight of the divergence from the teacher."})
    distill_temperature: float = field(default=1.0, metadata={"help": "Temperature of both softmaxes."})
    merge_warmup: float = field(default=0.0, metadata={"help": "Share of the steps in which merging grows."})
    learning_rate: float = field(default=2e-5, metadata={"help": "First and highest learning rate."})
    min_learning_rate: float = field(default=1e-6, metadata={"help": "Where the cosine ends."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of the matrices."})
    num_train_epochs: float = field(default=15, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images per device and step."})

    def __post_init__(self) -> None:
        if self.distill_weight < 0:
            raise ValueError(f"`distill_weight` must not be negative; got {self.distill_weight}.")
        if self.distill_temperature <= 0:
            raise ValueError(f"`distill_temperature` must be above 0; got {self.distill_temperature}.")
        if not 0 <= self.merge_warmup <= 1:
            raise ValueError(f"`merge_warmup` is a share of the steps, from 0 to 1; got {self.merge_warmup}.")
        super().__post_init__()


class MergeWarmupCallback(TrainerCallback):
    """Lets merging grow from nothing to the model's own amount over the first share of the steps.

    Between steps, when the model is evaluated or saved, it merges in full. Nothing is kept but the number of the step,
    so a resumed run continues exactly.

    Args:
        share (`float`):
            Share of all steps, from 0 to 1.

    Example:

    ```python
    >>> from hf_effml import MergeWarmupCallback

    >>> trainer.add_callback(MergeWarmupCallback(0.3))  # doctest: +SKIP
    ```
    """

    def __init__(self, share: float):
        if not 0 <= share <= 1:
            raise ValueError(f"`share` must be from 0 to 1; got {share}.")
        self.share = share
        self._full: list[tuple[VimModel, TokenMerger]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the full amount."""
        self._full = _merging_vims(kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the amount for one step."""
        steps = self.share * state.max_steps
        if state.global_step < steps:
            for vim, full in self._full:
                vim.token_reducer = _lessened(full, state.global_step / steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Goes back to the full amount."""
        for vim, full in self._full:
            vim.token_reducer = full


class RMeeToTrainer(TaughtTrainer):
    """Re-trains a Vision Mamba with merged tokens (https://huggingface.co/papers/2412.12496).

    The loss is the cross-entropy, with soft labels too, plus `distill_weight` times the divergence from the teacher,
    whose mean training logs as `distill_loss`. Evaluations report the cross-entropy alone. The teacher takes no part
    in saving, nor in the synchronisation of processes.

    Args:
        model (`PreTrainedModel`):
            A [`RMeeToVimForImageClassification`], or a Vim after [`apply_token_merging`], PEFT around it or not.
        args ([`RMeeToTrainingArguments`]):
            How to train.
        teacher (`nn.Module`, *optional*):
            A loaded teacher, instead of the one that `args.teacher` names. It is frozen and put in evaluation mode.
        kwargs (`dict`, *optional*):
            As for [`~transformers.Trainer`].

    Example:

    ```python
    >>> from hf_effml import RMeeToTrainer, RMeeToTrainingArguments, RMeeToVimConfig, RMeeToVimForImageClassification
    >>> from hf_effml import load_image_data, vim_image_processor

    >>> processor = vim_image_processor(16, crop_share=1.0)
    >>> data = load_image_data("digits", processor)
    >>> config = RMeeToVimConfig(
    ...     image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=3, num_labels=10, merge_r=4
    ... )
    >>> trainer = RMeeToTrainer(
    ...     RMeeToVimForImageClassification(config),
    ...     RMeeToTrainingArguments("my-rmeeto", max_steps=2, report_to="none"),
    ...     train_dataset=data.train,
    ...     processing_class=processor,
    ... )
    >>> trainer.train().global_step  # doctest: +SKIP
    2
    ```
    """

    _name = "R-MeeTo"
    _paper = "2412.12496"
    _tags = ("vision-mamba",)

    _arguments = RMeeToTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.merge_warmup:
            self.add_callback(MergeWarmupCallback(self.args.merge_warmup))

    def _find_student(self) -> nn.Module:
        if not _merging_vims(self.model):
            raise ValueError(
                f"The model must be a Vim with merged tokens; got a `{type(self.model).__name__}` without. Make one "
                "with `RMeeToVimForImageClassification.from_vim(model, merge_r=...)`, or call `apply_token_merging`."
            )
        return self.model

    def _make_plain(self, teacher: nn.Module) -> None:
        remove_token_merging(teacher)

    def _check_teacher(self, teacher: nn.Module) -> None:
        if teacher.config.num_labels != self.model.config.num_labels:
            raise ValueError(
                f"Teacher and model must know the same classes; got {teacher.config.num_labels} and "
                f"{self.model.config.num_labels}. Train the teacher on this data, or take another one."
            )

    def _training_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        images = {name: value for name, value in inputs.items() if name != "labels"}
        loss, outputs = self._classification_loss(model, inputs)
        if self.teacher is not None:
            with torch.no_grad():
                teacher_logits = self.teacher(**images).logits
            divergence = logit_divergence(
                outputs.logits, teacher_logits, self.args.distill_temperature, problem_type_of(self.model.config)
            )
            self.average_in_log({"distill_loss": divergence})
            loss = loss + self.args.distill_weight * divergence
        return loss, outputs


def _merging_vims(model: nn.Module) -> list[tuple[VimModel, TokenMerger]]:
    vims = (module for module in model.modules() if isinstance(module, VimModel))
    return [(vim, vim.token_reducer) for vim in vims if isinstance(vim.token_reducer, TokenMerger)]


def _lessened(full: TokenMerger, share: float) -> TokenMerger:
    """A merger that removes a share of the tokens which `full` removes, in the same blocks."""
    config = copy.deepcopy(full.config)
    amounts = [round(share * removed) for _, removed in requested_merges(full.config)]
    config.merge_r, config.merge_target_ratio, config.merge_legacy_last_target = amounts, None, None
    return TokenMerger(config)
