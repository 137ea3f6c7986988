"""What token routing is compared with: removing blocks, removing attentions and MLPs, and gates that save nothing."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .continuations import cross_entropy
from .modeling_token_router import TokenRouterModel
from .modeling_token_router_causal_lm import FULL_CHECKPOINTS
from .patching import find_decoder, is_patched, remove_token_router
from .token_skip_layer import CACHE_ARGUMENT


_KINDS = ("attention", "mlp")


def shortgpt_blocks(influence: Sequence[float], count: int) -> list[int]:
    """Chooses the blocks that ShortGPT removes: those of least influence (https://huggingface.co/papers/2403.03853).

    Args:
        influence (`Sequence[float]`):
            From [`block_influence`].
        count (`int`):
            How many to remove.

    Returns:
        `list[int]`: the blocks, that of least influence first, ties to the earlier one.

    Raises:
        ValueError: If `count` leaves no block, or an influence is not finite.

    Example:

    ```python
    >>> from hf_effml import shortgpt_blocks

    >>> shortgpt_blocks([0.9, 0.2, 0.1, 0.4], 2)
    [2, 1]

    ```
    """
    if not all(math.isfinite(share) for share in influence):
        raise ValueError(
            f"`influence` must hold finite numbers; got {list(influence)}. Check that the model's outputs are finite."
        )
    if not 0 <= count < len(influence):
        raise ValueError(f"`count` must leave one of the {len(influence)} blocks at least; got {count}.")
    return sorted(range(len(influence)), key=lambda block: influence[block])[:count]


def remove_blocks(model: PreTrainedModel, blocks: Iterable[int]) -> PreTrainedModel:
    """Makes a model without some of the decoder blocks, as ShortGPT does (https://huggingface.co/papers/2403.03853).

    It is a model of its own with the weights of the given one, which stays as it is: both have the same parameters, so
    to train, move or cast one does that to the other.

    Args:
        model (`PreTrainedModel`):
            A causal language model of a supported family. If it is patched, the new one is not.
        blocks (`Iterable[int]`):
            Blocks to remove, from [`shortgpt_blocks`] for example.

    Returns:
        `PreTrainedModel`: the smaller model, which generates and can be saved as any other of its class.

    Raises:
        TypeError: If the family is not supported.
        ValueError: If there is no such block, or none would be left.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_effml import remove_blocks

    >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=50)
    >>> model = LlamaForCausalLM(LlamaConfig(**shape))
    >>> smaller = remove_blocks(model, [1, 2])
    >>> smaller.config.num_hidden_layers, model.config.num_hidden_layers
    (2, 4)

    ```
    """
    gone = _indices("blocks", blocks, len(find_decoder(model).layers))
    smaller = _without_router(model)
    decoder = find_decoder(smaller)
    stay = [block for block in range(len(decoder.layers)) if block not in gone]
    if not stay:
        raise ValueError(f"`blocks` must leave one of the {len(gone)} blocks at least; got all of them.")
    decoder.layers = nn.ModuleList(decoder.layers[block] for block in stay)
    for index, block in enumerate(decoder.layers):
        # The cache files keys and values under this number.
        block.self_attn.layer_idx = index
    _shorten(decoder.config, stay, decoder)
    return smaller


def remove_sub_blocks(model: PreTrainedModel, sub_blocks: Iterable[tuple[str, int]]) -> PreTrainedModel:
    """Makes a model without some attentions and MLPs, as BlockPruner does (https://huggingface.co/papers/2406.10594).

    It is a model of its own with the weights of the given one, which stays as it is; see [`remove_blocks`]. It
    generates as any other, but cannot be saved: a checkpoint of its class has all parts.

    Args:
        model (`PreTrainedModel`):
            A causal language model of a supported family. If it is patched, the new one is not.
        sub_blocks (`Iterable[tuple[str, int]]`):
            What to remove, from [`block_pruner`] for example: `("attention", 3)` for the attention of block 3,
            `("mlp", 3)` for its MLP, each together with its normalization.

    Returns:
        `PreTrainedModel`: the smaller model.

    Raises:
        TypeError: If the family is not supported.
        ValueError: If there is no such part.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_effml import remove_sub_blocks

    >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=50)
    >>> model = LlamaForCausalLM(LlamaConfig(**shape))
    >>> smaller = remove_sub_blocks(model, [("attention", 0), ("mlp", 2)])
    >>> smaller.num_parameters() < model.num_parameters()
    True

    ```
    """
    count = len(find_decoder(model).layers)
    gone = list(sub_blocks)
    for part in gone:
        if not (isinstance(part, list | tuple) and len(part) == 2 and part[0] in _KINDS):
            raise ValueError(
                f'`sub_blocks` must hold pairs such as ("attention", 0) or ("mlp", {count - 1}); got {part!r}.'
            )
    for kind in _KINDS:
        _indices("sub_blocks", [index for what, index in gone if what == kind], count)
    smaller = _without_router(model)
    layers = find_decoder(smaller).layers
    for kind, index in gone:
        _take_out(layers[index], kind)
    return smaller


def block_pruner(model: PreTrainedModel, windows: Tensor, count: int, batch_size: int = 8) -> list[tuple[str, int]]:
    """Chooses attentions and MLPs to remove, as BlockPruner does (https://huggingface.co/papers/2406.10594).

    Greedily: every step tries to remove each of the parts that are left, and decides for the one without which the
    perplexity of the windows is lowest. Twice as many evaluations as the model has blocks, for every step.

    Args:
        model (`PreTrainedModel`):
            A causal language model of a supported family; it stays as it is.
        windows (`Tensor` of shape `(windows, tokens)`):
            Token ids of texts, without padding.
        count (`int`):
            Parts to remove.
        batch_size (`int`, *optional*, defaults to 8):
            Windows at a time.

    Returns:
        `list[tuple[str, int]]`: what to remove, in this order, for [`remove_sub_blocks`]. The first of them are the
        answer for a smaller `count`.

    Raises:
        TypeError: If the family is not supported.
        ValueError: If an argument has an impossible value.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_effml import block_pruner

    >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    >>> model = LlamaForCausalLM(LlamaConfig(**shape))
    >>> len(block_pruner(model, torch.arange(40).view(2, 20), 3))
    3

    ```
    """
    parts = [(kind, index) for index in range(len(find_decoder(model).layers)) for kind in _KINDS]
    if not 0 < count <= len(parts):
        raise ValueError(f"`count` must be from 1 to {len(parts)}, two for each block; got {count}.")
    if windows.dim() != 2 or windows.shape[1] < 2 or not len(windows):
        raise ValueError(
            f"`windows` must have the shape (windows, tokens), with two tokens at least; got {tuple(windows.shape)}."
        )
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
    smaller = _without_router(model).eval()
    layers = find_decoder(smaller).layers
    gone: list[tuple[str, int]] = []
    total = sum(len(parts) - step for step in range(count))
    with logging.tqdm(total=total, desc="Choosing what to remove", unit="trial") as bar:
        while len(gone) < count:
            losses = {}
            for kind, index in parts:
                taken = _take_out(layers[index], kind)
                losses[kind, index] = _loss(smaller, windows, batch_size)
                _put_back(layers[index], taken)
                bar.update()
            # NaN is no number to be lowest.
            best = min(parts, key=lambda part: math.inf if math.isnan(losses[part]) else losses[part])
            _take_out(layers[best[1]], best[0])
            parts.remove(best)
            gone.append(best)
    return gone


@contextmanager
def gate_multiply(model: nn.Module) -> Iterator[None]:
    """Lets a patched model compute all blocks for all tokens, then multiply by the decisions, inside a `with`.

    It is how the code released with SkipGPT (EIT-NLP/SkipGPT on GitHub) skips: the output is that of skipping, and no
    time is saved. For whole prompts, in benchmarks; other threads are affected.

    Args:
        model (`nn.Module`):
            A patched model, wrapped or not.

    Raises:
        RuntimeError: If the model is not patched.
        ValueError: If a call brings a cache, or asks the dynamic router.

    Example:

    ```python
    >>> with gate_multiply(model):  # doctest: +SKIP
    ...     same_but_slow = model(**inputs, use_cache=False).logits
    ```
    """
    decoder = find_decoder(model)
    if not is_patched(decoder):
        raise RuntimeError("This model has no token router whose decisions could be multiplied with. Patch it first.")
    handles = [decoder.register_forward_pre_hook(_check_prompt, with_kwargs=True)]
    for block in decoder.layers:
        gates = _Gates()
        handles += [
            block.register_forward_pre_hook(gates.decide, with_kwargs=True),
            block.self_attn.register_forward_hook(gates.close_attention),
            block.mlp.register_forward_hook(gates.close_mlp),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_prompt(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Runs after the hook that makes the decisions."""
    state = kwargs.get("token_routing")
    if state is None:
        return args, kwargs
    if kwargs.get(CACHE_ARGUMENT) is not None:
        raise ValueError(
            f"`{CACHE_ARGUMENT}` cannot be used inside `gate_multiply`, which stores keys of skipped tokens too. Pass "
            "whole prompts with `use_cache=False`."
        )
    if state.config.router_type == "dynamic" and state.replayed is None:
        raise ValueError(
            '`router_type="dynamic"` needs attention scores of blocks that skip, which `gate_multiply` does not take. '
            "Run the prompt once without it, and replay: `keep_mask=model.routing_report.keep_masks`."
        )
    return args, kwargs | {"use_cache": False}


class _Gates:
    """Multiplies what a block adds to its input."""

    attention: Tensor | None = None
    mlp: Tensor | None = None

    def decide(self, block: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Lets the block run without routing, and remembers the gates for what it computes."""
        self.attention = self.mlp = None
        hidden, state = args[0], kwargs.get("token_routing")
        if state is None:
            return args, kwargs
        plan = state.plan_for(block.self_attn.layer_idx)
        if plan is None or plan.is_full:
            return args, kwargs
        self.mlp = plan.keep.to(hidden).unsqueeze(-1)
        changes: dict[str, Any] = {"token_routing": None}
        if state.config.skip_unit == "block":
            self.attention = self.mlp
            if state.config.kv_policy == "drop":
                changes["attention_mask"] = _mask_of_kept(plan.keep.to(hidden.device), hidden.dtype)
        return args, kwargs | changes

    def close_attention(self, module: nn.Module, args: tuple, output: tuple) -> tuple:
        return output if self.attention is None else (output[0] * self.attention, *output[1:])

    def close_mlp(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output if self.mlp is None else output * self.mlp


def _mask_of_kept(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Lets tokens attend to kept ones that are not newer, and to themselves; added to logits."""
    visible = keep.unsqueeze(1).expand(-1, keep.shape[1], -1).tril() | torch.eye(
        keep.shape[1], dtype=torch.bool, device=keep.device
    )
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min).unsqueeze(1)


def _without_router(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that shares its parameters and buffers, without router."""
    model = model.model if isinstance(model, TokenRouterModel) else model
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` must be a `PreTrainedModel` or a `TokenRouterModel`; got a `{type(model).__name__}`. Adapters "
            "of PEFT have to be merged first: `model.merge_and_unload()`."
        )
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    plain_class: Any = {full: plain for plain, full in FULL_CHECKPOINTS.items()}.get(type(model))
    if plain_class is not None:
        fields = model.config.to_dict()
        for name in ("model_type", "architectures", "auto_map", "transformers_version", "token_router"):
            fields.pop(name, None)
        config = plain_class.config_class(**fields)
        config._attn_implementation = model.config._attn_implementation
        memo[id(model.config)] = config
    copied = copy.deepcopy(model, memo)
    if is_patched(find_decoder(copied)):
        remove_token_router(copied)
    if plain_class is not None:
        plain = plain_class.__new__(plain_class)
        plain.__dict__ = vars(copied)
        return plain
    return copied


def _shorten(config: Any, stay: list[int], decoder: nn.Module) -> None:
    """Describes the blocks that are left, so that a checkpoint loads."""
    config.num_hidden_layers = len(stay)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[block] for block in stay]
    if hasattr(config, "mlp_only_layers"):
        dense = [index for index, block in enumerate(decoder.layers) if not hasattr(block.mlp, "experts")]
        config.mlp_only_layers, config.decoder_sparse_step = dense, 1


