"""Analyses of one model at several steps, or of several models, as one: every number with its interval over the steps.

What it makes has the form of an analysis, so that `sparsecod report` shows it as one: curves with the ends of their
intervals, the last point's numbers, and the changes from each point to the next, paired by sequence.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsecod_megatron.analysis.analyze import Analysis
from sparsecod_megatron.analysis.compare import Difference, differences
from sparsecod_megatron.analysis.directory import AnalysisDirectory, with_ends
from sparsecod_megatron.analysis.scores.base import Lines, Number, Result

CHANGES = "_changes"
"""What follows a score's name in that of its table of changes."""


@dataclass(frozen=True)
class Point:
    """One model of a series.

    Attributes:
        name: of its folder in the output.
        place: on the axis: a checkpoint's step, or the number of a model.
        tokens: that a checkpoint has seen; None of other models.
    """

    name: str
    place: int
    tokens: int | None = None


def series_analysis(points: Sequence[Point], analyses: Sequence[AnalysisDirectory], *, axis: str) -> Analysis:
    """Everything of the points in the form of one analysis.

    Args:
        points: in order.
        analyses: theirs, of the same sequences and the same scores.
        axis: what a point's place is.

    Raises:
        ConfigError: two of them were measured on different sequences.
    """
    placed = list(zip(points, analyses, strict=True))
    changes = [
        (before, after, differences(first, second)) for (before, first), (after, second) in itertools.pairwise(placed)
    ]
    last = analyses[-1]
    results = {
        score: _result(score, points, analyses, [*_change_rows(score, changes)], axis=axis) for score in last.scores
    }
    return Analysis(last.settings | {"points": [dataclasses.asdict(point) for point in points], "axis": axis}, results)


def _result(
    score: str,
    points: Sequence[Point],
    analyses: Sequence[AnalysisDirectory],
    changes: list[dict[str, Any]],
    *,
    axis: str,
) -> Result:
    rows = [
        {axis: point.place, "tokens": point.tokens, "name": name, **ends}
        for point, analysis in zip(points, analyses, strict=True)
        for name, value in analysis.scores[score]["values"].items()
        if _is_number((ends := with_ends(value))["value"])
    ]
    last = analyses[-1].scores[score]
    tables = {score: rows, **({f"{score}{CHANGES}": changes} if changes else {})}
    return Result(
        values=last["values"],
        tables=tables,
        per_sequence=last["per_sequence"],
        figures=tuple(_figures(score, points, rows, axis)),
        warnings=tuple(last["warnings"]),
        num_sequences=last["num_sequences"],
        num_tokens=last["num_tokens"],
    )


def _is_number(value: Any) -> bool:
    """Or an undefined one."""
    return isinstance(value, int | float | None) and not isinstance(value, bool)


def _figures(score: str, points: Sequence[Point], rows: Sequence[dict[str, Any]], axis: str) -> Iterator[Lines]:
    for name in dict.fromkeys(row["name"] for row in rows):
        found = {row[axis]: row for row in rows if row["name"] == name}
        curves: dict[str, list[Number]] = {
            label: [found.get(point.place, {}).get(end) for point in points]
            for label, end in ((name, "value"), ("95 % from", "low"), ("95 % to", "high"))
        }
        known: dict[str, Sequence[Number]] = {
            label: curve for label, curve in curves.items() if any(value is not None for value in curve)
        }
        if known:
            title = f"{score}: {name} by {axis}"
            yield Lines(f"{score}_{name}_by_{axis}", title, [point.place for point in points], known, axis, name)


def _change_rows(score: str, changes: Sequence[tuple[Point, Point, list[Difference]]]) -> Iterator[dict[str, Any]]:
    for before, after, found in changes:
        for difference in found:
            if difference.score == score:
                facts = dataclasses.asdict(difference)
                del facts["score"]
                yield {"from": before.place, "to": after.place, **facts}
