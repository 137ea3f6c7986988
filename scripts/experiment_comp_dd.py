"""Asks whether classes of higher complexity are harder: the same student on random images of easy and hard classes.

Classes are scored on the training images by the activation maps of a network, the less and the more complex half of
them are made subsets, and the student is trained on random real images of each, as the baseline of an evaluation is.

Example: `python scripts/experiment_comp_dd.py --model microsoft/resnet-18 --data images/clothing_small`
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForImageClassification

from hf_effml import evaluate_distilled, load_real_images
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.comp_dd import MapNetwork, class_complexity, make_subsets, score_images
from hf_effml.distillation.evaluation.protocols import get_protocol
from hf_effml.distillation.evaluation.training_sets import TrainingSet, random_real_images
from hf_effml.utils.benchmark import describe_run
from hf_effml.utils.image_data import load_image_processor
from hf_effml.utils.model_kinds import check_task
from hf_effml.utils.report import Column, Report
from hf_effml.utils.sources.image_splits import load_image_splits


@dataclass
class ExperimentArguments:
    """The network that scores, the data, and the student."""

    model: str = field(metadata={"help": "Folder or Hub id of the image classifier that scores."})
    data: str = field(default="images/clothing_small", metadata={"help": "A folder or the id of a data set."})
    output_dir: str = field(default="experiments", metadata={"help": "Folder for the table and the numbers."})
    threshold: float = field(default=0.5, metadata={"help": "Of the score."})
    k: int = field(default=5, metadata={"help": "Classes of each subset."})
    images_per_class: int = field(default=10, metadata={"help": "Random images to train on."})
    image_size: int = field(default=32, metadata={"help": "Side of the images that students see."})
    student: str = field(default="convnet-d3-w32", metadata={"help": "What is trained."})
    epochs: int = field(default=300, metadata={"help": "Its epochs."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of the images and the students."})


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(ExperimentArguments, argv=argv, program=__file__, description=__doc__)
    torch.set_num_threads(1)
    check_task(args.model, "AutoModelForImageClassification")
    splits = load_image_splits(args.data)
    network = MapNetwork(AutoModelForImageClassification.from_pretrained(args.model), load_image_processor(args.model))
    scores = score_images(splits.train, [network], splits.labels, thresholds=(args.threshold,))
    table = class_complexity(scores.complexity[args.threshold], scores.labels, splits.labels)
    table.title = "Classes"
    subsets = make_subsets(table, {"all": list(table.rows)}, args.k)
    columns = {"complexity": Column("complexity (%)", ".1f", scale=100), "accuracy": Column("test accuracy", ".1%")}
    report = Report("comp_dd_experiment", columns, "Random real images of easy and hard classes")
    report.facts = {"arguments": {name: value for name, value in vars(args).items() if name != "output_dir"}}
    report.facts |= {"subsets": subsets, "run": describe_run(seed=args.seeds[0])}
    report.parts.append(table)
    for name, classes in subsets.items():
        mean = sum(table.rows[each]["complexity"] for each in classes) / len(classes)
        ids = [splits.ids[splits.labels.index(each)] for each in classes]
        report.add(name.removeprefix("all_"), complexity=mean, accuracy=[])
        for seed in args.seeds:
            report.rows[name.removeprefix("all_")]["accuracy"].append(_accuracy(args, ids, seed))
            # Written as it goes: what is done is not lost.
            written = report.save(args.output_dir)
    report.notes.append(_verdict(report))
    written = report.save(args.output_dir)
    print(f"\n{report.as_markdown()}\n\nWrote {written} and {written.with_suffix('.json').name}.")
    return report.as_dict()


def _accuracy(args: ExperimentArguments, ids: list[int], seed: int) -> float:
    sizes: dict[str, Any] = {"image_size": args.image_size, "whiten": False, "validation_share": 0.0}
    data = load_real_images(args.data, classes=ids, seed=seed, **sizes)
    wanted = torch.arange(data.num_labels).repeat_interleave(args.images_per_class)
    chosen = random_real_images(data.train, wanted, seed)
    random = TrainingSet(data.train.images[chosen], data.train.labels[chosen])
    protocol = get_protocol("hard", epochs=args.epochs)
    how: dict[str, Any] = {"protocol": protocol, "seeds": [seed], "baselines": False, "disable_tqdm": True}
    return evaluate_distilled(random, args.student, data.test, **how).accuracy


def _verdict(report: Report) -> str:
    """The gap of each seed, in points, with its sign."""
    easy, hard = (report.rows[name]["accuracy"] for name in ("easy", "hard"))
    gaps = [a - b for a, b in zip(easy, hard, strict=True)]
    mean = sum(gaps) / len(gaps)
    each = ", ".join(f"{100 * gap:+.1f}" for gap in gaps)
    expected = "as expected, the more complex classes are harder" if mean > 0 else "the more complex are NOT harder"
    agree = sum((gap > 0) == (mean > 0) for gap in gaps)
    says = f"{expected}; {agree} of {len(gaps)} seeds agree"
    return f"Accuracy of easy minus hard: {100 * mean:+.1f} points ({each}): {says}."


if __name__ == "__main__":
    sys.exit(run_script(main))
