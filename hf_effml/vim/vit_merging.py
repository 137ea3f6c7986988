"""Token merging for ViT and DeiT models of timm and transformers, after ToMe (https://huggingface.co/papers/2210.09461).

Only hooks are added, and to the instance of a timm model one method: no class and no parameter changes, and removing
them leaves no trace.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DeiTModel, ViTModel

from .configuration_rmeeto import RMeeToVimConfig, merging_blocks, requested_merges
from .token_reduction import MergeInfo, TokenPlan, bipartite_plan, compose


def apply_vit_merging(
    model: nn.Module, r: int | float | list[int] | None = None, target_ratio: float | None = None, interval: int = 1
) -> Callable[[], None]:
    """Merge similar tokens between the blocks of a loaded ViT or DeiT, in place; a second call replaces the first.

    Before block `i`, from block 1 on, tokens whose keys in block `i - 1` (mean over heads) are alike become their
    mean, weighted by how many patches each stands for; from there on attention counts a token that many times. (ToMe
    merges half a block earlier, between attention and MLP.) Class, distillation and register tokens take no part.
    After the last block every patch gets the value of the token it went into: outputs keep their shapes, and pooling
    over patches weighs tokens by their size. So do the outputs of earlier blocks that timm hands out with
    `features_only`, `forward_intermediates` and `get_intermediate_layers`.

    Args:
        model (`nn.Module`):
            A `VisionTransformer` of timm, distilled or not, or a model of transformers around a `ViTModel` or
            `DeiTModel`, on its own or inside another one; PEFT comes first, then merging.
        r (`int`, `float` or `list[int]`, *optional*):
            Tokens to remove before every merging block, see `merge_r` in [`RMeeToVimConfig`].
        target_ratio (`float`, *optional*):
            Share of the patch tokens to save, averaged over blocks, instead of `r`.
        interval (`int`, *optional*, defaults to 1):
            Blocks from one merge to the next.

    Returns:
        `Callable[[], None]`: Goes back to the setting before this call.

    Raises:
        TypeError: If the model, or a part of it, is of another kind.
        StrictDataclassError: If an argument has an impossible value.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> from hf_effml.vim.vit_merging import apply_vit_merging, vit_merge_info
    >>> model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_hidden_layers=3)).eval()
    >>> back = apply_vit_merging(model, r=4)
    >>> logits = model(torch.zeros(1, 3, 32, 32)).logits
    >>> vit_merge_info(model).tokens_per_layer
    [17, 13, 9]

    ```
    """
    encoder = _find_encoder(model)
    anatomy = _timm_anatomy(encoder) if _is_timm(encoder) else _transformers_anatomy(encoder)
    # A schedule over the patches alone: the tokens in front of them take no part.
    schedule = RMeeToVimConfig(
        num_hidden_layers=len(anatomy.blocks),
        cls_token_position="none",
        pooling="mean",
        merge_r=r or 0,
        merge_target_ratio=target_ratio,
        merge_interval=interval,
    )
    requested_merges(schedule, anatomy.patches)
    earlier = encoder.__dict__.get("token_reducer")
    _switch(encoder, _VitMerger(anatomy, schedule))
    return partial(_switch, encoder, earlier)


def remove_vit_merging(model: nn.Module) -> None:
    """Undo [`apply_vit_merging`]; the model then computes bit for bit what it did before it.

    Args:
        model (`nn.Module`):
            See [`apply_vit_merging`].
    """
    _switch(_find_encoder(model), None)


def vit_merge_info(model: nn.Module) -> MergeInfo:
    """What merging did in the latest forward pass of a ViT or DeiT; a Vim has it in its output.

    Args:
        model (`nn.Module`):
            See [`apply_vit_merging`].

    Returns:
        [`MergeInfo`]: What [`visualize_merge`] draws, for example.

    Raises:
        RuntimeError: If nothing was merged yet.
    """
    merger = _find_encoder(model).__dict__.get("token_reducer")
    if merger is None or not merger.steps:
        raise RuntimeError("Nothing was merged yet. Call `apply_token_merging` with r > 0, then run the model.")
    return merger.info()


class _Anatomy(NamedTuple):
    """Where hooks go."""

    start: nn.Module  # called once, before block 0
    blocks: Sequence[nn.Module]
    keys: Sequence[nn.Module]  # one per block; returns (batch, heads, tokens, features) or (batch, tokens, channels)
    norm: nn.Module  # called once, after the last block
    heads: int
    prefix: int  # class, distillation and register tokens, all in front
    patches: int


class _Step(NamedTuple):
    plan: TokenPlan
    size: Tensor | None  # of the tokens before it
    address: int  # of the tokens before it


@dataclass(eq=False)
class _VitMerger:
    """The hooks on one encoder, and what they did in the latest forward pass."""

    anatomy: _Anatomy
    schedule: RMeeToVimConfig
    handles: list[Any] = field(default_factory=list)
    steps: dict[int, _Step] = field(default_factory=dict)
    size: Tensor | None = None
    keys: Tensor | None = None
    removed: list[int] = field(default_factory=list)
    # While timm collects what blocks return: the latest output as it is, merged.
    collecting: bool = False
    output: Tensor | None = None

    def attach(self, encoder: nn.Module) -> None:
        start, blocks, keys, norm, *_ = self.anatomy
        merging = merging_blocks(self.schedule)
        if not merging or not (self.schedule.merge_r or self.schedule.merge_target_ratio):
            return
        add = self.handles.append
        add(start.register_forward_pre_hook(self.begin, with_kwargs=True))
        for block in merging:
            add(keys[block - 1].register_forward_hook(self.keep_keys))
        for block in range(merging[0], len(blocks)):
            hook = partial(self.merge_input, block)
            add(blocks[block].register_forward_pre_hook(hook, with_kwargs=True))
            add(blocks[block].register_forward_hook(self.spread))
        add(norm.register_forward_hook(self.restore))
        if hasattr(encoder, "forward_intermediates"):
            encoder.forward_intermediates = partial(self.collect, encoder)

    def detach(self, encoder: nn.Module) -> None:
        encoder.__dict__.pop("forward_intermediates", None)
        while self.handles:
            self.handles.pop().remove()

    def collect(self, encoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What timm's `features_only` and `get_intermediate_layers` go through, too: outputs with all tokens."""
        self.collecting = True
        try:
            return type(encoder).forward_intermediates(encoder, *args, **kwargs)
        finally:
            self.collecting, self.output = False, None

    def spread(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not self.collecting:
            return None
        self.output = output
        return self.whole_plan().unmerge(output)

    def begin(self, start: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if len(args) > 3 or kwargs.get("attention_mask") is not None:
            raise ValueError(_MASK)
        self.steps, self.size, self.keys = {}, None, None

    def keep_keys(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        keys = output.detach()
        self.keys = keys.mean(1) if keys.dim() == 4 else keys.unflatten(2, (self.anatomy.heads, -1)).mean(2)

    def merge_input(self, block: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        hidden = args[0] if self.output is None else self.output
        if kwargs.pop("attn_mask", None) is not None or kwargs.get("is_causal"):
            raise ValueError(_MASK)
        # Gradient checkpointing runs blocks again, from the last to the first: they get the plan they had.
        first_time = block not in self.steps
        if first_time:
            self.steps[block] = _Step(self.plan(block, hidden), self.size, _address(hidden))
        plan, size, address = self.steps[block]
        if address != _address(hidden):
            raise RuntimeError(_LOST)
        merged, size = plan.merge(hidden, size)
        if first_time:
            self.size = size
        log_size = size.log().transpose(1, 2).unsqueeze(1)
        return (merged, log_size.to(merged.dtype)), kwargs

    def plan(self, block: int, hidden: Tensor) -> TokenPlan:
        prefix = self.anatomy.prefix
        if not self.steps:
            self.removed = [removed for _, removed in requested_merges(self.schedule, hidden.shape[1] - prefix)]
        r, keys = self.removed[block], self.keys
        if r and keys is None:
            raise RuntimeError(_LOST)
        self.keys = None
        return bipartite_plan(hidden if keys is None else keys, r, range(prefix), first_source=prefix % 2)

    def restore(self, norm: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return self.whole_plan().unmerge(output) if self.steps and not self.collecting else None

    def whole_plan(self) -> TokenPlan:
        return reduce(compose, [step.plan for step in self.steps.values()])

    def info(self) -> MergeInfo:
        slot = self.whole_plan().slot
        batch, tokens = slot.shape
        lengths = [tokens] * min(self.steps) + [step.plan.keep.shape[1] for step in self.steps.values()]
        front = torch.arange(self.anatomy.prefix, device=slot.device).expand(batch, -1)
        return MergeInfo(self.size, slot, front, lengths)


_MASK = "Token merging cannot follow an attention mask: leave it out, or remove the merging."
_LOST = (
    "Token merging lost track. After a change of the model's modules, by PEFT for example, call `apply_token_merging` "
    "again; with gradient checkpointing, call `backward` before the next forward pass."
)


def _address(x: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() else x.data_ptr()


def _switch(encoder: nn.Module, merger: _VitMerger | None) -> None:
    current = encoder.__dict__.pop("token_reducer", None)
    if current is not None:
        current.detach(encoder)
    if merger is not None:
        merger.attach(encoder)
        encoder.token_reducer = merger


def _find_encoder(model: nn.Module) -> nn.Module:
    found = [module for module in model.modules() if isinstance(module, ViTModel | DeiTModel) or _is_timm(module)]
    if len(found) != 1:
        raise TypeError(
            "Token merging is for Vim models, timm's `VisionTransformer` (ViT, DeiT) and the `ViT...` and `DeiT...` "
            f"models of transformers; `{type(model).__name__}` contains {len(found)} of these instead of one."
        )
    return found[0]


def _is_timm(module: nn.Module) -> bool:
    # A model of timm exists only where timm is imported; importing it here would take seconds.
    timm = sys.modules.get("timm.models.vision_transformer")
    return timm is not None and isinstance(module, timm.VisionTransformer)


def _timm_anatomy(encoder: nn.Module) -> _Anatomy:
    timm = sys.modules["timm.models.vision_transformer"]
    for block in encoder.blocks:
        attention = type(getattr(block, "attn", None))
        if not isinstance(block, timm.Block | timm.ResPostBlock) or attention is not timm.Attention:
            raise TypeError(
                "Of timm's blocks, token merging supports `Block` and `ResPostBlock` with `Attention`; got "
                f"`{type(block).__name__}` with `{attention.__name__}`."
            )
    keys = [block.attn.k_norm for block in encoder.blocks]
    # Not the encoder itself: `forward_features` may be called instead of it.
    start = encoder.patch_embed
    return _Anatomy(start, encoder.blocks, keys, encoder.norm, 0, encoder.num_prefix_tokens, start.num_patches)


def _transformers_anatomy(encoder: nn.Module) -> _Anatomy:
    attention = encoder.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise TypeError(f'Token merging needs `attn_implementation` "sdpa" or "eager"; got {attention!r}.')
    keys = [layer.attention.k_proj for layer in encoder.layers]
    heads, patches = encoder.config.num_attention_heads, encoder.embeddings.patch_embeddings.num_patches
    prefix = 2 if isinstance(encoder, DeiTModel) else 1
    return _Anatomy(encoder, encoder.layers, keys, encoder.layernorm, heads, prefix, patches)


__all__ = ["apply_vit_merging", "remove_vit_merging", "vit_merge_info"]
