"""Accuracy, tokens, scans, multiply-adds and latency of Vims side by side, merging, dropping or plain."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_effml.utils.benchmark import compare
from hf_effml.utils.image_data import aligned
from hf_effml.utils.report import Column, Report
from hf_effml.vim.classification_loss import problem_type_of
from hf_effml.vim.modeling_dyvm import DyVMForImageClassification
from hf_effml.vim.modeling_rmeeto import TokenMerger
from hf_effml.vim.modeling_vim import VimForImageClassification

from .complexity import count_multiply_adds, tokens_per_block


def evaluate_vim(
    models: Mapping[str, nn.Module],
    split: Any,
    batch_size: int = 32,
    rounds: int = 7,
    where: str | None = None,
    name: str = "evaluate_vim",
) -> Report:
    """Measures Vims beside the first of them.

    Args:
        models (`Mapping[str, nn.Module]`):
            Image classifiers of this package in evaluation mode, by the names of their rows; all on one device.
        split (`Dataset`):
            The test images: anything indexable with `pixel_values` and `labels`. Those of [`load_image_data`] get the
            class numbers that each model has for the names of their classes.
        batch_size (`int`, *optional*, defaults to 32):
            Images at a time, also for the latency.
        rounds (`int`, *optional*, defaults to 7):
            Rounds of the latency, in each of which every model has its turn; the median counts.
        where (`str`, *optional*):
            What the latency on a card was measured on; device and batch size by default.
        name (`str`, *optional*, defaults to `"evaluate_vim"`):
            Name of the report.

    Returns:
        [`~hf_effml.utils.report.Report`]: a row per model. `accuracy`, mean `tokens` of a block, `multiply_adds`,
        `paper_multiply_adds` of one direction as R-MeeTo counts, `latency` in ms per image, `speed_up` over the first
        model, and of a DyVM `token_keep_ratio` after every stage and the measured `block_keep_ratio` of the scans.

    Raises:
        ValueError: If a model is in training mode, does not tell one class of several or does not know a class of the
            images, or there is no image.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml import RMeeToVimForImageClassification, VimConfig, VimForImageClassification, evaluate_vim

    >>> config = VimConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4)
    >>> vim = VimForImageClassification(config).eval()
    >>> merged = RMeeToVimForImageClassification.from_vim(vim, merge_r=4)
    >>> images = [{"pixel_values": torch.rand(3, 32, 32), "labels": 0} for _ in range(4)]
    >>> report = evaluate_vim({"dense": vim, "merged": merged}, images, rounds=1)
    >>> [row["tokens"] for row in report.rows.values()]
    [17.0, 15.0]

    ```
    """
    training = [each for each, model in models.items() if model.training]
    if training or not len(split):
        raise ValueError(
            f"`models` must be in evaluation mode; call `eval()` of {', '.join(training)}."
            if training
            else "`split` must hold at least one image; got an empty one."
        )
    others = {each: problem_type_of(model.config) for each, model in models.items()}
    if set(others.values()) != {"single_label_classification"}:
        raise ValueError(
            f"Accuracy is of models that tell one class of several; got {others}. Measure others with the trainer's "
            "`evaluate`."
        )
    splits = {each: aligned(split, model.config) for each, model in models.items()}
    device = next(iter(models.values())).device
    report = Report(name, _columns(models, where or f"{device}, batch {batch_size}"))
    report.facts = {"device": str(device), "batch_size": batch_size, "rounds": rounds}
    count = min(batch_size, len(split))
    pixels = torch.stack([split[index]["pixel_values"] for index in range(count)]).to(device)
    with torch.inference_mode():
        calls = {each: partial(model, pixels) for each, model in models.items()}
        timings = compare(calls, agree=[], rounds=rounds, threads=torch.get_num_threads())
    base = next(iter(timings.values()))
    for each, model in models.items():
        accuracy, scans = classify(model, splits[each], batch_size, each)
        shares = kept_shares(model)
        work, tokens = amount_of_work(model, scans)
        report.add(
            each,
            accuracy=accuracy,
            tokens=sum(tokens) / len(tokens),
            tokens_kept=" ".join(f"{share:.2f}" for share in shares) or "all",
            token_keep_ratio=shares,
            block_keep_ratio=scans,
            multiply_adds=work["total"],
            paper_multiply_adds=work["paper_layers" if len(set(tokens)) == 1 else "paper_total"],
            latency=timings[each].median / count,
            speed_up=base.speedup(timings[each]),
        )
    return report


def classify(
    model: VimForImageClassification, split: Any, batch_size: int = 32, name: str = ""
) -> tuple[float, float]:
    """Runs a model over images.

    Args:
        model ([`VimForImageClassification`]):
            A Vim in evaluation mode, of which a DyVM skips scans.
        split (`Dataset`):
            The images; see [`evaluate_vim`].
        batch_size (`int`, *optional*, defaults to 32):
            Images at a time.
        name (`str`, *optional*):
            What the progress bar says.

    Returns:
        `tuple[float, float]`: the share of images classified right, and the share of scans that ran.
    """
    from tqdm import tqdm

    split = aligned(split, model.config)
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
    model: VimForImageClassification, block_keep_ratio: float = 1.0
) -> tuple[dict[str, int], list[int]]:
    """Counts what a model does with one image, as its merging or pruning is set at the moment.

    Args:
        model ([`VimForImageClassification`]):
            A Vim, merging, dropping tokens or not.
        block_keep_ratio (`float`, *optional*, defaults to 1.0):
            Share of the scans that run, as measured.

    Returns:
        `tuple[dict[str, int], list[int]]`: multiply-adds by kind, see [`count_multiply_adds`], and tokens by block.
    """
    config, reducer = model.config, model.vim.token_reducer
    if isinstance(reducer, TokenMerger):
        config = reducer.config
    elif isinstance(model, DyVMForImageClassification) and not _is_dynamic(model):
        config = copy.deepcopy(config)
        config.enable_token_pruning = config.enable_block_selection = False
    if _is_dynamic(model) or isinstance(reducer, TokenMerger):
        tokens = tokens_per_block(config)
    else:
        # An R-MeeTo model whose merging is off keeps its configuration.
        tokens = [config.num_patches + config.num_class_tokens] * config.num_hidden_layers
    return count_multiply_adds(config, tokens, block_keep_ratio), tokens


def kept_shares(model: VimForImageClassification) -> list[float]:
    """Says which share of the patch tokens every stage of a DyVM keeps.

    Args:
        model ([`VimForImageClassification`]):
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


def _columns(models: Mapping[str, nn.Module], where: str) -> dict[str, Column]:
    """What tables and cards show; what the papers count differently beside merging, the scans beside a DyVM."""
    dynamic = any(isinstance(model, DyVMForImageClassification) for model in models.values())
    own = {
        "tokens_kept": Column("tokens kept"),
        "block_keep_ratio": Column("scans", ".1%", card="Share of the scans that run"),
    }
    return {
        "accuracy": Column("accuracy", ".1%", card="Accuracy", metric="accuracy"),
        "tokens": Column("tokens", ".1f", card="Tokens per block, on average"),
        **(own if dynamic else {}),
        "multiply_adds": Column("M mult-adds", ".2f", scale=1e-6, card="Million multiply-adds per image"),
        **({} if dynamic else {"paper_multiply_adds": Column("(paper)", ".2f", scale=1e-6)}),
        "latency": Column("ms/image", ".2f", card=f"Latency (ms per image, {where})"),
        "speed_up": Column("speed", ".2f", unit="x"),
    }


__all__ = ["amount_of_work", "classify", "evaluate_vim", "kept_shares"]
