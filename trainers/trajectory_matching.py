"""Distils a data set by matching the trajectories of experts: what PAD and EDF share, and DATM by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.utils import logging

from hf_effml.distillation.bank.segments import TrajectorySegments, collate_segments
from hf_effml.distillation.bank.trajectories import TrajectoryBank
from hf_effml.distillation.evaluation.measure import evaluate_distilled
from hf_effml.distillation.flat_student import FlatStudent, build_student, seed_from
from hf_effml.distillation.modeling_distilled_dataset import DistilledDatasetModel
from hf_effml.distillation.publishing.description import describe_distillation
from hf_effml.distillation.publishing.pictures import image_grid, save_curves
from hf_effml.distillation.publishing.run import DistillationRun
from hf_effml.distillation.publishing.sets import save_distilled_dataset
from hf_effml.distillation.unroll import StudentDerivatives
from hf_effml.hub import push_folder, write_card
from hf_effml.hub.privacy import scrub, scrub_command
from hf_effml.utils.files import remove_leftovers, replacing_file, write_text
from hf_effml.utils.imports import usable
from hf_effml.utils.processes import explaining_lost_processes
from hf_effml.utils.sources.class_labels import check_same_classes

from .base import EffMLTrainer, _changed_arguments, _command_line
from .trajectory_matching_arguments import TrajectoryMatchingTrainingArguments


if TYPE_CHECKING:
    from hf_effml.distillation.evaluation.report import EvaluationReport
    from hf_effml.distillation.real_images import RealImages

logger = logging.get_logger(__name__)

_DATASET, _PICTURES = "dataset", "pictures"
# What lies in the folder of a run and is no part of the model.
_BESIDE = (f"{_DATASET}/", f"{_PICTURES}/", "bank/")
# A bad choice of the start epochs or of the step size shows within so many steps.
_FIRST_STEPS = 100


class TrajectoryMatchingTrainer(EffMLTrainer):
    """[`~transformers.Trainer`] that trains a synthetic data set by trajectory matching.

    DATM (https://huggingface.co/papers/2310.05773), or MTT (https://huggingface.co/papers/2203.11932) with
    `initial_max_start_epoch` unset.

    The gradient goes through every step that the student takes, exactly, at the memory of a single one. A step whose
    segments all exceed `loss_threshold` changes nothing, momenta included. With several segments in a step, over
    accumulation and processes, those above the threshold count as zero in the mean; the papers have one segment only.

    Evaluations train fresh students on the set. Give them images that were cut from the training data: what was chosen
    on test images cannot be judged by them.

    Args:
        model ([`DistilledDatasetModel`]):
            The synthetic set, for example from [`distilled_from_real`].
        args ([`TrajectoryMatchingTrainingArguments`]):
            How to train.
        bank ([`TrajectoryBank`]):
            The experts.
        eval_dataset ([`~hf_effml.distillation.real_images.RealImages`], *optional*):
            Images to evaluate on.
        processing_class ([`ZCAImageProcessor`], *optional*):
            What preprocessed the real images. Saved beside the model, and needed for pictures. Defaults to the bank's.
        kwargs (`dict`, *optional*):
            Further arguments of [`~transformers.Trainer`].

    Raises:
        ValueError: If the bank does not fit the set or the arguments.

    Example:

    ```python
    >>> trainer = TrajectoryMatchingTrainer(model, args, bank=bank)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    ```
    """

    _tags = ("dataset-distillation",)
    _method = "tm"
    optimizer: torch.optim.Optimizer | None
    control: TrainerControl
    # Activation maps of the images, where a method makes them.
    maps: Tensor | None = None
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: DistilledDatasetModel,
        args: TrajectoryMatchingTrainingArguments,
        *,
        bank: TrajectoryBank,
        eval_dataset: "RealImages | None" = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which would copy the set to each in every step. Start "
                "one process per GPU with `torchrun --nproc_per_node`, or show it one with CUDA_VISIBLE_DEVICES."
            )
        self.bank = bank
        student = FlatStudent(build_student(bank.student_config))
        self._check_fit(model, args, student)
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        kwargs.setdefault("data_collator", collate_segments)
        super().__init__(
            model,
            args,
            train_dataset=TrajectorySegments(bank, args, per_step),
            eval_dataset=eval_dataset,
            processing_class=processing_class or bank.image_processor,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        self.settings = args.matching(augmentation=model.config.augmentation)
        self.derivatives = StudentDerivatives(student.to(args.device), compile=args.compile)
        self._counts = _StepCounts()
        self.add_callback(_StepCallback(self))

    def _check_fit(
        self, model: DistilledDatasetModel, args: TrajectoryMatchingTrainingArguments, student: FlatStudent
    ) -> None:
        self.bank.check_student(student)
        self.bank.check_range(args.max_start_epoch, args.expert_epochs, args.min_start_epoch)
        if model.config.preprocessing is not None:
            self.bank.check_preprocessing(model.config.preprocessing, args.allow_preprocessing_mismatch)
        try:
            classes = student.logits(student.flatten(), model.images[:2].detach().cpu()).shape[1]
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"The bank's student ({type(student.module).__name__}) cannot take images of shape "
                f"{tuple(model.images.shape[1:])}: {str(error).splitlines()[0]}"
            ) from error
        if classes != model.config.num_labels:
            raise ValueError(
                f"The bank's experts tell {classes} classes apart, the synthetic set has {model.config.num_labels}. "
                "Train experts on the same classes."
            )
        if self.bank.label_names is not None:
            check_same_classes("The synthetic set and the bank's experts", model.config, self.bank.label_names)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains the synthetic set, whose configuration then names the method.

        Arguments and result are those of [`EffMLTrainer.train`].
        """
        self.accelerator.unwrap_model(self.model).config.method = self._method
        if self.is_world_process_zero():
            remove_leftovers(Path(self.args.output_dir, _PICTURES))
        with explaining_lost_processes("for its part of a step"):
            return super().train(resume_from_checkpoint, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Creates the repository and keeps experts, pictures and the published set out of it.

        Args:
            args (`tuple`):
                Passed on to [`EffMLTrainer.init_hf_repo`].
            kwargs (`dict`):
                Passed on as well.
        """
        super().init_hf_repo(*args, **kwargs)
        if self.is_world_process_zero():
            ignored = Path(self.args.output_dir, ".gitignore")
            lines = ignored.read_text(encoding="utf-8").splitlines() if ignored.exists() else []
            write_text(ignored, "\n".join([*dict.fromkeys([*lines, *_BESIDE]), ""]))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Makes one SGD with a group for images, one for soft labels and one for the step size."""
        if self.optimizer is None:
            own: DistilledDatasetModel = self.accelerator.unwrap_model(self.model)
            self.optimizer = torch.optim.SGD(
                [
                    {"params": [own.images], "lr": self.args.lr_img, "momentum": self.args.momentum_img},
                    {"params": [own.labels], "lr": self.args.lr_y, "momentum": self.args.momentum_y},
                    {"params": [own.lr], "lr": self.args.lr_lr, "momentum": self.args.momentum_lr},
                ],
                lr=self.args.lr_img,
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Matches the segments of a batch.

        Args:
            model (`nn.Module`):
                The synthetic set, bare or wrapped.
            inputs (`Mapping`):
                From [`collate_segments`].
            return_outputs (`bool`, *optional*, defaults to `False`):
                Whether to return the model's output too.
            num_items_in_batch (`int`, *optional*):
                Not used: the loss is a mean over segments.

        Returns:
            `Tensor`, or `tuple` of it and the output.
        """
        outputs = model(**inputs, derivatives=self.derivatives, settings=self.settings)
        self._counts.add(outputs)
        own = self.accelerator.unwrap_model(model)
        self.average_in_log({"matched": outputs.took_part.float().mean(), "synthetic_lr": own.lr})
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def evaluate(
        self,
        eval_dataset: "RealImages | None" = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Trains fresh students on the synthetic set and measures their accuracy.

        Args:
            eval_dataset ([`~hf_effml.distillation.real_images.RealImages`], *optional*):
                What to measure on, in place of the trainer's own.
            ignore_keys (`list[str]`, *optional*):
                Not used.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                First part of the names of the results.

        Returns:
            `dict[str, float]`: accuracy, and its standard deviation over the seeds if there are several.
        """
        images = eval_dataset if eval_dataset is not None else self.eval_dataset
        if images is None:
            raise ValueError("Nothing to evaluate on: pass `eval_dataset`, images cut from the training data.")
        report = evaluate_distilled(
            self.accelerator.unwrap_model(self.model),
            self.bank.student_config,
            images,
            protocol=self.args.protocol(),
            seeds=[seed_from(self.args.seed, "evaluation", each) for each in range(self.args.eval_seeds)],
            baselines=False,
            split="validation",
            device=self.args.device,
            disable_tqdm=True,
        )
        metrics = {f"{metric_key_prefix}_accuracy": report.accuracy}
        if report.std is not None:
            metrics[f"{metric_key_prefix}_accuracy_std"] = report.std
        rules = report.protocol
        self.card_facts["evaluated_on"] = (
            f"{report.test_images:,} held-out images with {len(report.seeds)} fresh network(s) ({report.student}) "
            f"that were trained on the set by the protocol `{rules.name}`, {rules.epochs} epochs"
        )
        # Rounding may differ from device to device, and all processes must choose the same best step.
        with explaining_lost_processes("for the accuracy"):
            metrics = broadcast_object_list([metrics])[0]
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_picture(self, path: str | Path) -> Path:
        """Draws the synthetic images as they are now, one row per class.

        Args:
            path (`str` or `Path`):
                PNG file to write.

        Returns:
            `Path`: the file.
        """
        own: DistilledDatasetModel = self.accelerator.unwrap_model(self.model)
        grid = image_grid(own.images.detach().cpu(), self.processing_class, columns=own.config.images_per_class)
        with replacing_file(path) as unfinished:
            grid.save(unfinished, format="PNG")
        return Path(path)

    def save_dataset(
        self,
        folder: str | Path | None = None,
        reports: "Sequence[EvaluationReport]" = (),
        license: str | None = None,
    ) -> Path:
        """Writes the synthetic set as a data set that loads with `datasets` alone, with all that is known of it.

        Args:
            folder (`str` or `Path`, *optional*):
                Folder to write. Defaults to `dataset` in `args.output_dir`.
            reports (`Sequence[EvaluationReport]`, *optional*, defaults to `()`):
                Results for its card, from [`evaluate_distilled`].
            license (`str`, *optional*):
                The Hub's keyword for the license of the real images; without it the card says that it is not known.

        Returns:
            `Path`: the folder; [`load_distilled`] reads it.
        """
        folder = Path(folder or Path(self.args.output_dir, _DATASET))
        if self.is_world_process_zero():
            own: DistilledDatasetModel = self.accelerator.unwrap_model(self.model)
            run = DistillationRun.of_trainer(self, self._shaping_arguments(), self._command())
            info = describe_distillation(own, reports=reports, bank=self.bank, license=license, run=run)
            save_distilled_dataset(own, folder, self.processing_class, info=scrub(info), maps=self.maps)
            if usable("matplotlib"):
                measured = self.card_facts.get("evaluated_on")
                note = f"accuracy on {measured}" if measured else ""
                save_curves(self.state.log_history, folder / "curves.png", note=note)
            # By default the folder is called as everybody's is.
            write_card(folder, folder.resolve().parent.name if folder.name == _DATASET else None)
        with explaining_lost_processes("for the set to be written"):
            self.accelerator.wait_for_everyone()
        return folder

    def push_dataset_to_hub(
        self,
        repo_id: str,
        folder: str | Path | None = None,
        reports: "Sequence[EvaluationReport]" = (),
        license: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> CommitInfo | None:
        """Saves the synthetic set as a data set and pushes it; `push_to_hub` pushes the model instead.

        Args:
            repo_id (`str`):
                Where it goes: `namespace/name`. The repository is created when it does not exist.
            folder, reports, license (*optional*):
                As for `save_dataset`.
            private, revision, create_pr, commit_message, token (*optional*):
                As for [`~hf_effml.hub.push_folder`]; the token defaults to `args.hub_token`.

        Returns:
            `huggingface_hub.CommitInfo` or `None`: the commit; `None` on all processes but the first.
        """
        folder = self.save_dataset(folder, reports, license)
        if not self.is_world_process_zero():
            return None
        token = token or self.args.hub_token
        return push_folder(folder, repo_id, private, revision, create_pr, commit_message, token)

    def _shaping_arguments(self) -> dict[str, Any]:
        """Those of the method, and of the others those that are not at their defaults."""
        inherited = {each.name for each in fields(TrainingArguments)}
        own = {each.name: getattr(self.args, each.name) for each in fields(self.args) if each.name not in inherited}
        return own | {"max_steps": self.args.max_steps} | _changed_arguments(self.args)

    def _command(self) -> str | None:
        command = _command_line()
        return scrub_command(command) if command else None

    def before_step(self) -> None:
        """Called before the first batch of a step; subclasses may prepare what the step needs."""

    def before_update(self) -> None:
        """Called with the summed gradients of a step before the parameters change.

        Subclasses change gradients first and then call this one, which takes back a step that matched nothing.
        """
        matched, bad = self.accelerator.reduce(self._counts.as_tensor(self.args.device)).tolist()
        self._counts.end_step(bool(matched), bool(bad))
        if not matched:
            # Without a gradient SGD leaves values and momenta alone.
            for parameter in self.model.parameters():
                parameter.grad = None
        self._complain_about_losses()

    def _complain_about_losses(self) -> None:
        counts, args = self._counts, self.args
        if counts.bad_in_a_row >= args.max_bad_steps:
            own = self.accelerator.unwrap_model(self.model)
            self.save_model()
            raise RuntimeError(
                f"The matching loss or its gradient was not finite in {counts.bad_in_a_row} steps in a row. The "
                f"students' step size is {own.lr.item():.3g}: if it has grown, lower `lr_lr`; if images have, lower "
                "`lr_img`. Experts that do not move between start and target give 0/0: look at their accuracies in "
                f"`bank.metadata`. What was reached is saved in `{args.output_dir}`."
            )
        if self.state.global_step + 1 == counts.steps == _FIRST_STEPS and counts.empty > _FIRST_STEPS / 2:
            logger.warning(
                f"{counts.empty} of the first {_FIRST_STEPS} steps exceeded `loss_threshold`, {args.loss_threshold}, "
                "and changed nothing. Lower `max_start_epoch` or the step size, take more `syn_steps`, or raise the "
                "threshold."
            )

    def after_update(self) -> None:
        """Called when the parameters have changed: keeps the students' step size positive."""
        own: DistilledDatasetModel = self.accelerator.unwrap_model(self.model)
        if own.lr.item() < self.args.min_lr:
            # Without the value, which would make a new warning of every step.
            logger.warning_once(
                f"The students' step size fell below `min_lr`, {self.args.min_lr}, and is kept there. Lower `lr_lr`."
            )
            with torch.no_grad():
                own.lr.fill_(self.args.min_lr)


class _StepCounts:
    """How many segments of the running step took part or had no finite loss, and how earlier steps went."""

    def __init__(self) -> None:
        self._matched = self._bad = 0
        self.steps = self.empty = self.bad_in_a_row = 0

    def add(self, outputs: Any) -> None:
        self._matched += int(outputs.took_part.sum())
        self._bad += int((~outputs.losses.isfinite()).sum())

    def as_tensor(self, device: torch.device) -> Tensor:
        return torch.tensor([self._matched, self._bad], device=device)

    def end_step(self, matched: bool, bad: bool) -> None:
        self.steps += 1
        self.empty += not matched
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad and not matched else 0
        self._matched = self._bad = 0


class _StepCallback(TrainerCallback):
    """Gives the trainer the moments of a step that it has no method for."""

    def __init__(self, trainer: TrajectoryMatchingTrainer):
        self._trainer = trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._draw(state)
        self._trainer.before_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.before_update()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.after_update()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._draw(state)

    def _draw(self, state: TrainerState) -> None:
        every = self._trainer.args.picture_steps
        if every and state.global_step % every == 0 and state.is_world_process_zero:
            self._trainer.save_picture(
                Path(self._trainer.args.output_dir, _PICTURES, f"step-{state.global_step:06d}.png")
            )
