"""How images go through the blocks of a Vim, and the one place where R-MeeTo and DyVM change it."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .configuration_vim import VimConfig


class VimRun:
    """One forward pass through the blocks. A plain Vim applies every block to all tokens.

    A method that does otherwise is a subclass, and `step` is its story: [`MergeRun`] merges tokens before a block,
    [`DyVMRun`] drops tokens and skips scans. `pool` and `report` say what a pass leaves for the output.

    Args:
        config ([`VimConfig`]):
            That of the model.
        stream (`Tensor` of shape `(batch, tokens, hidden_size)`):
            Tokens before block 0.
        class_positions (`tuple[int, ...]`):
            Where the class token(s) are among them.
    """

    def __init__(self, config: VimConfig, stream: Tensor, class_positions: tuple[int, ...]):
        self.config = config
        self.class_positions: tuple[int, ...] | Tensor = class_positions
        self.batch, self.tokens, _ = stream.shape
        self.device = stream.device

    def step(self, block: int, layer: nn.Module, stream: Tensor) -> Tensor:
        """Apply a block, and what the method does to its input.

        Args:
            block (`int`):
                Its index.
            layer ([`VimBlock`]):
                The block.
            stream (`Tensor` of shape `(batch, tokens, hidden_size)`):
                Its input.

        Returns:
            `Tensor` of shape `(batch, tokens left, hidden_size)`: Its output.
        """
        return layer(stream)[0]

    def class_rows(self) -> Tensor:
        """Where the class token(s) are at the moment.

        Returns:
            `Tensor` of shape `(batch, class tokens)`: Rows of the stream.
        """
        positions = self.class_positions
        if isinstance(positions, Tensor):
            return positions
        return torch.tensor(positions, dtype=torch.long, device=self.device).expand(self.batch, -1)

    def pool(self, stream: Tensor, class_rows: Tensor) -> Tensor:
        """The feature that a head reads: the class token (the mean of two), or the mean or the last of the patches.

        Args:
            stream (`Tensor` of shape `(batch, tokens, hidden_size)`):
                Normalised tokens after the last block.
            class_rows (`Tensor` of shape `(batch, class tokens)`):
                Rows of the class token(s).

        Returns:
            `Tensor` of shape `(batch, hidden_size)`
        """
        if self.config.pooling == "cls":
            index = class_rows.unsqueeze(-1).expand(-1, -1, stream.shape[-1])
            return stream.gather(1, index).mean(1)
        return stream[:, -1] if self.config.pooling == "last" else stream.mean(1)

    def report(self, detailed: bool = False) -> dict[str, Any]:
        """What the method decided, as further fields of the model's output.

        Args:
            detailed (`bool`, *optional*, defaults to `False`):
                Also what costs time to put together: the `merge_info` of [`MergeRun`].

        Returns:
            `dict[str, Any]`: Nothing for a plain Vim.
        """
        return {}


class TokenReducer(Protocol):
    """What can be set as the `token_reducer` of a loaded [`VimModel`] to change how images go through its blocks."""

    def begin(self, stream: Tensor, class_positions: tuple[int, ...]) -> VimRun:
        """Start a forward pass.

        Args:
            stream (`Tensor` of shape `(batch, tokens, hidden_size)`):
                Tokens before block 0.
            class_positions (`tuple[int, ...]`):
                Where the class token(s) are among them.

        Returns:
            [`VimRun`]
        """


__all__ = ["TokenReducer", "VimRun"]
