"""Checks of token files before they are mapped: a damaged file is one line at the start, not a crash in mid-run.

All but the fall-back of `check_vocabulary` read a few bytes, whatever the size of the data.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsecod_megatron.data.metadata import split_info
from sparsecod_megatron.errors import DataError

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES: dict[int, type[np.integer]] = {4: np.int32, 5: np.int64, 8: np.uint16}
_SCAN_TOKENS = 1 << 24
_MAKE_AGAIN = "make it again with `sparsecod data`"


@dataclass(frozen=True)
class TokenFiles:
    """What the header of an `.idx` file says of the pair: sequences, tokens, and the type of the stored ids."""

    num_sequences: int
    num_tokens: int
    dtype: type[np.integer]


def check_token_files(prefix: str | Path, seq_length: int) -> TokenFiles:
    """Check that a pair of token files is whole and long enough.

    Args:
        prefix: path of the `.bin` and `.idx` files without suffix.
        seq_length: tokens of a sample; its labels need one more.

    Raises:
        DataError: a missing, foreign, truncated or empty file, or fewer tokens than one sample takes.
    """
    for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
        if not path.is_file():
            raise DataError(f"{path}: no such file; check the prefix, or write it with `sparsecod data`")
    files = _read_index(Path(f"{prefix}.idx"))
    bin_path = Path(f"{prefix}.bin")
    expected = files.num_tokens * np.dtype(files.dtype).itemsize
    if bin_path.stat().st_size != expected:
        message = f"{bin_path.stat().st_size} bytes, but its .idx file says {expected}"
        raise DataError(f"{bin_path}: {message}; it was cut short or belongs to another .idx: {_MAKE_AGAIN}")
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
    files = _read_index(Path(f"{prefix}.idx"))
    described = split_info(prefix)
    if described and described[1].tokens == files.num_tokens:
        largest, source = described[0].vocab_size - 1, "its tokenizer's largest id"
    else:
        largest, source = _largest_token(Path(f"{prefix}.bin"), files), "its largest token id"
    if largest >= vocab_size:
        message = f"{source} is {largest}, but the model's vocabulary has {vocab_size} entries"
        raise DataError(f"{prefix}.bin: {message}; set model.vocab_size to at least {largest + 1}")


def _read_index(path: Path) -> TokenFiles:
    """Read the header, the last sequence's length and its offset, whose sum is the end of the `.bin` file."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise DataError(f"{path}: not a Megatron index file (begins with {header[:9]!r}); {_MAKE_AGAIN}")
        _, version, code, sequences, documents = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPES:
            message = f"index version {version}, token type {code}"
            raise DataError(f"{path}: {message}; supported are version 1 and types {sorted(_DTYPES)}: {_MAKE_AGAIN}")
        expected = _HEADER.size + 12 * sequences + 8 * documents  # int32 lengths, int64 offsets, int64 document ends
        if size != expected:
            raise DataError(f"{path}: {size} bytes, but its header says {expected}; it was cut short: {_MAKE_AGAIN}")
        if sequences == 0 or documents < 2:
            raise DataError(f"{path}: no documents in it; {_MAKE_AGAIN} from text that is not empty")
        stream.seek(_HEADER.size + 4 * (sequences - 1))
        (last_length,) = struct.unpack("<i", stream.read(4))
        stream.seek(_HEADER.size + 12 * sequences - 8)
        (last_offset,) = struct.unpack("<q", stream.read(8))
    dtype = _DTYPES[code]
    return TokenFiles(sequences, last_offset // np.dtype(dtype).itemsize + last_length, dtype)


def _largest_token(path: Path, files: TokenFiles) -> int:
    tokens = np.memmap(path, dtype=files.dtype, mode="r", shape=(files.num_tokens,))
    starts = range(0, files.num_tokens, _SCAN_TOKENS)
    return max(int(tokens[start : start + _SCAN_TOKENS].max()) for start in starts)
