"""How much each block changes its input: where ShortGPT removes blocks, and where the search for a schedule starts."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .patching import disable_routing, find_decoder


def block_influence(model: nn.Module, data: Tensor | Iterable[Mapping[str, Any]], batch_size: int = 8) -> list[float]:
    """Measures how much each block changes its input, as in ShortGPT (https://huggingface.co/papers/2403.03853).

    The influence of a block is 1 minus the cosine between its input and its output, averaged over the tokens of a
    dense run.

    Args:
        model (`nn.Module`):
            A causal language model of a supported family, patched or not.
        data (`Tensor` of shape `(windows, tokens)` or iterable of batches):
            Token ids without padding, or dictionaries with `input_ids` and, where there is padding, `attention_mask`.
        batch_size (`int`, *optional*, defaults to 8):
            Windows at a time; batches stay as they are.

    Returns:
        `list[float]`: one number per block, 0 for a block that only stretches its input.

    Raises:
        TypeError: If the family is not supported, or `data` is something else.
        ValueError: If `data` holds no token.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_effml import block_influence

    >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=50)
    >>> model = LlamaForCausalLM(LlamaConfig(**shape))
    >>> len(block_influence(model, torch.arange(40).view(2, 20)))
    3

    ```
    """
    decoder = find_decoder(model)
    cosines: list[Tensor] = []
    real = torch.empty(0)

    def compare(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        cosine = F.cosine_similarity(given.float(), output.float(), dim=-1)
        cosines.append(cosine.masked_fill(~real.to(cosine.device), 0).sum().cpu())

    handles = [block.register_forward_hook(compare, with_kwargs=True) for block in decoder.layers]
    total, tokens = torch.zeros(len(handles), dtype=torch.float64), 0
    device = next(decoder.parameters()).device
    try:
        with torch.no_grad(), disable_routing(decoder), evaluation_mode(decoder):
            for ids, mask in _batches(data, batch_size):
                real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
                mask = None if mask is None else mask.to(device)
                decoder(input_ids=ids.to(device), attention_mask=mask, use_cache=False)
                total += torch.stack(cosines)
                tokens += int(real.sum())
                cosines.clear()
    finally:
        for handle in handles:
            handle.remove()
    if tokens == 0:
        raise ValueError("`data` holds no token to measure the blocks with. Pass windows of text, or batches of them.")
    return (1 - total / tokens).tolist()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode inside a `with`, and every module back into its own afterwards.

    Args:
        model (`nn.Module`):
            Any model.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _batches(data: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Token ids and attention masks."""
    if isinstance(data, Tensor):
        check_windows(data, "data")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
        yield from ((part, None) for part in data.split(batch_size))
        return
    if isinstance(data, Mapping | str) or not isinstance(data, Iterable):
        raise TypeError(
            f"`data` must be token ids of shape (windows, tokens), or an iterable of batches; got a "
            f"`{type(data).__name__}`. Put a single batch into a list."
        )
    for batch in data:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            found = sorted(batch) if isinstance(batch, Mapping) else f"a `{type(batch).__name__}`"
            raise TypeError(f"`data` must give dictionaries with `input_ids`; got {found}. Tokenize the texts first.")
        check_windows(batch["input_ids"], "input_ids")
        yield batch["input_ids"], batch.get("attention_mask")


def check_windows(windows: Any, name: str) -> None:
    """Refuses what is no batch of token ids.

    Args:
        windows (`Any`):
            What was given.
        name (`str`):
            Name of the argument, for the message.

    Raises:
        TypeError: If it is no tensor of whole numbers.
        ValueError: If its shape is not `(windows, tokens)`, or it is empty.
    """
    if not isinstance(windows, Tensor) or windows.is_floating_point() or windows.is_complex():
        found = str(windows.dtype) if isinstance(windows, Tensor) else f"a `{type(windows).__name__}`"
        raise TypeError(f"`{name}` must be a tensor of token ids; got {found}.")
    if windows.dim() != 2 or not windows.numel():
        raise ValueError(
            f"`{name}` must have the shape (windows, tokens), with at least one token; got {tuple(windows.shape)}."
        )
