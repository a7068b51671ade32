"""Megatron's `.idx` file: where each sequence of a `.bin` file begins and ends.

Written with NumPy from a file of lengths: Megatron's own writer keeps a Python list of them, which at a hundred million
documents takes gigabytes and minutes. Read to be checked, before anything maps it.

Layout, little endian: magic (9 bytes), version (uint64), token type (uint8), sequences and document ends (uint64 each),
then int32 lengths in tokens, int64 offsets in bytes, int64 numbers of the sequences that documents end before.

Source: `IndexedDataset` in megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from sparsecod_megatron.errors import DataError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPES: dict[int, type[np.integer]] = {4: np.int32, 5: np.int64, 8: np.uint16}
_CHUNK = 1 << 22
REMEDY = "make it again with `sparsecod data`"


@dataclass(frozen=True)
class TokenFiles:
    """What an `.idx` file says of the pair: sequences, tokens, and the type of the stored ids."""

    num_sequences: int
    num_tokens: int
    dtype: type[np.integer]


def write_index(path: Path, lengths: np.ndarray, dtype: type[np.integer]) -> None:
    """Write the index of documents of one sequence each, laid end to end.

    Args:
        path: the `.idx` file.
        lengths: `[documents]` int32, in tokens; may be a memory map.
        dtype: number format of the stored ids.
    """
    code = next(code for code, known in _DTYPES.items() if known is dtype)
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(lengths) + 1))
        for start in range(0, len(lengths), _CHUNK):
            stream.write(lengths[start : start + _CHUNK].astype("<i4").tobytes())
        offset = 0
        for start in range(0, len(lengths), _CHUNK):
            ends = offset + np.cumsum(lengths[start : start + _CHUNK], dtype="<i8") * np.dtype(dtype).itemsize
            stream.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
            offset = int(ends[-1])
        for start in range(0, len(lengths) + 1, _CHUNK):
            stream.write(np.arange(start, min(start + _CHUNK, len(lengths) + 1), dtype="<i8").tobytes())


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The type to store ids in.

    Source: `DType.optimal_dtype` in megatron/core/datasets/indexed_dataset.py, whose import takes seconds.
    """
    return np.uint16 if vocab_size < 65500 else np.int32


def read_header(path: Path) -> tuple[TokenFiles, int]:
    """Read the ends of the file: its header, and the last sequence, which tells the number of tokens.

    Returns:
        The facts, and the number of document ends.

    Raises:
        DataError: foreign, truncated or empty.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise DataError(f"{path}: not a Megatron index file (begins with {header[:9]!r}); {REMEDY}")
        _, version, code, sequences, documents = _HEADER.unpack(header)
        if version != _VERSION or code not in _DTYPES:
            message = f"index version {version}, token type {code}"
            raise DataError(f"{path}: {message}; supported are version 1 and types {sorted(_DTYPES)}: {REMEDY}")
        expected = _HEADER.size + 12 * sequences + 8 * documents
        if size != expected:
            raise DataError(f"{path}: {size} bytes, but its header says {expected}; it was cut short: {REMEDY}")
        if sequences == 0 or documents < 2:
            raise DataError(f"{path}: no documents in it; {REMEDY} from text that is not empty")
        stream.seek(_HEADER.size + 4 * (sequences - 1))
        (last_length,) = struct.unpack("<i", stream.read(4))
        stream.seek(_HEADER.size + 12 * sequences - 8)
        (last_offset,) = struct.unpack("<q", stream.read(8))
    dtype = _DTYPES[code]
    return TokenFiles(sequences, last_offset // np.dtype(dtype).itemsize + last_length, dtype), documents


def check_entries(path: Path) -> None:
    """Check that the sequences lie end to end and that documents end at sequences. Reads the whole file.

    Raises:
        DataError: an entry that contradicts another.
    """
    files, _ = read_header(path)
    sequences, itemsize = files.num_sequences, np.dtype(files.dtype).itemsize
    lengths, offsets, ends = _entries(path)
    offset = 0
    for start in range(0, sequences, _CHUNK):
        sizes = lengths[start : start + _CHUNK].astype(np.int64) * itemsize
        begins = np.concatenate([[offset], offset + np.cumsum(sizes)])
        wrong = (sizes < 0) | (begins[:-1] != offsets[start : start + _CHUNK])
        if wrong.any():
            number = start + int(wrong.argmax())
            message = f"sequence {number} has length {lengths[number]} and offset {offsets[number]}"
            raise DataError(f"{path}: {message}, which do not follow from those before; it is damaged: {REMEDY}")
        offset = int(begins[-1])
    if ends[0] != 0 or ends[-1] != sequences or (np.diff(ends) < 0).any():
        raise DataError(f"{path}: its documents do not end at its {sequences} sequences; it is damaged: {REMEDY}")


def token_documents(prefix: Path) -> Iterator[np.ndarray]:
    """Yield each document's ids `[tokens]`, mapped, in the stored type; documents without a token are left out.

    Megatron's own reader does the same after an import of seconds.

    Args:
        prefix: path of the `.bin` and `.idx` files without suffix, checked with `check_entries`.
    """
    files, _ = read_header(Path(f"{prefix}.idx"))
    lengths, offsets, ends = _entries(Path(f"{prefix}.idx"))
    tokens = np.memmap(f"{prefix}.bin", dtype=files.dtype, mode="r", shape=(files.num_tokens,))
    for first, behind in pairwise(ends):
        begin = offsets[first] // tokens.itemsize if first < behind else 0
        end = offsets[behind - 1] // tokens.itemsize + lengths[behind - 1] if first < behind else 0
        if begin < end:
            yield tokens[begin:end]


def _entries(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mapped: lengths `[sequences]` int32, offsets `[sequences]` int64, document ends `[documents]` int64."""
    files, documents = read_header(path)
    sequences = files.num_sequences
    content = np.memmap(path, dtype=np.uint8, mode="r")
    return (
        np.frombuffer(content, "<i4", sequences, _HEADER.size),
        np.frombuffer(content, "<i8", sequences, _HEADER.size + 4 * sequences),
        np.frombuffer(content, "<i8", documents, _HEADER.size + 12 * sequences),
    )
