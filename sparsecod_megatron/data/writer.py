"""One split on its way to disk: Megatron's builder plus the totals that PREFIX.json reports."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from sparsecod_megatron.data.metadata import SplitInfo


class SplitWriter:
    """Appends documents to `PREFIX.bin`; `finish` writes `PREFIX.idx`.

    Args:
        prefix: path without suffix.
        dtype: NumPy integer type of the stored token ids.
    """

    def __init__(self, prefix: Path, dtype: type[np.integer]) -> None:
        self._index_path = f"{prefix}.idx"
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        self._digest = hashlib.sha256()
        self._documents = self._tokens = self._bytes = 0

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        """Append one document.

        Args:
            tokens: `[tokens]` ids in the writer's dtype, the end-of-document id last.
            num_bytes: size of its UTF-8 text.
        """
        self._builder.add_document(tokens, [tokens.size])
        self._digest.update(tokens.tobytes())
        self._documents += 1
        self._tokens += tokens.size
        self._bytes += num_bytes

    def finish(self) -> SplitInfo:
        """Close the `.bin` file, write the `.idx` file and return the totals."""
        self._builder.finalize(self._index_path)
        return SplitInfo(self._documents, self._tokens, self._bytes, self._digest.hexdigest())

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        self._builder.data_file.close()
