"""Documents of JSON files, one object per line or all objects in one array: the content decides which.

Both go under the same names (`.json` above all), and read as text either would train a model on braces and keys.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from sparsecod_megatron.data.readers import no_text_key, no_text_value, open_text
from sparsecod_megatron.errors import DataError

_BLOCK = 1 << 16
_BEGINNING = re.compile(r"(\[\s*)?\{\s*[\"}]")
_SPACE = re.compile(r"[ \t\r\n]*")
_SHAPES = "a line must be one JSON object, or the whole file one array of objects"


def read_json(path: Path, text_key: str) -> Iterator[str]:
    """The text of each object.

    Raises:
        DataError: a line or an item that is not a JSON object with text under `text_key`.
    """
    with open_text(path) as stream:
        empty, first = _first_character(stream)
        if first == "[":
            for number, value in enumerate(_items(stream, path), start=1):
                yield _text_of(value, text_key, f"{path}: item {number}")
            return
        for number, line in enumerate(itertools.chain([first + stream.readline()], stream), start=empty + 1):
            if line := line.lstrip("\ufeff").strip():  # a mark stays where files were joined
                yield _text_of(_parse(line, f"{path}:{number}"), text_key, f"{path}:{number}")


def begins_like_json(path: Path) -> bool:
    """Whether a file begins like an object or an array of objects; the rest is not looked at.

    Raises:
        DataError: not text.
    """
    with open_text(path) as stream:
        _, first = _first_character(stream)
        return first in ("{", "[") and _BEGINNING.match(first + stream.read(_BLOCK)) is not None


def has_documents(path: Path, text_key: str) -> bool:
    """Whether the first object has text under `text_key`, as that of a configuration file has not."""
    try:
        return next(read_json(path, text_key), None) is not None
    except DataError:
        return False


def _first_character(stream: TextIO) -> tuple[int, str]:
    """The number of line ends before the first character that is not white space, and that character, or ""."""
    line_ends = 0
    while character := stream.read(1):
        if not character.isspace():
            return line_ends, character
        line_ends += character == "\n"
    return line_ends, ""


def _items(stream: TextIO, path: Path) -> Iterator[Any]:
    """The items of an array whose bracket has been read; not the whole array is in memory."""
    decoder = json.JSONDecoder()
    buffer, place, number, size = "", 0, 0, _BLOCK
    while True:
        place = _behind_space(buffer, place)
        reason = "its array does not end"
        if buffer.startswith("]", place):
            if rest := (buffer[place + 1 :] + stream.read()).strip():
                raise DataError(f"{path}: {rest[:20]!r} after its array; {_SHAPES}")
            return
        try:
            value, end = decoder.raw_decode(buffer, place)
            end = _behind_space(buffer, end)
            if buffer.startswith((",", "]"), end):  # else a number may have more digits in the next block
                number, size = number + 1, _BLOCK
                yield value
                place = end + buffer.startswith(",", end)
                continue
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
        more = stream.read(size)
        if not more:
            raise DataError(f"{path}: item {number + 1}: not JSON ({reason}); {_SHAPES}")
        # Doubled, so that the beginning of a long item is not read again for each of its blocks.
        buffer, place, size = buffer[place:] + more, 0, 2 * size


def _behind_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None, "matches the empty text"
    return found.end()


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise DataError(f"{where}: not JSON ({reason}); {_SHAPES}") from None


def _text_of(record: Any, text_key: str, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}, not an object; {_SHAPES}")
    if text_key not in record:
        raise no_text_key(where, text_key, list(record))
    text = record[text_key]
    if not isinstance(text, str):
        raise no_text_value(where, text_key, text)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: half a surrogate pair, which is not Unicode text; remove or repair it") from None
    return text
