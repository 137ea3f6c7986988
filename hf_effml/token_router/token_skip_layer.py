"""How a decoder block runs on some of its tokens: around the unchanged block, not instead of it."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .gate_gradients import key_gate_gradient
from .routing_state import KeepPlan, RoutingState
from .token_skip_cache import TokenSkipCacheLayer


# `past_key_values` until Transformers 5.23, `cache` from then on.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"
# For type checkers: the next class in line is that of the block.
_Block: Any = nn.Module if TYPE_CHECKING else object
# Queries scored at a time when all of them count.
_QUERY_CHUNK = 128


class TokenSkipMixin(_Block):
    """Lets a decoder block skip tokens: `type("TokenSkipX", (TokenSkipMixin, X), {})`.

    Parameters keep their names. Without the keyword argument `token_routing` a block is what it was.
    """

    def forward(
        self, hidden_states: Tensor, *args: Any, token_routing: RoutingState | None = None, **kwargs: Any
    ) -> Tensor:
        """Runs the block on the tokens that `token_routing` keeps.

        Args:
            hidden_states (`Tensor` of shape `(batch, tokens, channels)`):
                Input of the block.
            args (`tuple`):
                Passed on to the block.
            token_routing ([`RoutingState`], *optional*):
                Decisions of this forward pass; without them the block is dense.
            kwargs (`dict`):
                Passed on to the block.

        Returns:
            `Tensor` of shape `(batch, tokens, channels)`: its output; the input, where a token is skipped.
        """
        if token_routing is None:
            return super().forward(hidden_states, *args, **kwargs)
        call = _BlockCall(self, super().forward, hidden_states, token_routing, kwargs)
        return call.run()


@dataclass
class _CacheView:
    """What a block sees as its cache: notes the keys it attends to, and maybe changes what is stored."""

    store: Callable[[Tensor, Tensor, int, tuple, dict], tuple[Tensor, Tensor]]
    keys: Any = None
    values: Any = None

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = self.store(key, value, layer_idx, args, kwargs)
        self.keys, self.values = key.detach(), value.detach()
        return key, value


@dataclass
class _BlockCall:
    """One block in one forward pass."""

    block: Any
    dense: Callable[..., Tensor]
    hidden: Tensor
    routing: RoutingState
    kwargs: dict[str, Any]

    @cached_property
    def index(self) -> int:
        return self.block.self_attn.layer_idx

    @cached_property
    def cache(self) -> Cache | None:
        return self.kwargs.get(CACHE_ARGUMENT)

    @cached_property
    def implementation(self) -> str:
        return self.block.self_attn.config._attn_implementation

    @cached_property
    def rotary(self) -> tuple[Tensor, Tensor]:
        return self.kwargs["position_embeddings"]

    def run(self) -> Tensor:
        plan = self.routing.plan_for(self.index)
        if plan is not None and self.routing.learning:
            return self._run_soft(plan)
        if plan is not None and not plan.is_full:
            if self.routing.config.skip_unit == "mlp":
                return self._run_mlp_on_some(plan)
            if self.routing.config.kv_policy == "keep":
                return self._run_queries_on_some(plan)
            return self._run_on_some(plan)
        skip_layer = self._existing_skip_layer()
        if skip_layer is not None:
            return self._run_on_some(KeepPlan(self.routing.real, self.routing.lengths, is_full=True))
        return self._run_dense()

    # Nothing skipped

    def _run_dense(self) -> Tensor:
        if not self.routing.wants_score(self.index):
            return self.dense(self.hidden, **self.kwargs)
        view = _CacheView(self._store_as_it_is)
        output = self.dense(self.hidden, **(self.kwargs | {CACHE_ARGUMENT: view}))
        self._add_dense_score(view.keys)
        return output

    def _store_as_it_is(self, key: Tensor, value: Tensor, layer: int, args: tuple, more: dict) -> Any:
        return (key, value) if self.cache is None else self.cache.update(key, value, layer, *args, **more)

    @cached_property
    def _padded(self) -> bool:
        """Whether any new column is padding."""
        return min(self.routing.lengths) < self.hidden.shape[1]

    # Skipped tokens leave no key behind

    def _run_on_some(self, plan: KeepPlan) -> Tensor:
        """Gathers the kept tokens, runs the block on them, and scatters its output."""
        layer = self._skip_layer()
        columns, kept = self.hidden.shape[1], plan.kept
        if kept == 0:
            if layer is not None:
                layer.advance(columns)
                self._bring_next_layer()
            return self.hidden
        everything = plan.is_full and not self._padded
        if everything:
            index = torch.arange(columns, device=self.hidden.device).expand(len(self.hidden), -1)
            valid, given, rotary = None, self.hidden, self.rotary
        else:
            order, valid = self._compact(plan)
            index = order[:, :kept]
            rows = _flat(index, columns)
            given, rotary = _take(self.hidden, rows, index), tuple(_take_columns(part, index) for part in self.rotary)
        positions = index + self.routing.past
        positions = positions if valid is None else positions.masked_fill(~valid, -1)
        past, holes = (None, False) if layer is None else (layer.positions, layer.has_holes)
        mask = self._mask(positions, past, holes, valid)

        def store(key: Tensor, value: Tensor, layer_idx: int, args: tuple, more: dict) -> Any:
            if self.cache is None:
                return key, value
            more = more | {"positions": positions, "columns": columns, "holes": valid is not None}
            return self.cache.update(key, value, layer_idx, *args, **more)

        view = _CacheView(store)
        output = self._block(given, mask, rotary, view)
        if self.routing.wants_score(self.index):
            own = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
            keys_real = own if past is None else torch.cat([past >= 0, own], dim=1)
            took_part = valid if self.routing.generated is None else own & self.routing.prompt.gather(1, index)
            self._add_score(given, rotary, view.keys, took_part, keys_real, index)
        if everything:
            return output
        if valid is not None:
            output = torch.where(valid.unsqueeze(-1), output, given)
        return _put(self.hidden, rows, output)

    def _bring_next_layer(self) -> None:
        """What an offloaded cache does when it is updated, for a block that has nothing to add."""
        cache: Any = self.cache
        if cache.offloading:
            cache.prefetch(self.index + 1, cache.only_non_sliding)
            cache.offload(self.index, cache.only_non_sliding)

    def _mask(self, positions: Tensor, past: Tensor | None, holes: bool, valid: Tensor | None) -> Tensor | None:
        """The attention mask of kept tokens; `None` where the kernel's own causal mask is exact."""
        flash = "flash" in self.implementation
        if past is None and self.implementation != "eager":
            # Kept tokens are in order and fillers come after them.
            return valid if flash else None
        if past is not None and not holes and (positions.shape[1] == 1 and valid is None):
            return None
        if flash:
            if valid is None and not holes:
                return None
            if positions.shape[1] == 1:
                return torch.cat([past, positions], dim=1) >= 0
            raise ValueError(
                f'`attn_implementation="{self.implementation}"` cannot take several new tokens on a cache in which '
                'samples hold different numbers of tokens. Use "sdpa", or pass one sample at a time.'
            )
        keys = positions if past is None else torch.cat([past, positions], dim=1)
        visible = (keys >= 0).unsqueeze(1) & (keys.unsqueeze(1) <= positions.unsqueeze(2))
        # A filler sees itself: a row without any key would be NaN.
        own = torch.eye(positions.shape[1], dtype=torch.bool, device=keys.device)
        visible[:, :, keys.shape[1] - positions.shape[1] :] |= own & (positions < 0).unsqueeze(2)
        return self._as_mask(visible)

    # Skipped tokens leave their keys behind

    def _run_queries_on_some(self, plan: KeepPlan) -> Tensor:
        """Keys and values of all tokens, queries and MLP of the kept ones; the cache stays a dense one."""
        if "flash" in self.implementation:
            raise ValueError(
                f'`kv_policy="keep"` needs a mask that `attn_implementation="{self.implementation}"` does not take; '
                'use "sdpa" or "eager".'
            )
        columns, kept = self.hidden.shape[1], plan.kept
        order, valid = self._compact(plan)
        index, others = order[:, :kept], order[:, kept:]
        back = order.argsort(dim=1)
        rest = self._keys_and_values(others)

        def store(key: Tensor, value: Tensor, layer_idx: int, args: tuple, more: dict) -> Any:
            parts = zip((key, value), rest, strict=True) if kept else ((part,) for part in rest)
            key, value = (_take_entries(torch.cat(pair, dim=2), back) for pair in parts)
            return self._store_as_it_is(key, value, layer_idx, args, more)

        view = _CacheView(store)
        if kept == 0:
            view.update(*rest, self.index)
            return self.hidden
        rows = _flat(index, columns)
        given = _take(self.hidden, rows, index)
        rotary = tuple(_take_columns(part, index) for part in self.rotary)
        output = self._block(given, self._as_mask(self._visible(index)), rotary, view)
        if self.routing.wants_score(self.index):
            self._add_score(self.hidden, self.rotary, view.keys, plan.keep & self.routing.prompt, self._real_columns())
        if valid is not None:
            output = torch.where(valid.unsqueeze(-1), output, given)
        return _put(self.hidden, rows, output)

    def _keys_and_values(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values, of some columns."""
        attention = self.block.self_attn
        given = self.block.input_layernorm(_take(self.hidden, _flat(index, self.hidden.shape[1]), index))
        key, value = (
            layer(given).unflatten(-1, (-1, attention.head_dim)) for layer in (attention.k_proj, attention.v_proj)
        )
        key = attention.k_norm(key) if hasattr(attention, "k_norm") else key
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        cos, sin = (_take_columns(part, index) for part in self.rotary)
        return _rotate(attention, key, cos, sin), value

    def _real_columns(self) -> Tensor:
        """`True` for columns of the cache and of this call that are no padding."""
        routing = self.routing
        past = routing.real.new_ones(len(routing.real), routing.past)
        return torch.cat([past if routing.past_real is None else routing.past_real, routing.real], dim=1)

    def _visible(self, index: Tensor) -> Tensor:
        """Which columns each of some tokens of this call may attend to."""
        real = self._real_columns().to(index.device)
        columns = torch.arange(real.shape[1], device=real.device)
        here = (index + self.routing.past).unsqueeze(2)
        return (real.unsqueeze(1) & (columns <= here)) | (columns == here)

    # The MLP skips, attention does not

    def _run_mlp_on_some(self, plan: KeepPlan) -> Tensor:
        view = _CacheView(self._store_as_it_is) if self.routing.wants_score(self.index) else self.cache
        hidden = self.hidden + self._attention(self.hidden, self.kwargs | {CACHE_ARGUMENT: view})
        if isinstance(view, _CacheView):
            self._add_dense_score(view.keys)
        if plan.kept == 0:
            return hidden
        order, valid = self._compact(plan)
        index = order[:, : plan.kept]
        rows = _flat(index, hidden.shape[1])
        given = _take(hidden, rows, index)
        output = given + self._mlp(given)
        if valid is not None:
            output = torch.where(valid.unsqueeze(-1), output, given)
        return _put(hidden, rows, output)

    def _attention(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return self.block.self_attn(hidden_states=self.block.input_layernorm(hidden), **kwargs)[0]

    def _mlp(self, hidden: Tensor) -> Tensor:
        return self.block.mlp(self.block.post_attention_layernorm(hidden))

    # Training: everything is computed, and weighed

    def _run_soft(self, plan: KeepPlan) -> Tensor:
        """The block's output times a gate that is 0 or 1 forwards and has the router's gradient backwards."""
        if "flash" in self.implementation:
            raise ValueError(
                f'Training a router needs masks that `attn_implementation="{self.implementation}"` does not take; '
                'load the model with "sdpa" or "eager".'
            )
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "The router got no gradient: reentrant gradient checkpointing cuts it off. Set "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )
        routing = self.routing
        likely = routing.logits[self.index].softmax(-1)[..., 1].to(self.hidden.device)
        # Only tokens that the router decides on have a gradient.
        key_gate = plan.keep.to(likely) + (likely - likely.detach()) * routing.prompt
        gate = key_gate.unsqueeze(-1).to(self.hidden.dtype)
        view = _CacheView(self._store_as_it_is)
        if routing.config.skip_unit == "mlp":
            hidden = self.hidden + self._attention(self.hidden, self.kwargs | {CACHE_ARGUMENT: view})
            output = hidden + gate * self._mlp(hidden)
            took_part, keys_real = routing.prompt, routing.real
        else:
            keys_real = routing.real if routing.config.kv_policy == "keep" else plan.keep
            columns = torch.arange(self.hidden.shape[1], device=self.hidden.device)
            earlier, own = columns <= columns.unsqueeze(1), columns == columns.unsqueeze(1)
            visible = (keys_real.unsqueeze(1) & earlier) | own
            kwargs = self.kwargs | {"attention_mask": self._as_mask(visible), CACHE_ARGUMENT: view}
            hidden = self.hidden + self._attention(self.hidden, kwargs)
            if routing.config.kv_policy == "drop":
                causal = (routing.real.unsqueeze(1) & earlier) | own
                hidden = hidden + self._key_gradient(view, causal, visible, key_gate)
            output = hidden + self._mlp(hidden)
            output = gate * output + (1 - gate) * self.hidden
            took_part = plan.keep & routing.prompt
        if routing.wants_score(self.index):
            self._add_score(self.hidden, self.rotary, view.keys, took_part, keys_real)
        return output

    def _key_gradient(self, view: _CacheView, causal: Tensor, visible: Tensor, gate: Tensor) -> Tensor:
        """Zeros that tell the router what skipped keys are missed for; see [`key_gate_gradient`]."""
        everything = torch.arange(self.hidden.shape[1], device=self.hidden.device).expand(len(self.hidden), -1)
        with torch.no_grad():
            query = _queries(self.block, self.hidden, self.rotary, everything)
        zeros = key_gate_gradient(query, view.keys, view.values, causal, visible, gate).to(self.hidden.dtype)
        project = self.block.self_attn.o_proj
        # The difference has no bias.
        return project(zeros) - project(zeros.detach())

    # Shared steps

    def _block(self, given: Tensor, mask: Tensor | None, rotary: tuple[Tensor, ...], view: _CacheView) -> Tensor:
        """The unchanged block on compacted tokens."""
        # Flash attention would take positions with gaps for several packed texts.
        changes = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None, CACHE_ARGUMENT: view}
        return self.dense(given, **(self.kwargs | changes))

    def _compact(self, plan: KeepPlan) -> tuple[Tensor, Tensor | None]:
        order, valid = plan.compact()
        device = self.hidden.device
        return order.to(device), None if valid is None else valid.to(device)

    def _as_mask(self, visible: Tensor) -> Tensor:
        """A mask as the attention implementation wants it."""
        visible = visible.unsqueeze(1)
        if self.implementation != "eager":
            return visible
        dtype = self.hidden.dtype
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )

    def _existing_skip_layer(self) -> TokenSkipCacheLayer | None:
        layers = [] if self.cache is None else self.cache.layers
        layer = layers[self.index] if self.index < len(layers) else None
        return layer if isinstance(layer, TokenSkipCacheLayer) else None

    def _skip_layer(self) -> TokenSkipCacheLayer | None:
        """The cache of this block, made able to skip if it is not yet; `None` without a cache."""
        if self.cache is None:
            return None
        layers = self.cache.layers
        while len(layers) <= self.index:
            layers.append(DynamicLayer())
        if not isinstance(layers[self.index], TokenSkipCacheLayer):
            layers[self.index] = TokenSkipCacheLayer.from_dense(layers[self.index], self.routing.past_real)
        return layers[self.index]

    def _add_score(
        self,
        given: Tensor,
        rotary: tuple[Tensor, ...],
        keys: Tensor,
        took_part: Tensor | None,
        keys_real: Tensor | None,
        index: Tensor | None = None,
    ) -> None:
        """Hands the attention scores of this block to the router.

        `given` are the inputs of all columns or, with `index`, of some. `took_part` says which of them were processed
        and `keys_real` which keys exist; `None` means all.
        """
        config = self.routing.config
        limit = {"last": 1, "window": config.score_window, "mean": given.shape[1]}[config.score_mode]
        with torch.no_grad():
            scores = score_tokens(self.block, given, rotary, keys, keys_real, took_part, limit)
        if index is not None:
            scores = torch.zeros_like(self.hidden[..., 0], dtype=scores.dtype).scatter(1, index, scores)
        self.routing.add_score(self.index, scores)

    def _add_dense_score(self, keys: Tensor) -> None:
        """The same where all columns were processed."""
        took_part = self.routing.prompt if self._padded or self.routing.generated is not None else None
        has_padding = self._padded or self.routing.past_real is not None
        self._add_score(self.hidden, self.rotary, keys, took_part, self._real_columns() if has_padding else None)


def score_tokens(
    block: nn.Module,
    given: Tensor,
    rotary: tuple[Tensor, ...],
    keys: Tensor,
    keys_real: Tensor | None,
    took_part: Tensor | None,
    limit: int,
) -> Tensor:
    """Mean probability that heads and the last `limit` queries give to each token of this call."""
    tokens, past = given.shape[1], keys.shape[2] - given.shape[1]
    limit = min(limit, tokens)
    if took_part is None:
        queries = torch.arange(tokens - limit, tokens, device=given.device).expand(len(given), -1)
        counts = torch.ones_like(queries, dtype=torch.bool)
    else:
        # Those that count come last, in order.
        queries = took_part.to(torch.uint8).argsort(dim=1, stable=True)[:, -limit:]
        counts = took_part.gather(1, queries)
    total = torch.zeros(given.shape[:2], dtype=torch.float32, device=given.device)
    columns = torch.arange(keys.shape[2], device=given.device)
    for rows, weight in zip(queries.split(_QUERY_CHUNK, 1), counts.split(_QUERY_CHUNK, 1), strict=True):
        here = (rows + past).unsqueeze(2)
        visible = columns <= here
        if keys_real is not None:
            visible = (visible & keys_real.unsqueeze(1)) | (columns == here)
        query = _queries(block, given, rotary, rows).float()
        shared = query.view(len(query), keys.shape[1], -1, *query.shape[2:])
        logits = shared @ keys.float().unsqueeze(2).transpose(-1, -2)
        probabilities = logits.masked_fill_(~visible[:, None, None], -torch.inf).softmax(-1)[..., past:]
        total += torch.einsum("bghqk,bq->bk", probabilities, weight.to(total))
    return total / (query.shape[1] * counts.sum(1, keepdim=True)).clamp(min=1)


def _queries(block: nn.Module, given: Tensor, rotary: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    """Rotated and scaled queries of some tokens; so few that projecting them again costs next to nothing."""
    attention = block.self_attn
    some = block.input_layernorm(_take(given, _flat(rows, given.shape[1]), rows))
    query = attention.q_proj(some).view(*rows.shape, -1, attention.head_dim)
    query = attention.q_norm(query) if hasattr(attention, "q_norm") else query
    cos, sin = (_take_columns(part, rows) for part in rotary)
    return _rotate(attention, query.transpose(1, 2), cos, sin) * attention.scaling


def _rotate(attention: nn.Module, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding as the module's own family writes it."""
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(states, states, cos, sin)[0]


def _flat(index: Tensor, columns: int) -> Tensor:
    """Column indices as rows of a tensor whose samples are stacked: copying rows is faster than gathering elements."""
    start = torch.arange(len(index), device=index.device).unsqueeze(1) * columns
    return (index + start).flatten()


def _take(hidden: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    return hidden.flatten(0, 1).index_select(0, rows).view(*index.shape, hidden.shape[-1])


def _put(hidden: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    return hidden.flatten(0, 1).index_copy(0, rows, values.flatten(0, 1)).view(hidden.shape)


def _take_columns(part: Tensor, index: Tensor) -> Tensor:
    """Rows of cosines or sines, which all samples can share."""
    if part.shape[0] == 1:
        return part[0][index]
    return part.gather(1, index.unsqueeze(-1).expand(-1, -1, part.shape[-1]))


def _take_entries(states: Tensor, index: Tensor) -> Tensor:
    """Entries of keys or values, `(batch, heads, entries, head size)`, in the order of `index`."""
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
