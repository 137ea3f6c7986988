"""What the experiments and the demo share: short trainings on one CPU thread, and results over several seeds."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_effml import Augmentation, VimForImageClassification
    from hf_effml.utils.report import Column, Report

# Arguments of every training here.
SMALL_RUN: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "weight_decay": 0.05,
    "warmup_steps": 0.1,
    "max_grad_norm": 1.0,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
}


@dataclass
class ExperimentArguments:
    """The data, the model and how long to train it."""

    output_dir: str = field(default="experiments", metadata={"help": "Folder for the table and the numbers."})
    name: str = field(default="digits", metadata={"help": "Name of the files."})
    data: str = field(default="digits", metadata={"help": "digits, a folder, or the id of a data set on the Hub."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One start model each."})
    image_size: int = field(default=16, metadata={"help": "Side of the images in pixels."})
    patch_size: int = field(default=2, metadata={"help": "Side of a patch in pixels."})
    hidden_size: int = field(default=32, metadata={"help": "Width of the model."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Number of blocks."})
    epochs: int = field(default=10, metadata={"help": "Passes over the data for the start model."})
    learning_rate: float = field(default=3e-3, metadata={"help": "For the start model."})

    def settings(self, seed: int, epochs: int, learning_rate: float) -> dict[str, Any]:
        """Makes the arguments of one training.

        Args:
            seed (`int`):
                Seed of order and augmentation.
            epochs (`int`):
                Passes over the data.
            learning_rate (`float`):
                Peak; the cosine ends at a hundredth of it.

        Returns:
            `dict[str, Any]`: keyword arguments of a `VisionTrainingArguments`.
        """
        return SMALL_RUN | {
            "output_dir": self.output_dir,
            "num_train_epochs": epochs,
            "learning_rate": learning_rate,
            "min_learning_rate": learning_rate / 100,
            "seed": seed,
            "logging_strategy": "epoch",
        }

    def train_start(self, train: Any, seed: int, **fields: Any) -> "VimForImageClassification":
        """Trains the Vim that everything starts from.

        Args:
            train (`Dataset`):
                Training images.
            seed (`int`):
                Seed of the training; weights come from the global one.
            fields (`dict`):
                Fields of a `VimConfig` that describe the data.

        Returns:
            [`~hf_effml.VimForImageClassification`]: in evaluation mode.
        """
        from hf_effml import VimConfig, VimForImageClassification

        names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers")
        sizes = {name: getattr(self, name) for name in names}
        model = VimForImageClassification(VimConfig(**sizes, state_size=8, symmetric_dt_init=True, **fields))
        return train_vim(model, train, self.settings(seed, self.epochs, self.learning_rate))

    def report(
        self, columns: "Mapping[str, Column]", augmentation: "Augmentation", seed: int, rows: Sequence[dict[str, Any]]
    ) -> "Report":
        """Writes the table and the numbers; after every seed, so that what is done is not lost.

        Args:
            columns (`Mapping[str, Column]`):
                What the table shows.
            augmentation ([`~hf_effml.Augmentation`]):
                How training images were changed.
            seed (`int`):
                The last seed.
            rows (`Sequence[dict]`):
                `name`, `accuracies` of the seeds and whatever else was measured.

        Returns:
            [`~hf_effml.utils.report.Report`]: with mean and standard deviation of the accuracies in every row.
        """
        from hf_effml.utils.benchmark import describe_run
        from hf_effml.utils.report import Report

        report = Report(self.name, columns)
        arguments = {name: value for name, value in vars(self).items() if name != "output_dir"}
        report.facts = {"arguments": arguments, "augmentation": vars(augmentation)}
        report.facts["run"] = describe_run(seed=seed)
        for row in rows:
            accuracies = row["accuracies"]
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None
            per_seed = " ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
            values = {name: value for name, value in row.items() if name != "name"}
            report.add(row["name"], **values, accuracy=statistics.fmean(accuracies), spread=spread, per_seed=per_seed)
        report.save(self.output_dir)
        return report


def train_vim(model: "VimForImageClassification", train: Any, settings: dict[str, Any]) -> "VimForImageClassification":
    """Trains a plain Vim in place.

    Args:
        model ([`~hf_effml.VimForImageClassification`]):
            The model.
        train (`Dataset`):
            Training images.
        settings (`dict[str, Any]`):
            Arguments of the training.

    Returns:
        [`~hf_effml.VimForImageClassification`]: the same, in evaluation mode.
    """
    from hf_effml import VimTrainer, VimTrainingArguments

    trainer = VimTrainer(model, VimTrainingArguments(**settings), train_dataset=train)
    trainer.train()
    return trainer.model.eval()


def train_with_bar(trainer: Any, what: str) -> None:
    """Trains with one bar and nothing else on the screen.

    Args:
        trainer (`Trainer`):
            What to train.
        what (`str`):
            What the bar says.
    """
    from tqdm import tqdm
    from transformers import PrinterCallback, TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = tqdm(total=state.max_steps, desc=what, unit="step")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Bar())
    trainer.train()


__all__ = ["SMALL_RUN", "ExperimentArguments", "train_vim", "train_with_bar"]
