"""Checks of token files before they are mapped: a damaged file is one line at the start, not a crash in mid-run.

The `.idx` file is read as a whole, once a process; of the `.bin` file only its size, but for the fall-back of
`check_vocabulary`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparsecod_megatron.data.index_file import REMEDY, TokenFiles, check_entries, read_header
from sparsecod_megatron.data.metadata import split_info
from sparsecod_megatron.errors import DataError

_SCAN_TOKENS = 1 << 24


def check_token_files(prefix: str | Path, seq_length: int, *, entries: bool = True) -> TokenFiles:
    """Check that a pair of token files is whole and long enough.

    Args:
        prefix: path of the `.bin` and `.idx` files without suffix.
        seq_length: tokens of a sample; its labels need one more.
        entries: also check every entry of the index; off where this process has done so.

    Raises:
        DataError: a missing, foreign, truncated or empty file, or fewer tokens than one sample takes.
    """
    for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
        if not path.is_file():
            raise DataError(f"{path}: no such file; check the prefix, or write it with `sparsecod data`")
    files, _ = read_header(Path(f"{prefix}.idx"))
    bin_path = Path(f"{prefix}.bin")
    expected = files.num_tokens * np.dtype(files.dtype).itemsize
    if bin_path.stat().st_size != expected:
        message = f"{bin_path.stat().st_size} bytes, but its .idx file says {expected}"
        raise DataError(f"{bin_path}: {message}; it was cut short or belongs to another .idx: {REMEDY}")
    if entries:
        check_entries(Path(f"{prefix}.idx"))
    if files.num_tokens < seq_length + 1:
        message = f"{files.num_tokens} tokens, fewer than one sample of {seq_length} + 1"
        raise DataError(f"{bin_path}: {message}; shorten the sequence or add text")
    return files


def check_vocabulary(prefix: str | Path, vocab_size: int) -> None:
    """Check that every token id has a row in the model's embedding table.

    Reads the vocabulary size from PREFIX.json; token files without one, or that it no longer describes, are scanned.

    Args:
        prefix: path of the `.bin` and `.idx` files without suffix.
        vocab_size: rows of the embedding table.

    Raises:
        DataError: an id too large.
    """
    files, _ = read_header(Path(f"{prefix}.idx"))
    described = split_info(prefix)
    if described and described[1].tokens == files.num_tokens:
        largest, source = described[0].vocab_size - 1, "its tokenizer's largest id"
    else:
        largest, source = _largest_token(Path(f"{prefix}.bin"), files), "its largest token id"
    if largest >= vocab_size:
        message = f"{source} is {largest}, but the model's vocabulary has {vocab_size} entries"
        raise DataError(f"{prefix}.bin: {message}; set model.vocab_size to at least {largest + 1}")


def _largest_token(path: Path, files: TokenFiles) -> int:
    tokens = np.memmap(path, dtype=files.dtype, mode="r", shape=(files.num_tokens,))
    starts = range(0, files.num_tokens, _SCAN_TOKENS)
    return max(int(tokens[start : start + _SCAN_TOKENS].max()) for start in starts)
