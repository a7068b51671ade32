"""Opens the kinds of file that text comes in; what cannot be read becomes one line that names the file.

Every command reads text with `open_text`, so that one file is the same characters, and hence the same tokens, in all of
them. pyarrow, which `datasets` brings along, reads Zstandard and parquet.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO, cast

from sparsecod_megatron.errors import DataError

_MARKS = (  # UTF-32's marks begin with those of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_KEY_ADVICE = "name another one with --text-key"
COMPRESSION_SUFFIXES = (".gz", ".zst")
"""Suffixes, in lower case, of files that are unpacked while they are read."""


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open text, plain or compressed (`.gz`, `.zst`), without touching its line ends.

    UTF-8, or what a byte-order mark says (UTF-16, UTF-32); the mark is not part of the text.

    Raises:
        DataError: not such text, damaged, or unreadable; also while reading.
    """
    try:
        with path.open("rb") as file, _unpacked(file, path) as stream:
            buffered = io.BufferedReader(cast(io.RawIOBase, stream))
            yield io.TextIOWrapper(buffered, encoding=_encoding(buffered.peek(1 << 12), path), newline="")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {_not_text(error)}; convert it to UTF-8 or leave it out") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); check the file") from error


def read_parquet(path: Path, text_key: str) -> Iterator[str]:
    """The text of each row, one record batch in memory at a time; dictionary-encoded text is text.

    Raises:
        DataError: no parquet file, or no text in column `text_key`.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        # An open file, because pyarrow takes no name that is not UTF-8.
        with path.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as file:
            columns = file.schema_arrow.names
            if text_key not in columns:
                raise no_text_key(str(path), text_key, columns)
            kind = file.schema_arrow.field(text_key).type
            if not _is_text(kind):
                raise DataError(f"{path}: column {text_key!r} holds {kind}, not text; {_KEY_ADVICE}")
            rows = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    rows += 1
                    if text is None:
                        raise no_text_value(f"{path}: row {rows}", text_key, text)
                    yield text
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]}); check the file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert it or leave it out") from None


def no_text_key(where: str, text_key: str, found: list[str]) -> DataError:
    """The refusal of a record or table without `text_key`."""
    keys = ", ".join(sorted(found)) or "none"
    return DataError(f"{where}: no text under key {text_key!r} (keys: {keys}); name the right one with --text-key")


def no_text_value(where: str, text_key: str, value: object) -> DataError:
    """The refusal of a record whose value under `text_key` is not text."""
    if value is None:
        return DataError(f"{where}: null under key {text_key!r}, not text; remove the record or give it a text")
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    found = names.get(type(value), f"a {type(value).__name__}")
    return DataError(f"{where}: {found} under key {text_key!r}, not text; {_KEY_ADVICE}")


def _unpacked(file: IO[bytes], path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if suffix == ".zst":
        import pyarrow

        return cast(IO[bytes], pyarrow.input_stream(file, compression="zstd"))
    return file


def _encoding(head: bytes, path: Path) -> str:
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    # Western text in UTF-16 is valid UTF-8 with a NUL for every second character.
    halves = head[::2].count(0), head[1::2].count(0)
    if len(head) >= 16 and max(halves) > len(head) // 4 and min(halves) <= len(head) // 64:
        raise DataError(f"{path}: looks like UTF-16 without its byte-order mark; convert it to UTF-8 or leave it out")
    return "utf-8"


def _not_text(error: UnicodeDecodeError) -> str:
    if error.encoding.startswith("utf-8") or error.encoding == "utf_8":
        return f"not UTF-8 text (byte 0x{error.object[error.start]:02x})"
    return f"not the {error.encoding.upper()} text that its byte-order mark says"


def _is_text(kind: object) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type  # type: ignore[attr-defined]
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
