"""What `sparsecod data` can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsecod_megatron.errors import DataError

TRAIN = "train:"
"""Prefix of the vocabulary size of a tokenizer to train."""
HUB = "hf:"
"""Prefix of the name of a HuggingFace dataset."""


@dataclass(frozen=True)
class PreprocessOptions:
    """What `sparsecod data` was asked for.

    Args:
        input: a path, `stdlib`, or `hf:NAME[:CONFIG]`.
        tokenizer: a name or path that `load_tokenizer` knows, or `train:VOCAB`.
        output: PREFIX of everything written.
        workers: tokenizing processes.
        val_fraction: share of the documents held out, at least one document if above 0.
        seed: chooses the documents held out.
        text_key: JSONL field, or column, that holds the text.
        max_documents: use only this many, the first ones; None uses all.
        max_tokens: stop after the document with which the splits together hold so many; None uses all.
        overwrite: replace an earlier result of the same PREFIX.
        commit_interval_s: seconds of work that a killed process may lose.
    """

    input: str
    tokenizer: str
    output: Path
    workers: int = 1
    val_fraction: float = 0.0
    seed: int = 1234
    text_key: str = "text"
    max_documents: int | None = None
    max_tokens: int | None = None
    overwrite: bool = False
    commit_interval_s: float = 10.0

    def __post_init__(self) -> None:
        """Refuse what no corpus could satisfy.

        Raises:
            DataError: one line.
        """
        if self.workers < 1:
            raise DataError(f"--workers {self.workers}: must be at least 1")
        if not 0 <= self.val_fraction < 1:
            raise DataError(f"--val-fraction {self.val_fraction}: must be at least 0 and below 1")
        for name, limit in (("--max-documents", self.max_documents), ("--max-tokens", self.max_tokens)):
            if limit is not None and limit < 1:
                raise DataError(f"{name} {limit}: must be at least 1")
        if self.seed < 0:
            raise DataError(f"--seed {self.seed}: must be at least 0")
        for name, value in (("--output", str(self.output)), ("--tokenizer", self.tokenizer)):
            if not _is_utf8(value):
                raise DataError(f"{name} {value!r}: not a UTF-8 name, which tokenizers cannot open; rename it")
        if self.output.name in ("", ".."):
            raise DataError(f"--output {self.output}: must end in a name, the PREFIX of the files to write")
        size = self.tokenizer.removeprefix(TRAIN)
        if self.tokenizer.startswith(TRAIN) and not size.isdecimal():
            raise DataError(
                f"--tokenizer {self.tokenizer}: {size!r} is not a vocabulary size; write for example train:4096"
            )

    @property
    def reads_twice(self) -> bool:
        """Whether documents are needed before the pass that tokenizes: to count them, or to learn a tokenizer."""
        return self.val_fraction > 0 or self.tokenizer.startswith(TRAIN)


def _is_utf8(name: str) -> bool:
    """Whether a name of the file system, as Python holds it, is text."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
