"""Measures a DyVM: accuracy, the tokens and scans that really run, multiply-adds and latency beside the dense model.

Example: `hf-effml evaluate dyvm dyvm-smoke --start dyvm-smoke/start --data digits --picture dropped.png`
"""

import copy
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_effml.cli.parsing import parse_arguments, run_script


if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from hf_effml import DyVMForImageClassification, VimForImageClassification
    from hf_effml.hub import CardResult
    from hf_effml.utils.image_data import ImageData


SAVED = "as saved"
_PICTURES = 6


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


@dataclass(frozen=True)
class Measurement:
    """One model's row: shares of patch tokens after every stage and of scans run, `latency` in ms per image."""

    name: str
    accuracy: float
    token_keep_ratio: list[float]
    block_keep_ratio: float
    tokens: float
    multiply_adds: int
    latency: float
    speed_up: float


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(EvaluateArguments, argv=argv, program=__file__, description=__doc__)
    from hf_effml import load_image_data, load_image_processor

    processor = load_image_processor(args.model)
    data = load_image_data(args.data, processor)
    models = {name: model.to(args.device).eval() for name, model in _variants(args).items()}
    measurements = measure(models, data.test, args.batch_size, args.rounds)
    print_table(measurements)
    if args.picture:
        draw_dropped_patches(models[SAVED], data, processor, args.picture)
        print(f"Drew {args.picture}")
    if args.add_to_card:
        print(f"Renewed {_add_to_card(args, measurements, data.name)}")
    rows = [asdict(measurement) for measurement in measurements]
    return {"model": args.model, "data": data.name, "device": args.device, "rows": rows}


