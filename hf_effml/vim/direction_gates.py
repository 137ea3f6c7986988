"""The gates of DyVM: which scan directions a block runs for which image, and the mixer that leaves the others out."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .configuration_dyvm import DyVMConfig
from .selective_scan import ScanStream, selective_scan
from .token_reduction import take_rows
from .token_selection import straight_through
from .vim_blocks import VimBlock, VimMixer


class Gating(NamedTuple):
    """How a mixer decides which directions to scan.

    Args:
        class_rows (`Tensor` of shape `(batch, class tokens)`):
            The tokens that decide; without any, the mean does.
        offset (`Tensor` of shape `(2,)`):
            Added to the logits.
        threshold (`float`, *optional*):
            Probability above which a scan runs; `None` gives soft gates with noise.
        tau (`float`):
            Temperature with noise.
        noise (`Tensor` of shape `(batch, 2)`, *optional*):
            Difference of two Gumbel draws, in training.
        forced (`Tensor` of shape `(batch, 2)`, *optional*):
            The gates, if they are decided already.
        select (`bool`):
            Whether closed directions are left out, instead of multiplied by 0.
    """

    class_rows: Tensor
    offset: Tensor
    threshold: float | None
    tau: float
    noise: Tensor | None
    forced: Tensor | None
    select: bool

    def decide(self, logits: Tensor) -> Tensor:
        """Logits to gates.

        Args:
            logits (`Tensor` of shape `(batch, 2)`):
                Offset included.

        Returns:
            `Tensor` of shape `(batch, 2)`: 0 or 1, with the gradient of the probability under noise.
        """
        if self.forced is not None:
            return self.forced.to(logits.dtype)
        threshold = 0.5 if self.threshold is None else self.threshold
        if self.noise is None:
            return (logits > math.log(threshold / (1 - threshold))).to(logits.dtype)
        probability = torch.sigmoid((logits + self.noise) / self.tau)
        if self.threshold is None:
            return probability
        return straight_through((probability > threshold).to(logits.dtype), probability)


class DyVMMixer(VimMixer):
    """The mixer of Vim with a gate on each direction, read off the projected class token."""

    def __init__(self, config: DyVMConfig):
        super().__init__(config)
        if config.enable_block_selection:
            # Logits of the two directions from the projected class token; both start open for every image.
            self.block_head = nn.Linear(2 * config.intermediate_size, 2)
            self.block_head.starts_open = True

    def forward(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None = None,
        *plain: Any,
        gating: Gating | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix tokens along the sequence, in the directions that are open.

        Args:
            hidden_states (`Tensor` of shape `(batch, tokens, hidden_size)`):
                Normalised tokens.
            token_mask (`Tensor` of shape `(batch, tokens)`, *optional*):
                See [`VimMixer`].
            gating ([`Gating`], *optional*):
                How to decide the gates; without it this is a plain mixer.
            plain, options (`tuple`, `dict`, *optional*):
                What only a plain mixer looks at.

        Returns:
            `tuple[Tensor, Tensor | None]`: The output `(batch, tokens, hidden_size)`, and with `gating` the gates and
            their logits `(batch, 2, 2)`.
        """
        if gating is None:
            return super().forward(hidden_states, token_mask, *plain, **options)
        projected = self.in_proj(hidden_states)
        logits = self.block_head(self._summary(projected, gating.class_rows, token_mask)).float() + gating.offset
        gates = gating.decide(logits)
        u, z = projected.chunk(2, dim=-1)
        # What was scanned is held until the projection: memory that is freed before it goes back to the system.
        y, _streams = self._scan_selected(u, gates) if gating.select else self._scan(u, token_mask, gates)
        return self._output(y, z), torch.stack([gates, logits], dim=1)

    def _summary(self, projected: Tensor, class_rows: Tensor, token_mask: Tensor | None) -> Tensor:
        """What the gates look at: the class token(s), or the mean of the kept tokens where there is none."""
        if class_rows.shape[1]:
            return take_rows(projected, class_rows).mean(1)
        if token_mask is None:
            return projected.mean(1)
        total = torch.bmm(token_mask.unsqueeze(1).to(projected.dtype), projected).squeeze(1)
        return total / token_mask.sum(1, keepdim=True).clamp(min=1).to(projected.dtype)

    def _scan_selected(self, u: Tensor, gates: Tensor) -> tuple[Tensor, list[ScanStream]]:
        """As `_scan`, each direction for the images whose gate is open only; without a copy where all are."""
        opened = gates.tolist()
        streams: list[ScanStream] = []
        rows_of = []
        for direction, suffix in enumerate(("", "_b")):
            rows = [row for row, pair in enumerate(opened) if pair[direction] > 0]
            if rows:
                index = None if len(rows) == len(u) else torch.tensor(rows, device=u.device)
                part = u if index is None else u.index_select(0, index)
                streams.append(self._stream(part, suffix, None))
                rows_of.append(index)
        if not streams:
            return torch.zeros_like(u), streams
        outputs = list(zip(selective_scan(*streams), rows_of, strict=True))
        # A direction that all images take is the buffer that the other is added to.
        outputs.sort(key=lambda output: output[1] is not None)
        (total, index), *others = outputs
        if index is not None:
            total = total.new_zeros(u.shape).index_copy_(0, index, total)
        for y, index in others:
            total = total.add_(y) if index is None else total.index_add_(0, index, y)
        return total, streams


class DyVMBlock(VimBlock):
    """One block on the residual stream. With `gating` it also returns the gates and their logits `(batch, 2, 2)`."""

    mixer_class = DyVMMixer


__all__ = ["DyVMBlock", "DyVMMixer", "Gating"]
