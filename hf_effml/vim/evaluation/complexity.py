"""Multiply-adds of a Vim, of merged tokens and of skipped scans: all the work, and as the papers count."""

from typing import TypeGuard

from hf_effml.vim.configuration_dyvm import DyVMConfig
from hf_effml.vim.configuration_rmeeto import RMeeToVimConfig, merge_schedule, merging_blocks
from hf_effml.vim.configuration_vim import VimConfig


def count_multiply_adds(
    config: VimConfig, tokens_per_layer: list[int] | None = None, block_keep_ratio: float = 1.0
) -> dict[str, int]:
    """Multiply-adds of one image.

    A scan step of one channel and state counts 9 and its skip and gate 2, as in the official counters; norms and
    activations count nothing.

    Args:
        config ([`VimConfig`], [`RMeeToVimConfig`] or [`DyVMConfig`]):
            The model.
        tokens_per_layer (`list[int]`, *optional*):
            Tokens inside every block; [`tokens_per_block`] of `config` by default.
        block_keep_ratio (`float`, *optional*, defaults to 1.0):
            Share of the scans that run, as measured: `outputs.block_keep_ratio` of a DyVM.

    Returns:
        `dict[str, int]`: `embedding`, `projections`, `convolutions` and `scan` (both directions), `head`, `matching`
        (finding the tokens to merge), `predictors` and `gates` (of a DyVM) and their sum `total`. Beside them the
        papers' own numbers, comparable with their tables only: `paper_layers` leaves one direction and all matching
        out (the baselines of R-MeeTo), `paper_total` adds matching, at 2 per multiply-add and also for `merge_r=0`
        (its merged models), `paper_dyvm` is as DyVM counts, with one direction and the predictors.

    Example:

    ```python
    >>> from hf_effml import RMeeToVimConfig
    >>> from hf_effml.vim.evaluation.complexity import count_multiply_adds
    >>> count = count_multiply_adds(RMeeToVimConfig(merge_r=5, num_labels=1000))
    >>> round(count["total"] / 1e9, 2), round(count["paper_total"] / 1e9, 3)
    (1.59, 1.285)

    ```
    """
    lengths = tokens_per_block(config) if tokens_per_layer is None else tokens_per_layer
    width, inner, states = config.hidden_size, config.intermediate_size, config.state_size
    rank = int(config.time_step_rank)
    tokens = sum(lengths)
    ends = tokens * width * 3 * inner
    selection = round(tokens * inner * (2 * rank + 2 * states) * block_keep_ratio)
    convolution = round(tokens * inner * config.conv_kernel * block_keep_ratio)
    scan = round(tokens * inner * (9 * states + 2) * block_keep_ratio)
    patch = config.num_channels * config.patch_size**2 * width
    count = {
        "embedding": config.num_patches * patch,
        "projections": ends + 2 * selection,
        "convolutions": 2 * convolution,
        "scan": 2 * scan,
        "head": width * config.num_labels,
        "matching": _matching(config, lengths),
        "predictors": _predictors(config, lengths),
        "gates": _gates(config),
    }
    count["total"] = sum(count.values())
    # The papers pad the convolution at both ends, and that of R-MeeTo projects the class token like a patch.
    padding = round(len(lengths) * inner * config.conv_kernel * (config.conv_kernel - 1) * block_keep_ratio)
    one_direction = ends + selection + convolution + scan + padding + count["head"]
    count["paper_layers"] = one_direction + (config.num_patches + config.num_class_tokens) * patch
    count["paper_total"] = count["paper_layers"] + _paper_matching(config, lengths)
    count["paper_dyvm"] = one_direction + count["embedding"] + count["predictors"]
    return count


def tokens_per_block(config: VimConfig, num_patches: int | None = None) -> list[int]:
    """Number of tokens inside every block, class tokens included.

    Args:
        config ([`VimConfig`], [`RMeeToVimConfig`] or [`DyVMConfig`]):
            The model.
        num_patches (`int`, *optional*):
            Patches of the image; those of `config` by default.

    Returns:
        `list[int]`: One number per block.
    """
    patches = num_patches or config.num_patches
    if not _is_dynamic(config) or not config.enable_token_pruning:
        return merge_schedule(config, patches + config.num_class_tokens)
    kept = dict(zip(config.pruning_layers or [], config.tokens_kept(patches), strict=True))
    lengths = []
    for block in range(config.num_hidden_layers):
        patches = kept.get(block, patches)
        lengths.append(patches + config.num_class_tokens)
    return lengths


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


def _is_dynamic(config: VimConfig) -> TypeGuard[DyVMConfig]:
    return config.model_type == DyVMConfig.model_type


def _gates(config: VimConfig) -> int:
    if not _is_dynamic(config) or not config.enable_block_selection:
        return 0
    return config.num_hidden_layers * 2 * 2 * config.intermediate_size


def _predictors(config: VimConfig, lengths: list[int]) -> int:
    if not _is_dynamic(config) or not config.enable_token_pruning or config.token_selection != "learned":
        return 0
    half, quarter = config.hidden_size // 2, config.hidden_size // 4
    per_token = config.hidden_size * (config.hidden_size + half) + half * quarter + 2 * quarter
    scored = [lengths[block - 1] - config.num_class_tokens for block in config.pruning_layers or []]
    return sum(scored) * per_token


def _paper_matching(config: VimConfig, lengths: list[int]) -> int:
    total = 0
    for block in merging_blocks(config):
        before, removed = lengths[block - 1], lengths[block - 1] - lengths[block]
        total += _metric_width(config) * (before * before + 12 * before) // 2 + removed * config.hidden_size
    return total


__all__ = ["count_multiply_adds", "tokens_per_block"]
