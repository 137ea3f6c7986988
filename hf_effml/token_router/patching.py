"""Patching a language model so that its tokens skip blocks, and un-patching it."""

import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.utils import logging

from .configuration_token_router import TokenRouterConfig
from .routing import TokenRouter
from .routing_report import RoutingReport, make_report
from .routing_state import RoutingState
from .token_skip_cache import TokenSkipCacheLayer
from .token_skip_layer import CACHE_ARGUMENT, TokenSkipMixin


logger = logging.get_logger(__name__)

# Families whose block has the structure that skipping relies on, checked by tests. Exact names: a block that inherits
# from one of them may do something else.
SUPPORTED_BLOCKS = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "Qwen3MoeDecoderLayer",
    "GemmaDecoderLayer",
)
_PREFIX = "TokenSkip"
# Decoders that run dense in this thread, by id.
_DENSE: ContextVar[frozenset[int]] = ContextVar("dense decoders", default=frozenset())


def apply_token_router(
    model: PreTrainedModel, config: TokenRouterConfig | None = None, exist_ok: bool = False
) -> PreTrainedModel:
    """Patches a language model in place, so that tokens skip decoder blocks as `config` says.

    No weight of the model is touched or renamed: blocks change their class, and the decoder gets a hook and a
    submodule `token_router`. LoRA targets, tensor-parallel plans and base checkpoints stay valid.
    [`remove_token_router`] undoes it exactly.

    Args:
        model (`PreTrainedModel`):
            A decoder-only language model of a supported family: Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, Gemma,
            without sliding windows.
        config ([`TokenRouterConfig`], *optional*):
            What to do. `num_hidden_layers` and `base_model_name_or_path` are filled in where they are missing.
        exist_ok (`bool`, *optional*, defaults to `False`):
            Replace a router that is there; it is an error otherwise.

    Returns:
        `PreTrainedModel`: the same model.

    Raises:
        TypeError: If the family is not supported.
        ValueError: If the configuration does not fit the model.
        RuntimeError: If the model is patched already.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_effml import TokenRouterConfig, apply_token_router, remove_token_router

    >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=50)
    >>> model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    >>> prompt = torch.arange(40).unsqueeze(0)
    >>> dense = model(prompt).logits
    >>> model = apply_token_router(model, TokenRouterConfig(target_sparsity=0.4, min_tokens=0))
    >>> bool((model(prompt).logits != dense).any())
    True
    >>> bool((remove_token_router(model)(prompt).logits == dense).all())
    True

    ```
    """
    config = TokenRouterConfig() if config is None else config
    decoder = find_decoder(model)
    if is_patched(decoder) and not exist_ok:
        raise RuntimeError(
            "This model has a token router already. Remove it with `remove_token_router(model)`, or replace it with "
            "`exist_ok=True`."
        )
    _fit(config, model, decoder)
    if is_patched(decoder):
        remove_token_router(model)
    for block in decoder.layers:
        block.__class__ = _skipping(type(block))
    decoder.token_router = TokenRouter(config.router_hidden_size).to(decoder.layers[0].input_layernorm.weight.device)
    decoder.token_routing_hook = RoutingHook(config)
    decoder.token_routing_hook.handle = decoder.register_forward_pre_hook(decoder.token_routing_hook, with_kwargs=True)
    return model


