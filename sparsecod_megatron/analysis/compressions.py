"""Tables of compressions read back, as `sparsecod compress` writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecod_megatron.analysis.directory import short_names
from sparsecod_megatron.errors import DataError

TABLE_FILE = "table.json"
DENSE = "dense"
"""Method of the first row, the model as it was."""
USEFULNESS_BY_BLOCK = "usefulness_by_block"
"""Key of the usefulness of each block, in rows that were scored by it."""


@dataclass(frozen=True)
class CompressionTable:
    """One table as written.

    Attributes:
        name: the shortest end of its path that tells it from the others read with it.
        path: its directory.
        command: that made it.
        rows: plain data, the dense model's first.
        warnings: one sentence each.
    """

    name: str
    path: Path
    command: str
    rows: list[dict[str, Any]]
    warnings: list[str]

    @property
    def compressed(self) -> list[dict[str, Any]]:
        """The rows but for the dense model's."""
        return [row for row in self.rows if row["method"] != DENSE]

    def score_names(self) -> list[tuple[str, str]]:
        """Score and name of every depth score's number, in the order of the rows."""
        return list(dict.fromkeys((entry["score"], entry["name"]) for row in self.rows for entry in scores_of(row)))


def scores_of(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The numbers of a row's depth scores: `first` dense, `second` compressed, `difference`, `low`, `high`."""
    yield from row.get("scores", [])


def is_compressions(path: Path) -> bool:
    """Whether `sparsecod compress` wrote a table into this directory; that of a study holds no command."""
    try:
        content = json.loads((path / TABLE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "command" in content


def load_compressions(paths: Sequence[Path]) -> list[CompressionTable]:
    """Read tables, each under a name of its own.

    Args:
        paths: directories with a table of `sparsecod compress`.

    Raises:
        DataError: no such table, one given twice, or one that lacks what every row has.
    """
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise DataError(f"{paths[index]}: given twice; name each table once")
    return [_load(path, name) for path, name in zip(paths, short_names(resolved), strict=True)]


def _load(directory: Path, name: str) -> CompressionTable:
    path = directory / TABLE_FILE
    if not is_compressions(directory):
        raise DataError(f"{directory}: no table of compressions; give a directory that `sparsecod compress` wrote")
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content.get("rows")
    needed = {"method", "pattern", "perplexity", "nonzero_parameters", "bytes"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise DataError(f"{path}: its rows lack numbers; run `sparsecod compress` again")
    return CompressionTable(name, directory, content["command"], rows, list(content.get("warnings", [])))
