"""A small language model to start from where none is given: trained on this machine in seconds, tokenizer included."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from .model_kinds import check_task
from .shards import ShardFolder
from .text_data import make_windows


__all__ = ["load_language_model", "train_language_model"]

logger = logging.get_logger(__name__)

_START, _PAD = "<s>", "<pad>"
_VOCABULARY, _WINDOW = 512, 256


def load_language_model(name_or_path: str, **options: Any) -> tuple[Any, Any]:
    """Loads a language model to route.

    Args:
        name_or_path (`str`):
            Folder, also below the one that the environment variable `HF_EFFML_DATA` names, or Hub id.
        options (`dict`, *optional*):
            Passed on to `AutoModelForCausalLM.from_pretrained`.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: the model, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: If it is no language model.
        OSError: If there is none.
    """
    below = Path(os.environ.get("HF_EFFML_DATA", ""), name_or_path)
    if not Path(name_or_path).is_dir() and below.is_dir():
        name_or_path = str(below)
    if check_task(name_or_path, "AutoModelForCausalLM") == "token_router":
        raise ValueError(
            f"`{name_or_path}` is a token router already; needed is the language model that it was made from. Give "
            "its folder or Hub id."
        )
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(name_or_path, **options).eval(), tokenizer


def train_language_model(texts: Sequence[str], folder: str | Path, steps: int, seed: int) -> str:
    """Trains a Llama of 4 blocks and a tokenizer of 512 entries; what an earlier run of its settings has left is used.

    Args:
        texts (`Sequence[str]`):
            What to train on.
        folder (`str` or `Path`):
            Where to save both.
        steps (`int`):
            Steps of 4 windows of 256 tokens.
        seed (`int`):
            Of weights and order.

    Returns:
        `str`: the folder.

    Raises:
        ValueError: If there are no steps, or the folder's model was trained with others, or on other texts.
    """
    if steps < 1:
        raise ValueError(
            "There is no language model to start from. Give one with `--model_name_or_path FOLDER`, or train a tiny "
            "one with `--start_steps 200`."
        )
    folder = Path(folder)
    settings = {"steps": steps, "seed": seed, "texts": _digest(texts)}
    # The tokenizer is saved last.
    start = ShardFolder(folder, ["tokenizer_config.json"], settings, "_start.json")
    if not start.start():
        logger.warning(f"The start model `{folder}` is there, trained by an earlier run with the same settings.")
        return str(folder)
    tokenizer = _train_tokenizer(texts)
    try:
        windows = make_windows(texts, tokenizer, _WINDOW)
    except ValueError:  # all of them are shorter
        windows = make_windows(texts, tokenizer, _WINDOW, packed=True)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta2=0.95,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
    )
    rows = [{"input_ids": window, "labels": window} for window in windows]
    trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=rows)
    trainer.train()
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def _train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_START, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_START, pad_token=_PAD)
