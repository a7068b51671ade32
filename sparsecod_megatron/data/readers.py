"""Opening the kinds of file that text comes in; what cannot be read becomes one line that names the file.

pyarrow, which `datasets` brings along, reads Zstandard and parquet.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO, cast

from sparsecod_megatron.errors import DataError


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open UTF-8 text, plain or compressed (`.gz`, `.zst`), without touching its line ends.

    Raises:
        DataError: not UTF-8, damaged, or unreadable; also while reading.
    """
    try:
        with _open_binary(path) as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8", newline="")
    except UnicodeDecodeError as error:
        value = error.object[error.start]
        raise DataError(f"{path}: not UTF-8 text (byte 0x{value:02x}); convert it to UTF-8 or leave it out") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); check the file") from error


def read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    """The text of each line.

    Raises:
        DataError: a line that is no JSON object with text under `text_key`.
    """
    with open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _text_of_line(line, text_key, where=f"{path}:{number}")


def read_parquet(path: Path, text_key: str) -> Iterator[str]:
    """The text of each row, one record batch in memory at a time.

    Raises:
        DataError: no parquet file, or no text in column `text_key`.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            kind = file.schema_arrow.field(text_key).type if text_key in columns else None
            if kind is None or not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise _no_text(str(path), text_key, columns)
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise _no_text(str(path), text_key, columns)
                    yield text
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]}); check the file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert it or leave it out") from None


def _open_binary(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return path.open("rb")


def _text_of_line(line: str, text_key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise DataError(f"{where}: not JSON ({reason}); every line must be one JSON object") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}, not an object; every line must be one JSON object")
    text = record.get(text_key)
    if not isinstance(text, str):
        raise _no_text(where, text_key, list(record))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: half a surrogate pair, which is no Unicode text; remove or repair it") from None
    return text


def _no_text(where: str, text_key: str, found: list[str]) -> DataError:
    keys = ", ".join(sorted(found))
    return DataError(f"{where}: no text under key {text_key!r} (keys: {keys}); name the right one with --text-key")
