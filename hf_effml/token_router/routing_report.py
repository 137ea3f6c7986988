"""What a routed prompt was spared: tokens by block, multiply-adds, bytes of cache."""

from dataclasses import dataclass

from torch import Tensor, nn

from .routing_state import RoutingState


@dataclass(frozen=True)
class RoutingReport:
    """What the blocks skipped of one prompt.

    Args:
        keep_masks (`Tensor` of shape `(blocks, batch, tokens)`):
            `True` where a block processed a token; can be passed as `keep_mask` to replay the decisions.
        real (`Tensor` of shape `(batch, tokens)`):
            `True` for tokens that are no padding.
        required_sparsity (`list[float]`):
            Share that each block had to skip.
        kv_bytes (`int`):
            Keys and values of this prompt in the cache, padding and fillers not counted.
        dense_kv_bytes (`int`):
            The same without routing.
        flop_ratio (`float`):
            Work of the decoder blocks over that of a dense run; router and scores are not counted.
    """

    keep_masks: Tensor
    real: Tensor
    required_sparsity: list[float]
    kv_bytes: int
    dense_kv_bytes: int
    flop_ratio: float

    @property
    def kept_counts(self) -> Tensor:
        """Tokens processed, of shape `(blocks, batch)`."""
        return self.keep_masks.sum(-1)

    @property
    def kept_per_block(self) -> list[float]:
        """Tokens that each block processed, averaged over the samples."""
        return self.kept_counts.float().mean(-1).tolist()

    @property
    def sparsity_per_block(self) -> list[float]:
        """Share of the real tokens that skipped each block."""
        real = self.real.sum().clamp(min=1)
        return (1 - self.keep_masks.flatten(1).sum(-1) / real).tolist()

    @property
    def sparsity(self) -> float:
        """Share of the tokens that skipped a block, averaged over all blocks."""
        shares = self.sparsity_per_block
        return sum(shares) / len(shares)

    def __str__(self) -> str:
        return (
            f"{self.sparsity:.1%} skipped, {self.flop_ratio:.1%} of the work, "
            f"{self.kv_bytes / max(self.dense_kv_bytes, 1):.1%} of the cache"
        )


def make_report(state: RoutingState, decoder: nn.Module) -> RoutingReport:
    """Counts what a forward pass was spared.

    Args:
        state ([`RoutingState`]):
            Its decisions.
        decoder (`nn.Module`):
            The decoder they were made for.

    Returns:
        [`RoutingReport`]: the counts.
    """
    masks, config = state.keep_masks(), state.config
    counts = masks.sum(-1).tolist()
    whole = config.skip_unit == "block"
    keeps_cache = not whole or config.kv_policy == "keep"
    entries = [state.lengths if keeps_cache else kept for kept in counts]
    work = dense = bytes_kept = bytes_dense = 0.0
    for block, kept, stored in zip(decoder.layers, counts, entries, strict=True):
        work += sum(
            _block_work(block, *sample, config.kv_policy, whole) for sample in zip(kept, state.lengths, strict=True)
        )
        dense += sum(_block_work(block, tokens, tokens, "drop", True) for tokens in state.lengths)
        per_entry = _bytes_per_entry(block)
        bytes_kept += per_entry * sum(stored)
        bytes_dense += per_entry * sum(state.lengths)
    return RoutingReport(
        masks, state.real, list(state.schedule), int(bytes_kept), int(bytes_dense), work / dense if dense else 1.0
    )


def _bytes_per_entry(block: nn.Module) -> int:
    # Not the type of `k_proj`, whose weight may be quantized.
    return 2 * block.self_attn.k_proj.out_features * block.input_layernorm.weight.element_size()


def _block_work(block: nn.Module, kept: int, tokens: int, kv_policy: str, whole: bool) -> float:
    """Multiply-adds of a block for one sample: linear layers, and causal attention."""
    attention = block.self_attn
    queries = sum(layer.in_features * layer.out_features for layer in (attention.q_proj, attention.o_proj))
    keys = sum(layer.in_features * layer.out_features for layer in (attention.k_proj, attention.v_proj))
    width = attention.q_proj.out_features
    mlp = kept * _mlp_work(block)
    if not whole:
        return mlp + tokens * (queries + keys) + tokens * tokens * width
    if kv_policy == "keep":
        # A kept query sees, on average, half of all keys.
        return mlp + kept * queries + tokens * keys + kept * tokens * width
    return mlp + kept * (queries + keys) + kept * kept * width


def _mlp_work(block: nn.Module) -> float:
    """Multiply-adds of the MLP for one token; of the experts that it visits."""
    mlp = block.mlp
    if hasattr(mlp, "experts"):
        config = block.self_attn.config
        return 3 * config.num_experts_per_tok * config.hidden_size * config.moe_intermediate_size
    return sum(module.in_features * module.out_features for module in mlp.modules() if isinstance(module, nn.Linear))
