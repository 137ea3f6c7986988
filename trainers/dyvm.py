"""DyVM's fine-tuning: which tokens and which scans a Vision Mamba needs is learned beside a dense teacher."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from hf_effml.vim.classification_loss import classification_loss
from hf_effml.vim.losses import dyvm_distillation_losses, dyvm_patch_features, dyvm_ratio_losses
from hf_effml.vim.modeling_dyvm import DyVMForImageClassification
from hf_effml.vim.modeling_vim import VimForImageClassification

from .vision import TaughtTrainer, TaughtTrainingArguments


@dataclass
class DyVMTrainingArguments(TaughtTrainingArguments):
    """How to fine-tune a model that drops tokens and skips scans.

    The defaults are the official ones of DyVM-Vim-S (https://huggingface.co/papers/2504.04787) on ImageNet with a
    global batch of 256, so 64 on each of 4 devices. The learning rate goes with the global batch: 5e-5 per 512 images
    for small and base, 3e-5 for tiny. The weights of the losses are fields of [`DyVMConfig`]. Two things differ on
    purpose: the gates are calibrated after training, and the moving average, if there is one, is what is kept.

    Args:
        teacher (`str`, *optional*, defaults to `"self"`):
            `"self"` is a frozen copy of the model as it comes, with all tokens and scans. Otherwise the folder or Hub
            id of a Vim with the same classes, patches and width, or `"none"`.
        calibration_images (`int`, *optional*, defaults to 1024):
            Training images on which the gates are set after training so that the share of scans that run is the one
            asked for. Sampled gates meet it in training, thresholded ones do not: without calibration more scans run.
            They are not augmented if the data set has a method `without_augmentation`, as [`load_image_data`]'s has.
            0 leaves the gates as they were trained, as the paper does.
    """

    calibration_images: int = field(
        default=1024, metadata={"help": "Training images that set the gates after training; 0 for none."}
    )
    learning_rate: float = field(default=2.5e-5, metadata={"help": "Peak learning rate, for the global batch."})
    min_learning_rate: float = field(default=1e-6, metadata={"help": "Where the cosine ends."})
    weight_decay: float = field(default=1e-8, metadata={"help": "Weight decay of the matrices."})
    num_train_epochs: float = field(default=30, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images per device and step."})
    warmup_steps: float = field(default=0.1667, metadata={"help": "Steps of warm-up, or their share if below 1."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient norm to clip at; 0 for none."})

    def __post_init__(self) -> None:
        if self.calibration_images < 0:
            raise ValueError(
                f"`calibration_images` must not be negative; got {self.calibration_images}. 0 leaves the gates as "
                "they were trained."
            )
        super().__post_init__()


class DyVMTrainer(TaughtTrainer):
    """Fine-tunes a Vision Mamba that drops tokens and skips scans (https://huggingface.co/papers/2504.04787).

    The loss has five terms: cross-entropy, with soft labels too; how far the tokens kept and the scans run are from
    the shares asked for; and how far classes and kept tokens are from the teacher's. Training logs each of them as it
    enters the loss, so that they add up, and the shares: `token_keep_ratio/0` of stage 0 and so on,
    `block_keep_ratio` of the sampled gates, and `block_keep_ratio_deterministic` of the same gates without noise.
    Evaluations report the cross-entropy alone, and the share of scans that ran. The teacher takes no part in saving,
    nor in the synchronisation of processes.

    Args:
        model ([`DyVMForImageClassification`]):
            The model, PEFT around it or not.
        args ([`DyVMTrainingArguments`]):
            How to train.
        teacher (`nn.Module`, *optional*):
            A loaded teacher, instead of the one that `args.teacher` names. It is frozen, put in evaluation mode and,
            if it is a DyVM, its pruning is switched off.
        kwargs (`dict`, *optional*):
            As for [`~transformers.Trainer`].

    Example:

    ```python
    >>> from hf_effml import DyVMConfig, DyVMForImageClassification, DyVMTrainer, DyVMTrainingArguments
    >>> from hf_effml import load_image_data, vim_image_processor

    >>> processor = vim_image_processor(16, crop_share=1.0)
    >>> data = load_image_data("digits", processor)
    >>> config = DyVMConfig(
    ...     image_size=16,
    ...     patch_size=4,
    ...     hidden_size=16,
    ...     num_hidden_layers=3,
    ...     num_labels=10,
    ...     pruning_layers=[1],
    ...     token_keep_ratio=0.7,
    ... )
    >>> trainer = DyVMTrainer(
    ...     DyVMForImageClassification(config),
    ...     DyVMTrainingArguments("my-dyvm", max_steps=2, report_to="none"),
    ...     train_dataset=data.train,
    ...     processing_class=processor,
    ... )
    >>> trainer.train().global_step  # doctest: +SKIP
    2
    ```
    """

    _name = "DyVM"
    _paper = "2504.04787"
    _tags = ("vision-mamba",)

    _arguments = DyVMTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any):
        self._scans_run: list[Tensor] = []
        super().__init__(*args, **kwargs)
        images = self.args.calibration_images
        if images and self.train_dataset is not None and not hasattr(self.train_dataset, "__len__"):
            raise ValueError(
                f"`calibration_images` of {images} needs training data of known length; got a "
                f"`{type(self.train_dataset).__name__}`. Set it to 0, and call `model.calibrate_block_gates` yourself."
            )

    def _find_student(self) -> nn.Module:
        for module in self.model.modules():
            if isinstance(module, DyVMForImageClassification):
                return module
        raise ValueError(
            f"The model must be a `DyVMForImageClassification`; got a `{type(self.model).__name__}`. Make one with "
            "`DyVMForImageClassification.from_vim(model, token_keep_ratio=0.7, block_keep_ratio=0.8)`."
        )

    def _make_plain(self, teacher: nn.Module) -> None:
        teacher.set_pruning(False)

    def _check_teacher(self, teacher: nn.Module) -> None:
        if not isinstance(teacher, VimForImageClassification) or teacher.vim.token_reducer is not None:
            raise ValueError(
                f"The teacher must be a Vim that keeps all patches; got a `{type(teacher).__name__}`. Pass a "
                "`VimForImageClassification`."
            )
        for name in ("num_labels", "num_patches", "hidden_size"):
            theirs, ours = getattr(teacher.config, name), getattr(self._student.config, name)
            if theirs != ours:
                raise ValueError(
                    f"Teacher and model must agree in `{name}`; got {theirs} and {ours}. Take the model that this one "
                    'was made from, or `teacher="self"` in `args`.'
                )

    def _make_teacher(self, teacher: nn.Module | None) -> nn.Module | None:
        teacher = super()._make_teacher(teacher)
        if isinstance(teacher, DyVMForImageClassification):
            self._make_plain(teacher)
        return teacher

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains the model, and sets its gates when it is done; the rest is as in [`VisionTrainer`].

        Arguments and result are those of [`EffMLTrainer.train`].
        """
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.args.calibration_images and self._student.config.enable_block_selection:
            self._calibrate()
        return output

    def _calibrate(self) -> None:
        """Sets the gates on training images; every process does the same, so none has to be told."""
        images = _without_augmentation(self.train_dataset)
        generator = torch.Generator().manual_seed(self.args.seed)
        chosen = torch.randperm(len(images), generator=generator)[: self.args.calibration_images].tolist()
        with self._without_mixup():
            batches = DataLoader(
                Subset(images, chosen),
                self.args.eval_batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                generator=generator,
            )
        row = self._student.calibrate_block_gates(batches)[0]
        self.log({f"block_keep_ratio_{when}_calibration": row[when] for when in ("before", "after")})
        note = (
            f"Its gates were set on {len(chosen)} training images, where {row['after']:.1%} of the scans run "
            f"({row['before']:.1%} before); on other images the share differs."
        )
        others = [limit for limit in self.card_facts.get("limits", ()) if not limit.startswith("Its gates were set")]
        self.card_facts["limits"] = [*others, note]

    def _classification_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        loss, outputs = super()._classification_loss(model, inputs)
        if outputs.block_keep_ratio is not None:
            self._scans_run.append(outputs.block_keep_ratio)
        return loss, outputs

    def _training_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        images = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**images)
        terms = self._loss_terms(outputs, inputs["labels"], images)
        self._remember(terms, outputs)
        return torch.stack(list(terms.values())).sum(), outputs

    def _loss_terms(self, outputs: Any, labels: Tensor, images: Mapping[str, Any]) -> dict[str, Tensor]:
        """The terms of the loss with their weights, in float32."""
        config, smoothing = self._student.config, self.args.label_smoothing_factor
        terms = {"classification": classification_loss(outputs.logits, labels, config, smoothing)}
        terms |= dyvm_ratio_losses(outputs, config)
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                logits, features = _ask_teacher(self.teacher, images)
            terms |= dyvm_distillation_losses(outputs, logits, features, config)
        return terms

    def _remember(self, terms: Mapping[str, Tensor], outputs: Any) -> None:
        """Adds what the log will average."""
        values = {f"{name}_loss": term for name, term in terms.items()}
        if outputs.token_keep_ratio is not None:
            values |= {f"token_keep_ratio/{s}": share for s, share in enumerate(outputs.token_keep_ratio.mean(0))}
        if outputs.block_keep_ratio is not None:
            threshold = self._student.config.block_gate_threshold or 0.5
            values["block_keep_ratio"] = outputs.block_keep_ratio.mean()
            values["block_keep_ratio_deterministic"] = (outputs.block_gate_logits.sigmoid() > threshold).float().mean()
        self.average_in_log(values)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluates or predicts, and reports the share of scans that ran where labels were given."""
        self._scans_run = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._scans_run:
            shares = torch.cat(self._scans_run)
            total, count = self.accelerator.reduce(
                torch.stack([shares.sum(), shares.new_tensor(len(shares))])
            ).tolist()
            output.metrics[f"{metric_key_prefix}_block_keep_ratio"] = total / count
        return output


def _ask_teacher(teacher: VimForImageClassification, images: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Scores, and features of the patch tokens in their original order."""
    outputs = teacher.vim(**images)
    features = dyvm_patch_features(outputs.last_hidden_state, outputs.cls_token_index)
    return teacher.classifier(outputs.pooler_output), features


def _without_augmentation(dataset: Any) -> Dataset:
    return dataset.without_augmentation() if hasattr(dataset, "without_augmentation") else dataset
