"""Where documents come from: one re-iterable, deterministic stream of texts per kind of input.

What one document is:

- a JSONL file (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`): the text key of each line;
- a parquet file (`.parquet`): the text column of each row;
- a directory: each `.txt`, `.md`, `.rst`, `.py` file and each document of each JSONL and parquet file, ordered by
  relative path;
- a single text file, plain, `.gz` or `.zst`: stretches of about `TARGET_CHARACTERS` that end at a blank line, so that
  some can be held out; joined, they are the file;
- `stdlib`: each UTF-8 source file of this Python's standard library, then each topic of its reference (`pydoc`).

Line ends are kept as they are. Documents of white space only are left out.
"""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsecod_megatron.data.readers import open_text, read_jsonl, read_parquet
from sparsecod_megatron.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_SUFFIX = ".parquet"
_READABLE = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, PARQUET_SUFFIX)
TARGET_CHARACTERS = 16_384
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read more than once, in the same order each time.

    Args:
        read: starts a new pass.
        max_documents: keep the first so many; None keeps all.
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
        text_key: JSONL field or parquet column that holds the text.
        max_documents: keep the first so many; None keeps all.

    Raises:
        DataError: nothing to read at `source`. Damaged files raise while iterating.
    """
    if source == "stdlib":
        return Corpus(_read_stdlib, max_documents)
    path = Path(source)
    if path.is_dir():
        files = _text_files(path)
        if not files:
            kinds = " ".join(f"*{suffix}" for suffix in _READABLE)
            raise DataError(f"{path}: no text files in this directory; it needs at least one of {kinds}")
        return Corpus(lambda: _read_files(files, text_key), max_documents, tuple(files))
    if not path.is_file():
        raise DataError(f"{path}: no such file or directory; give a path, `stdlib` or `hf:NAME[:CONFIG]`")
    if path.name.endswith((*JSONL_SUFFIXES, PARQUET_SUFFIX)):
        return Corpus(lambda: _read_files([path], text_key), max_documents, (path,))
    return Corpus(lambda: _cut_at_blank_lines(path), max_documents, (path,))


def _text_files(directory: Path) -> list[Path]:
    """All readable kinds below a directory, sorted by relative path; hidden files and folders are skipped."""

    def wanted(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        return path.name.endswith(_READABLE) and not hidden and path.is_file()

    return sorted(filter(wanted, directory.rglob("*")), key=lambda path: path.relative_to(directory).as_posix())


def _read_files(files: list[Path], text_key: str) -> Iterator[str]:
    for path in files:
        if path.name.endswith(JSONL_SUFFIXES):
            yield from read_jsonl(path, text_key)
        elif path.suffix == PARQUET_SUFFIX:
            yield from read_parquet(path, text_key)
        else:
            with open_text(path) as stream:
                text = stream.read()
            yield text


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
        if _NOT_LIBRARY.intersection(parts) or parts[0] == "pydoc_data":
            continue
        try:
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
    from pydoc_data.topics import topics

    for _, text in sorted(topics.items()):
        yield text
