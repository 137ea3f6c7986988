"""Token routing, slow and obvious: one sample at a time, everything dense, with masks; only a block's own layers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from helpers import assert_close, texts, tiny_language_model
from hf_effml import TokenRouterConfig, TokenSkipCacheLayer, apply_token_router
from hf_effml.token_router.patching import copy_config
from hf_effml.token_router.token_skip_layer import CACHE_ARGUMENT


TOKENS, PADDING = 32, (0, 7, 1, 25)
POLICIES = {
    "drop": {"kv_policy": "drop", "skip_unit": "block"},
    "keep": {"kv_policy": "keep", "skip_unit": "block"},
    "mlp": {"kv_policy": "drop", "skip_unit": "mlp"},
}


@dataclass
class SlowRun:
    """What a model computes under given decisions.

    Attributes:
        logits: `(batch, tokens, vocabulary)`, 0 on padding.
        hidden: input of every block and the last output, `(batch, tokens, channels)` each, 0 on padding.
        attention: of every block, `(batch, heads, tokens, tokens)`; rows of tokens that it did not process are 0.
        keys, values: of every block and sample, `(tokens with a key, key-value heads, head size)`.
    """

    logits: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    keys: list[list[Tensor]] = field(default_factory=list)
    values: list[list[Tensor]] = field(default_factory=list)


@torch.no_grad()
def slow_run(
    model: Any,
    ids: Tensor,
    keep: Tensor,
    real: Tensor | None = None,
    positions: Tensor | None = None,
    kv_policy: str = "drop",
    skip_unit: str = "block",
    blocks: int | None = None,
) -> SlowRun:
    """Run a model, patched or not, so that each block processes the tokens of `keep`, `(blocks, batch, tokens)`.

    Stops after `blocks` blocks.
    """
    decoder = model.model
    batch, tokens = ids.shape
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.bool()
    positions = torch.arange(tokens).expand(batch, -1) if positions is None else positions
    blocks = len(decoder.layers) if blocks is None else blocks
    heads = model.config.num_attention_heads
    example = decoder.embed_tokens(ids)
    run = SlowRun(torch.zeros(batch, tokens, model.config.vocab_size, dtype=example.dtype))
    run.hidden = [torch.zeros_like(example) for _ in range(blocks + 1)]
    run.attention = [torch.zeros(batch, heads, tokens, tokens) for _ in range(blocks)]
    run.keys, run.values = [[] for _ in range(blocks)], [[] for _ in range(blocks)]
    for sample in range(batch):
        there = real[sample].nonzero().squeeze(1)
        hidden = example[sample, there]
        cos, sin = (part[0] for part in decoder.rotary_emb(hidden, positions[sample, there].unsqueeze(0)))
        for index, block in enumerate(decoder.layers[:blocks]):
            run.hidden[index][sample, there] = hidden
            kept = keep[index, sample, there].bool()
            all_kept = torch.ones_like(kept)
            attends = kept if skip_unit == "block" else all_kept
            has_key = attends if kv_policy == "drop" else all_kept
            if len(there):
                output, weights, keys, values = _attention(block, hidden, cos, sin, has_key)
                run.attention[index][sample][:, there[:, None], there] = weights * attends[:, None]
                run.keys[index].append(keys[has_key])
                run.values[index].append(values[has_key])
                after = hidden + output
                if skip_unit == "mlp":
                    hidden = after
                after = after + _mlp(block, after)
                hidden = torch.where(kept.unsqueeze(1), after, hidden)
            else:
                run.keys[index].append(hidden.new_zeros(0))
                run.values[index].append(hidden.new_zeros(0))
        run.hidden[blocks][sample, there] = hidden
        run.logits[sample, there] = model.lm_head(decoder.norm(hidden)).to(run.logits)
    return run


def _mlp(block: Any, hidden: Tensor) -> Tensor:
    output = block.mlp(block.post_attention_layernorm(hidden).unsqueeze(0))
    return (output[0] if isinstance(output, tuple) else output).squeeze(0)


def _attention(block: Any, hidden: Tensor, cos: Tensor, sin: Tensor, has_key: Tensor) -> tuple[Tensor, ...]:
    """Output, weights `(heads, queries, keys)`, and keys and values `(tokens, heads, head size)` of one sample."""
    module = block.self_attn
    tokens = len(hidden)
    given = block.input_layernorm(hidden)
    query, keys, values = (
        layer(given).view(tokens, -1, module.head_dim) for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        query, keys = module.q_norm(query), module.k_norm(keys)
    query, keys = _rotated(query, cos, sin), _rotated(keys, cos, sin)
    groups = query.shape[1] // keys.shape[1]
    each_keys, each_values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril() & has_key
    logits = torch.einsum("qhd,khd->hqk", query, each_keys) * module.scaling
    # Rows of tokens without any key are not used.
    weights = logits.float().masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    output = torch.einsum("hqk,khd->qhd", weights.to(values.dtype), each_values)
    return module.o_proj(output.flatten(1)), weights, keys, values


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)


def random_decisions(blocks: int, real: Tensor, seed: int = 0) -> Tensor:
    """Masks `(blocks, batch, tokens)` that keep half of the tokens, all in the last block.

    In block 1 the first sample skips altogether, in block 2 nobody keeps the last two columns.
    """
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(blocks, *real.shape, generator=generator) < 0.5
    keep[1, 0] = False
    keep[2, :, -2:] = False
    keep[-1] = True
    return keep & real.bool()


def decode_decisions(config: Any, real: Tensor) -> Tensor:
    """Masks of tokens that follow the decode policy."""
    skips = [config.decode_policy == "threshold" and share > config.decode_threshold for share in config.schedule]
    return ~torch.tensor(skips)[:, None, None] & real.bool()


def routed(family: str = "Llama", kernel: str = "sdpa", initializer_range: float = 0.3, **fields: Any) -> Any:
    """A patched tiny model that may skip tokens in all blocks, of prompts of any length."""
    model = tiny_language_model(family, attn_implementation=kernel, initializer_range=initializer_range)
    config = {"router_type": "static", "num_protected_first": 0, "target_sparsity": 0.25, "min_tokens": 0}
    return apply_token_router(model, TokenRouterConfig(**(config | fields)))


class RaggedCase:
    """A ragged batch of 32 columns, random decisions, and what the reference makes of them."""

    def __init__(self, model: Any, mask: Tensor | None = None, seed: int = 0, **policy: Any):
        ids, left_padded = texts(len(PADDING), TOKENS, PADDING, seed)
        self.model, self.policy = model, policy
        self.mask = left_padded if mask is None else mask
        self.ids, self.real = ids, self.mask.bool()
        self.keep = random_decisions(4, self.real, seed)
        self.slow = slow_run(model, ids, self.keep, self.real, **policy)
        self.config = copy_config(model.model.token_routing_hook.config, **policy)

    @torch.no_grad()
    def call(self, start: int, stop: int, cache: Any = None, samples: Any = slice(None)) -> Tensor:
        """Logits of some columns, of some samples; the padding among them 0."""
        more = {"use_cache": False} if cache is None else {CACHE_ARGUMENT: cache}
        logits = self.model(
            self.ids[samples, start:stop],
            attention_mask=self.mask[samples, :stop],
            keep_mask=self.keep[:, samples, start:stop],
            token_router_config=self.config,
            **more,
        ).logits
        return logits * self.real[samples, start:stop, None]

    def check(self, logits: Tensor, start: int = 0, samples: Any = slice(None)) -> None:
        """Hold the logits of columns from `start` on against the reference."""
        assert_close(logits, self.slow.logits[samples, start : start + logits.shape[1]], 1e-5)

    def check_cache(self, cache: Any) -> None:
        """Keys and values of exactly the tokens that have some, in order."""
        assert cache.get_seq_length() == TOKENS
        for block, layer in enumerate(cache.layers):
            for sample, (keys, values) in enumerate(zip(self.slow.keys[block], self.slow.values[block], strict=True)):
                entries = layer.positions[sample] >= 0 if isinstance(layer, TokenSkipCacheLayer) else self.real[sample]
                assert_close(layer.keys[sample][:, entries].transpose(0, 1), keys, 1e-5)
                assert_close(layer.values[sample][:, entries].transpose(0, 1), values, 1e-5)


class Recorder:
    """Notes every call of a patched decoder, to hold it against the slow reference afterwards.

    It keeps what is known of each column, overwritten by later calls that go over it again: generation that throws
    drafts away does so. Samples must keep their order.
    """

    def __init__(self, model: Any):
        self.model, self.calls = model, []
        decoder = model.model
        self._past = 0
        decoder.register_forward_pre_hook(self._before, with_kwargs=True)
        decoder.register_forward_hook(self._after, with_kwargs=True)

    def _before(self, decoder: Any, args: tuple, kwargs: dict) -> None:
        cache = kwargs.get(CACHE_ARGUMENT)
        self._past = 0 if cache is None else cache.get_seq_length()

    def _after(self, decoder: Any, args: tuple, kwargs: dict, output: Any) -> None:
        masks = kwargs["token_routing"].keep_masks()
        entry = {
            "ids": kwargs["input_ids"],
            "real": kwargs["token_routing"].real,
            "keep": masks,
            "positions": kwargs["position_ids"],
            "hidden": output.last_hidden_state,
        }
        if self.calls and self._past:
            before = self.calls[-1]
            assert before["ids"].shape[1] >= self._past
            for name in ("ids", "real", "keep", "positions"):
                entry[name] = torch.cat([before[name][..., : self._past], entry[name]], dim=-1)
        self.calls.append(entry)

    def worst_difference(self, **policy: Any) -> float:
        """Largest difference of the logits of any call from the reference's."""
        worst = 0.0
        for call in self.calls:
            wanted = slow_run(self.model, call["ids"], call["keep"], call["real"], call["positions"], **policy).logits
            new = call["hidden"].shape[1]
            found = self.model.lm_head(call["hidden"]).detach()
            difference = (found - wanted[:, -new:])[call["real"][:, -new:]].abs()
            worst = max(worst, difference.max().item() if difference.numel() else 0.0)
        return worst
