"""The tokenizer that goes with an exported model, and proof that it still encodes the same beside that model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from sparsecod_megatron.errors import ConversionError, first_line

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
PROBE = "It's the 1st of 23 lines:\n\n\tdef größe(x, y_):  return x ** 2  # 日本語 🎉\n  "
"""Spaces, case, digits, code, accents and bytes: where tokenizer classes differ."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a model directory holds a tokenizer at all."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(source: Path, *, vocab_size: int) -> Any:
    """Load a HuggingFace tokenizer directory offline.

    Args:
        source: the directory.
        vocab_size: rows of the model's embedding.

    Raises:
        ConversionError: it cannot be loaded, or gives ids that the model has no row for.
    """
    if not source.is_dir():
        raise ConversionError(f"{source}: no such tokenizer directory; give the one that `sparsecod data` wrote")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # the readers behind it raise nothing narrower; a panic of tokenizers is not an Exception
        raise ConversionError(
            f"{source}: AutoTokenizer cannot load it ({first_line(error)}); give a HuggingFace tokenizer directory"
        ) from error
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > vocab_size:
        raise ConversionError(
            f"{source}: the tokenizer has ids up to {needed - 1}, more than model.vocab_size={vocab_size} rows; "
            "give the tokenizer that the model was trained with"
        )
    return tokenizer


def special_token_ids(tokenizer: Any | None) -> dict[str, int | None]:
    """Begin, end and padding ids under the configuration's names, None where it has none."""
    return {name: getattr(tokenizer, name, None) for name in SPECIAL_TOKENS}


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Load the tokenizer from a model directory, where transformers also looks at the model's class, and compare.

    Raises:
        ConversionError: the two encode differently.
    """
    if AutoTokenizer.from_pretrained(folder, local_files_only=True).encode(PROBE) != tokenizer.encode(PROBE):
        raise ConversionError(
            f"{tokenizer.name_or_path}: loaded with this model, AutoTokenizer rebuilds it differently; "
            "export without a tokenizer and load it from its own directory"
        )
