"""How DyVM chooses and moves patch tokens: the predictor, its decisions, the order of the stream after them."""

import random
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .token_reduction import take_rows


class TokenPredictor(nn.Module):
    """Log-probabilities that a token is kept and that it is dropped, from the token and the mean of all.

    Args:
        hidden_size (`int`):
            Width of the tokens, a multiple of 4.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        half, quarter = hidden_size // 2, hidden_size // 4
        self.in_conv = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, hidden_size), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(hidden_size, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )

    def forward(self, hidden_states: Tensor, weights: Tensor) -> Tensor:
        """Score tokens.

        Args:
            hidden_states (`Tensor` of shape `(batch, tokens, hidden_size)`):
                The stream.
            weights (`Tensor` of shape `(batch, tokens)`):
                Which tokens the mean is over: 1, others 0.

        Returns:
            `Tensor` of shape `(batch, tokens, 2)`: For every token, keep first, in float32.
        """
        local, shared = self.in_conv(hidden_states.to(self.in_conv[0].weight.dtype)).chunk(2, dim=-1)
        total = torch.bmm(weights.unsqueeze(1).to(shared.dtype), shared)
        # One more than there are: the mean stays finite where no token is left.
        mean = total / (weights.sum(1) + 1).view(-1, 1, 1).to(shared.dtype)
        scores = self.out_conv(torch.cat([local, mean.expand_as(local)], dim=-1))
        return F.log_softmax(scores.float(), dim=-1)


class TokenLayout(NamedTuple):
    """Which row of the stream is what.

    Args:
        positions (`Tensor` of shape `(batch, patches)`):
            Original patch of every patch token, in stream order.
        patch_rows (`Tensor` of shape `(batch, patches)`):
            Its row in the stream.
        class_rows (`Tensor` of shape `(batch, class tokens)`):
            Rows of the class token(s).
        policy (`Tensor` of shape `(batch, patches)`, *optional*):
            In training, 1 for every patch token that is still kept, 0 for the others; all are kept without it.
    """

    positions: Tensor
    patch_rows: Tensor
    class_rows: Tensor
    policy: Tensor | None = None

    @classmethod
    def start(cls, batch: int, patches: int, class_position: str, device: torch.device) -> Self:
        """The layout before block 0.

        Args:
            batch (`int`):
                Images.
            patches (`int`):
                Patches of an image.
            class_position (`str`):
                `cls_token_position` of the configuration.
            device (`torch.device`):
                Where the tensors go.

        Returns:
            [`TokenLayout`]
        """
        positions = torch.arange(patches, device=device).expand(batch, -1)
        class_rows = _class_rows(torch.full((batch,), patches, device=device), class_position)
        return cls(positions, patch_rows(class_rows, patches), class_rows)

    def row_weights(self, class_weight: float) -> Tensor:
        """The policy as one number per row of the stream.

        Args:
            class_weight (`float`):
                The number for class tokens.

        Returns:
            `Tensor` of shape `(batch, tokens)`: In float32.
        """
        batch, patches = self.patch_rows.shape
        tokens = patches + self.class_rows.shape[1]
        weights = torch.full((batch, tokens), class_weight, device=self.patch_rows.device)
        policy = torch.ones_like(weights[:, :patches]) if self.policy is None else self.policy
        return weights.scatter(1, self.patch_rows, policy)

    def rearrange(self, stream: Tensor, order: Tensor, kept: Tensor, class_position: str) -> tuple[Tensor, Self]:
        """Bring patch tokens into a new order, possibly leaving some out, and the class token(s) to their place in it.

        Args:
            stream (`Tensor` of shape `(batch, tokens, hidden_size)`):
                The stream in this layout.
            order (`Tensor` of shape `(batch, new patches)`):
                The patch tokens wanted, by their rank in this layout.
            kept (`Tensor` of shape `(batch,)`):
                How many of them are kept; they come first.
            class_position (`str`):
                `cls_token_position` of the configuration.

        Returns:
            `tuple[Tensor, TokenLayout]`: The new stream and its layout.
        """
        class_rows = _class_rows(kept, class_position)
        new_rows = patch_rows(class_rows, order.shape[1])
        rows = order.new_empty(order.shape[0], order.shape[1] + class_rows.shape[1])
        rows = rows.scatter(1, new_rows, self.patch_rows.gather(1, order)).scatter(1, class_rows, self.class_rows)
        policy = None if self.policy is None else self.policy.gather(1, order)
        layout = self._replace(
            positions=self.positions.gather(1, order), patch_rows=new_rows, class_rows=class_rows, policy=policy
        )
        return take_rows(stream, rows), layout


def _class_rows(kept: Tensor, class_position: str) -> Tensor:
    """Rows of the class token(s), `(batch, class tokens)`, by the number of tokens that are kept."""
    first = torch.zeros_like(kept)
    rows = {"none": [], "head": [first], "middle": [kept // 2], "double": [first, kept + 1]}[class_position]
    return torch.stack(rows, dim=1) if rows else kept.new_empty(kept.shape[0], 0)


def patch_rows(class_rows: Tensor, patches: int) -> Tensor:
    """The rows that class tokens leave to patch tokens.

    Args:
        class_rows (`Tensor` of shape `(batch, class tokens)`):
            Rows of the class token(s), ascending.
        patches (`int`):
            Number of patch tokens.

    Returns:
        `Tensor` of shape `(batch, patches)`: Ascending.
    """
    rows = torch.arange(patches, device=class_rows.device).expand(class_rows.shape[0], -1)
    for class_row in class_rows.unbind(1):
        rows = rows + (rows >= class_row.unsqueeze(1))
    return rows


def sample_exponential(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Noise of rate 1, in float32; minus its logarithm is Gumbel noise.

    Args:
        shape (`tuple[int, ...]`):
            Shape.
        device (`torch.device`):
            Where it goes.
        generator (`torch.Generator`, *optional*):
            Where it is from; the default generator of the device if unset.

    Returns:
        `Tensor`
    """
    return torch.empty(shape, device=device).exponential_(generator=generator)


