"""Distils a data set with EDF: gradients weighted by activation maps, and a loss on what is not matched yet.

Example: `hf-effml train edf --recipe smoke --output_dir edf-smoke`
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from hf_effml import EDFTrainer, EDFTrainingArguments, TrajectoryBank
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.cli.recipes import read_recipes
from hf_effml.comp_dd import subset_info
from hf_effml.trainers.distillation import SetArguments, distil, estimate_run, load_bank


@dataclass
class MapArguments:
    """The classifier that activation maps are made with; an expert of the bank if left out."""

    cam_model: str | None = field(default=None, metadata={"help": "Folder or Hub id of an image classifier."})
    cam_subset: str | None = field(
        default=None, metadata={"help": "Its ImageNet classes are those of this subset, see `hf-effml comp-dd list`."}
    )
    cam_classes: list[int] | None = field(
        default=None, metadata={"help": "The number of its class for every class of the set, in order."}
    )

    def __post_init__(self) -> None:
        if self.cam_subset is not None:
            try:
                subset_info(self.cam_subset)
            except ValueError as error:
                raise ValueError(f"`cam_subset`: {error}") from error
        if self.cam_subset is not None and self.cam_classes is not None:
            raise ValueError("Give `cam_subset` or `cam_classes`, not both.")
        if self.cam_model is None and (self.cam_subset is not None or self.cam_classes is not None):
            raise ValueError("`cam_subset` and `cam_classes` say what classes of `cam_model` mean. Name it as well.")


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    script, maps, args = parse_arguments(
        SetArguments,
        MapArguments,
        EDFTrainingArguments,
        argv=argv,
        program=__file__,
        description=__doc__,
    )
    if script.dry_run:
        cost = estimate_run(script, args, read_recipes("expert"))
        print(cost.as_markdown())
        return cost.facts
    bank = load_bank(script, args, read_recipes("expert"))
    found = distil(EDFTrainer, script, args, bank, **_map_network(maps, bank))
    if found.is_main_process:
        print(f"\n{found.as_text()}")
    return found.results()


def _map_network(maps: MapArguments, bank: TrajectoryBank) -> dict[str, Any]:
    """Keyword arguments of the trainer: the network, its preprocessing, and what its classes mean."""
    if maps.cam_model is None:
        return {}
    from transformers import AutoModelForImageClassification

    from hf_effml import load_image_processor
    from hf_effml.utils.model_kinds import check_task

    classes = maps.cam_classes or (subset_info(maps.cam_subset).indices if maps.cam_subset else None)
    labels = len(bank.metadata["dataset"]["label_names"])
    if classes is not None and len(classes) != labels:
        raise ValueError(f"Name one class of `cam_model` for each of the {labels} classes; got {len(classes)}.")
    check_task(maps.cam_model, "AutoModelForImageClassification")
    return {
        "cam_model": AutoModelForImageClassification.from_pretrained(maps.cam_model),
        "cam_processor": load_image_processor(maps.cam_model),
        "cam_label_map": None if classes is None else dict(enumerate(classes)),
    }


if __name__ == "__main__":
    sys.exit(run_script(main))
