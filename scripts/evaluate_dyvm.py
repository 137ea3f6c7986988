"""Measures a DyVM: accuracy, the tokens and scans that really run, multiply-adds and latency beside the dense model.

Example: `hf-effml evaluate dyvm dyvm-smoke --start dyvm-smoke/start --data digits --picture dropped.png`
"""

import copy
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_effml.cli.parsing import parse_arguments, run_script


if TYPE_CHECKING:
    from hf_effml import VimForImageClassification


SAVED = "as saved"


@dataclass
class EvaluateArguments:
    """What to measure, and on what."""

    model: str = field(metadata={"help": "Folder or Hub id of a DyVM.", "positional": True})
    start: str | None = field(
        default=None, metadata={"help": "The dense model it was made from; itself with everything on if left out."}
    )
    data: str = field(default="digits", metadata={"help": "digits, a folder, or the id of a data set on the Hub."})
    token_keep_ratio: list[float] = field(
        default_factory=list, metadata={"help": "Other shares of tokens to try, as they come without training."}
    )
    batch_size: int = field(default=32, metadata={"help": "Images at a time, also for the latency."})
    rounds: int = field(default=7, metadata={"help": "Interleaved rounds of the latency; the median counts."})
    device: str = field(default="cpu", metadata={"help": "Where to run: cpu, cuda, ..."})
    picture: str | None = field(default=None, metadata={"help": "PNG file to draw dropped patches into."})
    add_to_card: bool = field(default=False, metadata={"help": "Put the results on the card in the model's folder."})


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(EvaluateArguments, argv=argv, program=__file__, description=__doc__)
    from hf_effml import draw_patches, evaluate_vim, load_image_data, load_image_processor
    from hf_effml.hub import add_results
    from hf_effml.utils.model_kinds import check_model_type

    for name in filter(None, (args.model, args.start)):
        check_model_type(name, ("vim", "rmeeto_vim", "dyvm"))
    processor = load_image_processor(args.model)
    data = load_image_data(args.data, processor, only_test=True)
    models = {name: model.to(args.device).eval() for name, model in _variants(args).items()}
    report = evaluate_vim(models, data.test, args.batch_size, args.rounds, name="evaluate_dyvm")
    report.facts = {"model": args.model, "data": data.name} | report.facts
    print(f"\n{report.as_text()}")
    if args.picture:
        draw_patches(models[SAVED], data, processor, args.picture)
        print(f"Drew {args.picture}")
    if args.add_to_card:
        results = report.card_results(SAVED, beside=next(iter(report.rows)))
        print(f"Renewed {add_results(args.model, results, data.name)}")
    return report.as_dict()


def _variants(args: EvaluateArguments) -> "dict[str, VimForImageClassification]":
    from transformers import AutoModelForImageClassification

    saved = AutoModelForImageClassification.from_pretrained(args.model)
    if not hasattr(saved, "set_pruning"):
        raise ValueError(
            f"`{args.model}` must be a DyVM; it is a `{type(saved).__name__}`. Make one with `hf-effml train dyvm "
            f"--model_name_or_path {args.model}`."
        )
    if args.start:
        models = {"its start": AutoModelForImageClassification.from_pretrained(args.start)}
    else:
        models = {"everything on": copy.deepcopy(saved)}
        models["everything on"].set_pruning(False)
    models[SAVED] = saved
    for ratio in args.token_keep_ratio:
        models[f"token_keep_ratio = {ratio:g}"] = copy.deepcopy(saved)
        models[f"token_keep_ratio = {ratio:g}"].set_token_keep_ratio(ratio)
    return models


if __name__ == "__main__":
    sys.exit(run_script(main))
