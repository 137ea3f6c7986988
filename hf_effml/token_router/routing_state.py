"""What one forward pass decides: which tokens each block processes. Blocks write into slots of their own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from .configuration_token_router import TokenRouterConfig
from .routing import (
    kept_count,
    router_factors,
    select_budget,
    select_threshold,
    static_priority,
    update_table,
)


@dataclass(frozen=True)
class KeepPlan:
    """Which tokens of a call one block processes.

    Args:
        keep (`Tensor` of shape `(batch, tokens)`):
            `True` for tokens that are processed, never for padding.
        counts (`list[int]`):
            How many they are in each sample.
        is_full (`bool`):
            Whether no real token is skipped.
    """

    keep: Tensor
    counts: list[int]
    is_full: bool = False

    @property
    def kept(self) -> int:
        """Tokens kept in the sample that keeps most."""
        return max(self.counts, default=0)

    def compact(self) -> tuple[Tensor, Tensor | None]:
        """Lists the kept tokens.

        Returns:
            `tuple[Tensor, Tensor | None]`: columns of shape `(batch, tokens)`, those of kept tokens in order and then
            the others, and `True` of shape `(batch, kept)` where a column is that of a kept token; `None` instead if
            all samples keep the same number.
        """
        order = (~self.keep).to(torch.uint8).argsort(dim=1, stable=True)
        if min(self.counts) == self.kept:
            return order, None
        return order, self.keep.gather(1, order[:, : self.kept])


@dataclass
class RoutingState:
    """Decisions of one forward pass, and what they are made from.

    It travels through the model as the keyword argument `token_routing` of every block, so modules hold no state: a
    model may run in several threads, and a block that gradient checkpointing runs twice writes the same values twice.

    Args:
        config ([`TokenRouterConfig`]):
            What to do.
        router (`nn.Module`):
            The router, maybe wrapped by PEFT.
        real (`Tensor` of shape `(batch, tokens)`):
            `True` for new columns that are no padding.
        lengths (`list[int]`):
            How many they are in each sample.
        past (`int`):
            Columns in the cache.
        past_real (`Tensor` of shape `(batch, past)`, *optional*):
            Which of them are no padding; all if left out.
        learning (`bool`, *optional*, defaults to `False`):
            Compute densely, so that gradients reach the router.
        replayed (`Mapping[int, Tensor]`, *optional*):
            Decisions of an earlier run, by block; the router is not asked.
        as_generated (`bool`, *optional*, defaults to `False`):
            Treat the new tokens as generated ones, however many they are.
        generated (`Tensor` of shape `(batch, tokens)`, *optional*):
            Tokens that follow their prompt in the same call: they are not decided on but follow `decode_policy`.
    """

    config: TokenRouterConfig
    router: nn.Module
    real: Tensor
    lengths: list[int]
    past: int = 0
    past_real: Tensor | None = None
    learning: bool = False
    replayed: Mapping[int, Tensor] | None = None
    as_generated: bool = False
    generated: Tensor | None = None
    plans: dict[int, KeepPlan] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.schedule = self.config.schedule
        self.routed = [block for block, sparsity in enumerate(self.schedule) if sparsity > 0]
        self.prompt = self.real if self.generated is None else self.real & ~self.generated
        self.prompt_lengths = self.lengths if self.generated is None else self.prompt.sum(-1).tolist()
        is_long = self.past == 0 or self.real.shape[1] >= self._shortest_prompt
        self.is_prompt = self.replayed is not None or (is_long and not self.as_generated)
        if self.replayed is not None:
            self._replay(self.replayed)
        elif not self.is_prompt:
            self._follow_decode_policy()
        elif not self.config.is_learned:
            self._decide_without_router()

    @property
    def _shortest_prompt(self) -> int:
        return max(self.config.min_tokens, 2)

    @property
    def _asks_router(self) -> bool:
        return self.replayed is None and self.is_prompt and self.config.is_learned and bool(self.routed)

    def wants_score(self, block: int) -> bool:
        """Whether the attention scores of a block are needed by a later one.

        Args:
            block (`int`):
                Index of the block.

        Returns:
            `bool`: the answer.
        """
        if not self._asks_router or block >= self.routed[-1]:
            return False
        return self.config.router_type == "dynamic" or block == self.config.num_protected_first - 1

    def add_score(self, block: int, scores: Tensor) -> None:
        """Takes the attention scores of a block; the one-pass router decides when it has them.

        Args:
            block (`int`):
                Index of the block.
            scores (`Tensor` of shape `(batch, tokens)`):
                One score per new column.
        """
        self.scores[block] = scores.detach().float()
        if self.config.router_type == "one_pass":
            self._ask_router(self.routed, self._table(block + 1))

    def plan_for(self, block: int) -> KeepPlan | None:
        """Says what a block has to process; `None` where it has nothing to decide.

        Args:
            block (`int`):
                Index of the block.

        Returns:
            `KeepPlan` or `None`: the decision.
        """
        if self._asks_router and self.config.router_type == "dynamic" and self.schedule[block] > 0:
            self._ask_router([block], self._table(block))
        return self.plans.get(block)

    def keep_masks(self) -> Tensor:
        """All decisions.

        Returns:
            `Tensor` of shape `(blocks, batch, tokens)`: `True` where a block processed a token.
        """
        masks = [self.plans[block].keep if block in self.plans else self.real for block in range(len(self.schedule))]
        return torch.stack([mask.to(self.real.device) for mask in masks])

    def _table(self, block: int) -> Tensor:
        """The latest score of every token before a block, folded from the slots of the blocks before it."""
        table = torch.zeros(self.prompt.shape, device=self.real.device)
        for earlier in sorted(self.scores):
            if earlier < block:
                plan = self.plans.get(earlier)
                took_part = self.prompt if plan is None else plan.keep.to(table.device)
                table = update_table(table, self.scores[earlier].to(table.device), took_part)
        return table

    def _ask_router(self, blocks: Sequence[int], table: Tensor) -> None:
        """Decides for blocks, from one table of scores."""
        config = self.config
        sparsities = [self.schedule[block] for block in blocks]
        factors = router_factors(table, self.prompt, sparsities, config.normalize_scores)
        logits = self.router(factors)
        self.logits |= dict(zip(blocks, logits, strict=True))
        decided = logits.detach()
        if config.selection == "budget":
            priority = (decided[..., 1] - decided[..., 0]).masked_fill(self._forced(), torch.inf)
            self._set_budget(blocks, lambda counts: select_budget(priority, self.prompt, counts), self._num_forced())
            return
        short = torch.tensor([self._runs_dense(tokens) for tokens in self.prompt_lengths], device=self.prompt.device)
        keep = select_threshold(decided, self.prompt) | self._forced() | (self.prompt & short.unsqueeze(-1))
        self._set(blocks, keep, keep.sum(-1).tolist())

    def _forced(self) -> Tensor:
        """Tokens that learned routers always keep."""
        newest_first = self.prompt.flip(-1).cumsum(-1).flip(-1)
        first = (self.prompt.cumsum(-1) <= self.config.always_keep_first) & self._starts().unsqueeze(-1)
        return self.prompt & (first | (newest_first <= self.config.always_keep_last))

    def _num_forced(self) -> list[int]:
        """How many these are in each sample, if it is long enough."""
        first, last = self.config.always_keep_first, self.config.always_keep_last
        if self.past == 0 or self.past_real is None:
            return [last + (first if self.past == 0 else 0)] * len(self.lengths)
        return [last + first * starts for starts in self._starts().tolist()]

    def _starts(self) -> Tensor:
        """Which samples begin in this call: their first token is the attention sink, that of a later chunk is not."""
        if self.past == 0:
            return torch.ones(len(self.prompt), dtype=torch.bool, device=self.prompt.device)
        if self.past_real is None:
            return torch.zeros(len(self.prompt), dtype=torch.bool, device=self.prompt.device)
        return ~self.past_real.any(-1)

    def _decide_without_router(self) -> None:
        if not self.routed:
            return
        if self.config.router_type == "static":
            sink = self.prompt & (self.prompt.cumsum(-1) == 1) & self._starts().unsqueeze(-1)
            priority = static_priority(self.prompt, sink).expand(len(self.routed), *self.prompt.shape)
        else:
            generator = torch.Generator().manual_seed(self.config.random_seed)
            priority = torch.rand(len(self.schedule), *self.prompt.shape, generator=generator)[self.routed]
            priority = priority.to(self.prompt.device)
        self._set_budget(self.routed, lambda counts: select_budget(priority, self.prompt, counts))

    def _set_budget(
        self, blocks: Sequence[int], select: Callable[[Tensor], Tensor], at_least: Sequence[int] | None = None
    ) -> None:
        """Counts are known from the lengths, so nothing has to wait for the device."""
        at_least = [0] * len(self.lengths) if at_least is None else at_least
        counts = [
            [
                tokens if self._runs_dense(tokens) else kept_count(tokens, self.schedule[block], forced)
                for tokens, forced in zip(self.prompt_lengths, at_least, strict=True)
            ]
            for block in blocks
        ]
        self._set(blocks, select(torch.tensor(counts, device=self.prompt.device)), counts)

    def _runs_dense(self, tokens: int) -> bool:
        return tokens < self.config.min_tokens

    @cached_property
    def _skipped_in_decode(self) -> list[int]:
        """Blocks that generated tokens skip, in all samples alike, so that batches stay regular."""
        config = self.config
        if config.decode_policy == "keep":
            return []
        return [block for block in self.routed if self.schedule[block] > config.decode_threshold]

    def _follow_decode_policy(self) -> None:
        if self._skipped_in_decode:
            nothing = KeepPlan(torch.zeros_like(self.real), [0] * len(self.lengths))
            self.plans = dict.fromkeys(self._skipped_in_decode, nothing)

    def _replay(self, masks: Mapping[int, Tensor]) -> None:
        blocks = sorted(masks)
        if blocks:
            keep = torch.stack([masks[block].to(self.real.device).bool() for block in blocks]) & self.real
            self._set(blocks, keep, keep.sum(-1).tolist())

    def _set(self, blocks: Sequence[int], keep: Tensor, counts: list[list[int]]) -> None:
        for block, mask, kept in zip(blocks, keep, counts, strict=True):
            if self.generated is not None and block not in self._skipped_in_decode:
                mask = mask | (self.real & self.generated)
                kept = mask.sum(-1).tolist()
            self.plans[block] = KeepPlan(mask, kept, is_full=kept == self.lengths)
