"""Tokenizers from anywhere, always saved as one HuggingFace directory that `AutoTokenizer` loads offline."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparsecod_megatron.data.encode import load_encoding_tokenizer
from sparsecod_megatron.data.sentencepiece import convert_sentencepiece
from sparsecod_megatron.data.tiktoken import END_OF_TEXT, convert_tiktoken
from sparsecod_megatron.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_BYTE_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_PROBE = "Größe 日本語 🎉\n\n  def f(x):\n\treturn x ** 2  # 1234, don't"


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer.

    Args:
        name: a HuggingFace directory, a `tokenizer.json`, a sentencepiece `.model`, a `.tiktoken` file
            of ranks, or a name on the HuggingFace hub.

    Raises:
        DataError: nothing loads from `name`, or it defines no end-of-text token.
    """
    path = Path(name)
    if not path.is_file() and path.suffix in (".json", ".model", ".tiktoken"):
        raise DataError(f"{path}: no such tokenizer file; check the path")
    try:
        tokenizer = _load_file(path) if path.is_file() else _load_pretrained(name)
        tokenizer.encode(_PROBE)  # some damage shows only here
        separates = tokenizer.eos_token_id is not None
    except (DataError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # damage shows anywhere in four libraries; a panic of tokenizers is not an Exception
        fix = "check the file" if path.is_file() else "check the path, or name and network"
        raise DataError(f"{name}: no tokenizer can be made of it ({first_line(error)}); {fix}") from error
    if not separates:
        raise DataError(f"{name}: no end-of-text token, which must separate documents; give a tokenizer that has one")
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, whose 256 byte tokens encode any text; the same documents give the same tokenizer.

    Args:
        documents: texts to learn merges from.
        vocab_size: upper bound; short texts have fewer merges to learn.

    Raises:
        DataError: `vocab_size` has no room for the bytes and the end-of-text token.
    """
    smallest = len(_BYTE_ALPHABET) + 1
    if vocab_size < smallest:
        needs = f"256 bytes and {END_OF_TEXT}"
        raise DataError(f"--tokenizer train:{vocab_size}: too small; at least {smallest} are needed ({needs})")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=_BYTE_ALPHABET, show_progress=False
    )
    backend.train_from_iterator(documents, trainer)
    return _wrap(backend, eos_token=END_OF_TEXT)


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows that an embedding table needs: the number of entries, or more where their ids have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    """Save as a HuggingFace directory and check that it loads back as what encodes the documents.

    Returns:
        The `tokenizer.json` to encode with.

    Raises:
        DataError: `AutoTokenizer` rebuilds it differently, so models trained on its ids would be served wrongly.
    """
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer.json"
    reloaded = AutoTokenizer.from_pretrained(directory)
    ids = load_encoding_tokenizer(path).encode(_PROBE, add_special_tokens=False).ids
    if reloaded.encode(_PROBE, add_special_tokens=False) != ids:
        message = "AutoTokenizer and its own tokenizer.json encode differently; use another tokenizer"
        raise DataError(f"{tokenizer.name_or_path or 'the tokenizer'}: {message}")
    return path


def _load_file(path: Path) -> PreTrainedTokenizerFast:
    if path.suffix == ".model":
        backend, special_tokens = convert_sentencepiece(path)
        return _wrap(backend, **special_tokens)
    if path.suffix == ".tiktoken":
        return _wrap(convert_tiktoken(path), eos_token=END_OF_TEXT)
    backend = Tokenizer.from_file(str(path))
    end = next((token for token in _END_TOKENS if backend.token_to_id(token) is not None), None)
    return _wrap(backend, **({"eos_token": end} if end else {}))


def _load_pretrained(name: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        raise DataError(f"{name}: its tokenizer is Python code without a tokenizer.json; give one that has it")
    return tokenizer


def _wrap(backend: Tokenizer, **special_tokens: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special_tokens)
