"""Training and validation split, written side by side and committed together."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from sparsecod_megatron.data.encode import EncodedDocument
from sparsecod_megatron.data.metadata import SplitInfo
from sparsecod_megatron.data.staging import Journal
from sparsecod_megatron.data.writer import SplitWriter

_TRAIN, _VAL = "train", "val"


class SplitsWriter:
    """Sends each document of the corpus to its split.

    Args:
        prefix: PREFIX_train and PREFIX_val are written.
        dtype: NumPy integer type of the stored token ids.
        vocab_size: ids must be below.
        held_out: `[documents]` bool, True for validation; None writes no validation split.
        journal: journal of the folder that `prefix` lies in; writing resumes where it says.
    """

    def __init__(
        self,
        prefix: Path,
        dtype: type[np.integer],
        vocab_size: int,
        held_out: np.ndarray | None,
        journal: Journal,
    ) -> None:
        self._folder, self._held_out, self._journal = prefix.parent, held_out, journal
        self._open = ExitStack()
        self._writers = {
            name: self._open.enter_context(
                SplitWriter(prefix.with_name(f"{prefix.name}_{name}"), dtype, vocab_size, journal.splits.get(name))
            )
            for name in ((_TRAIN,) if held_out is None else (_TRAIN, _VAL))
        }

    @property
    def num_tokens(self) -> int:
        """Tokens of both splits."""
        return sum(writer.progress.tokens for writer in self._writers.values())

    def add(self, document: EncodedDocument) -> None:
        """Append the next document of the corpus."""
        held = self._held_out is not None and self._held_out[self._journal.documents]
        self._writers[_VAL if held else _TRAIN].add(document.tokens, document.num_bytes)
        self._journal.documents += 1

    def commit(self) -> None:
        """Bring what was added to the disk."""
        self._journal.splits = {name: writer.commit() for name, writer in self._writers.items()}
        self._journal.save(self._folder)

    def finish(self) -> dict[str, SplitInfo]:
        """Commit, write the `.idx` files and return the totals."""
        self.commit()
        return {name: writer.finish() for name, writer in self._writers.items()}

    def __enter__(self) -> SplitsWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        self._open.close()