def _indices(name: str, blocks: Iterable[int], count: int) -> set[int]:
    given = list(blocks)
    for block in given:
        if not isinstance(block, int) or not 0 <= block < count:
            raise ValueError(f"`{name}` must name blocks from 0 to {count - 1}; got {block!r}.")
    if len(set(given)) < len(given):
        raise ValueError(f"`{name}` must name nothing twice; got {given}.")
    return set(given)


class _NoAttention(nn.Module):
    """In place of an attention: adds nothing.

    Caches count tokens by what their layers hold, each for itself: one zero per token stands for keys and values.
    """

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        cache = kwargs.get(CACHE_ARGUMENT)
        if cache is not None:
            zeros = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(zeros, zeros, self.layer_idx)
        return hidden_states.new_zeros(()), None


class _NoMLP(nn.Module):
    """In place of an MLP: adds nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(())


def _take_out(block: nn.Module, kind: str) -> dict[str, nn.Module]:
    """Takes an attention or an MLP out of a block, in place; gives what `_put_back` needs."""
    if kind == "attention":
        new = {"self_attn": _NoAttention(block.self_attn.layer_idx), "input_layernorm": nn.Identity()}
    else:
        new = {"mlp": _NoMLP(), "post_attention_layernorm": nn.Identity()}
    old = {name: getattr(block, name) for name in new}
    _put_back(block, new)
    return old


def _put_back(block: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        setattr(block, name, module)


@torch.no_grad()
def _loss(model: PreTrainedModel, windows: Tensor, batch_size: int) -> float:
    """Cross-entropy of all tokens, whose exponential is the perplexity."""
    device = next(model.parameters()).device
    batches = (part.to(device) for part in windows.split(batch_size))
    losses = [cross_entropy(model(part, use_cache=False).logits[:, :-1], part[:, 1:]).sum() for part in batches]
    return torch.stack(losses).double().sum().item() / windows[:, 1:].numel()
