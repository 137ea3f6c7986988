"""Which tokens a decoder block processes: the four factors, the router, and selection. Tensors in, tensors out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import initialization as init


# Rounding of `sparsity * tokens`: 0.29 * 100 is a little less than 29 in binary.
_EPSILON = 1e-6
# How steeply a fresh router prefers the newest tokens.
_PRIOR = 2.0


class TokenRouter(nn.Module):
    """The router that all blocks share: four factors of a token to the logits of skipping and of keeping it.

    A fresh one equals the static rule: it keeps the newest tokens, as many as the block's sparsity allows, so that
    training starts from the paper's static router and not from noise. Everything is computed in float32.

    Args:
        hidden_size (`int`, *optional*, defaults to 64):
            Width of the hidden layer; 450 parameters at the default.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml import TokenRouter

    >>> TokenRouter()(torch.rand(2, 5, 4)).shape
    torch.Size([2, 5, 2])

    ```
    """

    def __init__(self, hidden_size: int = 64):
        super().__init__()
        self.fc1 = nn.Linear(4, hidden_size)
        self.fc2 = nn.Linear(hidden_size, 2)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the weights to a router that follows the static rule, its other hidden units random."""
        first = torch.zeros_like(self.fc1.weight).uniform_(-0.5, 0.5)
        # position - sparsity, and its opposite: together the signed distance from where the skipped tokens end.
        first[:2] = torch.tensor([[1.0, 0.0, 0.0, -1.0], [-1.0, 0.0, 0.0, 1.0]], dtype=first.dtype)
        second = torch.zeros_like(self.fc2.weight)
        second[:, :2] = _PRIOR * torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=second.dtype)
        init.copy_(self.fc1.weight, first)
        init.copy_(self.fc2.weight, second)
        init.zeros_(self.fc1.bias)
        init.zeros_(self.fc2.bias)

    def forward(self, factors: Tensor) -> Tensor:
        """Computes logits.

        Args:
            factors (`Tensor` of shape `(..., 4)`):
                From [`router_factors`].

        Returns:
            `Tensor` of shape `(..., 2)`: logits of skipping (class 0) and of keeping (class 1), in float32.
        """
        with torch.autocast(factors.device.type, enabled=False):
            return _in_float32(self.fc2, _in_float32(self.fc1, factors.float()).relu())


def _in_float32(linear: nn.Module, x: Tensor) -> Tensor:
    """Calls the layer, so that an adapter or a quantised one in its place is heard."""
    narrow = {name: value.float() for name, value in linear.named_parameters() if value.dtype != torch.float32}
    return functional_call(linear, narrow, (x,)) if narrow else linear(x)


def kept_count(tokens: int, sparsity: float, at_least: int = 0) -> int:
    """Says how many tokens a block processes.

    Args:
        tokens (`int`):
            Real tokens of the sample.
        sparsity (`float`):
            Share of them that the block has to skip.
        at_least (`int`, *optional*, defaults to 0):
            Tokens that are kept whatever the sparsity.

    Returns:
        `int`: `tokens - floor(sparsity * tokens + 1e-6)`, or more where `at_least` and the tokens allow.

    Example:

    ```python
    >>> from hf_effml.token_router.routing import kept_count

    >>> kept_count(10, 0.4)
    6

    ```
    """
    return max(tokens - int(sparsity * tokens + _EPSILON), min(at_least, tokens))


def index_among_real(real: Tensor) -> Tensor:
    """Counts the real tokens before each column.

    Args:
        real (`Tensor` of shape `(batch, tokens)`):
            `True` for tokens that are no padding.

    Returns:
        `Tensor` of shape `(batch, tokens)`: 0 for the first real token, and so on; meaningless on padding.
    """
    return real.cumsum(-1) - 1


def static_priority(real: Tensor, sink: Tensor) -> Tensor:
    """Ranks tokens as the static router does: the first token of the text, then from the newest to the oldest.

    Args:
        real (`Tensor` of shape `(batch, tokens)`):
            `True` for tokens that are no padding.
        sink (`Tensor` of shape `(batch, tokens)`):
            `True` for the first token of a text.

    Returns:
        `Tensor` of shape `(batch, tokens)`: higher is kept longer.
    """
    return index_among_real(real).float().masked_fill(sink, torch.inf)


def rank_scores(scores: Tensor, real: Tensor) -> Tensor:
    """Ranks scores within each sample.

    Args:
        scores (`Tensor` of shape `(batch, tokens)`):
            Any values.
        real (`Tensor` of shape `(batch, tokens)`):
            `True` for tokens that are no padding.

    Returns:
        `Tensor` of shape `(batch, tokens)`: 0 for the highest, ties to the earlier token; padding comes last.
    """
    order = scores.masked_fill(~real, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def router_factors(table: Tensor, real: Tensor, sparsities: Sequence[float], normalize_scores: bool = False) -> Tensor:
    """Describes every token to the router: position, attention score, rank of the score, required sparsity.

    Args:
        table (`Tensor` of shape `(batch, tokens)`):
            Latest attention score of each token.
        real (`Tensor` of shape `(batch, tokens)`):
            `True` for tokens that are no padding.
        sparsities (`Sequence[float]`):
            Required sparsity of each block to describe them for.
        normalize_scores (`bool`, *optional*, defaults to `False`):
            Multiply the score by the number of tokens, against which it shrinks.

    Returns:
        `Tensor` of shape `(blocks, batch, tokens, 4)`: factors in float32, 0 on padding.
    """
    tokens = real.sum(-1, keepdim=True)
    last = (tokens - 1).clamp(min=1).float()
    scores = table.float() * tokens if normalize_scores else table.float()
    shared = torch.stack([index_among_real(real) / last, scores, rank_scores(table, real) / last], dim=-1)
    sparsity = torch.tensor(sparsities, dtype=torch.float32, device=table.device)
    factors = torch.cat(
        [shared.expand(len(sparsities), *shared.shape), sparsity.view(-1, 1, 1, 1).expand(-1, *table.shape, 1)], dim=-1
    )
    return factors * real.unsqueeze(-1)


def attention_scores_reference(attention: Tensor, took_part: Tensor, mode: str = "window", window: int = 32) -> Tensor:
    """Reduces a block's attention matrix to one score per token; the slow twin of what the blocks compute.

    Args:
        attention (`Tensor` of shape `(batch, heads, tokens, tokens)`):
            Probability that the query of a row gives to the key of a column.
        took_part (`Tensor` of shape `(batch, tokens)`):
            Tokens that the block processed.
        mode (`str`, *optional*, defaults to `"window"`):
            Which of these queries count: `"mean"` all, `"last"` the last one, `"window"` the last `window`.
        window (`int`, *optional*, defaults to 32):
            Number of queries of `"window"`.

    Returns:
        `Tensor` of shape `(batch, tokens)`: mean probability over heads and queries; 0 where no query counts.
    """
    newest_first = took_part.flip(-1).cumsum(-1).flip(-1)
    limit = {"mean": took_part.shape[-1], "last": 1, "window": window}[mode]
    counts = (took_part & (newest_first <= limit)).to(attention.dtype)
    return torch.einsum("bhqk,bq->bk", attention, counts) / (attention.shape[1] * counts.sum(-1, keepdim=True)).clamp(
        min=1
    )


def update_table(table: Tensor, scores: Tensor, took_part: Tensor) -> Tensor:
    """Overwrites the scores of the tokens that a block processed; the others keep their older ones.

    Args:
        table (`Tensor` of shape `(batch, tokens)`):
            Scores before the block.
        scores (`Tensor` of shape `(batch, tokens)`):
            Scores of the block.
        took_part (`Tensor` of shape `(batch, tokens)`):
            Tokens that the block processed.

    Returns:
        `Tensor` of shape `(batch, tokens)`: scores after it.
    """
    return torch.where(took_part, scores.to(table.dtype), table)


def select_budget(priority: Tensor, real: Tensor, counts: Tensor) -> Tensor:
    """Keeps the tokens of highest priority.

    Args:
        priority (`Tensor` of shape `(..., batch, tokens)`):
            Any values; ties go to the earlier token.
        real (`Tensor` of shape `(batch, tokens)`):
            `True` for tokens that are no padding; only they are kept.
        counts (`Tensor` of shape `(..., batch)`):
            How many to keep, at most the real ones.

    Returns:
        `Tensor` of shape `(..., batch, tokens)`: `True` for tokens that are kept.
    """
    order = priority.masked_fill(~real, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(priority.shape[-1], device=priority.device) < counts.unsqueeze(-1)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, chosen) & real


def select_threshold(logits: Tensor, real: Tensor) -> Tensor:
    """Keeps the tokens that the router would rather keep than skip.

    Args:
        logits (`Tensor` of shape `(..., batch, tokens, 2)`):
            Of the router.
        real (`Tensor` of shape `(batch, tokens)`):
            `True` for tokens that are no padding; only they are kept.

    Returns:
        `Tensor` of shape `(..., batch, tokens)`: `True` for tokens that are kept.
    """
    return (logits[..., 1] > logits[..., 0]) & real
