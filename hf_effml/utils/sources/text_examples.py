"""Texts as training examples of a language model: cut to length, completions marked, padded on the left."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_effml.utils.text_data import check_count, make_windows, tokenize

from .text_files import checked_texts


__all__ = ["LeftPaddingCollator", "make_examples"]


def make_examples(
    texts: Sequence[str],
    tokenizer: Any,
    length: int,
    *,
    completion_marker: str | None = None,
    single_line_breaks: bool = False,
) -> list[dict[str, list[int]]]:
    """Cuts texts to length; with a marker, the tokens behind it are marked as the completion.

    Args:
        texts (`Sequence[str]`):
            The texts.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        length (`int`):
            Tokens of an example, at most.
        completion_marker (`str`, *optional*):
            What ends the prompt in each text. Without it texts are packed into windows of `length` tokens.
        single_line_breaks (`bool`, *optional*, defaults to `False`):
            Replace double line breaks by single ones.

    Returns:
        `list[dict]`: `input_ids` and, with a marker, `completion_mask`.

    Raises:
        ValueError: If no text has the marker with anything behind it.
    """
    if completion_marker is None:
        windows = make_windows(texts, tokenizer, length, single_line_breaks=single_line_breaks)
        return [{"input_ids": window.tolist()} for window in windows]
    check_count("length", length, 1)
    if not isinstance(completion_marker, str) or not completion_marker:
        raise ValueError(f"`completion_marker` must be a text with a character; got {completion_marker!r}.")
    texts = checked_texts(texts, "`texts`, number")
    pairs = [text.partition(completion_marker) for text in texts]
    prompts = tokenize([before + marker for before, marker, _ in pairs], tokenizer, single_line_breaks)
    examples = []
    for prompt, (_, _, after) in zip(prompts, pairs, strict=True):
        ids = (prompt + tokenizer(after, add_special_tokens=False)["input_ids"])[:length]
        if len(ids) > len(prompt):
            mask = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
            examples.append({"input_ids": ids, "completion_mask": mask})
    if not examples:
        raise ValueError(
            f"No text has `completion_marker` {completion_marker!r} with anything behind it within {length} tokens. "
            "Take another marker, or longer texts."
        )
    return examples


class LeftPaddingCollator:
    """Makes a batch of examples, padded on the left as generation has it.

    Args:
        pad_token_id (`int`, *optional*, defaults to 0):
            What to pad with; an attention mask hides it.

    Example:

    ```python
    >>> from hf_effml.utils.sources.text_examples import LeftPaddingCollator

    >>> batch = LeftPaddingCollator()([{"input_ids": [5, 6]}, {"input_ids": [7]}])
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[5, 6], [0, 7]], [[1, 1], [0, 1]])

    ```
    """

    def __init__(self, pad_token_id: int | None = None):
        self.pad_token_id = pad_token_id or 0

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Pads `input_ids` and, where examples have it, `completion_mask`."""
        length = max(len(row["input_ids"]) for row in rows)

        def padded(values: Sequence[Sequence[int]], value: int) -> Tensor:
            return torch.tensor([[value] * (length - len(row)) + list(row) for row in values])

        ids = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
        }
        if "completion_mask" in rows[0]:
            batch["completion_mask"] = padded([row["completion_mask"] for row in rows], 0)
        return batch
