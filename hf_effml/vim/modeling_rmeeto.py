"""R-MeeTo: Vision Mamba that merges similar tokens between its blocks, as a model and as a switch on a loaded Vim."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .configuration_rmeeto import RMeeToVimConfig, merge_schedule, requested_merges
from .configuration_vim import VimConfig
from .modeling_vim import VimForImageClassification, VimModel, VimPreTrainedModel
from .token_reduction import MergeInfo, TokenPlan, bipartite_plan, local_plan, random_plan
from .vim_run import TokenReducer, VimRun
from .vit_merging import apply_vit_merging, remove_vit_merging


logger = logging.get_logger(__name__)


class TokenMerger:
    """Merges tokens before the blocks that a configuration names: the [`TokenReducer`] of a [`VimModel`].

    It holds no parameters and no tensors; what belongs to one forward pass lives in the [`MergeRun`] it starts.

    Args:
        config ([`RMeeToVimConfig`]):
            When and how to merge.

    Raises:
        ValueError: If a field has an impossible value, also one that was assigned after construction.
    """

    def __init__(self, config: RMeeToVimConfig):
        config.validate_merging()
        self.config = config
        self._removals: dict[int, list[int]] = {}
        self.removals(config.num_patches + config.num_class_tokens)

    def removals(self, num_tokens: int) -> list[int]:
        """How many tokens are removed before every block.

        Args:
            num_tokens (`int`):
                Tokens before block 0, class tokens included.

        Returns:
            `list[int]`: One number per block.
        """
        if num_tokens not in self._removals:
            merges = requested_merges(self.config, num_tokens)
            self._removals[num_tokens] = [removed for _, removed in merges]
            _warn_of_limits(merges, num_tokens)
        return self._removals[num_tokens]

    def begin(self, stream: Tensor, class_positions: tuple[int, ...]) -> "MergeRun":
        """Start one forward pass.

        Args:
            stream (`Tensor` of shape `(batch, tokens, hidden_size)`):
                Tokens before block 0.
            class_positions (`tuple[int, ...]`):
                Where the class tokens are.

        Returns:
            [`MergeRun`]
        """
        return MergeRun(self.config, stream, class_positions, self.removals(int(stream.shape[1])))


class MergeRun(VimRun):
    """One forward pass of R-MeeTo; `class_positions` and `sizes` describe the tokens at the moment.

    Args:
        config ([`RMeeToVimConfig`]):
            When and how to merge.
        stream (`Tensor` of shape `(batch, tokens, hidden_size)`):
            Tokens before block 0.
        class_positions (`tuple[int, ...]`):
            Where the class tokens are.
        removals (`list[int]`):
            How many tokens are removed before every block.
    """

    config: RMeeToVimConfig

    def __init__(self, config: RMeeToVimConfig, stream: Tensor, class_positions: tuple[int, ...], removals: list[int]):
        super().__init__(config, stream, class_positions)
        self.removals = removals
        self.sizes: Tensor | None = None
        self._feature: Tensor | None = None
        self._plans: list[TokenPlan] = []

    def step(self, block: int, layer: nn.Module, stream: Tensor) -> Tensor:
        """Merge the tokens that the block before found alike, and apply a block; see [`VimRun`]."""
        stream = self.reduce(block, stream, self._feature)
        stream, self._feature = layer(stream, feature=self.feature_for(block + 1))
        return stream

    def pool(self, stream: Tensor, class_rows: Tensor) -> Tensor:
        """See [`VimRun`]; in the mean a merged token weighs as much as the patches it stands for."""
        if self.config.pooling != "mean" or self.sizes is None:
            return super().pool(stream, class_rows)
        weights = self.sizes / self.sizes.sum(1, keepdim=True)
        return (stream * weights).sum(1).to(stream.dtype)

    def report(self, detailed: bool = False) -> dict[str, Any]:
        """The `merge_info` of [`VimModelOutput`], if it is asked for; see [`VimRun`]."""
        return {"merge_info": self.info()} if detailed else {}

    def feature_for(self, block: int) -> str | None:
        """What the block before `block` must return.

        Args:
            block (`int`):
                Index of a block; may be one past the last.

        Returns:
            `str` or `None`: `config.merge_metric`, or `None` if `block` does not merge.
        """
        merges = block < len(self.removals) and self.removals[block] > 0
        return self.config.merge_metric if merges else None

    def reduce(self, block: int, hidden_states: Tensor, feature: Tensor | None) -> Tensor:
        """Merge the input of a block; the very same tensor if the block does not merge.

        Merging is linear, so the stream is merged once, after the addition, where the official code merges the mixer's
        output and the residual stream one after the other.

        Args:
            block (`int`):
                Index of the block.
            hidden_states (`Tensor` of shape `(batch, tokens, hidden_size)`):
                Its input.
            feature (`Tensor` of shape `(batch, tokens, features)`, *optional*):
                What the block before returned.

        Returns:
            `Tensor` of shape `(batch, tokens - removed, hidden_size)`: Its new input.
        """
        if self.removals[block] == 0:
            return hidden_states
        plan, how, sizes = self._plan(block, feature), self.config.merge_reduce, self.sizes
        if how in ("amax", "amin"):
            # Extremes are not linear; the two parts of the stream have to be reduced apart.
            merged, self.sizes = plan.merge(feature, sizes, how)
            merged = merged + plan.merge(hidden_states - feature, sizes, how)[0]
        else:
            merged, self.sizes = plan.merge(hidden_states, sizes, how)
        self.class_positions = plan.protected
        self._plans.append(plan)
        return merged

    def _plan(self, block: int, feature: Tensor) -> TokenPlan:
        config, r = self.config, self.removals[block]
        options: dict[str, Any] = {
            "keep_order": config.merge_keep_order,
            "class_position": config.merge_class_position,
            "prune": config.merge_mode == "prune",
        }
        if config.merge_matching == "random":
            seed = config.merge_seed * config.num_hidden_layers + block
            options["generator"] = torch.Generator().manual_seed(seed)
            return random_plan(feature, r, self.class_positions, **options)
        make = local_plan if config.merge_matching == "local" else bipartite_plan
        return make(feature, r, self.class_positions, distance=config.merge_distance, **options)

    def info(self) -> MergeInfo:
        """Everything that happened so far.

        Returns:
            [`MergeInfo`]
        """
        batch, tokens, device = self.batch, self.tokens, self.device
        slot = torch.arange(tokens, device=device).expand(batch, -1)
        for plan in self._plans:
            slot = plan.slot.gather(1, slot.clamp(min=0)).masked_fill(slot < 0, -1)
        sizes = torch.ones(batch, tokens, 1, device=device) if self.sizes is None else self.sizes
        return MergeInfo(sizes, slot, self.class_rows(), merge_schedule(self.config, tokens))


class _MergingVim(VimPreTrainedModel):
    """What the R-MeeTo models have beside their Vim."""

    config_class = RMeeToVimConfig
    config: RMeeToVimConfig
    _plain_class: type[VimPreTrainedModel]

    @classmethod
    def from_vim(cls, model: VimPreTrainedModel, **merge_fields: Any) -> Self:
        """Make a merging model from a loaded Vim of the same kind; the weights are copied.

        Args:
            model ([`VimModel`] or [`VimForImageClassification`]):
                The plain model.
            merge_fields:
                Fields of [`RMeeToVimConfig`], `merge_r=11` for example.

        Returns:
            The merging model, on the same device, with the same types and in the same mode.

        Raises:
            TypeError: If `model` is of another kind, or a field is not known.
            StrictDataclassError: If a field has an impossible value.
        """
        if not isinstance(model, cls._plain_class):
            raise TypeError(
                f"`{cls.__name__}.from_vim` needs a `{cls._plain_class.__name__}`; got a `{type(model).__name__}`."
            )
        with torch.device("meta"):
            merging = cls(_merging_config(model.config, merge_fields))
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        merging.load_state_dict(state, assign=True)
        return merging.train(model.training)

    def set_merge_r(self, r: int | float | list[int]) -> None:
        """Change how much is merged from the next forward pass on; 0 gives exactly the plain Vim.

        The configuration changes with it, so a saved model keeps it.

        Args:
            r (`int`, `float` or `list[int]`):
                See `merge_r` in [`RMeeToVimConfig`].

        Raises:
            ValueError: If it has an impossible value; nothing is changed then.
        """
        config = self.config
        before = config.merge_r, config.merge_target_ratio
        try:
            config.merge_r, config.merge_target_ratio = r, None
            merger = TokenMerger(config)
        except Exception:
            config.merge_r, config.merge_target_ratio = before
            raise
        for vim in _vim_models(self):
            vim.token_reducer = merger


class RMeeToVimModel(_MergingVim, VimModel):
    r"""Vision Mamba that merges tokens between its blocks, without a head (https://huggingface.co/papers/2412.12496).

    Its weights are those of a plain [`VimModel`].

    Example:

    ```python
    >>> import torch
    >>> from hf_effml import RMeeToVimConfig, RMeeToVimModel
    >>> config = RMeeToVimConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, merge_r=4)
    >>> RMeeToVimModel(config)(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape
    torch.Size([1, 13, 32])

    ```
    """

    _plain_class = VimModel

    def __init__(self, config: RMeeToVimConfig):
        super().__init__(config)
        self.token_reducer = TokenMerger(config)


class RMeeToVimForImageClassification(_MergingVim, VimForImageClassification):
    r"""Vision Mamba that merges tokens (https://huggingface.co/papers/2412.12496), with a classifier.

    Its weights are those of a plain [`VimForImageClassification`], whose folder it loads.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml import RMeeToVimForImageClassification, VimConfig, VimForImageClassification
    >>> vim = VimForImageClassification(VimConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3))
    >>> model = RMeeToVimForImageClassification.from_vim(vim, merge_r=4)
    >>> model(torch.zeros(1, 3, 32, 32), output_merge_info=True).merge_info.tokens_per_layer
    [17, 17, 13]

    ```
    """

    _plain_class = VimForImageClassification

    def __init__(self, config: RMeeToVimConfig):
        super().__init__(config)
        self.vim.token_reducer = TokenMerger(config)


def apply_token_merging(
    model: nn.Module,
    r: int | float | list[int] | None = None,
    target_ratio: float | None = None,
    **options: Any,
) -> None:
    """Switch token merging on in a loaded model, in place; its weights and its configuration stay as they are.

    Args:
        model (`nn.Module`):
            A Vim or anything that contains one, wrapped by PEFT for example; or a ViT or DeiT of transformers or timm.
        r (`int`, `float` or `list[int]`, *optional*):
            Tokens to remove per merging block, see `merge_r` in [`RMeeToVimConfig`].
        target_ratio (`float`, *optional*):
            Share of the tokens to save on average, instead of `r`.
        options:
            The other merging fields of [`RMeeToVimConfig`] without their prefix: `class_position="exact"`,
            `interval=3`, and so on. For a ViT, see [`apply_vit_merging`].

    Raises:
        TypeError: If the model is of another kind, or an option is not known.
        StrictDataclassError: If an option has an impossible value.

    Example:

    ```python
    >>> from hf_effml import VimConfig, VimForImageClassification, apply_token_merging, remove_token_merging
    >>> model = VimForImageClassification(VimConfig(image_size=32, patch_size=8, hidden_size=32))
    >>> apply_token_merging(model, r=1)
    >>> remove_token_merging(model)

    ```
    """
    _apply(model, r, target_ratio, options)


def remove_token_merging(model: nn.Module) -> None:
    """Switch token merging off; the model then computes exactly what it does without.

    Args:
        model (`nn.Module`):
            As for [`apply_token_merging`].

    Raises:
        TypeError: If the model is of another kind.
    """
    models = _vim_models(model)
    for vim in models:
        vim.token_reducer = None
    if not models:
        remove_vit_merging(model)


@contextmanager
def token_merging(
    model: nn.Module,
    r: int | float | list[int] | None = None,
    target_ratio: float | None = None,
    **options: Any,
) -> Iterator[nn.Module]:
    """Merge tokens inside a `with` block, and go back to the earlier setting after it, also after an exception.

    Args:
        model, r, target_ratio, options:
            See [`apply_token_merging`].

    Yields:
        `nn.Module`: The model.

    Example:

    ```python
    >>> from hf_effml import VimConfig, VimForImageClassification, token_merging
    >>> model = VimForImageClassification(VimConfig(image_size=32, patch_size=8, hidden_size=32))
    >>> with token_merging(model, target_ratio=0.3):
    ...     pass

    ```
    """
    restore = _apply(model, r, target_ratio, options)
    try:
        yield model
    finally:
        restore()


def _apply(
    model: nn.Module, r: int | float | list[int] | None, target_ratio: float | None, options: dict[str, Any]
) -> Callable[[], None]:
    """Returns the way back to the earlier setting."""
    if (r is None) == (target_ratio is None):
        raise TypeError(f"Give either `r` or `target_ratio`; got {r} and {target_ratio}.")
    models = _vim_models(model)
    if not models:
        return apply_vit_merging(model, r, target_ratio, **options)
    amount = {"merge_r": 0 if r is None else r, "merge_target_ratio": target_ratio}
    merge_fields = amount | {f"merge_{name}": value for name, value in options.items()}
    # All are built before any is set: an impossible option must not leave half of the models changed.
    reducers = [TokenMerger(_merging_config(vim.config, merge_fields)) for vim in models]
    earlier = [vim.token_reducer for vim in models]

    def set_reducers(values: Sequence[TokenReducer | None]) -> None:
        for vim, value in zip(models, values, strict=True):
            vim.token_reducer = value

    set_reducers(reducers)
    return partial(set_reducers, earlier)


def _warn_of_limits(merges: list[tuple[int, int]], tokens: int) -> None:
    for block, (wanted, removed) in enumerate(merges):
        if wanted > removed:
            logger.warning_once(
                f"Block {block} cannot remove {wanted} of {tokens} tokens, only {removed}: half of them at most. "
                "Lower `merge_r` to silence this."
            )
            return
        tokens -= removed


def _vim_models(model: nn.Module) -> list[VimModel]:
    return [module for module in model.modules() if isinstance(module, VimModel)]


def _merging_config(config: VimConfig, merge_fields: dict[str, Any]) -> RMeeToVimConfig:
    """`config` with merging; what `merge_fields` leaves open stays as in `config`, or at its default."""
    if config.model_type == "dyvm":
        raise TypeError(
            "A DyVM drops tokens itself and cannot merge them as well. Merge in the plain Vim that it was made from, "
            "or keep fewer tokens with its `set_token_keep_ratio`."
        )
    known = {field.name for field in fields(RMeeToVimConfig) if field.name.startswith("merge_")}
    unknown = sorted(set(merge_fields) - known)
    if unknown:
        raise TypeError(f"Unknown merging field {', '.join(unknown)}. Possible: {', '.join(sorted(known))}.")
    # Derived, or about the file that `config` came from.
    own = ("architectures", "auto_map", "model_type", "out_features", "out_indices", "stage_names")
    values = {name: value for name, value in config.to_dict().items() if name not in (*own, "transformers_version")}
    return RMeeToVimConfig(**values | merge_fields)


__all__ = [
    "MergeRun",
    "RMeeToVimForImageClassification",
    "RMeeToVimModel",
    "TokenMerger",
    "apply_token_merging",
    "remove_token_merging",
    "token_merging",
]
