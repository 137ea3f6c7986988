"""What the programs share that distil a data set: experts, images, the training, and the honest test at its end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_effml import (
    DistilledDatasetModel,
    RealImageData,
    TrajectoryBank,
    TrajectoryMatchingTrainer,
    TrajectoryMatchingTrainingArguments,
    distilled_from_real,
    estimate_cost,
    evaluate_distilled,
)
from hf_effml.distillation.evaluation.protocols import get_protocol
from hf_effml.distillation.real_images import reload_real_images
from hf_effml.hub import CardResult
from hf_effml.utils.benchmark import markdown_table
from hf_effml.utils.imports import require


if TYPE_CHECKING:
    from hf_effml import EvaluationReport


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
        """The fields of a `DistilledDatasetConfig` among them."""
        return {
            "initial_lr": self.initial_lr,
            "augmentation_strategy": self.augmentation,
            "augmentation_crop_ratio": self.crop_ratio,
        }


def load_bank(script: SetArguments, args: TrajectoryMatchingTrainingArguments) -> TrajectoryBank:
    """Loads the experts, training them first if need be; what an earlier run has left is used or continued.

    Args:
        script (`SetArguments`):
            Where they are, or how they are made.
        args ([`TrajectoryMatchingTrainingArguments`]):
            Where the run writes.

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
    from hf_effml.scripts import train_expert

    folder = str(Path(args.output_dir, "bank"))
    train_expert.main(["--recipe", script.bank_recipe, "--output_dir", folder])
    return TrajectoryBank.from_pretrained(folder)


def show_cost(script: SetArguments, args: TrajectoryMatchingTrainingArguments, bank: TrajectoryBank) -> dict[str, Any]:
    """Prints what a run needs, beside what the published code would need for the same.

    Args:
        script (`SetArguments`):
            The set.
        args ([`TrajectoryMatchingTrainingArguments`]):
            The run.
        bank ([`TrajectoryBank`]):
            The experts.

    Returns:
        `dict[str, Any]`: the numbers, by name.
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
    row = cost.as_row()
    print(markdown_table([{"what": name.replace("_", " "), "value": value} for name, value in row.items()]))
    print("Gigabytes are those of one process; a graph of all steps is what the published code keeps.")
    return row


def distil(
    trainer_class: type[TrajectoryMatchingTrainer],
    script: SetArguments,
    args: TrajectoryMatchingTrainingArguments,
    bank: TrajectoryBank,
    **options: Any,
) -> dict[str, Any]:
    """Distils, tests once on the test images, writes model and data set, and prints the table.

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
        `dict[str, Any]`: the program's results.
    """
    # What the end needs is asked for before hours of work.
    require("datasets")
    data = reload_real_images(bank.metadata["dataset"].get("arguments"), bank.image_processor, script.data)
    model = distilled_from_real(
        data,
        bank,
        script.images_per_class,
        method=script.initialization,
        seed=args.seed,
        device=args.device,
        **script.config_fields(),
    )
    initial = DistilledDatasetModel(model.config).set_content(model.images, model.labels, model.lr)
    trainer = trainer_class(model, args, bank=bank, eval_dataset=data.validation, **options)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    results: dict[str, Any] = {"output_dir": args.output_dir, "steps": trainer.state.global_step}
    results["lr"] = trainer.accelerator.unwrap_model(trainer.model).lr.item()
    reports = _test(script, args, trainer, data, bank, initial)
    folder = trainer.save_dataset(reports=reports, license=script.license)
    if not trainer.is_world_process_zero():
        return results
    # What the evaluations during training measured served to choose, and is no result.
    trainer.card_facts |= {
        "results": [CardResult(*row) for report in reports for row in report.card_results()],
        "evaluated_on": f"the test images of {data.name}",
        "datasets": [data.hub_id] if data.hub_id else [],
        "license": script.license,
    }
    trainer.create_model_card()
    for report in reports:
        print(f"\n{markdown_table(report.rows())}")
        results |= {"accuracy": report.accuracy, "accuracies": {k: v.mean for k, v in report.accuracies.items()}}
    print(f"\nWrote {folder}, with a picture and a card. To load it, or to push it as a data set:")
    # By its file: of a folder with a card `datasets` caches the first content and gives it back ever after.
    print(f'load_dataset("parquet", data_files="{folder}/data/*.parquet", split="train")')
    print(f"hf-effml push {folder} USER/NAME")
    return results


def _test(
    script: SetArguments,
    args: TrajectoryMatchingTrainingArguments,
    trainer: TrajectoryMatchingTrainer,
    data: RealImageData,
    bank: TrajectoryBank,
    initial: DistilledDatasetModel,
) -> "list[EvaluationReport]":
    """The only look at the test images: the selected set beside its baselines."""
    if not script.test_seeds:
        return []
    changes: Mapping[str, Any] = {} if script.test_epochs is None else {"epochs": script.test_epochs}
    return [
        evaluate_distilled(
            trainer.accelerator.unwrap_model(trainer.model),
            bank.student_config,
            data.test,
            protocol=get_protocol(script.test_protocol, **changes),
            seeds=range(script.test_seeds),
            real=data.train,
            bank=bank,
            initial=initial,
            last=_last_step(trainer),
            full_epochs=script.full_epochs,
            device=args.device,
        )
    ]


def _last_step(trainer: TrajectoryMatchingTrainer) -> DistilledDatasetModel | None:
    """The set at the end of training, where an earlier one was selected."""
    best = trainer.state.best_model_checkpoint
    last = Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")
    if not trainer.args.load_best_model_at_end or best is None or Path(best).name == last.name or not last.is_dir():
        return None
    return DistilledDatasetModel.from_pretrained(last)
