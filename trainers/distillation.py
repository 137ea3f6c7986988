"""A whole distillation: the experts, the set, the honest test at its end, model and data set with their cards."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from hf_effml.distillation.bank.initialization import distilled_from_real
from hf_effml.distillation.bank.trajectories import TrajectoryBank
from hf_effml.distillation.evaluation.cost import estimate_cost
from hf_effml.distillation.evaluation.measure import evaluate_distilled
from hf_effml.distillation.evaluation.protocols import get_protocol
from hf_effml.distillation.evaluation.report import EvaluationReport
from hf_effml.distillation.modeling_distilled_dataset import DistilledDatasetModel
from hf_effml.distillation.real_images import RealImageData, reload_real_images
from hf_effml.utils.imports import require
from hf_effml.utils.report import Column, Report

from .expert_bank import train_bank
from .trajectory_matching import TrajectoryMatchingTrainer
from .trajectory_matching_arguments import TrajectoryMatchingTrainingArguments


__all__ = ["Distilled", "SetArguments", "distil", "estimate_run", "load_bank"]


@dataclass
class SetArguments:
    """What to distil, and how it is tested in the end."""

    rarely_changed: ClassVar[tuple[str, ...]] = (
        "initial_lr",
        "augmentation",
        "crop_ratio",
        "test_protocol",
        "test_epochs",
        "full_epochs",
        "license",
    )

    bank: str | None = field(default=None, metadata={"help": "Folder or Hub id of the experts."})
    bank_recipe: str | None = field(
        default=None, metadata={"help": "Recipe of `hf-effml train expert` that trains them, in OUTPUT_DIR/bank."}
    )
    data: str | None = field(
        default=None, metadata={"help": "Where the experts' images are; the experts know it, but for local folders."}
    )
    images_per_class: int = field(default=1, metadata={"help": "Synthetic images of every class."})
    initialization: Literal["correct", "real", "noise"] = field(
        default="correct", metadata={"help": "What the images start from."}
    )
    initial_lr: float = field(default=0.01, metadata={"help": "Step size of students at the start; it is learned."})
    augmentation: str = field(
        default="color_crop_cutout_flip_scale_rotate",
        metadata={"help": "Operations, joined by _; none for none."},
    )
    crop_ratio: float = field(default=0.125, metadata={"help": "Largest shift, as a share of the image."})
    test_protocol: str = field(default="tm", metadata={"help": "How students are trained for the test in the end."})
    test_epochs: int | None = field(default=None, metadata={"help": "Epochs of that, in place of the protocol's."})
    test_seeds: int = field(default=3, metadata={"help": "Students of that test; 0 leaves the test out."})
    full_epochs: int = field(
        default=0, metadata={"help": "Epochs on all real images, for the scores that need their accuracy; 0 for none."}
    )
    license: str | None = field(default=None, metadata={"help": "License of the real images, for the set's card."})
    dry_run: bool = field(default=False, metadata={"help": "Only say what it needs in memory and arithmetic."})

    def config_fields(self) -> dict[str, Any]:
        """The fields of a [`DistilledDatasetConfig`] among them."""
        return {
            "initial_lr": self.initial_lr,
            "augmentation_strategy": self.augmentation,
            "augmentation_crop_ratio": self.crop_ratio,
        }


@dataclass
class Distilled:
    """What a distillation has made.

    Args:
        folder (`Path`):
            The published set.
        steps (`int`):
            Steps of the distillation.
        learning_rate (`float`):
            The learned step size.
        reports (`list[EvaluationReport]`):
            The test at the end; empty if it was left out.
        is_main_process (`bool`):
            Whether this process is the one to speak.
    """

    folder: Path
    steps: int
    learning_rate: float
    reports: list[EvaluationReport]
    is_main_process: bool

    def results(self) -> dict[str, Any]:
        """What a program returns, JSON-plain."""
        found: dict[str, Any] = {"output_dir": str(self.folder.parent), "steps": self.steps, "lr": self.learning_rate}
        for report in self.reports if self.is_main_process else ():
            accuracies = {key: measured.mean for key, measured in report.accuracies.items()}
            found |= {"accuracy": report.accuracy, "accuracies": accuracies}
        return found

    def as_text(self) -> str:
        """What a program prints in the end."""
        tables = [report.as_report().as_markdown() for report in self.reports]
        # By its file: of a folder with a card `datasets` caches the first content and gives it back ever after.
        load = f'load_dataset("parquet", data_files="{self.folder}/data/*.parquet", split="train")'
        wrote = f"Wrote {self.folder}, with a picture and a card. To load it, or to push it as a data set:"
        return "\n\n".join([*tables, f"{wrote}\n{load}\nhf-effml push {self.folder} USER/NAME"])


def load_bank(
    script: SetArguments, args: TrajectoryMatchingTrainingArguments, recipes: Mapping[str, Mapping[str, Any]]
) -> TrajectoryBank:
    """Loads the experts, training them first if need be; what an earlier run has left is used or continued.

    Args:
        script (`SetArguments`):
            Where they are, or how they are made.
        args ([`TrajectoryMatchingTrainingArguments`]):
            Where the run writes.
        recipes (`Mapping[str, Mapping]`):
            Those of `hf-effml train expert`.

    Returns:
        [`TrajectoryBank`]

    Raises:
        ValueError: If nothing says which experts.
    """
    if script.bank is not None:
        return TrajectoryBank.from_pretrained(script.bank)
    if script.bank_recipe is None:
        raise ValueError(
            "There are no experts to match. Give a bank with `--bank FOLDER`, or the recipe that trains one with "
            "`--bank_recipe smoke`."
        )
    if script.bank_recipe not in recipes:
        raise ValueError(f"`bank_recipe` must be one of {', '.join(recipes)}; got {script.bank_recipe!r}.")
    return train_bank(recipes[script.bank_recipe], str(Path(args.output_dir, "bank")))


def estimate_run(script: SetArguments, args: TrajectoryMatchingTrainingArguments, bank: TrajectoryBank) -> Report:
    """Says what a run needs, beside what the published code would need for the same.

    Args:
        script (`SetArguments`):
            The set.
        args ([`TrajectoryMatchingTrainingArguments`]):
            The run.
        bank ([`TrajectoryBank`]):
            The experts.

    Returns:
        [`~hf_effml.utils.report.Report`]: the numbers are among its facts, by name.
    """
    labels = bank.metadata["dataset"]["label_names"]
    channels, height, width = bank.metadata["dataset"]["image_shape"]
    cost = estimate_cost(
        bank.student_config,
        (channels, height, width),
        len(labels),
        script.images_per_class,
        syn_steps=args.syn_steps,
        batch_syn=args.batch_syn,
        num_experts=len(bank),
        snapshots=len(bank.epochs),
        kept_snapshots=args.max_start_epoch - args.min_start_epoch + args.expert_epochs,
        iterations=args.max_steps,
    )
    report = Report("cost", {"value": Column("value")}, facts=dict(cost.as_row()))
    for name, value in cost.as_row().items():
        report.add(name.replace("_", " "), value=value)
    report.notes.append("Gigabytes are those of one process; a graph of all steps is what the published code keeps.")
    return report


def distil(
    trainer_class: type[TrajectoryMatchingTrainer],
    script: SetArguments,
    args: TrajectoryMatchingTrainingArguments,
    bank: TrajectoryBank,
    **options: Any,
) -> Distilled:
    """Distils, tests once on the test images, and writes model and data set with their cards.

    Args:
        trainer_class (`type`):
            [`PADTrainer`], [`EDFTrainer`] or [`TrajectoryMatchingTrainer`].
        script (`SetArguments`):
            The set and its test.
        args ([`TrajectoryMatchingTrainingArguments`]):
            The run.
        bank ([`TrajectoryBank`]):
            The experts.
        options (`dict`, *optional*):
            Further arguments of the trainer.

    Returns:
        [`Distilled`]
    """
    # What the end needs is asked for before hours of work.
    require("datasets")
    data = reload_real_images(bank.metadata["dataset"].get("arguments"), bank.image_processor, script.data)
    data = data if bank.label_names is None else data.aligned_to(bank.label_names)
    how = {"method": script.initialization, "seed": args.seed, "device": args.device, **script.config_fields()}
    model = distilled_from_real(data, bank, script.images_per_class, **how)
    initial = DistilledDatasetModel(model.config).set_content(model.images, model.labels, model.lr)
    trainer = trainer_class(model, args, bank=bank, eval_dataset=data.validation, **options)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    reports = _test(script, trainer, data, initial) if script.test_seeds else []
    folder = trainer.save_dataset(reports=reports, license=script.license)
    # What the evaluations during training measured served to choose, and is no result.
    trainer.card_facts |= {
        "results": [result for report in reports for result in report.card_results()],
        "evaluated_on": f"the test images of {data.name}",
        "data": {"name": data.name, "hub_id": data.hub_id, "splits": {"training": len(data.train)}},
        "license": script.license,
    }
    trainer.create_model_card()
    own = trainer.accelerator.unwrap_model(trainer.model)
    return Distilled(folder, trainer.state.global_step, own.lr.item(), reports, trainer.is_world_process_zero())


def _test(
    script: SetArguments, trainer: TrajectoryMatchingTrainer, data: RealImageData, initial: DistilledDatasetModel
) -> list[EvaluationReport]:
    """The only look at the test images: the selected set beside its baselines."""
    changes = {} if script.test_epochs is None else {"epochs": script.test_epochs}
    return [
        evaluate_distilled(
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.bank.student_config,
            data.test,
            protocol=get_protocol(script.test_protocol, **changes),
            seeds=range(script.test_seeds),
            real=data.train,
            bank=trainer.bank,
            initial=initial,
            last=_last_step(trainer),
            full_epochs=script.full_epochs,
            device=trainer.args.device,
        )
    ]


def _last_step(trainer: TrajectoryMatchingTrainer) -> DistilledDatasetModel | None:
    """The set at the end of training, where an earlier one was selected."""
    best = trainer.state.best_model_checkpoint
    last = Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")
    if not trainer.args.load_best_model_at_end or best is None or Path(best).name == last.name or not last.is_dir():
        return None
    return DistilledDatasetModel.from_pretrained(last)
