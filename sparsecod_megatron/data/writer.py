"""One split on its way to disk, so that a killed process loses only what it wrote since the last commit."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sparsecod_megatron.data.index_file import write_index
from sparsecod_megatron.data.metadata import SplitInfo
from sparsecod_megatron.errors import DataError

_LENGTH = np.dtype("<i4")
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class SplitProgress:
    """What of a split is safely on disk: documents, tokens, bytes of their UTF-8 text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


class SplitWriter:
    """Appends documents to `PREFIX.bin` and their lengths to `PREFIX.lengths`; `finish` makes `PREFIX.idx` of these.

    Args:
        prefix: path without suffix.
        dtype: NumPy integer type of the stored token ids.
        vocab_size: ids must be below.
        progress: what an earlier process has committed; whatever lies behind it is cut off.

    Raises:
        DataError: less on disk than was committed.
    """

    def __init__(
        self, prefix: Path, dtype: type[np.integer], vocab_size: int, progress: SplitProgress | None = None
    ) -> None:
        self.progress = progress or SplitProgress()
        self._dtype, self._vocab_size = dtype, vocab_size
        self._paths = {suffix: prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".lengths", ".idx")}
        self._tokens = _open_at(self._paths[".bin"], self.progress.tokens * np.dtype(dtype).itemsize)
        self._lengths = _open_at(self._paths[".lengths"], self.progress.documents * _LENGTH.itemsize)

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        """Append one document.

        Args:
            tokens: `[tokens]` ids in the writer's dtype, the end-of-document id last.
            num_bytes: size of its UTF-8 text.

        Raises:
            DataError: an id outside the vocabulary.
        """
        if (largest := int(tokens.max())) >= self._vocab_size:
            message = f"token id {largest} in document {self.progress.documents}, but {self._vocab_size} entries"
            raise DataError(f"{self._paths['.bin'].name}: {message}; the tokenizer contradicts itself, use another")
        self._tokens.write(tokens.tobytes())
        self._lengths.write(np.array(tokens.size, dtype=_LENGTH).tobytes())
        before = self.progress
        self.progress = SplitProgress(before.documents + 1, before.tokens + tokens.size, before.bytes + num_bytes)

    def commit(self) -> SplitProgress:
        """Bring everything to the disk, and return how much it is."""
        for stream in (self._tokens, self._lengths):
            stream.flush()
            os.fsync(stream.fileno())
        return self.progress

    def finish(self) -> SplitInfo:
        """Write the `.idx` file and return the totals; may be repeated."""
        self.commit()
        lengths = np.fromfile(self._paths[".lengths"], dtype=_LENGTH)
        write_index(self._paths[".idx"], lengths, self._dtype)
        digest = hashlib.sha256()
        with self._paths[".bin"].open("rb") as stream:
            while content := stream.read(_BLOCK_BYTES):
                digest.update(content)
        return SplitInfo(self.progress.documents, self.progress.tokens, self.progress.bytes, digest.hexdigest())

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        self._tokens.close()
        self._lengths.close()


def _open_at(path: Path, size: int) -> BinaryIO:
    stream = path.open("r+b" if path.exists() else "w+b")
    if (found := stream.seek(0, os.SEEK_END)) < size:
        stream.close()
        raise DataError(f"{path}: {found} bytes left of {size}; it is damaged; start afresh with --overwrite")
    stream.truncate(size)
    stream.seek(size)
    return stream