def remove_token_router(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes [`apply_token_router`]: classes, forward passes and values are what they were.

    Args:
        model (`PreTrainedModel`):
            A patched model.

    Returns:
        `PreTrainedModel`: the same model.
    """
    decoder = find_decoder(model)
    if not is_patched(decoder):
        raise RuntimeError("This model has no token router to remove.")
    for block in decoder.layers:
        block.__class__ = type(block).__mro__[2]
    decoder.token_routing_hook.handle.remove()
    del decoder.token_routing_hook, decoder.token_router
    return model


@contextmanager
def disable_routing(model: nn.Module) -> Iterator[None]:
    """Runs a patched model dense: as the teacher, or to compare. Other threads are not affected.

    Args:
        model (`nn.Module`):
            A patched model, wrapped or not.

    Example:

    ```python
    >>> with disable_routing(model):  # doctest: +SKIP
    ...     dense = model(**inputs).logits
    ```
    """
    token = _DENSE.set(_DENSE.get() | {id(find_decoder(model))})
    try:
        yield
    finally:
        _DENSE.reset(token)


def find_decoder(model: nn.Module) -> nn.Module:
    """Finds the module that holds the decoder blocks, also inside PEFT or [`TokenRouterModel`].

    Args:
        model (`nn.Module`):
            A language model.

    Returns:
        `nn.Module`: the decoder.

    Raises:
        TypeError: If there is none of a supported family.
    """
    lists = [module for module in model.modules() if isinstance(getattr(module, "layers", None), nn.ModuleList)]
    if len(lists) == 1 and all(_family(block) in SUPPORTED_BLOCKS for block in lists[0].layers):
        return lists[0]
    blocks = sorted({_family(block) for module in lists for block in module.layers})
    found = f"blocks of class {', '.join(blocks)}" if blocks else "no list of decoder blocks"
    raise TypeError(
        f"Token routing does not support `{type(model).__name__}`, which has {found}; supported are "
        f"{', '.join(SUPPORTED_BLOCKS)}."
    )


def is_patched(decoder: nn.Module) -> bool:
    """Says whether a decoder has a token router.

    Args:
        decoder (`nn.Module`):
            From [`find_decoder`].

    Returns:
        `bool`: the answer.
    """
    return hasattr(decoder, "token_routing_hook")


def _family(block: nn.Module) -> str:
    return type(block).__name__.removeprefix(_PREFIX)


def _skipping(block_class: type) -> type:
    """The class of blocks that skip tokens; one per family, found again by name when a model is unpickled."""
    module = sys.modules[__name__]
    name = _PREFIX + block_class.__name__
    if name not in vars(module):
        setattr(module, name, type(name, (TokenSkipMixin, block_class), {"__module__": __name__}))
    return getattr(module, name)


def __getattr__(name: str) -> Any:
    family = name.removeprefix(_PREFIX)
    if family != name and family in SUPPORTED_BLOCKS:
        folder = family.removesuffix("DecoderLayer")
        folder = {"Qwen3Moe": "qwen3_moe"}.get(folder, folder.lower())
        from importlib import import_module

        return _skipping(getattr(import_module(f"transformers.models.{folder}.modeling_{folder}"), family))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _fit(config: TokenRouterConfig, model: PreTrainedModel, decoder: nn.Module) -> None:
    """Fills in what the model knows, and checks that the configuration fits."""
    text_config = decoder.config
    windows = "sliding_attention" in (getattr(text_config, "layer_types", None) or [])
    if windows or (not hasattr(text_config, "layer_types") and getattr(text_config, "sliding_window", None)):
        raise ValueError(
            "Token routing does not support sliding windows, which count columns that skipping removes; this "
            f"`{type(model).__name__}` has `sliding_window={text_config.sliding_window}`. Load it with "
            "`sliding_window=None` if its texts are shorter than the window."
        )
    blocks = len(decoder.layers)
    if config.num_hidden_layers not in (None, blocks):
        raise ValueError(
            f"This router was made for a model of {config.num_hidden_layers} blocks; this one has {blocks}. Load it "
            f"on `{config.base_model_name_or_path or 'its own base model'}`."
        )
    config.num_hidden_layers = blocks
    config.validate_token_routing()
    name = getattr(model.config, "name_or_path", "") or None
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = name
    elif name is not None and name != config.base_model_name_or_path:
        logger.warning(
            f"This router was trained on `{config.base_model_name_or_path}` and is applied to `{name}`. If that is "
            "the same model, set `base_model_name_or_path` of its configuration."
        )


class RoutingHook:
    """Prepares the decisions of each forward pass of a decoder, before it runs.

    Attributes:
        config ([`TokenRouterConfig`]):
            What to do; a change takes effect with the next call.
        latest ([`RoutingState`] or `None`):
            The decisions about the latest prompt, for reports and losses. No forward pass reads it.
    """

    def __init__(self, config: TokenRouterConfig):
        self.config = config
        self.latest: RoutingState | None = None
        self.handle: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # Decisions of a training step carry a graph, which can be neither copied nor saved.
        return self.__dict__ | {"latest": None}

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Adds the decisions to the arguments of a forward pass."""
        args, kwargs = (), _by_name(decoder, args, kwargs)
        replayed = kwargs.pop("keep_mask", None)
        config = kwargs.pop("token_router_config", None) or self.config
        as_generated, generated = kwargs.pop("as_generated", False), kwargs.pop("generated", None)
        if id(decoder) in _DENSE.get() or not (any(config.schedule) or replayed is not None):
            return args, kwargs
        _refuse_what_routing_cannot_do(decoder, kwargs)
        state = _begin(decoder, config, kwargs, replayed, as_generated, generated)
        if state.learning:
            if state.past:
                raise ValueError(
                    f"A router is trained on whole texts; got a cache of {state.past} columns. Leave it out, or call "
                    "`model.eval()` to generate."
                )
            kwargs |= {"use_cache": False, CACHE_ARGUMENT: None}
        elif kwargs.get(CACHE_ARGUMENT) is not None:
            _check_cache(kwargs[CACHE_ARGUMENT], state)
        if state.is_prompt:
            self.latest = state
        return args, kwargs | {"token_routing": state}


def _by_name(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a decoder that was called by hand, as a language model passes them on."""
    kwargs = dict(kwargs)
    if args:
        names = list(inspect.signature(type(decoder).forward).parameters)[1:]
        kwargs |= dict(zip(names, args, strict=False))
    if "past_key_values" in kwargs:
        kwargs[CACHE_ARGUMENT] = kwargs.pop("past_key_values")
    return kwargs


def _begin(
    decoder: nn.Module,
    config: TokenRouterConfig,
    kwargs: dict[str, Any],
    replayed: Any,
    as_generated: bool,
    generated: Tensor | None,
) -> RoutingState:
    """Reads off the inputs which columns are new and real."""
    inputs: Any = kwargs.get("inputs_embeds")
    inputs = kwargs.get("input_ids") if inputs is None else inputs
    if inputs is None or inputs.dim() < 2 or 0 in inputs.shape[:2]:
        raise ValueError(
            "`input_ids` or `inputs_embeds` must hold at least one text of at least one token, (batch, tokens); got "
            f"{None if inputs is None else tuple(inputs.shape)}. Nothing can be routed there."
        )
    batch, tokens = inputs.shape[:2]
    cache, mask = kwargs.get(CACHE_ARGUMENT), kwargs.get("attention_mask")
    past = 0 if cache is None else cache.get_seq_length()
    learning = (
        torch.is_grad_enabled()
        and decoder.training
        and replayed is None
        and config.is_learned
        and any(parameter.requires_grad for parameter in decoder.token_router.parameters())
    )
    past_real = None
    if mask is None:
        real = torch.ones(batch, tokens, dtype=torch.bool, device=inputs.device)
        lengths = [tokens] * batch
    else:
        if mask.shape != (batch, past + tokens):
            raise ValueError(
                f"`attention_mask` must cover the {past} columns of the cache and the {tokens} new ones of {batch} "
                f"samples; got {tuple(mask.shape)}."
            )
        mask = mask.to(inputs.device).bool()
        real = mask[:, past:]
        # The one time in a forward pass that the device is waited for.
        lengths, past_lengths = torch.stack([real.sum(-1), mask[:, :past].sum(-1)]).tolist()
        past_real = mask[:, :past] if min(past_lengths) < past else None
    if replayed is not None:
        replayed = _masks_by_block(replayed, len(config.schedule), (batch, tokens))
    if generated is not None and generated.shape != (batch, tokens):
        raise ValueError(f"`generated` must have the shape {(batch, tokens)}; got {tuple(generated.shape)}.")
    return RoutingState(
        config, decoder.token_router, real, lengths, past, past_real, learning, replayed, as_generated, generated
    )


def _masks_by_block(masks: Any, blocks: int, shape: tuple[int, int]) -> dict[int, Tensor]:
    """Decisions to replay as a dictionary, checked."""
    given = dict(enumerate(masks)) if isinstance(masks, Tensor) else dict(masks)
    complete = len(given) == blocks or not isinstance(masks, Tensor)
    if not complete or any(block not in range(blocks) or mask.shape != shape for block, mask in given.items()):
        found = tuple(masks.shape) if isinstance(masks, Tensor) else {key: tuple(masks[key].shape) for key in masks}
        raise ValueError(
            f"`keep_mask` must have the shape {(blocks, *shape)}, or map some of the {blocks} blocks to masks of "
            f"shape {shape}; got {found}."
        )
    return given


def _refuse_what_routing_cannot_do(decoder: nn.Module, kwargs: dict[str, Any]) -> None:
    mask, positions, cache = (kwargs.get(name) for name in ("attention_mask", "position_ids", CACHE_ARGUMENT))
    implementation = decoder.config._attn_implementation
    if not (implementation in ("eager", "sdpa") or "flash" in implementation):
        raise ValueError(
            f'Token routing supports the attention implementations "sdpa", "eager" and flash attention; got '
            f'"{implementation}". Call `model.set_attn_implementation("sdpa")`.'
        )
    if kwargs.get("output_attentions") or decoder.config.output_attentions:
        raise ValueError(
            "`output_attentions` is not supported with routing: blocks attend to different tokens. Use "
            "`disable_routing()`, or look at `routing_report`."
        )
    if cache is not None and type(cache) is not DynamicCache:
        raise ValueError(
            f"Token routing needs a `DynamicCache`, whose blocks can hold different numbers of tokens; got a "
            f'`{type(cache).__name__}`. Pass `cache_implementation="dynamic"` to `generate`.'
        )
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"`attention_mask` must have the shape (batch, tokens) with routing; got {shape}. Packed sequences are "
            "not supported with routing: pad them instead."
        )
    restarts = (
        mask is None
        and positions is not None
        and positions.dim() == 2
        and positions.shape[1] > 1
        and bool((positions[:, 1:] <= positions[:, :-1]).any())
    )
    if restarts or any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k")):
        raise ValueError(
            "Packed sequences are not supported with routing: `position_ids` restart, or `cu_seq_lens` were given. "
            "Pad the texts and pass an `attention_mask`."
        )


def _check_cache(cache: DynamicCache, state: RoutingState) -> None:
    for block in state.routed:
        layer = cache.layers[block] if block < len(cache.layers) else None
        if layer is None:
            continue
        if type(layer) not in (DynamicLayer, TokenSkipCacheLayer):
            raise ValueError(
                f"Token routing cannot skip tokens in a `{type(layer).__name__}`, which block {block} has as its "
                'cache; supported is `cache_implementation="dynamic"`.'
            )
        if layer.keys is not None and layer.keys.numel() and layer.keys.shape[0] != len(state.real):
            raise ValueError(
                f"The cache holds {layer.keys.shape[0]} samples, the inputs {len(state.real)}. Start with a new "
                "cache, or select samples with `cache.batch_select_indices`."
            )


def make_routing_report(model: nn.Module) -> RoutingReport:
    """Reports what the latest prompt was spared in a patched model.

    Args:
        model (`nn.Module`):
            A patched model, wrapped or not.

    Returns:
        [`RoutingReport`]: shares and masks by block, work and memory.

    Raises:
        RuntimeError: If no prompt has been routed yet.
    """
    decoder = find_decoder(model)
    state = decoder.token_routing_hook.latest if is_patched(decoder) else None
    if state is None:
        raise RuntimeError("Nothing has been routed yet. Run the model on a prompt first.")
    return make_report(state, decoder)


def copy_config(config: TokenRouterConfig, **changes: Any) -> TokenRouterConfig:
    """Copies a configuration with other values, for `token_router_config` of a call.

    Args:
        config ([`TokenRouterConfig`]):
            What to copy.
        changes (`dict`):
            Fields to change; together they are checked as on construction.

    Returns:
        [`TokenRouterConfig`]: the copy.
    """
    changed = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    changed.validate_token_routing()
    return changed
