"""Held-out text, a Megatron dataset or a text file, as what evaluation needs: documents and a token stream."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sparsecod_megatron.data.index_file import token_documents
from sparsecod_megatron.data.integrity import check_token_files
from sparsecod_megatron.data.metadata import split_info
from sparsecod_megatron.data.sources import document_kind, read_text
from sparsecod_megatron.data.tokenizer_identity import check_made_with
from sparsecod_megatron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("sparsecod")


@dataclass(frozen=True)
class Corpus:
    """A token stream and the bytes of text it stands for.

    Attributes:
        tokens: int64 `[tokens]`. The first is context only; all others are to be scored.
        num_bytes: UTF-8 bytes of the text of `tokens[1:]`; special tokens count no bytes.
    """

    tokens: torch.Tensor
    num_bytes: int


def read_corpus(source: Path, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None = None) -> Corpus:
    """Concatenate a source's documents into one stream.

    The stream opens with the token that training saw before text, so that the text's first token is scored too. A
    tokenizer without any such token gives up its first token as context.

    Args:
        source: prefix of `source.bin` and `source.idx` made with this tokenizer, or a text file, plain or packed, in
            which a quoted special token is text, as it is for `sparsecod data`.
        tokenizer: the model's.
        max_tokens: keep so many scored tokens from the start; None keeps all.

    Raises:
        DataError: the source is missing, damaged, empty, not text, or made with another tokenizer.
    """
    prefix = dataset_prefix(source)
    leading = leading_token(tokenizer, in_dataset=prefix is not None)
    wanted = None if max_tokens is None else max_tokens + (leading is None)
    if prefix is None:
        text = _read_text(source)
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        whole = np.asarray(encoded["input_ids"], dtype=np.int64)
        pieces, total_tokens, total_bytes = [whole[:wanted]], len(whole), len(text.encode())
    else:
        described = split_info(prefix)
        total_tokens, total_bytes = (described[1].tokens, described[1].bytes) if described else (-1, 0)
        pieces = _take(_token_documents(prefix, tokenizer), wanted)
    stream = np.concatenate([np.array([] if leading is None else [leading], dtype=np.int64), *pieces])
    if len(stream) < 2:
        raise DataError(f"{source}: no text to score; give a source with at least two tokens")
    if sum(map(len, pieces)) == total_tokens:
        num_bytes = total_bytes  # of the text itself, which a tokenizer with unknown words cannot give back
    else:
        num_bytes = sum(_num_bytes(piece, tokenizer) for piece in pieces)
    if leading is None:
        num_bytes -= _num_bytes(stream[:1], tokenizer)
    return Corpus(torch.from_numpy(stream), num_bytes)


def read_documents(source: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the documents' text: a dataset's decoded without special tokens, a text file as one document.

    Raises:
        DataError: the source is missing, damaged, not text, or made with another tokenizer; raised when the first
            document is asked for.
    """
    prefix = dataset_prefix(source)
    if prefix is None:
        yield _read_text(source)
    else:
        for document in _token_documents(prefix, tokenizer):
            yield _decode(document, tokenizer)


def dataset_prefix(source: Path) -> Path | None:
    """The prefix of a Megatron dataset, or None for a text file; `.bin` and `.idx` may be written out.

    Raises:
        DataError: there is neither, or half a dataset.
    """
    prefix = source.with_suffix("") if source.suffix in (".bin", ".idx") else source
    halves = [Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx")]
    found = [half.is_file() for half in halves]
    if all(found):
        return prefix
    if any(found):
        missing = halves[found.index(False)]
        raise DataError(f"{source}: {missing} is missing; a dataset needs both its .bin and its .idx")
    if source.is_file():
        return None
    raise DataError(f"{source}: no such text file, and no dataset {halves[0].name} + {halves[1].name} there")


def _token_documents(prefix: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Yield each document's token ids, int64 `[tokens]`."""
    check_token_files(prefix, seq_length=0)
    if unchecked := check_made_with(prefix, tokenizer, owner="the model's"):
        logger.warning(unchecked)
    for document in token_documents(prefix):
        yield document.astype(np.int64)


def _take(documents: Iterable[np.ndarray], max_tokens: int | None) -> list[np.ndarray]:
    """The documents up to a total of `max_tokens` tokens, the last one cut."""
    kept: list[np.ndarray] = []
    room = max_tokens
    for document in documents:
        kept.append(document[:room])
        if room is not None:
            room -= len(kept[-1])
            if room == 0:
                break
    return kept


def leading_token(tokenizer: PreTrainedTokenizerBase, *, in_dataset: bool = False) -> int | None:
    """A dataset's documents follow an end-of-text token; a text follows what the tokenizer puts before it, or that."""
    ids = tokenizer("")["input_ids"]
    if not in_dataset and ids and ids[0] == tokenizer.bos_token_id:
        return tokenizer.bos_token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id


def _read_text(source: Path) -> str:
    """One text as a whole, read as `sparsecod data` reads it.

    Raises:
        DataError: not text, or a file of many documents, which token files keep apart.
    """
    if (kind := document_kind(source)) != "text":
        make = f"sparsecod data --input {source} --tokenizer MODEL --output PREFIX"
        raise DataError(f"{source}: {kind} holds documents, not one text; run `{make}` and give PREFIX_train")
    return read_text(source)


def _decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _num_bytes(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(_decode(ids, tokenizer).encode())
