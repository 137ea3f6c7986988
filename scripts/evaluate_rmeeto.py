"""Measures a Vision Mamba with merged tokens: accuracy, tokens, multiply-adds and latency beside merging off.

Example: `hf-effml evaluate rmeeto rmeeto-smoke --data digits --r 8 16 24 --add_to_card`
"""

import copy
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_effml.cli.parsing import parse_arguments, run_script


if TYPE_CHECKING:
    from hf_effml import VimForImageClassification


@dataclass
class EvaluateArguments:
    """What to measure, and on what."""

    model: str = field(metadata={"help": "Folder or Hub id of a Vim, merging or not.", "positional": True})
    start: str | None = field(
        default=None, metadata={"help": "The un-merged model it was made from; its own weights if left out."}
    )
    data: str = field(default="digits", metadata={"help": "digits, a folder, or the id of a data set on the Hub."})
    r: list[int] = field(default_factory=list, metadata={"help": "Other amounts to try, tokens per merging block."})
    batch_size: int = field(default=32, metadata={"help": "Images at a time, also for the latency."})
    rounds: int = field(default=7, metadata={"help": "Interleaved rounds of the latency; the median counts."})
    device: str = field(default="cpu", metadata={"help": "Where to run: cpu, cuda, ..."})
    add_to_card: bool = field(default=False, metadata={"help": "Put the results on the card in the model's folder."})


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(EvaluateArguments, argv=argv, program=__file__, description=__doc__)
    from hf_effml import evaluate_vim, load_image_data, load_image_processor
    from hf_effml.hub import add_results
    from hf_effml.utils.model_kinds import check_model_type

    for name in filter(None, (args.model, args.start)):
        check_model_type(name, ("vim", "rmeeto_vim", "dyvm"))
    data = load_image_data(args.data, load_image_processor(args.model), only_test=True)
    models = {name: model.to(args.device).eval() for name, model in _variants(args).items()}
    report = evaluate_vim(models, data.test, args.batch_size, args.rounds, name="evaluate_rmeeto")
    report.facts = {"model": args.model, "data": data.name} | report.facts
    print(f"\n{report.as_text()}")
    if args.add_to_card:
        names = [*report.rows]
        own = "as saved" if "as saved" in names else names[0]
        print(f"Renewed {add_results(args.model, report.card_results(own, beside=names[0]), data.name)}")
    return report.as_dict()


def _variants(args: EvaluateArguments) -> "dict[str, VimForImageClassification]":
    from transformers import AutoModelForImageClassification

    from hf_effml import apply_token_merging, remove_token_merging

    saved = AutoModelForImageClassification.from_pretrained(args.model)
    off = AutoModelForImageClassification.from_pretrained(args.start or args.model)
    remove_token_merging(off)
    models = {"its start, merging off" if args.start else "merging off": off}
    options = {}
    if saved.vim.token_reducer is not None:
        models["as saved"] = saved
        fields = {name for name in vars(saved.config) if name.startswith("merge_")} - {"merge_r", "merge_target_ratio"}
        options = {name.removeprefix("merge_"): getattr(saved.config, name) for name in fields}
    for r in args.r:
        models[f"r = {r}"] = copy.deepcopy(saved)
        apply_token_merging(models[f"r = {r}"], r=r, **options)
    return models


if __name__ == "__main__":
    sys.exit(run_script(main))
