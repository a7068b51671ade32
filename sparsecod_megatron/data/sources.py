"""Where documents come from: one re-iterable, deterministic stream of texts per kind of input.

What one document is:

- a JSON file (`.jsonl`, `.ndjson`, `.jsonlines`, `.json`): the text key of each line, or of each item of its one array;
- a parquet file (`.parquet`): the text column of each row;
- a directory: each text file (`.txt`, `.md`, `.rst`, `.py`) and each document of each JSON and parquet file, ordered by
  relative path; what else lies there is named once;
- any other file: stretches of text of about `TARGET_CHARACTERS` that end at a blank line, so that some can be held out;
  joined, they are the file. One without a suffix that tells its kind is JSON if it begins like that;
- `stdlib`: each UTF-8 source file of this Python's standard library, then each topic of its reference (`pydoc`).

Upper case counts as lower case in suffixes; text and JSON may be packed (`.gz`, `.zst`). Line ends are kept as they
are. Documents of white space only are left out.
"""

from __future__ import annotations

import itertools
import logging
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsecod_megatron.data.directory import find_files
from sparsecod_megatron.data.json_documents import begins_like_json, has_documents, read_json
from sparsecod_megatron.data.readers import COMPRESSION_SUFFIXES, open_text, read_parquet
from sparsecod_megatron.errors import DataError

logger = logging.getLogger("sparsecod")

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json")
PARQUET_SUFFIX = ".parquet"
_SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, PARQUET_SUFFIX)
TARGET_CHARACTERS = 16_384
_FOLDERS_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}
_MAX_NAMED = 5


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read more than once, in the same order each time.

    Args:
        read: starts a new pass.
        max_documents: keep only this many, the first ones; None keeps all.
        files: what is read, as far as it is files; their sizes and times tell whether a corpus is still the same.
    """

    read: Callable[[], Iterator[str]]
    max_documents: int | None = None
    files: tuple[Path, ...] = ()

    def __iter__(self) -> Iterator[str]:
        documents = (text for text in self.read() if text.strip())
        return itertools.islice(documents, self.max_documents)


def open_corpus(source: str, text_key: str = "text", max_documents: int | None = None) -> Corpus:
    """Find the documents of a file, a directory or `stdlib`.

    Args:
        source: path, or `stdlib`.
        text_key: JSON field or parquet column that holds the text.
        max_documents: keep only this many, the first ones; None keeps all.

    Raises:
        DataError: nothing to read at `source`. Damaged files raise while iterating.
    """
    if source == "stdlib":
        return Corpus(_read_stdlib, max_documents)
    path = Path(source)
    if path.is_dir():
        files = _files_below(path, text_key)
        kinds = {file: document_kind(file) for file in files}
        return Corpus(lambda: _read_files(kinds, text_key), max_documents, tuple(files))
    if not path.is_file():
        raise DataError(f"{path}: no such file or directory; give a path, `stdlib` or `hf:NAME[:CONFIG]`")
    kind = document_kind(path)
    if kind != "text":
        return Corpus(lambda: _read_files({path: kind}, text_key), max_documents, (path,))
    return Corpus(lambda: _cut_at_blank_lines(path), max_documents, (path,))


def document_kind(path: Path) -> str:
    """`text`, `json` or `parquet`, by name; by content where the name tells nothing.

    Text by name that begins as JSON does is read as text, with a warning.

    Raises:
        DataError: a file that has to be looked into and is not text.
    """
    suffix = _suffix(path)
    if suffix == PARQUET_SUFFIX:
        return "parquet"
    if suffix in JSON_SUFFIXES:
        return "json"
    if not begins_like_json(path):
        return "text"
    if suffix not in TEXT_SUFFIXES:
        return "json"
    logger.warning("%s: read as text, because of its name, but it begins with JSON; rename it to .jsonl if it is", path)
    return "text"


def _suffix(path: Path) -> str:
    """The suffix that tells the kind, in lower case; without that of a packed file."""
    path = path.with_suffix("") if path.suffix.lower() in COMPRESSION_SUFFIXES else path
    return path.suffix.lower()


def _files_below(directory: Path, text_key: str) -> list[Path]:
    """All readable kinds below a directory, sorted by relative path; what is not read is counted and named."""
    found = find_files(directory)
    files = [path for path in found.files if _is_read(path, text_key)]
    unread = sorted(
        [*found.passed_over, *(path.relative_to(directory).as_posix() for path in {*found.files} - {*files})]
    )
    names = ", ".join(unread[:_MAX_NAMED]) + (
        f" and {len(unread) - _MAX_NAMED} more" if len(unread) > _MAX_NAMED else ""
    )
    if not files:
        kinds = " ".join(f"*{suffix}" for suffix in _SUFFIXES)
        message = f"no text files in this directory (but {names or 'nothing'}); it needs at least one of {kinds}"
        raise DataError(f"{directory}: {message}, the JSON ones with text under {text_key!r}")
    if unread:
        logger.warning("%s: %d files are read, %d entries are not: %s", directory, len(files), len(unread), names)
    return files


def _is_read(path: Path, text_key: str) -> bool:
    """Whether a file of a directory holds documents; many a `.json` beside them is a configuration."""
    suffix = _suffix(path)
    if suffix == PARQUET_SUFFIX:
        return path.suffix.lower() == PARQUET_SUFFIX  # packed it cannot be read
    return suffix in _SUFFIXES and (suffix != ".json" or has_documents(path, text_key))


def _read_files(kinds: dict[Path, str], text_key: str) -> Iterator[str]:
    for path, kind in kinds.items():
        if kind == "json":
            yield from read_json(path, text_key)
        elif kind == "parquet":
            yield from read_parquet(path, text_key)
        else:
            yield read_text(path)


def read_text(path: Path) -> str:
    """A text file as one document.

    Raises:
        DataError: not text, damaged, or unreadable.
    """
    with open_text(path) as stream:
        return stream.read()


def _cut_at_blank_lines(path: Path) -> Iterator[str]:
    """Cut one file into documents: at the first blank line past the target, at any line end past twice the target."""
    with open_text(path) as stream:
        lines: list[str] = []
        characters = 0
        for line in stream:
            lines.append(line)
            characters += len(line)
            if characters >= 2 * TARGET_CHARACTERS or (characters >= TARGET_CHARACTERS and not line.strip()):
                yield "".join(lines)
                lines, characters = [], 0
        yield "".join(lines)


def _read_stdlib() -> Iterator[str]:
    """Python's own library. Some of its tests are in other encodings on purpose: those are skipped."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if _FOLDERS_LEFT_OUT.intersection(parts) or parts[0] == "pydoc_data":
            continue
        try:
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
    from pydoc_data.topics import topics

    for _, text in sorted(topics.items()):
        yield text