def sample_decisions(log_probs: Tensor, tau: float, generator: torch.Generator | None) -> Tensor:
    """Draw keep or drop for every token; the gradient is that of the probability to keep (straight-through).

    Args:
        log_probs (`Tensor` of shape `(batch, patches, 2)`):
            From [`TokenPredictor`].
        tau (`float`):
            Temperature of the gradient.
        generator (`torch.Generator`, *optional*):
            Source of the noise.

    Returns:
        `Tensor` of shape `(batch, patches)`: 0 or 1.
    """
    noise = sample_exponential(tuple(log_probs.shape), log_probs.device, generator).log()
    noisy = log_probs - noise
    keep = torch.softmax(noisy / tau, dim=-1)[..., 0]
    return straight_through((noisy[..., 0] >= noisy[..., 1]).to(keep.dtype), keep)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of one tensor with the gradient of another.

    Args:
        hard (`Tensor`):
            The value.
        soft (`Tensor`):
            What the gradient goes to.

    Returns:
        `Tensor`: Exactly `hard`.
    """
    return hard.detach() + (soft - soft.detach())


def fixed_ranks(selection: str, tokens: int, kept: int, seed: str) -> list[int]:
    """The tokens that the baselines keep, the same for all images.

    Args:
        selection (`str`):
            `"even"` or `"random"`.
        tokens (`int`):
            How many there are.
        kept (`int`):
            How many to keep.
        seed (`str`):
            Seed of `"random"`.

    Returns:
        `list[int]`: Their ranks, ascending.
    """
    if selection == "even":
        return [(2 * rank + 1) * tokens // (2 * kept) for rank in range(kept)]
    return sorted(random.Random(seed).sample(range(tokens), kept))


def decisions_from(ranks: Tensor, tokens: int) -> Tensor:
    """Chosen tokens as 0 and 1.

    Args:
        ranks (`Tensor` of shape `(batch, kept)`):
            Which tokens.
        tokens (`int`):
            Of how many.

    Returns:
        `Tensor` of shape `(batch, tokens)`: In float32.
    """
    zeros = torch.zeros(ranks.shape[0], tokens, device=ranks.device)
    return zeros.scatter(1, ranks, 1.0)


__all__ = [
    "TokenLayout",
    "TokenPredictor",
    "decisions_from",
    "fixed_ranks",
    "patch_rows",
    "sample_decisions",
    "sample_exponential",
    "straight_through",
]
