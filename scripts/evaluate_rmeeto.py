"""Measures a Vision Mamba with merged tokens: accuracy, tokens, multiply-adds and latency beside merging off.

Example: `hf-effml evaluate rmeeto rmeeto-smoke --data digits --r 8 16 24 --add_to_card`
"""

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_effml.cli.parsing import parse_arguments, run_script


if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from hf_effml import VimForImageClassification
    from hf_effml.hub import CardResult


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


@dataclass(frozen=True)
class Measurement:
    """One model's row: `latency` in ms per image, `paper_multiply_adds` of one direction, as the paper counts."""

    name: str
    accuracy: float
    tokens: float
    multiply_adds: int
    paper_multiply_adds: int
    latency: float
    speed_up: float


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(EvaluateArguments, argv=argv, program=__file__, description=__doc__)
    from hf_effml import load_image_data, load_image_processor

    data = load_image_data(args.data, load_image_processor(args.model))
    models = {name: model.to(args.device).eval() for name, model in _variants(args).items()}
    measurements = measure(models, data.test, args.batch_size, args.rounds)
    print_table(measurements)
    if args.add_to_card:
        print(f"Renewed {_add_to_card(args, measurements, data.name)}")
    rows = [asdict(measurement) for measurement in measurements]
    return {"model": args.model, "data": data.name, "device": args.device, "rows": rows}


def measure(
    models: "Mapping[str, nn.Module]",
    split: "Dataset",
    batch_size: int = 32,
    rounds: int = 7,
    work_of: "Callable[[Any], tuple[dict[str, int], list[int]]] | None" = None,
) -> list[Measurement]:
    """Measures models beside the first of them.

    Args:
        models (`Mapping[str, nn.Module]`):
            Vims to measure, by the names of the rows; all on one device.
        split (`Dataset`):
            The test images.
        batch_size (`int`, *optional*, defaults to 32):
            Images at a time.
        rounds (`int`, *optional*, defaults to 7):
            Rounds of the latency, in each of which every model has its turn.
        work_of (`Callable`, *optional*):
            Counts multiply-adds by kind and tokens by block. Defaults to [`amount_of_work`], which knows merging.

    Returns:
        `list[Measurement]`: one per model.
    """
    import torch

    from hf_effml.utils.benchmark import compare

    device = next(iter(models.values())).device
    count = min(batch_size, len(split))
    pixels = torch.stack([split[index]["pixel_values"] for index in range(count)]).to(device)
    with torch.inference_mode():
        calls = {name: partial(model, pixels) for name, model in models.items()}
        timings = compare(calls, agree=[], rounds=rounds, threads=torch.get_num_threads())
    base = next(iter(timings.values()))
    rows = []
    for name, model in models.items():
        work, tokens = (work_of or amount_of_work)(model)
        rows.append(
            Measurement(
                name=name,
                accuracy=accuracy_on(model, split, batch_size, name),
                tokens=sum(tokens) / len(tokens),
                multiply_adds=work["total"],
                paper_multiply_adds=work["paper_layers" if len(set(tokens)) == 1 else "paper_total"],
                latency=timings[name].median / count,
                speed_up=base.speedup(timings[name]),
            )
        )
    return rows


def accuracy_on(model: "VimForImageClassification", split: "Dataset", batch_size: int, name: str = "") -> float:
    """Measures the share of images that a model classifies right.

    Args:
        model (`VimForImageClassification`):
            The model.
        split (`Dataset`):
            The images.
        batch_size (`int`):
            Images at a time.
        name (`str`, *optional*):
            What the progress bar says.

    Returns:
        `float`: the accuracy.
    """
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm
    from transformers import default_data_collator

    loader = DataLoader(split, batch_size, collate_fn=default_data_collator)
    right = 0
    for batch in tqdm(loader, desc=f"accuracy {name}".strip(), leave=False, delay=2):
        with torch.inference_mode():
            best = model(batch["pixel_values"].to(model.device)).logits.argmax(-1).cpu()
        right += int((best == batch["labels"]).sum())
    return right / len(split)


def amount_of_work(model: "VimForImageClassification") -> tuple[dict[str, int], list[int]]:
    """Counts what a model does with one image, as its merging is set at the moment.

    Args:
        model (`VimForImageClassification`):
            A Vim, merging or not.

    Returns:
        `tuple[dict[str, int], list[int]]`: multiply-adds by kind, and tokens by block.
    """
    from hf_effml.vim.complexity import count_multiply_adds
    from hf_effml.vim.configuration_rmeeto import merge_schedule
    from hf_effml.vim.modeling_rmeeto import TokenMerger

    reducer = model.vim.token_reducer
    if isinstance(reducer, TokenMerger):
        tokens = merge_schedule(reducer.config)
        return count_multiply_adds(reducer.config, tokens), tokens
    config = model.config
    tokens = [config.num_patches + config.num_class_tokens] * config.num_hidden_layers
    return count_multiply_adds(config, tokens), tokens


def print_table(rows: list[Measurement]) -> None:
    """Prints measurements, each number of work and time beside that of the first row.

    Args:
        rows (`list[Measurement]`):
            What to print.
    """
    width = max(len(row.name) for row in rows) + 2
    print(
        f"\n{'':<{width}}{'accuracy':>10}{'tokens':>9}{'M mult-adds':>13}{'(paper)':>10}{'ms/image':>10}{'speed':>8}"
    )
    for row in rows:
        print(
            f"{row.name:<{width}}{row.accuracy:>10.1%}{row.tokens:>9.1f}{row.multiply_adds / 1e6:>13.2f}"
            f"{row.paper_multiply_adds / 1e6:>10.2f}{row.latency:>10.2f}{row.speed_up:>7.2f}x"
        )


def card_results(own: Measurement, base: Measurement, where: str) -> "list[CardResult]":
    """Makes the rows of a card.

    Args:
        own (`Measurement`):
            Of the model that the card is about.
        base (`Measurement`):
            Of the model it was made from.
        where (`str`):
            What the latency was measured on.

    Returns:
        `list[CardResult]`: the rows.
    """
    from hf_effml.hub import CardResult

    return [
        CardResult("Accuracy", own.accuracy, base.accuracy, "accuracy"),
        CardResult("Tokens per block, on average", own.tokens, base.tokens),
        CardResult("Million multiply-adds per image", own.multiply_adds / 1e6, base.multiply_adds / 1e6),
        CardResult(f"Latency (ms per image, {where})", own.latency, base.latency),
    ]


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
        names = ("interval", "offset", "metric", "distance", "mode", "reduce", "matching", "class_position")
        options = {name: getattr(saved.config, f"merge_{name}") for name in names}
    for r in args.r:
        models[f"r = {r}"] = copy.deepcopy(saved)
        apply_token_merging(models[f"r = {r}"], r=r, **options)
    return models


def _add_to_card(args: EvaluateArguments, rows: list[Measurement], data: str) -> Any:
    from hf_effml.hub import add_results

    own = next((row for row in rows if row.name == "as saved"), rows[0])
    return add_results(args.model, card_results(own, rows[0], f"{args.device}, batch {args.batch_size}"), data)


if __name__ == "__main__":
    sys.exit(run_script(main))
