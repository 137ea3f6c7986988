"""Configuration of R-MeeTo, a Vision Mamba that merges tokens between its blocks, and the schedule it implies."""

from typing import Any, Literal, TypeGuard

from huggingface_hub.dataclasses import strict

from .configuration_vim import VimConfig


@strict
class RMeeToVimConfig(VimConfig):
    r"""Configuration of [`RMeeToVimModel`] and [`RMeeToVimForImageClassification`].

    They are the models of "Faster Vision Mamba is Rebuilt in Minutes via Merged Token Re-training"
    (https://huggingface.co/papers/2412.12496).

    Block `i` merges its input if `i > 0` and `(i + merge_offset) % merge_interval == 0`. Token merging adds no
    parameter: weights of a plain Vim load as they are.

    Args:
        merge_r (`int`, `float` or `list[int]`, *optional*, defaults to 0):
            Tokens that every merging block removes; the paper uses 5 for tiny, 11 for small and base. A float below
            0.5 is a share of the block's tokens. A list has one number per block, is filled up with zeros, and sets
            the merging blocks by itself. At most half of a block's tokens, class tokens left out, can be removed.
        merge_target_ratio (`float`, *optional*):
            Share of the tokens to save, averaged over all blocks, instead of `merge_r`: the nearest `int` is used.
        merge_interval (`int`, *optional*, defaults to 2):
            Blocks from one merge to the next.
        merge_offset (`int`, *optional*, defaults to 0):
            Shifts the merging blocks forward; 1 with interval 2 merges in blocks 1, 3, 5, ...
        merge_metric (`str`, *optional*, defaults to `"hidden"`):
            What similarity is measured on: the previous mixer's output (`"hidden"`), or its `"B"`, `"C"` or `"delta"`.
        merge_distance (`str`, *optional*, defaults to `"cosine"`):
            `"cosine"`, `"l1"` or `"l2"`, on unit vectors.
        merge_mode (`str`, *optional*, defaults to `"merge"`):
            `"merge"`, or `"prune"` to drop the same tokens.
        merge_reduce (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, `"average"`, `"amax"` or `"amin"`, see [`TokenPlan.merge`]. (The official code calls the first
            `sum` and the second `mean`.)
        merge_matching (`str`, *optional*, defaults to `"bipartite"`):
            `"bipartite"`, `"local"` (neighbours only; linear cost), or `"random"`, a baseline.
        merge_keep_order (`bool`, *optional*, defaults to `True`):
            Keep tokens in sequence order. A scan needs it; `False` is an ablation.
        merge_class_position (`str`, *optional*, defaults to `"proportional"`):
            `"proportional"` places the class token as the official code does; `"exact"` keeps it between its true
            neighbours, which loses less accuracy without re-training.
        merge_legacy_last_target (`int`, *optional*):
            Number of tokens that the last merging blocks (those within `merge_interval` of the end) cut down to,
            whatever `merge_r` is. The official code does this with 76 at 224 pixels; off by default.
        merge_seed (`int`, *optional*, defaults to 0):
            Seed of `merge_matching="random"`.
        kwargs:
            The fields of [`VimConfig`].

    Raises:
        StrictDataclassError: If a field has the wrong type or a value that no schedule fits; the message names both.

    Example:

    ```python
    >>> from hf_effml import RMeeToVimConfig
    >>> from hf_effml.vim.configuration_rmeeto import merge_schedule, reduction_ratio
    >>> schedule = merge_schedule(RMeeToVimConfig(merge_r=11))
    >>> schedule[:4], schedule[-1], round(reduction_ratio(schedule), 3)
    ([197, 197, 186, 186], 76, 0.307)

    ```
    """

    model_type = "rmeeto_vim"

    merge_r: int | float | list[int] = 0
    merge_target_ratio: float | int | None = None
    merge_interval: int = 2
    merge_offset: int = 0
    merge_metric: Literal["hidden", "B", "C", "delta"] = "hidden"
    merge_distance: Literal["cosine", "l1", "l2"] = "cosine"
    merge_mode: Literal["merge", "prune"] = "merge"
    merge_reduce: Literal["mean", "average", "amax", "amin"] = "mean"
    merge_matching: Literal["bipartite", "local", "random"] = "bipartite"
    merge_keep_order: bool = True
    merge_class_position: Literal["proportional", "exact"] = "proportional"
    merge_legacy_last_target: int | None = None
    merge_seed: int = 0

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a saved configuration; that of a plain Vim, whose weights serve as they are, is taken for our own."""
        values, unused = super().get_config_dict(*args, **kwargs)
        if values.get("model_type") == VimConfig.model_type:
            values["model_type"] = cls.model_type
        return values, unused

    def validate_merging(self) -> None:
        """Check ranges and combinations; called by `strict` on construction and by the model."""
        if self.merge_interval < 1:
            raise ValueError(f"`merge_interval` must be at least 1; got {self.merge_interval}.")
        if not 0 <= self.merge_offset < self.merge_interval:
            raise ValueError(
                f"`merge_offset` must be from 0 to `merge_interval` - 1 = {self.merge_interval - 1}; "
                f"got {self.merge_offset}."
            )
        if self.merge_class_position == "exact" and not self.merge_keep_order:
            raise ValueError('`merge_class_position="exact"` needs `merge_keep_order=True`.')
        if self.merge_reduce in ("amax", "amin") and self.merge_metric != "hidden":
            raise ValueError(
                f'`merge_reduce={self.merge_reduce!r}` needs `merge_metric="hidden"`; got {self.merge_metric!r}.'
            )
        target = self.merge_legacy_last_target
        if target is not None and (target < 1 or isinstance(self.merge_r, list)):
            raise ValueError(
                "`merge_legacy_last_target` must be a positive number of tokens, without a list in `merge_r`; got "
                f"{target} and `merge_r={self.merge_r}`."
            )
        self._check_amount()

    def _check_amount(self) -> None:
        r, ratio = self.merge_r, self.merge_target_ratio
        if isinstance(r, list):
            if len(r) > self.num_hidden_layers or min(r, default=0) < 0:
                raise ValueError(
                    f"A list in `merge_r` has at most one non-negative number per block ({self.num_hidden_layers}); "
                    f"got {r}."
                )
            if r and r[0] > 0:
                raise ValueError(f"Block 0 has no previous block to match on: `merge_r[0]` must be 0; got {r[0]}.")
        elif not r >= 0 or (isinstance(r, float) and r >= 0.5):
            raise ValueError(f"`merge_r` must be a number of tokens, at least 0, or a share below 0.5; got {r}.")
        if ratio is not None and not 0 < ratio < 1:
            raise ValueError(f"`merge_target_ratio` must be between 0 and 1; got {ratio}.")
        if ratio is not None and r != 0:
            raise ValueError(f"Set either `merge_r` or `merge_target_ratio`; got {r} and {ratio}.")


def _merges_tokens(config: VimConfig) -> TypeGuard[RMeeToVimConfig]:
    # By name: as remote code, transformers loads the class of the config and that of the model from two copies.
    return config.model_type == RMeeToVimConfig.model_type


def merging_blocks(config: VimConfig) -> list[int]:
    """The blocks whose input is merged, whatever the amount.

    Args:
        config ([`VimConfig`]):
            A plain one has none.

    Returns:
        `list[int]`: Their indices, ascending.
    """
    if not _merges_tokens(config):
        return []
    if isinstance(config.merge_r, list):
        return [block for block, r in enumerate(config.merge_r) if r > 0]
    interval, offset = config.merge_interval, config.merge_offset
    return [block for block in range(1, config.num_hidden_layers) if (block + offset) % interval == 0]


def requested_merges(config: VimConfig, num_tokens: int | None = None) -> list[tuple[int, int]]:
    """What every block is asked to remove, and what it can: half of the tokens it gets, class tokens left out.

    Args:
        config ([`VimConfig`]):
            A plain one asks for nothing.
        num_tokens (`int`, *optional*):
            Tokens before block 0, class tokens included; those of `config` by default.

    Returns:
        `list[tuple[int, int]]`: Per block, the request and what is removed.

    Raises:
        ValueError: If `merge_target_ratio` is out of reach.
    """
    tokens = num_tokens or config.num_patches + config.num_class_tokens
    if not _merges_tokens(config):
        return [(0, 0)] * config.num_hidden_layers
    if config.merge_target_ratio is None:
        return _merges(config, config.merge_r, tokens)
    return _merges(config, _solve_ratio(config, config.merge_target_ratio, tokens), tokens)


def _merges(config: RMeeToVimConfig, r: int | float | list[int], tokens: int) -> list[tuple[int, int]]:
    depth, blocks = config.num_hidden_layers, set(merging_blocks(config)) if r else set()
    merges = []
    for block in range(depth):
        wanted = 0
        if block in blocks:
            legacy = config.merge_legacy_last_target
            if isinstance(r, list):
                wanted = r[block]
            elif legacy is not None and depth - block <= config.merge_interval:
                wanted = max(tokens - legacy, 0)
            else:
                wanted = int(r * tokens) if isinstance(r, float) else r
        removed = min(wanted, (tokens - config.num_class_tokens) // 2)
        merges.append((wanted, removed))
        tokens -= removed
    return merges


def _solve_ratio(config: RMeeToVimConfig, target: float, tokens: int) -> int:
    """The integer r whose share of saved tokens is nearest to `target`."""
    best, nearest = 0, 0.0
    for r in range(1, tokens // 2 + 1):
        ratio = reduction_ratio(_lengths(_merges(config, r, tokens), tokens))
        if abs(ratio - target) < abs(nearest - target):
            best, nearest = r, ratio
        if ratio >= target:
            return best
    raise ValueError(
        f"`merge_target_ratio={target}` is out of reach: {tokens} tokens in {config.num_hidden_layers} blocks allow "
        f"{nearest:.2f}. Lower it, or merge in more blocks with a smaller `merge_interval`."
    )


def _lengths(merges: list[tuple[int, int]], tokens: int) -> list[int]:
    lengths = []
    for _, removed in merges:
        tokens -= removed
        lengths.append(tokens)
    return lengths


def merge_schedule(config: VimConfig, num_tokens: int | None = None) -> list[int]:
    """Number of tokens inside every block.

    Args:
        config ([`VimConfig`]):
            A plain one keeps them all.
        num_tokens (`int`, *optional*):
            Tokens before block 0, class tokens included; those of `config` by default.

    Returns:
        `list[int]`: One number per block.

    Raises:
        ValueError: If `merge_target_ratio` is out of reach.
    """
    tokens = num_tokens or config.num_patches + config.num_class_tokens
    return _lengths(requested_merges(config, tokens), tokens)


def reduction_ratio(tokens_per_layer: list[int]) -> float:
    """The paper's reduction ratio: share of the tokens that is saved, averaged over all blocks.

    Args:
        tokens_per_layer (`list[int]`):
            See [`merge_schedule`].

    Returns:
        `float`: 0 without merging.
    """
    return 1 - sum(tokens_per_layer) / (len(tokens_per_layer) * tokens_per_layer[0])


__all__ = ["RMeeToVimConfig", "merge_schedule", "merging_blocks", "reduction_ratio", "requested_merges"]
