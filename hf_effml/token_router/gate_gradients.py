"""What it would be worth to attention if another token were kept: a zero with a gradient."""

import torch
from torch import Tensor


def key_gate_gradient(
    query: Tensor, keys: Tensor, values: Tensor, causal: Tensor, kept: Tensor, gate: Tensor
) -> Tensor:
    """Lets the gates of keys, which are hard, have the gradient of what keeping each key does to attention.

    A hard mask hides from the router what a skipped token costs most: that later tokens cannot attend to it. Here the
    gate of a skipped key gets the exact change of attention's output if that key alone came back, and the gate of a
    kept key the slope at which the output changes when it fades.

    Args:
        query (`Tensor` of shape `(batch, heads, tokens, head size)`):
            Rotated and scaled queries.
        keys (`Tensor` of shape `(batch, key-value heads, tokens, head size)`):
            Rotated keys of all tokens.
        values (`Tensor` of the same shape):
            Their values.
        causal (`Tensor` of shape `(batch, tokens, tokens)`):
            `True` where a query may see a key if it is kept.
        kept (`Tensor` of shape `(batch, tokens, tokens)`):
            `True` where it sees it; at least one key of each query.
        gate (`Tensor` of shape `(batch, tokens)`):
            1 for a kept key and 0 for a skipped one, with a gradient.

    Returns:
        `Tensor` of shape `(batch, tokens, heads * head size)`: zeros, to add to the output of attention.
    """
    with torch.no_grad():
        grouped = query.view(len(query), keys.shape[1], -1, *query.shape[2:]).float()
        keys, values = keys.float().unsqueeze(2), values.float().unsqueeze(2)
        logits = grouped @ keys.transpose(-1, -2)
        causal, kept = causal[:, None, None], kept[:, None, None]
        total = logits.masked_fill(~kept, -torch.inf).logsumexp(-1, keepdim=True)
        slope = torch.where(kept, (logits - total).exp(), (logits - total).sigmoid()).masked_fill(~causal, 0.0)
        output = slope.masked_fill(~kept, 0.0) @ values
    change = (gate - gate.detach()).float()[:, None, None, None, :]
    moved = slope * change
    moved = moved @ values - moved.sum(-1, keepdim=True) * output
    return moved.flatten(1, 2).transpose(1, 2).flatten(2)
