"""Shifts the gates of a DyVM so that, decided without noise, the wanted share of its scans runs."""

import math
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(__name__)

_ROUNDS = 5
_CLOSE_ENOUGH = 0.002
_FAR = 0.02
_GROUPS = ("global", "block", "direction")


def calibrate(
    model: Any, dataloader: Iterable[Any], target: float | None, per: str, max_batches: int | None
) -> list[dict[str, Any]]:
    """What `calibrate_block_gates` of the DyVM models does; see there.

    A gate that closes changes what later blocks see, so the offsets are found in a few rounds.

    Args:
        model ([`DyVMModel`] or [`DyVMForImageClassification`]):
            Its configuration is changed.
        dataloader, target, per, max_batches:
            See there.

    Returns:
        `list[dict[str, Any]]`: See there.
    """
    config = model.config
    target = float(config.block_keep_ratio if target is None else target)
    if not config.enable_block_selection:
        raise ValueError("There are no gates to calibrate: `enable_block_selection` is off.")
    if not 0 < target <= 1:
        raise ValueError(f"`target` must be above 0 and at most 1; got {target}.")
    if per not in _GROUPS:
        raise ValueError(f"`per` must be one of {', '.join(_GROUPS)}; got {per!r}.")
    threshold = 0.5 if config.block_gate_threshold is None else config.block_gate_threshold
    cut = math.log(threshold / (1 - threshold))
    was_training, chosen = model.training, config.block_gate_logit_offset
    model.eval()
    try:
        logits = _collect(model, dataloader, max_batches)
        before = (logits > cut).double().mean(0)
        smallest, after = math.inf, before
        for _ in range(_ROUNDS):
            offset = config.block_gate_logit_offset
            raw = logits - torch.tensor(offset, dtype=torch.float64)
            config.block_gate_logit_offset = _offset(raw, target, per, cut)
            if config.block_gate_logit_offset == offset:
                break
            logits = _collect(model, dataloader, max_batches)
            opened = (logits > cut).double().mean(0)
            error = _distance(opened, target, per)
            if error < smallest:
                smallest, after, chosen = error, opened, config.block_gate_logit_offset
            if error <= _CLOSE_ENOUGH:
                break
    finally:
        config.block_gate_logit_offset = chosen
        model.train(was_training)
    if smallest > _FAR:
        logger.warning(
            f"Calibrated gates run {smallest:.2f} more or fewer scans than `target` {target}: their logits vary too "
            "little between images. Train the gates first, or use more images."
        )
    return _table(before, after, torch.tensor(chosen, dtype=torch.float64).expand_as(before))


@torch.no_grad()
def _collect(model: Any, dataloader: Iterable[Any], max_batches: int | None) -> Tensor:
    """The logits of all gates, `(images, blocks, 2)`, in float64 on the CPU."""
    logits = []
    for batch in islice(dataloader, max_batches):
        if isinstance(batch, list | tuple):
            batch = batch[0]
        pixel_values = batch if isinstance(batch, Tensor) else batch["pixel_values"]
        seen = getattr(model(pixel_values.to(model.device), return_dict=True), "block_gate_logits", None)
        if seen is None:
            raise ValueError(
                "The model reports no gates. Switch them on with `set_pruning(True)`; for a backbone, calibrate the "
                "classifier: the offsets are in its configuration."
            )
        logits.append(seen.double().cpu())
    if not sum(map(len, logits)):
        raise ValueError(
            "`dataloader` gave no image. It is gone through several times: pass a `DataLoader` or a list of batches, "
            "not a generator."
        )
    return torch.cat(logits)


def _offset(raw: Tensor, target: float, per: str, cut: float) -> float | list[list[float]]:
    """What added to the logits `(images, blocks, 2)` opens the share wanted, in the form of the configuration."""
    blocks = raw.shape[1]
    if per == "global":
        return cut - _threshold(raw, target)
    if per == "block":
        return [[cut - _threshold(raw[:, block], target)] * 2 for block in range(blocks)]
    return [[cut - _threshold(raw[:, block, way], target) for way in range(2)] for block in range(blocks)]


def _threshold(values: Tensor, target: float) -> float:
    """Above which about a share `target` of the values lies; midway between two of them."""
    levels, counts = values.unique(return_counts=True)
    between = torch.cat([levels[:1] - 1, (levels[:-1] + levels[1:]) / 2, levels[-1:]])
    above = values.numel() - torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return between[(above - target * values.numel()).abs().argmin()].item()


def _distance(opened: Tensor, target: float, per: str) -> float:
    """The mean distance from the target of the groups of `opened` `(blocks, 2)`."""
    groups = {"global": opened.mean(), "block": opened.mean(1), "direction": opened}[per]
    return (groups - target).abs().mean().item()


def _table(before: Tensor, after: Tensor, offset: Tensor) -> list[dict[str, Any]]:
    """One row over all gates, then one per block and direction."""

    def row(block: int | str, direction: str, index: tuple) -> dict[str, Any]:
        values = {"before": before, "after": after, "offset": offset}
        means = {name: value[index].mean().item() for name, value in values.items()}
        return {"block": block, "direction": direction, **means}

    rows = [row("all", "both", (slice(None),))]
    for block in range(len(before)):
        rows += [row(block, direction, (block, way)) for way, direction in enumerate(("forward", "backward"))]
    return rows


__all__ = ["calibrate"]
