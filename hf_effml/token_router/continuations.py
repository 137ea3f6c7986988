"""The honest way to score a routed language model: route the prompt, then score what follows it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .token_skip_layer import CACHE_ARGUMENT


def continuation_logits(
    model: nn.Module, windows: Tensor, prompt_length: int, batch_size: int = 8, **routing: object
) -> Iterator[Tensor]:
    """Predicts the continuations of prompts, teacher-forced.

    The prompt is one call, the rest of a window another one on its cache that follows `decode_policy`. Routing cannot
    look ahead this way, which it can where the perplexity of all positions is taken from one call.

    Args:
        model (`nn.Module`):
            A causal language model, patched or not, in evaluation mode.
        windows (`Tensor` of shape `(windows, tokens)`):
            Token ids, without padding.
        prompt_length (`int`):
            Tokens of each window that are its prompt; at least one has to follow.
        batch_size (`int`, *optional*, defaults to 8):
            Windows at a time.
        routing (`dict`, *optional*):
            For a patched model: `token_router_config` to use instead of its own.

    Yields:
        `Tensor` of shape `(batch, tokens - prompt_length, vocabulary)`: logits of the tokens after the prompt.
    """
    if not 0 < prompt_length < windows.shape[1]:
        raise ValueError(
            f"`prompt_length` must leave a continuation of windows of {windows.shape[1]} tokens; got {prompt_length}."
        )
    device = next(model.parameters()).device
    for batch in windows.split(batch_size):
        batch = batch.to(device)
        with torch.inference_mode():
            prompt = model(batch[:, :prompt_length], use_cache=True, logits_to_keep=1, **routing)
            logits = [prompt.logits]
            if windows.shape[1] > prompt_length + 1:
                options = routing | ({"as_generated": True} if _is_routed(model) else {})
                cache = {CACHE_ARGUMENT: prompt[CACHE_ARGUMENT]}
                logits.append(model(batch[:, prompt_length:-1], use_cache=True, **cache, **options).logits)
        yield torch.cat(logits, dim=1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each token.

    Args:
        logits (`Tensor` of shape `(batch, tokens, vocabulary)`):
            Predictions.
        targets (`Tensor` of shape `(batch, tokens)`):
            What followed.

    Returns:
        `Tensor` of shape `(batch, tokens)`: in nats, float32.
    """
    return nn.functional.cross_entropy(logits.float().transpose(1, 2), targets.to(logits.device), reduction="none")


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a student's predictions from a teacher's.

    Args:
        teacher (`Tensor` of shape `(..., vocabulary)`):
            Logits or log-probabilities.
        student (`Tensor` of the same shape):
            Logits or log-probabilities.

    Returns:
        `Tensor` of shape `(...)`: KL(teacher || student) in nats, float32.
    """
    teacher, student = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1)


def _is_routed(model: nn.Module) -> bool:
    return any(hasattr(module, "token_routing_hook") for module in model.modules())
