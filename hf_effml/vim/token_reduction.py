"""Merging and pruning tokens of a sequence: plans are made from a similarity feature, then applied to any tensor.

Tensors in, tensors out; nothing here knows about a model. Every shape follows from the arguments, so it compiles.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


Distance = Literal["cosine", "l1", "l2"]
Reduce = Literal["mean", "average", "amax", "amin"]
ClassPosition = Literal["proportional", "exact"]

_EPS = 1e-12
# Adding 8 rounds scores to multiples of 2^-20: equal pairs stay equal in whatever order a device sums products.
_TIE_GRID = 8.0


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """Which tokens stay, which leave and where those go.

    Made by [`bipartite_plan`], [`local_plan`] or [`random_plan`].

    Args:
        keep (`Tensor` of shape `(batch, tokens - r)`):
            Input position of every output token.
        removed (`Tensor` of shape `(batch, r)`):
            Input positions of the tokens that leave.
        target (`Tensor` of shape `(batch, r)`):
            Output position each of them is merged into; -1 if it is dropped.
        protected (`tuple[int, ...]` or `Tensor` of shape `(batch, k)`):
            Output positions of the protected tokens.
        pruned (`bool`, *optional*, defaults to `False`):
            Whether the leaving tokens are dropped.
    """

    keep: Tensor
    removed: Tensor
    target: Tensor
    protected: tuple[int, ...] | Tensor
    pruned: bool = False

    @property
    def slot(self) -> Tensor:
        """`(batch, tokens)`: the output position of every input token, -1 if it is dropped."""
        batch, kept = self.keep.shape
        slot = self.keep.new_empty(batch, kept + self.removed.shape[1])
        places = torch.arange(kept, device=slot.device).expand(batch, -1)
        return slot.scatter_(1, self.keep, places).scatter_(1, self.removed, self.target)

    @property
    def class_index(self) -> Tensor | None:
        """`(batch,)`: where the protected token is afterwards; `(batch, k)` for k of them, `None` without any."""
        index = _per_sample(self.protected, self.keep)
        return index.squeeze(1) if index.shape[1] else None

    def merge(self, x: Tensor, size: Tensor | None = None, reduce: Reduce = "mean") -> tuple[Tensor, Tensor]:
        """Apply the plan; differentiable in `x`.

        Args:
            x (`Tensor` of shape `(batch, tokens, channels)`):
                What to reduce; computed in float32 at least.
            size (`Tensor` of shape `(batch, tokens, 1)`, *optional*):
                How many original tokens each token stands for, which is its weight; one each if unset.
            reduce (`str`, *optional*, defaults to `"mean"`):
                `"mean"` is the size-weighted mean of a group, and its sizes add up. `"average"` is the same mean, but
                the sizes are averaged too, so that later means weigh differently. `"amax"` and `"amin"` take the
                extreme of size times value, and of the sizes, and divide. Pruning ignores it.

        Returns:
            `tuple[Tensor, Tensor]`: The output `(batch, tokens - r, channels)` in the type of `x`, and its sizes
            `(batch, tokens - r, 1)`.
        """
        tokens = self.keep.shape[1] + self.removed.shape[1]
        if x.shape[1] != tokens:
            raise ValueError(f"This plan is for {tokens} tokens; got `x` with {x.shape[1]}.")
        size = x.new_ones(*x.shape[:2], 1, dtype=torch.float32) if size is None else size
        if self.removed.shape[1] == 0:
            return x, size
        if self.pruned:
            return take_rows(x, self.keep), size.squeeze(2).gather(1, self.keep).unsqueeze(2)
        if reduce not in ("mean", "average", "amax", "amin"):
            raise ValueError(f'`reduce` must be "mean", "average", "amax" or "amin"; got {reduce!r}.')
        combine = self._mean if reduce in ("mean", "average") else self._extreme
        merged, total = combine(_full_precision(x), size.squeeze(2), reduce)
        return merged.to(x.dtype), total.unsqueeze(2)

    def _mean(self, x: Tensor, size: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
        """Copy the survivors, then add weight * (leaving token - survivor): only r rows are computed."""
        batch, tokens, _ = x.shape
        leaving = size.gather(1, self.removed)
        total = size.gather(1, self.keep).scatter_add_(1, self.target, leaving)
        weight = leaving / total.gather(1, self.target)
        x, target = x.flatten(0, 1), _row_numbers(self.target, self.keep.shape[1])
        out = x.index_select(0, _row_numbers(self.keep, tokens))
        step = x.index_select(0, _row_numbers(self.removed, tokens)) - out.index_select(0, target)
        out = out.index_add_(0, target, step * weight.view(-1, 1).to(x.dtype))
        if reduce == "average":
            total = total / torch.ones_like(total).scatter_add_(1, self.target, torch.ones_like(leaving))
        return out.view(batch, self.keep.shape[1], x.shape[1]), total

    def _extreme(self, x: Tensor, size: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
        total = size.gather(1, self.keep).scatter_reduce(1, self.target, size.gather(1, self.removed), reduce)
        x = x * size.unsqueeze(2).to(x.dtype)
        index = self.target.unsqueeze(2).expand(-1, -1, x.shape[2])
        out = take_rows(x, self.keep).scatter_reduce(1, index, take_rows(x, self.removed), reduce)
        return out / total.unsqueeze(2).to(x.dtype), total

    def unmerge(self, y: Tensor) -> Tensor:
        """Give every input token the value of its output token; dropped tokens get zeros.

        Args:
            y (`Tensor` of shape `(batch, tokens - r, channels)`):
                One row per output token.

        Returns:
            `Tensor` of shape `(batch, tokens, channels)`: One row per input token.
        """
        slot = self.slot
        if not self.pruned:
            return take_rows(y, slot)
        return take_rows(y, slot.clamp(min=0)).masked_fill(slot.unsqueeze(2) < 0, 0)


@dataclass
class MergeInfo:
    """What token merging did to a batch, with `output_merge_info=True`.

    Args:
        sizes (`Tensor` of shape `(batch, tokens, 1)`):
            How many input tokens each remaining token stands for.
        slot (`Tensor` of shape `(batch, input tokens)`):
            Where every input token, class tokens included, ended up among the remaining ones; -1 if it was pruned.
        class_index (`Tensor` of shape `(batch, class tokens)`):
            Where the class token(s) ended up.
        tokens_per_layer (`list[int]`):
            Number of tokens inside every block.
    """

    sizes: Tensor
    slot: Tensor
    class_index: Tensor
    tokens_per_layer: list[int]


def bipartite_plan(
    metric: Tensor,
    r: int,
    protected: int | Sequence[int] | Tensor | None = None,
    *,
    distance: Distance = "cosine",
    choose: int = 1,
    keep_order: bool = True,
    class_position: ClassPosition = "proportional",
    prune: bool = False,
    first_source: int = 0,
) -> TokenPlan:
    """Match tokens in two alternating halves and let the `r` most similar pairs merge.

    This is the matching of ToMe (https://huggingface.co/papers/2210.09461) as R-MeeTo uses it
    (https://huggingface.co/papers/2412.12496).

    The unprotected tokens, in sequence order, are sources and destinations in turn. Every source picks its most
    similar destination; the `r` sources with the best match leave. Ties go to the lower position. No gradient flows.

    Args:
        metric (`Tensor` of shape `(batch, tokens, features)`):
            What similarity is measured on.
        r (`int`):
            Tokens to remove; at most half of the unprotected ones are.
        protected (`int`, `Sequence[int]` or `Tensor` of shape `(batch,)` or `(batch, k)`, *optional*):
            Positions, class tokens mostly, that take no part. A tensor gives every sample its own.
        distance (`str`, *optional*, defaults to `"cosine"`):
            On unit vectors: `"cosine"`, `"l1"`, or `"l2"`, which ranks like cosine.
        choose (`int`, *optional*, defaults to 1):
            1 picks the best destination, 3 the third best (an ablation).
        keep_order (`bool`, *optional*, defaults to `True`):
            Keep survivors in sequence order, which a scan needs. Otherwise the remaining sources come first, by
            falling similarity, then the destinations.
        class_position (`str`, *optional*, defaults to `"proportional"`):
            `"proportional"` puts a protected token from position p of T to `floor(p * (T - r) / T)`, the same in the
            whole batch, as the official code does; `"exact"` keeps it between its true neighbours, per sample.
        prune (`bool`, *optional*, defaults to `False`):
            Drop the sources instead of merging them.
        first_source (`int`, *optional*, defaults to 0):
            0 if the first unprotected token is a source; 1 if it is a destination, as in ToMe with a class token in
            front.

    Returns:
        [`TokenPlan`]

    Raises:
        ValueError: If an option has an impossible value.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.vim.token_reduction import bipartite_plan
    >>> metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [1.0, 0.1], [0.0, 1.0]]])
    >>> plan = bipartite_plan(metric, r=1, protected=4)
    >>> plan.slot
    tensor([[0, 1, 2, 2, 3]])

    ```
    """
    if distance not in ("cosine", "l1", "l2"):
        raise ValueError(f'`distance` must be "cosine", "l1" or "l2"; got {distance!r}.')
    if choose < 1:
        raise ValueError(f"`choose` must be at least 1; got {choose}.")
    split = _Split.make(metric, r, protected, first_source)
    if split.r == 0:
        return split.identity()
    unit = split.unit_rows(metric.detach())
    scores = _scores(unit[:, first_source::2], unit[:, 1 - first_source :: 2], distance)
    if choose > 1:
        ranked = scores.sort(dim=-1, descending=True, stable=True)
        column = min(choose, scores.shape[2]) - 1
        score, partner = ranked.values[..., column], ranked.indices[..., column]
        return split.plan(score, lambda chosen: partner.gather(1, chosen), keep_order, class_position, prune)

    def best(chosen: Tensor) -> Tensor:
        # A CPU finds maxima many times faster than their positions, which only the r chosen rows need.
        return take_rows(scores, chosen).argmax(dim=-1)

    return split.plan(scores.amax(dim=-1), best, keep_order, class_position, prune)


def local_plan(
    metric: Tensor,
    r: int,
    protected: int | Sequence[int] | Tensor | None = None,
    *,
    distance: Distance = "cosine",
    keep_order: bool = True,
    class_position: ClassPosition = "proportional",
    prune: bool = False,
) -> TokenPlan:
    """As [`bipartite_plan`], but a source may only join one of its two neighbours in the sequence.

    Cost grows with the number of tokens instead of its square.

    Args:
        metric (`Tensor` of shape `(batch, tokens, features)`):
            What similarity is measured on.
        r, protected, distance, keep_order, class_position, prune:
            See [`bipartite_plan`].

    Returns:
        [`TokenPlan`]

    Raises:
        ValueError: If an option has an impossible value.
    """
    if distance not in ("cosine", "l1", "l2"):
        raise ValueError(f'`distance` must be "cosine", "l1" or "l2"; got {distance!r}.')
    split = _Split.make(metric, r, protected)
    if split.r == 0:
        return split.identity()
    unit = split.unit_rows(metric.detach())
    left, right = unit[:, :-1], unit[:, 1:]
    pairs = -(left - right).abs().sum(-1) if distance == "l1" else (left * right).sum(-1)
    # Entry s is the pair of free token s with the one before it, entry s + 1 with the one after.
    pairs = F.pad(pairs + _TIE_GRID, (1, 1), value=-torch.inf)
    sources = (unit.shape[1] + 1) // 2
    both = torch.stack([pairs[:, 0::2][:, :sources], pairs[:, 1::2]], dim=-1)
    score, side = both.max(dim=-1)
    partner = side + torch.arange(-1, sources - 1, device=side.device)
    return split.plan(score, lambda chosen: partner.gather(1, chosen), keep_order, class_position, prune)


def random_plan(
    metric: Tensor,
    r: int,
    protected: int | Sequence[int] | Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    keep_order: bool = True,
    class_position: ClassPosition = "proportional",
    prune: bool = False,
) -> TokenPlan:
    """Random sources leave for random destinations: the baseline that a matching must beat.

    The same pairs are drawn for the whole batch, so that a sample's result does not depend on the others.

    Args:
        metric (`Tensor` of shape `(batch, tokens, features)`):
            Only its shape and device count.
        generator (`torch.Generator`, *optional*):
            A CPU generator, for a repeatable draw.
        r, protected, keep_order, class_position, prune:
            See [`bipartite_plan`].

    Returns:
        [`TokenPlan`]
    """
    split = _Split.make(metric, r, protected)
    if split.r == 0:
        return split.identity()
    free = split.free.shape[-1]
    score = torch.rand((free + 1) // 2, generator=generator).to(metric.device)
    partner = torch.randint(free // 2, score.shape, generator=generator).to(metric.device)
    score = score.expand(metric.shape[0], -1)
    return split.plan(score, lambda chosen: partner[chosen], keep_order, class_position, prune)


def compose(first: TokenPlan, second: TokenPlan) -> TokenPlan:
    """One plan that does what `first` and then `second` do.

    Args:
        first ([`TokenPlan`]):
            Applied first.
        second ([`TokenPlan`]):
            Made for the output of `first`.

    Returns:
        [`TokenPlan`]

    Raises:
        ValueError: If one of them merges and the other prunes.
    """
    if first.pruned != second.pruned and first.removed.shape[1] and second.removed.shape[1]:
        raise ValueError("A merging and a pruning plan cannot be composed. Use the same mode for both.")
    slot = second.slot
    moved = slot.gather(1, first.target.clamp(min=0)).masked_fill(first.target < 0, -1)
    return TokenPlan(
        keep=first.keep.gather(1, second.keep),
        removed=torch.cat([first.removed, first.keep.gather(1, second.removed)], dim=1),
        target=torch.cat([moved, second.target], dim=1),
        protected=second.protected,
        pruned=first.pruned or second.pruned,
    )


class _Split(NamedTuple):
    """The unprotected ("free") tokens as alternating sources and destinations, and how many sources leave."""

    batch: int
    tokens: int
    r: int
    protected: tuple[int, ...] | Tensor
    free: Tensor  # (batch, n): positions of the free tokens
    first_source: int

    @classmethod
    def make(
        cls, metric: Tensor, r: int, protected: int | Sequence[int] | Tensor | None, first_source: int = 0
    ) -> "_Split":
        # Traced, a number of tokens would be a tensor; that of images is the same for all.
        batch, tokens = metric.shape[0], int(metric.shape[1])
        if r < 0:
            raise ValueError(f"`r` must not be negative; got {r}.")
        if isinstance(protected, Tensor):
            places = (protected.unsqueeze(1) if protected.dim() == 1 else protected).sort(dim=1).values
            free = torch.arange(tokens - places.shape[1], device=metric.device).expand(batch, -1)
            for place in places.unbind(1):
                free = free + (free >= place.unsqueeze(1))
            r = min(r, (tokens - int(places.shape[1])) // 2)
            return cls(batch, tokens, r, places, free, first_source)
        given = () if protected is None else (protected,) if isinstance(protected, int) else protected
        positions = tuple(sorted(given))
        if positions and not 0 <= positions[0] <= positions[-1] < tokens:
            raise ValueError(f"`protected` must be positions from 0 to {tokens - 1}; got {positions}.")
        free = torch.arange(tokens - len(positions), device=metric.device)
        for count, position in enumerate(positions):
            free[position - count :].add_(1)
        r = min(r, (tokens - len(positions)) // 2)
        return cls(batch, tokens, r, positions, free.expand(batch, -1), first_source)

    def unit_rows(self, x: Tensor) -> Tensor:
        """The free rows as unit vectors, at the price of one copy: fresh memory costs a CPU more than the division."""
        if isinstance(self.protected, Tensor):
            rows = take_rows(x, self.free)
        elif not self.protected or self.batch == 0:
            rows = x[:, : self.free.shape[1]].clone()
        else:
            rows = x.index_select(1, self.free[0])
        rows = _full_precision(rows)
        return rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True).add_(_EPS))

    def identity(self) -> TokenPlan:
        keep = torch.arange(self.tokens, device=self.free.device).expand(self.batch, -1)
        return TokenPlan(keep, keep[:, :0], keep[:, :0], self.protected)

    def plan(
        self,
        score: Tensor,
        partner_of: Callable[[Tensor], Tensor],
        keep_order: bool,
        class_position: ClassPosition,
        prune: bool,
    ) -> TokenPlan:
        """From the score of every source, `(batch, sources)`, and what gives the destinations of chosen ones."""
        exact = class_position == "exact"
        if not exact and class_position != "proportional":
            raise ValueError(f'`class_position` must be "proportional" or "exact"; got {class_position!r}.')
        if exact and not keep_order:
            raise ValueError('`class_position="exact"` needs `keep_order=True`; without an order no place is exact.')
        if isinstance(self.protected, Tensor) and not exact:
            raise ValueError('`protected` per sample needs `class_position="exact"`.')
        if prune:
            # A token that is not finite must reach the output, so it is never among the dropped ones.
            score = score.masked_fill(score.isnan(), -torch.inf)
        ranking = score.argsort(dim=-1, descending=True, stable=True)
        chosen = ranking[:, : self.r]
        removed = self.free[:, self.first_source :: 2].gather(1, chosen)
        partner = partner_of(chosen)
        if keep_order:
            into = self.free[:, 1 - self.first_source :: 2].gather(1, partner)
            keep, target, protected = self._in_order(chosen, into, exact)
        else:
            keep, target, protected = self._by_similarity(ranking[:, self.r :], partner)
        target = torch.full_like(target, -1) if prune else target
        return TokenPlan(keep, removed, target, protected, prune)

    def _in_order(self, chosen: Tensor, into: Tensor, exact: bool) -> tuple[Tensor, Tensor, tuple[int, ...] | Tensor]:
        """Survivors by position; class tokens where they are, or where the official rule puts them."""
        kept = self.tokens - self.r
        keys = self.free.clone()
        # Those that leave sort to the end.
        keys[:, self.first_source :: 2].scatter_(1, chosen, self.tokens)
        if exact:
            fixed = _per_sample(self.protected, keys)
            keep = torch.cat([keys, fixed], dim=1).sort(dim=1).values[:, :kept]
        else:
            moved = _scaled(self.protected, kept, self.tokens, kept)
            keep = self._insert_protected(keys.sort(dim=1).values[:, : kept - len(moved)], moved)
        places = torch.arange(kept, device=keys.device)
        slot = keep.new_empty(self.batch, self.tokens).scatter_(1, keep, places.expand(self.batch, -1))
        protected = slot.gather(1, fixed) if exact else moved
        return keep, slot.gather(1, into), protected

    def _by_similarity(self, remaining: Tensor, partner: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """The remaining sources, by falling score, with the protected tokens among them, then the destinations."""
        kept = remaining.shape[1]
        moved = _scaled(self.protected, kept, kept + self.r, kept + len(self.protected))
        keep = self._insert_protected(self.free[:, self.first_source :: 2].gather(1, remaining), moved)
        return torch.cat([keep, self.free[:, 1 - self.first_source :: 2]], dim=1), partner + keep.shape[1], moved

    def _insert_protected(self, keep: Tensor, places: tuple[int, ...]) -> Tensor:
        """The protected tokens' positions among those of the others, at these places of the result."""
        parts, start = [], 0
        for count, (old, new) in enumerate(zip(self.protected, places, strict=True)):
            parts += [keep[:, start : new - count], keep.new_full((self.batch, 1), old)]
            start = new - count
        return torch.cat([*parts, keep[:, start:]], dim=1)


def _scaled(positions: Sequence[int], new: int, old: int, length: int) -> tuple[int, ...]:
    """The official rule for class tokens: from p to `floor(p * new / old)`; several stay apart and below `length`."""
    moved: list[int] = []
    for count, position in enumerate(positions):
        lowest = moved[-1] + 1 if moved else 0
        highest = length - len(positions) + count
        moved.append(min(max(position * new // old, lowest), highest))
    return tuple(moved)


def _per_sample(positions: tuple[int, ...] | Tensor, like: Tensor) -> Tensor:
    if isinstance(positions, Tensor):
        return positions
    return torch.tensor(positions, dtype=torch.long, device=like.device).expand(like.shape[0], -1)


def _row_numbers(index: Tensor, rows: int) -> Tensor:
    """`index` `(batch, n)` into `rows` rows per sample, as row numbers of the flattened batch."""
    batch = index.shape[0]
    if batch == 1 and not torch.jit.is_tracing():
        return index.view(-1)
    return (index + torch.arange(0, batch * rows, rows, device=index.device).unsqueeze(1)).view(-1)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[b, index[b]]` for every sample; copying whole rows is many times faster than `gather` on a CPU."""
    rows = x.flatten(0, 1).index_select(0, _row_numbers(index, x.shape[1]))
    return rows.view(*index.shape, rows.shape[1])


def _full_precision(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _scores(source: Tensor, destination: Tensor, distance: Distance) -> Tensor:
    """`(batch, sources, destinations)`: the larger, the more alike. Unit vectors rank the same by cosine and by l2."""
    if distance == "l1":
        return _TIE_GRID - torch.cdist(source, destination, p=1.0)
    with _without_autocast(source):
        return torch.bmm(source, destination.mT).add_(_TIE_GRID)


def _without_autocast(x: Tensor) -> AbstractContextManager:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


__all__ = [
    "MergeInfo",
    "TokenPlan",
    "bipartite_plan",
    "compose",
    "local_plan",
    "random_plan",
]
