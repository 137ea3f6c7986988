"""The forward pass of DyVM: before which blocks it drops tokens, and which scans it runs for which image."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_dyvm import DyVMConfig
from .direction_gates import Gating
from .token_reduction import take_rows
from .token_selection import TokenLayout, decisions_from, fixed_ranks, sample_decisions, sample_exponential
from .vim_run import VimRun


class DyVMRun(VimRun):
    """One forward pass of a DyVM: the layout of the stream at the moment, and everything that was decided so far.

    Args:
        config ([`DyVMConfig`]):
            When and how to choose.
        stream (`Tensor` of shape `(batch, tokens, hidden_size)`):
            Tokens before block 0.
        class_positions (`tuple[int, ...]`):
            Where the class token(s) are among them.
        predictors (`nn.ModuleList`, *optional*):
            One [`TokenPredictor`] per stage, for learned selection.
        training (`bool`, *optional*, defaults to `False`):
            Whether to draw decisions and keep all tokens, or to decide and drop.
        enabled (`bool`, *optional*, defaults to `True`):
            `False` runs every block on all tokens, as a plain Vim does.
        kept_indices, block_gates, generator:
            See [`DyVMModel`].

    Raises:
        ValueError: If forced decisions have the wrong shape.
    """

    config: DyVMConfig

    def __init__(
        self,
        config: DyVMConfig,
        stream: Tensor,
        class_positions: tuple[int, ...],
        predictors: nn.ModuleList | None = None,
        training: bool = False,
        enabled: bool = True,
        kept_indices: Sequence[Tensor] | None = None,
        block_gates: Tensor | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__(config, stream, class_positions)
        self.predictors, self.training = predictors, training
        self.forced_indices, self.forced_gates, self.generator = kept_indices, block_gates, generator
        self._check_forced()
        self.patches_before = self.tokens - config.num_class_tokens
        self.layout = TokenLayout.start(self.batch, self.patches_before, config.cls_token_position, self.device)
        self.counts = config.tokens_kept(self.patches_before)
        layers = config.pruning_layers or [] if enabled and config.enable_token_pruning else []
        self.stages = {block: stage for stage, block in enumerate(layers)}
        self.gates_blocks = enabled and config.enable_block_selection
        self.token_mask: Tensor | None = None
        self.kept: list[Tensor] = []
        self.decisions: list[Tensor] = []
        self.decided: list[Tensor] = []
        self.offsets = torch.tensor(config.block_gate_logit_offset, dtype=torch.float32, device=self.device)
        self.offsets = self.offsets.expand(config.num_hidden_layers, 2)
        self.static = torch.compiler.is_compiling() or torch.jit.is_tracing()
        self.select = config.inference_mode == "select" and not training and not self.static

    def _check_forced(self) -> None:
        stages, blocks = len(self.config.pruning_layers or []), self.config.num_hidden_layers
        kept, gates = self.forced_indices, self.forced_gates
        if kept is not None and len(kept) != stages:
            raise ValueError(f"`kept_indices` needs one (batch, kept) tensor per stage ({stages}); got {len(kept)}.")
        if gates is not None and tuple(gates.shape) != (self.batch, blocks, 2):
            raise ValueError(f"`block_gates` must be {(self.batch, blocks, 2)}; got {tuple(gates.shape)}.")

    def prunes(self, block: int) -> bool:
        """Whether tokens are dropped before a block.

        Args:
            block (`int`):
                Its index.

        Returns:
            `bool`
        """
        return block in self.stages

    def step(self, block: int, layer: nn.Module, stream: Tensor) -> Tensor:
        """Choose tokens if it is time to, and apply a block; see [`VimRun`].

        In training dropped tokens stay, masked behind the others; in evaluation they are gone, and a scan runs for the
        images whose gate is open.
        """
        if self.prunes(block):
            stage = self.stages[block]
            stream = self._mark(stage, stream) if self.training else self._drop(stage, stream)
        if not self.gates_blocks:
            return layer(stream, self.token_mask)[0]
        stream, decided = layer(stream, self.token_mask, gating=self._gating(block))
        self.decided.append(decided)
        return stream

    def class_rows(self) -> Tensor:
        """See [`VimRun`]; the class token goes with the tokens that are left."""
        return self.layout.class_rows

    def pool(self, stream: Tensor, class_rows: Tensor) -> Tensor:
        """See [`VimRun`]; without dropped tokens, of which an image may have nothing but."""
        policy = self.layout.policy
        if policy is None or self.config.pooling == "cls":
            return super().pool(stream, class_rows)
        weights = policy.unsqueeze(2)
        count = weights.sum(1)
        if self.config.pooling == "mean":
            return ((stream * weights).sum(1) / count.clamp(min=1)).to(stream.dtype)
        return take_rows(stream, (count.long() - 1).clamp(min=0)).squeeze(1)

    def _gating(self, block: int) -> Gating:
        config, noise = self.config, None
        forced = None if self.forced_gates is None else self.forced_gates[:, block]
        if self.training and forced is None:
            plus, minus = (sample_exponential((self.batch, 2), self.device, self.generator).log() for _ in range(2))
            noise = minus - plus
        return Gating(
            class_rows=self.layout.class_rows,
            offset=self.offsets[block],
            threshold=config.block_gate_threshold,
            tau=config.block_gumbel_tau,
            noise=noise,
            forced=forced,
            select=self.select,
        )

    def _log_probs(self, stage: int, stream: Tensor) -> Tensor:
        """Of keeping and dropping every patch token, `(batch, patches, 2)`, in stream order."""
        if self.predictors is None:
            raise RuntimeError(
                'This model has no token predictors: it was built with `token_selection="random"` or `"even"`, or '
                "without token pruning. Load it with the setting wanted instead of changing its configuration."
            )
        scores = self.predictors[stage](stream, self.layout.row_weights(class_weight=0.0))
        return scores.gather(1, self.layout.patch_rows.unsqueeze(2).expand(-1, -1, 2))

    def _drop(self, stage: int, stream: Tensor) -> Tensor:
        """Evaluation: the same number of tokens goes on for every image."""
        tokens, kept = self.layout.positions.shape[1], self.counts[stage]
        if self.forced_indices is not None:
            ranks = self._forced_ranks(self.forced_indices[stage])
            kept = ranks.shape[1]
        elif kept == tokens:
            self.kept.append(self.layout.positions)
            return stream
        elif self.config.token_selection == "learned":
            ranks = self._log_probs(stage, stream)[..., 0].topk(kept, dim=1).indices.sort(dim=1).values
        else:
            ranks = self._fixed_ranks(stage, tokens)
        counts = torch.full((self.batch,), kept, device=ranks.device)
        stream, self.layout = self.layout.rearrange(stream, ranks, counts, self.config.cls_token_position)
        self.kept.append(self.layout.positions)
        return stream

    def _forced_ranks(self, patches: Tensor) -> Tensor:
        """Of original patches, `(batch, kept)`, among those that are left."""
        left = self.layout.positions.contiguous()
        ranks = torch.searchsorted(left, patches).clamp(max=left.shape[1] - 1)
        if not self.static and not torch.equal(left.gather(1, ranks), patches):
            raise ValueError("`kept_indices` must be ascending patches that no earlier stage has dropped.")
        return ranks

    def _mark(self, stage: int, stream: Tensor) -> Tensor:
        """Training: drawn decisions; kept tokens come first, the others stay behind them, masked."""
        decisions = self._draw(stage, stream)
        if self.layout.policy is not None:
            decisions = decisions * self.layout.policy
        self.decisions.append(decisions)
        dropped = decisions < 0.5
        order = dropped.to(torch.uint8).argsort(dim=1, stable=True)
        counts = decisions.shape[1] - dropped.sum(1)
        layout = self.layout._replace(policy=decisions)
        stream, self.layout = layout.rearrange(stream, order, counts, self.config.cls_token_position)
        self.token_mask = self.layout.row_weights(class_weight=1.0)
        return stream

    def _draw(self, stage: int, stream: Tensor) -> Tensor:
        """Which patch tokens to keep, `(batch, patches)` 0 or 1, whatever was decided before."""
        tokens, selection = self.layout.positions.shape[1], self.config.token_selection
        if self.forced_indices is not None:
            return decisions_from(self.forced_indices[stage], tokens).gather(1, self.layout.positions)
        if selection == "learned":
            tau = float(self.config.token_gumbel_tau)
            return sample_decisions(self._log_probs(stage, stream), tau, self.generator)
        # Kept tokens stand first, so the ranks of those that are left are the first ones.
        left = self.counts[stage - 1] if stage else tokens
        if selection == "even":
            return decisions_from(self._fixed_ranks(stage, left), tokens)
        noise = sample_exponential((self.batch, left), self.device, self.generator)
        return decisions_from(noise.topk(self.counts[stage], dim=1).indices, tokens)

    def _fixed_ranks(self, stage: int, tokens: int) -> Tensor:
        seed = f"{self.config.token_selection_seed}-{stage}"
        ranks = fixed_ranks(self.config.token_selection, tokens, self.counts[stage], seed)
        return torch.tensor(ranks, device=self.device).expand(self.batch, -1)

    def report(self, detailed: bool = False) -> dict[str, Any]:
        """What was decided: the fields of [`DyVMModelOutput`] after `merge_info`; see [`VimRun`]."""
        values: dict[str, Any] = {"token_positions": self.layout.positions}
        if self.kept:
            shares = [positions.shape[1] / self.patches_before for positions in self.kept]
            values["kept_indices"] = tuple(self.kept)
            values["token_keep_ratio"] = torch.tensor(shares, device=self.device).expand(self.batch, -1)
        if self.decisions:
            values["token_decisions"] = tuple(self.decisions)
            values["token_policy"] = self.layout.policy
            values["token_keep_ratio"] = torch.stack([step.detach().mean(1) for step in self.decisions], dim=1)
        if self.decided:
            gates, logits = torch.stack(self.decided, dim=1).unbind(2)
            values["block_gates"], values["block_gate_logits"] = gates, logits
            values["block_keep_ratio"] = gates.detach().mean((1, 2))
        return values


__all__ = ["DyVMRun"]
