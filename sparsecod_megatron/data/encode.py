"""Text to token ids in worker processes, in the order of the input whatever their number.

Workers are spawned, not forked: the parent may hold threads of torch and of the tokenizer trainer, which a fork would
leave locked. This module imports only NumPy and `tokenizers`, so that a worker starts in a fraction of a second.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sparsecod_megatron.errors import DataError

_CHUNK_CHARACTERS = 1_000_000
_CHUNK_DOCUMENTS = 1_000
_CHUNKS_AHEAD = 3  # per worker: enough to keep it busy, few enough to bound memory


@dataclass(frozen=True)
class EncodedDocument:
    """Token ids `[tokens]`, the end-of-document id last, and the size of the UTF-8 text."""

    tokens: np.ndarray
    num_bytes: int


@dataclass(frozen=True)
class Encoder:
    """How a document becomes ids; small, so that it travels to the workers.

    Args:
        tokenizer_file: `tokenizer.json`.
        eod_token_id: appended to each document.
        dtype: NumPy name of the integer type of the ids.
    """

    tokenizer_file: Path
    eod_token_id: int
    dtype: str

    def encode(self, text: str) -> EncodedDocument:
        """Encode one document on one core."""
        # The variant without character offsets; a batch of one keeps the library on one thread.
        encoding = _load(self.tokenizer_file).encode_batch_fast([text], add_special_tokens=False)[0]
        tokens = np.array([*encoding.ids, self.eod_token_id], dtype=self.dtype)
        return EncodedDocument(tokens, len(text.encode("utf-8")))

    def encode_chunk(self, texts: list[str]) -> list[EncodedDocument]:
        """Encode several documents: one worker's task."""
        return [self.encode(text) for text in texts]


def load_encoding_tokenizer(path: Path) -> Tokenizer:
    """Load `tokenizer.json` for documents: whole, unpadded, and with text that looks like a special token read as text.

    Only the writer places end-of-document ids; a document that quotes `<|endoftext|>` must not end there.
    """
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


@functools.lru_cache(maxsize=1)
def _load(path: Path) -> Tokenizer:
    return load_encoding_tokenizer(path)


def encode_documents(texts: Iterable[str], encoder: Encoder, workers: int) -> Generator[EncodedDocument]:
    """Encode documents in order.

    Args:
        texts: documents; read as workers become free, so memory stays bounded.
        encoder: what to do with each.
        workers: processes; 1 encodes in this one.

    Raises:
        DataError: a worker was killed.
    """
    if workers == 1:
        yield from map(encoder.encode, texts)
        return
    pool = ProcessPoolExecutor(
        max_workers=workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare_worker,
    )
    pending: deque[Future[list[EncodedDocument]]] = deque()
    try:
        for chunk in _chunks(texts):
            pending.append(pool.submit(encoder.encode_chunk, chunk))
            if len(pending) >= _CHUNKS_AHEAD * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a tokenizing process ended abruptly, often for lack of memory; use fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: a pool's processes would wait forever for one that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"
    parent.join()
    os._exit(1)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if characters >= _CHUNK_CHARACTERS or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