def measure(
    models: "Mapping[str, nn.Module]", split: "Dataset", batch_size: int = 32, rounds: int = 7
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
        accuracy, scans = run_over(model, split, batch_size, name)
        work, tokens = amount_of_work(model, scans)
        rows.append(
            Measurement(
                name=name,
                accuracy=accuracy,
                token_keep_ratio=kept_shares(model),
                block_keep_ratio=scans,
                tokens=sum(tokens) / len(tokens),
                multiply_adds=work["total"],
                latency=timings[name].median / count,
                speed_up=base.speedup(timings[name]),
            )
        )
    return rows


def run_over(
    model: "VimForImageClassification", split: "Dataset", batch_size: int, name: str = ""
) -> tuple[float, float]:
    """Runs a model over a split.

    Args:
        model (`VimForImageClassification`):
            A Vim, of which a DyVM skips scans.
        split (`Dataset`):
            The images.
        batch_size (`int`):
            Images at a time.
        name (`str`, *optional*):
            What the progress bar says.

    Returns:
        `tuple[float, float]`: the share of images classified right, and the share of scans that ran.
    """
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm
    from transformers import default_data_collator

    loader = DataLoader(split, batch_size, collate_fn=default_data_collator)
    right, scans = 0, 0.0
    for batch in tqdm(loader, desc=f"accuracy {name}".strip(), leave=False, delay=2):
        with torch.inference_mode():
            output = model(batch["pixel_values"].to(model.device))
        right += int((output.logits.argmax(-1).cpu() == batch["labels"]).sum())
        shares = getattr(output, "block_keep_ratio", None)
        scans += len(output.logits) if shares is None else shares.sum().item()
    return right / len(split), scans / len(split)


def amount_of_work(
    model: "VimForImageClassification", block_keep_ratio: float = 1.0
) -> tuple[dict[str, int], list[int]]:
    """Counts what a model does with one image.

    Args:
        model (`VimForImageClassification`):
            A Vim, dropping tokens or not.
        block_keep_ratio (`float`, *optional*, defaults to 1.0):
            Share of the scans that run, as measured.

    Returns:
        `tuple[dict[str, int], list[int]]`: multiply-adds by kind, and tokens by block.
    """
    from hf_effml import DyVMForImageClassification
    from hf_effml.vim.complexity import count_multiply_adds, tokens_per_block

    config = model.config
    if isinstance(model, DyVMForImageClassification) and not _is_dynamic(model):
        config = copy.deepcopy(config)
        config.enable_token_pruning = config.enable_block_selection = False
    tokens = tokens_per_block(config)
    return count_multiply_adds(config, tokens, block_keep_ratio), tokens


def kept_shares(model: "VimForImageClassification") -> list[float]:
    """Says which share of the patch tokens every stage keeps.

    Args:
        model (`VimForImageClassification`):
            A Vim, dropping tokens or not.

    Returns:
        `list[float]`: shares of all patches; empty where none are dropped.
    """
    if not _is_dynamic(model):
        return []
    return [kept / model.config.num_patches for kept in model.config.tokens_kept_at_default_size]


def _is_dynamic(model: Any) -> bool:
    """Whether a model drops tokens or skips scans as it stands."""
    return getattr(model.vim, "pruning", False)


def print_table(rows: list[Measurement]) -> None:
    """Prints measurements, the speed beside that of the first row.

    Args:
        rows (`list[Measurement]`):
            What to print.
    """
    width = max(len(row.name) for row in rows) + 2
    head = f"{'accuracy':>10}{'tokens kept':>20}{'scans':>8}{'M mult-adds':>13}{'ms/image':>10}{'speed':>8}"
    print(f"\n{'':<{width}}{head}")
    for row in rows:
        shares = " ".join(f"{share:.2f}" for share in row.token_keep_ratio) or "all"
        print(
            f"{row.name:<{width}}{row.accuracy:>10.1%}{shares:>20}{row.block_keep_ratio:>8.1%}"
            f"{row.multiply_adds / 1e6:>13.2f}{row.latency:>10.2f}{row.speed_up:>7.2f}x"
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
        CardResult("Share of the scans that run", own.block_keep_ratio, base.block_keep_ratio),
        CardResult("Million multiply-adds per image", own.multiply_adds / 1e6, base.multiply_adds / 1e6),
        CardResult(f"Latency (ms per image, {where})", own.latency, base.latency),
    ]


def draw_dropped_patches(
    model: "DyVMForImageClassification", data: "ImageData", processor: Any, path: str | Path
) -> None:
    """Draws which patches of the first test images a model drops, and where.

    Args:
        model (`DyVMForImageClassification`):
            The model, in evaluation mode.
        data (`ImageData`):
            The data; its test images are drawn.
        processor (`BaseImageProcessor`):
            What made pixels of them.
        path (`str` or `Path`):
            PNG file to write.
    """
    import torch

    from hf_effml import visualize_selection
    from hf_effml.utils.plotting import plot_images

    chosen = [data.test[index] for index in range(_PICTURES)]
    pixels = torch.stack([row["pixel_values"] for row in chosen]).to(model.device)
    with torch.inference_mode():
        output = model(pixels)
    found = output.logits.argmax(-1).tolist()
    left = model.config.tokens_kept_at_default_size[-1]
    plot_images(
        [visualize_selection(_picture(row["pixel_values"], processor), output, i) for i, row in enumerate(chosen)],
        [
            f"{data.labels[row['labels']]}, read as {data.labels[label]}"
            for row, label in zip(chosen, found, strict=True)
        ],
        path,
        columns=3,
        title=f"{model.config.num_patches} patches and the {left} that DyVM keeps to the end",
    )


def _picture(pixels: "Tensor", processor: Any) -> "Image.Image":
    """An image as the model saw it."""
    import torch
    from PIL import Image

    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std))
    values = ((pixels * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


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


def _add_to_card(args: EvaluateArguments, rows: list[Measurement], data: str) -> Any:
    from hf_effml.hub import add_results

    own = next(row for row in rows if row.name == SAVED)
    return add_results(args.model, card_results(own, rows[0], f"{args.device}, batch {args.batch_size}"), data)


if __name__ == "__main__":
    sys.exit(run_script(main))
