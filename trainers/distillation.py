"""A whole distillation: the experts, the set, the honest test at its end, model and data set with their cards."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import PreTrainedConfig

from hf_effml.distillation.bank.initialization import distilled_from_real
from hf_effml.distillation.bank.trajectories import TrajectoryBank
from hf_effml.distillation.evaluation.cost import data_shape, estimate_cost, student_of_paper
from hf_effml.distillation.evaluation.measure import evaluate_distilled
from hf_effml.distillation.evaluation.protocols import get_protocol
from hf_effml.distillation.evaluation.report import EvaluationReport
from hf_effml.distillation.evaluation.students import student_by_name
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
        "student",
        "image_shape",
        "num_classes",
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
    student: str | None = field(
        default=None, metadata={"help": "With --dry_run: the network, as convnet-d3-w128, where no bank is at hand."}
    )
    image_shape: list[int] | None = field(
        default=None, metadata={"help": "With --dry_run: channels, height and width, as 3 32 32."}
    )
    num_classes: int | None = field(default=None, metadata={"help": "With --dry_run: classes of the images."})

    def __post_init__(self) -> None:
        named = {name: getattr(self, name) for name in ("student", "image_shape", "num_classes")}
        given = [f"--{name}" for name, value in named.items() if value is not None]
        if given and not (self.dry_run and len(given) == len(named)):
            raise ValueError(
                f"`{'`, `'.join(given)}` describes what `--dry_run` counts for: give `--dry_run` and all of "
                f"`--{'`, `--'.join(named)}`, or leave it out."
            )
        if self.image_shape is not None and (len(self.image_shape) != 3 or min(self.image_shape) < 1):
            raise ValueError(f"`image_shape` must be channels, height and width; got {self.image_shape}.")

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
    own = {} if script.data is None else {"data": script.data}
    return train_bank({**recipes[script.bank_recipe], **own}, str(Path(args.output_dir, "bank")))


def estimate_run(
    script: SetArguments, args: TrajectoryMatchingTrainingArguments, recipes: Mapping[str, Mapping[str, Any]]
) -> Report:
    """Says what a run needs, beside what the published code would need for the same.

    It needs no experts: a bank that is here, a recipe of one, the name of a paper's, or network, shape and classes by
    themselves say enough.

    Args:
        script (`SetArguments`):
            The set.
        args ([`TrajectoryMatchingTrainingArguments`]):
            The run.
        recipes (`Mapping[str, Mapping]`):
            Those of `hf-effml train expert`.

    Returns:
        [`~hf_effml.utils.report.Report`]: the numbers are among its facts, by name.

    Raises:
        ValueError: If nothing says which network is trained on which images.
    """
    student, shape, num_classes, num_experts, epochs = _what_is_matched(script, recipes)
    if isinstance(student, str):
        student = student_by_name(student, shape[1:], shape[0], num_classes)
    if not isinstance(student, PreTrainedConfig):
        raise ValueError(f"`{script.student}` has no configuration to count for. Name another `--student`.")
    cost = estimate_cost(
        student,
        shape,
        num_classes,
        script.images_per_class,
        syn_steps=args.syn_steps,
        batch_syn=args.batch_syn,
        num_experts=num_experts,
        snapshots=epochs,
        kept_snapshots=args.max_start_epoch - args.min_start_epoch + args.expert_epochs,
        iterations=args.max_steps,
    )
    report = Report("cost", {"value": Column("value")}, facts=dict(cost.as_row()))
    for name, value in cost.as_row().items():
        report.add(name.replace("_", " "), value=value)
    report.notes.append("Gigabytes are those of one process; a graph of all steps is what the published code keeps.")
    return report


def _what_is_matched(
    script: SetArguments, recipes: Mapping[str, Mapping[str, Any]]
) -> tuple[Any, tuple[int, int, int], int, int, int]:
    """Network, shape of an image, classes, experts and what is kept of each, from the first source that says it."""
    if script.student is not None and script.image_shape is not None and script.num_classes is not None:
        channels, height, width = script.image_shape
        return script.student, (channels, height, width), script.num_classes, *_PUBLISHED
    settings = next(
        (
            recipe
            for name, recipe in recipes.items()
            if script.bank_recipe == name or (script.bank is not None and recipe.get("output_dir") == script.bank)
        ),
        None,
    )
    here = script.bank is not None and Path(script.bank).is_dir()
    if not here and settings is not None and (found := data_shape(settings)) is not None:
        shape, num_classes = found
        return settings["student"], shape, num_classes, settings["num_experts"], settings["num_train_epochs"] + 1
    if not here and script.bank is not None and (known := student_of_paper(script.bank)) is not None:
        return *known, *_PUBLISHED
    if script.bank is None:
        raise ValueError(
            "Nothing says which network is trained on which images. Give `--bank`, `--bank_recipe`, or `--student`, "
            "`--image_shape` and `--num_classes`."
        )
    bank = TrajectoryBank.from_pretrained(script.bank)
    described = bank.metadata.get("dataset") or {}
    if not described.get("image_shape") or not described.get("label_names"):
        raise ValueError(
            f"The bank `{script.bank}` does not say what its images are. Give `--student`, `--image_shape` and "
            "`--num_classes`."
        )
    channels, height, width = described["image_shape"]
    classes = len(described["label_names"])
    return bank.student_config, (channels, height, width), classes, len(bank), len(bank.epochs)


# The papers' experts, and what is kept of each.
_PUBLISHED = (100, 101)


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
