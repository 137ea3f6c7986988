"""The cache of a block that skips tokens: fewer entries than columns, each with the column it came from."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class TokenSkipCacheLayer(DynamicLayer):
    """Keys and values of the tokens that a block processed.

    It stands in the place of a [`~transformers.cache_utils.DynamicLayer`] in a `DynamicCache` and reports the number
    of columns seen, kept or not, as its length: positions, masks and `generate` go by that of any layer.

    Attributes:
        keys, values (`Tensor` of shape `(batch, key-value heads, entries, head size)`):
            The entries.
        positions (`Tensor` of shape `(batch, entries)`):
            The column of each entry; -1 for a hole, where a sample has fewer entries than another.
        cumulative_length (`int`):
            Columns seen.
        has_holes (`bool`):
            Whether any position can be -1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.positions: Tensor | None = None
        self.cumulative_length = 0
        self.has_holes = False

    @classmethod
    def from_dense(cls, layer: DynamicLayer, real: Tensor | None = None) -> "TokenSkipCacheLayer":
        """Converts a layer that a dense run has filled, exactly.

        Args:
            layer (`DynamicLayer`):
                Holds one entry per column.
            real (`Tensor` of shape `(batch, columns)`, *optional*):
                `True` where a column is no padding; all of them if left out.

        Returns:
            `TokenSkipCacheLayer`: shares the tensors of `layer`.
        """
        converted = cls()
        length = layer.get_seq_length()
        if length:
            converted.lazy_initialization(layer.keys, layer.values)
            converted.keys, converted.values = layer.keys, layer.values
            # Where they are used; an offloaded layer has its keys elsewhere.
            converted.device = layer.device
            columns = torch.arange(length, device=layer.device).expand(layer.keys.shape[0], -1)
            converted.positions = columns if real is None else columns.masked_fill(~real, -1)
            converted.cumulative_length, converted.has_holes = length, real is not None
        return converted

    @property
    def num_entries(self) -> int:
        """Entries stored per sample, holes included."""
        return 0 if self.positions is None else self.positions.shape[1]

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        positions: Tensor | None = None,
        columns: int = 0,
        holes: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Appends entries, and counts the columns they are the survivors of.

        Args:
            key_states (`Tensor` of shape `(batch, key-value heads, entries, head size)`):
                New keys.
            value_states (`Tensor` of the same shape):
                New values.
            positions (`Tensor` of shape `(batch, entries)`):
                Their columns, -1 for a hole.
            columns (`int`):
                New columns, skipped ones included.
            holes (`bool`, *optional*, defaults to `False`):
                Whether `positions` can hold -1.

        Returns:
            `tuple[Tensor, Tensor]`: all keys and values.
        """
        if positions is None:
            raise ValueError(
                "This cache was filled by a model that skips tokens, so its blocks hold different tokens, and a dense "
                "run cannot go on from it. Continue with routing switched on, or start with a new cache."
            )
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], dim=1)
        self.cumulative_length += columns
        self.has_holes |= holes
        return super().update(key_states, value_states)

    def advance(self, columns: int) -> None:
        """Counts columns of which no sample keeps any.

        Args:
            columns (`int`):
                New columns.
        """
        self.cumulative_length += columns

    def get_seq_length(self) -> int:
        """Columns seen, kept or not."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that blocks without routing need."""
        return self.cumulative_length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest columns.

        Args:
            tokens_to_remove (`int`):
                Minus the number of columns to forget; a positive number is the length to keep, as older versions of
                Transformers have it.
        """
        keep = tokens_to_remove if tokens_to_remove > 0 else self.cumulative_length + tokens_to_remove
        if keep >= self.cumulative_length:
            return
        self.cumulative_length = max(keep, 0)
        if self.positions is not None:
            stays = (self.positions >= 0) & (self.positions < self.cumulative_length)
            used = stays.any(0).nonzero().squeeze(-1)
            self._select(lambda tensor, dim: tensor.index_select(dim, used.to(tensor.device)), entries=True)
            stays = stays.index_select(1, used)
            self.positions = self.positions.masked_fill(~stays, -1)
            self.has_holes = not bool(stays.all())

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()
        self.keys = self.values = self.positions = None
        self.is_initialized = self.has_holes = False
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the samples in another order.

        Args:
            beam_idx (`Tensor` of shape `(batch,)`):
                Index of each new sample among the old ones.
        """
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sample.

        Args:
            repeats (`int`):
                How often.
        """
        self._select(lambda tensor, _: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Takes some of the samples.

        Args:
            indices (`Tensor` of shape `(batch,)`):
                Which ones.
        """
        self._select(lambda tensor, _: tensor[indices.to(tensor.device)])

    def _select(self, select: Any, entries: bool = False) -> None:
        """Applies `select(tensor, dimension)` along the samples, or along the entries."""
        if self.positions is not None:
            self.keys, self.values = (select(tensor, 2 if entries else 0) for tensor in (self.keys, self.values))
            self.positions = select(self.positions, 1 if entries else 0)
