"""Analysis directories read back: their files' names, and `scores.json` as plain values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecod_megatron.errors import DataError

SCORES_FILE = "scores.json"
PLOTS_FOLDER = "plots"


@dataclass(frozen=True)
class AnalysisDirectory:
    """One analysis as written.

    Attributes:
        name: the shortest end of its path that tells it from the others read with it.
        settings: what it was measured with.
        scores: results by the name of the score: `values`, `tables`, `per_sequence`, `figures`, `warnings`.
    """

    name: str
    path: Path
    settings: dict[str, Any]
    scores: dict[str, dict[str, Any]]


def is_analysis(path: Path) -> bool:
    """Whether `sparsecod analyze` wrote this directory."""
    return (path / SCORES_FILE).is_file()


def load_analyses(paths: Sequence[Path]) -> list[AnalysisDirectory]:
    """Read analysis directories, each under a name of its own.

    Args:
        paths: directories that `sparsecod analyze` wrote.

    Raises:
        DataError: not such a directory, one given twice, or a damaged `scores.json`.
    """
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise DataError(f"{paths[index]}: given twice; name each analysis once")
    return [_load(path, name) for path, name in zip(paths, short_names(resolved), strict=True)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell all of them apart."""
    for depth in range(1, max((len(path.parts) for path in paths), default=0)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def with_ends(value: Any) -> dict[str, Any]:
    """One of a score's `values` with the ends of its interval; they are None where it has none."""
    found = value if isinstance(value, dict) else {"value": value}
    return {end: found.get(end) for end in ("value", "low", "high")}


def _load(directory: Path, name: str) -> AnalysisDirectory:
    path = directory / SCORES_FILE
    if not path.is_file():
        raise DataError(f"{directory}: no {SCORES_FILE} in it; give a directory that `sparsecod analyze` wrote")
    try:
        analysis = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); analyse the model again") from None
    if not isinstance(analysis, dict) or not {"settings", "scores"} <= analysis.keys():
        raise DataError(f"{path}: has no settings and scores; analyse the model again")
    for score, result in analysis["scores"].items():
        figures = result.get("figures") if isinstance(result, dict) else None
        if not isinstance(figures, list) or not all(isinstance(figure, dict) for figure in figures):
            raise DataError(f"{path}: score {score} does not hold its figures' values; analyse the model again")
    return AnalysisDirectory(name, directory, analysis["settings"], analysis["scores"])
