"""A language of numbered words `w0`, `w1` and so on, one token each: models with random weights need no better."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

END = "<end>"


def save_with_words(model: PreTrainedModel, folder: Path) -> Path:
    """The model's directory with a tokenizer of as many words as its vocabulary has room for."""
    vocabulary = {END: 0} | {f"w{number}": number + 1 for number in range(model.config.vocab_size - 1)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def write_words(path: Path, vocab_size: int, count: int) -> Path:
    """So many random words, the same each time."""
    numbers = np.random.default_rng(0).integers(0, vocab_size - 1, size=count)
    path.write_text(" ".join(f"w{number}" for number in numbers), encoding="utf-8")
    return path
