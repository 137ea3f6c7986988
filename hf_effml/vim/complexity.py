"""Multiply-adds of a Vim, with and without merged tokens: all the work, and as the R-MeeTo paper counts."""

from .configuration_rmeeto import RMeeToVimConfig, merge_schedule, merging_blocks
from .configuration_vim import VimConfig


def count_multiply_adds(config: VimConfig, tokens_per_layer: list[int] | None = None) -> dict[str, int]:
    """
    Multiply-adds of one image.

    A scan step of one channel and state counts 9 and its skip and gate 2, as in the official counters; norms and
    activations count nothing.

    Args:
        config ([`VimConfig`] or [`RMeeToVimConfig`]): The model.
        tokens_per_layer (`list[int]`, *optional*):
            Tokens inside every block; [`merge_schedule`] of `config` by default.

    Returns:
        `dict[str, int]`: `embedding`, `projections`, `convolutions` and `scan` (both directions), `head`, `matching`
        (finding the tokens to merge) and their sum `total`. Beside them the paper's own numbers, comparable with its
        tables only: `paper_layers` leaves one direction and all matching out (its baselines), `paper_total` adds
        matching, at 2 per multiply-add and also for `merge_r=0` (its merged models).

    Example:

    ```python
    >>> from hf_effml import RMeeToVimConfig
    >>> from hf_effml.vim.complexity import count_multiply_adds
    >>> count = count_multiply_adds(RMeeToVimConfig(merge_r=5, num_labels=1000))
    >>> round(count["total"] / 1e9, 2), round(count["paper_total"] / 1e9, 3)
    (1.59, 1.285)

    ```
    """
    lengths = merge_schedule(config) if tokens_per_layer is None else tokens_per_layer
    width, inner, states = config.hidden_size, config.intermediate_size, config.state_size
    rank = int(config.time_step_rank)
    tokens = sum(lengths)
    ends = tokens * width * 3 * inner
    selection = tokens * inner * (2 * rank + 2 * states)
    convolution = tokens * inner * config.conv_kernel
    scan = tokens * inner * (9 * states + 2)
    patch = config.num_channels * config.patch_size**2 * width
    count = {
        "embedding": config.num_patches * patch,
        "projections": ends + 2 * selection,
        "convolutions": 2 * convolution,
        "scan": 2 * scan,
        "head": width * config.num_labels,
        "matching": _matching(config, lengths),
    }
    count["total"] = sum(count.values())
    # The paper pads the convolution at both ends and projects the class token like a patch.
    padding = len(lengths) * inner * config.conv_kernel * (config.conv_kernel - 1)
    embedding = (config.num_patches + config.num_class_tokens) * patch
    count["paper_layers"] = ends + selection + convolution + scan + padding + embedding + count["head"]
    count["paper_total"] = count["paper_layers"] + _paper_matching(config, lengths)
    return count


def _metric_width(config: RMeeToVimConfig) -> int:
    widths = {"hidden": config.hidden_size, "delta": config.intermediate_size}
    return widths.get(config.merge_metric, config.state_size)


def _matching(config: VimConfig, lengths: list[int]) -> int:
    total = 0
    for block in merging_blocks(config):
        free = lengths[block - 1] - config.num_class_tokens
        if lengths[block] == lengths[block - 1] or config.merge_matching == "random":
            continue
        pairs = free - 1 if config.merge_matching == "local" else (free // 2) * ((free + 1) // 2)
        total += pairs * _metric_width(config)
    return total


def _paper_matching(config: VimConfig, lengths: list[int]) -> int:
    total = 0
    for block in merging_blocks(config):
        before, removed = lengths[block - 1], lengths[block - 1] - lengths[block]
        total += _metric_width(config) * (before * before + 12 * before) // 2 + removed * config.hidden_size
    return total


__all__ = ["count_multiply_adds"]
