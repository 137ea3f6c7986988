"""Whole checkpoints that carry a token router: Llama, Qwen2 and Qwen3, patched as soon as they are made."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM

from .configuration_token_router import (
    TokenRouterConfig,
    TokenRouterLlamaConfig,
    TokenRouterQwen2Config,
    TokenRouterQwen3Config,
)
from .patching import apply_token_router, find_decoder, is_patched, make_routing_report
from .routing_report import RoutingReport


try:
    from hf_effml.utils.model_kinds import NamesWhatFails
except ImportError:  # a saved folder where the package is not installed

    class NamesWhatFails:  # type: ignore[no-redef]
        """Adds nothing."""


# For type checkers: the next class in line is that of the language model.
_Model: Any = PreTrainedModel if TYPE_CHECKING else object


class _TokenRouterCheckpoint(NamesWhatFails, _Model):
    """What these classes share: they patch themselves, and write the router's configuration into their own."""

    _keep_in_fp32_modules_strict = {"token_router"}

    def __init__(self, config: Any):
        super().__init__(config)
        fields = dict(config.token_router or {})
        # The base model was another folder than this one; that is no reason to warn.
        base = fields.pop("base_model_name_or_path", None)
        apply_token_router(self, TokenRouterConfig(**fields))
        find_decoder(self).token_routing_hook.config.base_model_name_or_path = base

    def initialize_weights(self) -> None:
        """Initialises what a checkpoint did not have."""
        super().initialize_weights()
        decoder = find_decoder(self)
        if is_patched(decoder):
            # The decoder, a model of its own, has treated the router's layers as any linear ones.
            decoder.token_router.reset_parameters()

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Saves weights, router and configuration.

        Args:
            save_directory (`str` or `Path`):
                Folder to write.
            kwargs (`dict`, *optional*):
                As for [`~transformers.PreTrainedModel.save_pretrained`].
        """
        self.config.token_router = _plain(find_decoder(self).token_routing_hook.config)
        super().save_pretrained(save_directory, **kwargs)

    @property
    def routing_report(self) -> RoutingReport:
        """What the latest prompt was spared, see [`RoutingReport`]."""
        return make_routing_report(self)


class TokenRouterLlamaForCausalLM(_TokenRouterCheckpoint, LlamaForCausalLM):
    """A Llama with a token router in one checkpoint (https://huggingface.co/papers/2412.11494).

    Args:
        config ([`TokenRouterLlamaConfig`]):
            Of the model and, in its field `token_router`, of the router.
    """

    config_class = TokenRouterLlamaConfig


class TokenRouterQwen2ForCausalLM(_TokenRouterCheckpoint, Qwen2ForCausalLM):
    """A Qwen2, or Qwen1.5, with a token router in one checkpoint (https://huggingface.co/papers/2412.11494).

    Args:
        config ([`TokenRouterQwen2Config`]):
            Of the model and, in its field `token_router`, of the router.
    """

    config_class = TokenRouterQwen2Config


class TokenRouterQwen3ForCausalLM(_TokenRouterCheckpoint, Qwen3ForCausalLM):
    """A Qwen3 with a token router in one checkpoint (https://huggingface.co/papers/2412.11494).

    Args:
        config ([`TokenRouterQwen3Config`]):
            Of the model and, in its field `token_router`, of the router.
    """

    config_class = TokenRouterQwen3Config


FULL_CHECKPOINTS: dict[type, Any] = {
    LlamaForCausalLM: TokenRouterLlamaForCausalLM,
    Qwen2ForCausalLM: TokenRouterQwen2ForCausalLM,
    Qwen3ForCausalLM: TokenRouterQwen3ForCausalLM,
}


def make_full_checkpoint(model: PreTrainedModel) -> PreTrainedModel:
    """Makes one model of a patched language model and its router; it shares their weights.

    Args:
        model (`PreTrainedModel`):
            A patched Llama, Qwen2 or Qwen3.

    Returns:
        `PreTrainedModel`: one of the classes of this file.

    Raises:
        TypeError: If there is no class for the family.
    """
    full_class = FULL_CHECKPOINTS.get(type(model))
    if full_class is None:
        raise TypeError(
            f"There is no full checkpoint of a `{type(model).__name__}`; there are of "
            f"{', '.join(known.__name__ for known in FULL_CHECKPOINTS)}. Save the router alone instead."
        )
    fields = model.config.to_dict() | {"token_router": _plain(find_decoder(model).token_routing_hook.config)}
    for name in ("model_type", "architectures", "auto_map", "transformers_version"):
        fields.pop(name, None)
    config = full_class.config_class(**fields)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        full = full_class(config)
    full.load_state_dict(model.state_dict(), assign=True)
    full.tie_weights()
    _share_buffers(model, full)
    full.generation_config = model.generation_config
    return full.train(model.training)


def _share_buffers(source: nn.Module, target: nn.Module) -> None:
    """Buffers that are in no state dict, such as rotary frequencies."""
    modules = dict(target.named_modules())
    for name, module in source.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            modules[name].register_buffer(key, buffer, persistent=key not in module._non_persistent_buffers_set)


def _plain(config: TokenRouterConfig) -> dict[str, Any]:
    """The fields of a router's configuration that are not those of any configuration."""
    known = TokenRouterConfig.__annotations__
    return {name: getattr(config, name) for name in known}
