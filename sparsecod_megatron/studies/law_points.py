"""Points of a law from a table: a study's `table.csv`, a row per metric, or any table with a column per variable."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsecod_megatron.errors import DataError
from sparsecod_megatron.studies.laws import Points

STUDY_COLUMNS = ("metric", "mean", "low", "high", "seeds")
"""Columns of a study's table after those of its axes."""
LOW, HIGH = "_low", "_high"
"""What follows a column's name in those of its 95 % interval."""
HEAVY = 0.5
"""Share of all weight that a reader should know one point has."""


@dataclass(frozen=True)
class Row:
    """One point as the table has it.

    Attributes:
        where: for messages.
        cells: text of every column or metric; empty where there is none.
        ends: lower and upper end of the 95 % interval by name.
    """

    where: str
    cells: dict[str, str]
    ends: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Selected:
    """Points, and what was done to get them.

    Attributes:
        points: to fit.
        notes: rows that were left out, how points weigh.
    """

    points: Points
    notes: tuple[str, ...]


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file; the metrics of a place of a study's table are one row.

    Raises:
        DataError: a file that is not such a table.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream, restval="")
            lines = [(reader.line_num, line) for line in reader]
            header = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table ({error}); give a CSV file with a header") from None
    for number, line in lines:
        if None in line:
            raise DataError(f"{path}:{number}: more cells than the header has columns; fix the line")
    if tuple(header[-len(STUDY_COLUMNS) :]) == STUDY_COLUMNS:
        return _study_rows(header[: -len(STUDY_COLUMNS)], [line for _, line in lines])
    return [
        Row(
            f"{path}:{number}",
            dict(line),
            {
                name: (line[name + LOW], line[name + HIGH])
                for name in header
                if {name + LOW, name + HIGH} <= set(header)
            },
        )
        for number, line in lines
    ]


def _study_rows(axes: Sequence[str], lines: Sequence[Mapping[str, str]]) -> list[Row]:
    rows: dict[tuple[str, ...], Row] = {}
    for line in lines:
        labels = {axis: line[axis] for axis in axes}
        where = ", ".join(f"{axis}={label}" for axis, label in labels.items())
        row = rows.setdefault(tuple(labels.values()), Row(where, labels, {}))
        row.cells[line["metric"]] = line["mean"]
        row.ends[line["metric"]] = (line["low"], line["high"])
    return list(rows.values())


def select(
    rows: Sequence[Row],
    variables: Sequence[str],
    value: str,
    *,
    where: Mapping[str, str] | None = None,
    group: str | None = None,
    is_weighted: bool = True,
) -> Selected:
    """Points of the rows that have all numbers.

    Args:
        rows: of a table.
        variables: columns of the law's variables, in its order.
        value: column that the law is of.
        where: column → text of the rows to take; None takes all.
        group: column whose text is the same in all points of one run; None takes each row for a run of its own.
        is_weighted: weigh points by 1/σ² where all have intervals.

    Raises:
        DataError: columns that no row has, cells that are not numbers, or no rows at all.
    """
    known = list(dict.fromkeys(name for row in rows for name in row.cells))
    for name in (*variables, value, *(where or {}), *([group] if group else [])):
        if name not in known:
            raise DataError(f"column {name!r}: not in the table; it has {', '.join(known) or 'none'}")
    taken = [row for row in rows if all(row.cells.get(name, "") == text for name, text in (where or {}).items())]
    read = [(row, [_number(row, name) for name in (*variables, value)]) for row in taken]
    kept = [(row, numbers) for row, numbers in read if all(map(math.isfinite, numbers))]
    if not kept:
        raise DataError(f"no row has {', '.join((*variables, value))}" + (f" where {_shown(where)}" if where else ""))
    notes = (
        [f"left out, without all of these numbers: {len(read) - len(kept)} of {len(read)} rows"]
        if len(kept) < len(read)
        else []
    )
    weights, note = _weights([row for row, _ in kept], value) if is_weighted else (np.ones(len(kept)), "")
    table = np.array([numbers for _, numbers in kept]).T
    names = [row.cells.get(group, "") if group else str(index) for index, (row, _) in enumerate(kept)]
    groups = np.unique(names, return_inverse=True)[1]
    return Selected(Points(table[:-1], table[-1], weights, groups), (*notes, *([note] if note else [])))


def _weights(rows: Sequence[Row], value: str) -> tuple[np.ndarray, str]:
    """1/σ² with mean 1, or ones and why."""
    ends = [row.ends.get(value, ("", "")) for row in rows]
    given = [all(end.strip() for end in pair) for pair in ends]
    if not any(given):
        return np.ones(len(rows)), ""
    if not all(given):
        return np.ones(len(rows)), f"points weigh the same: {given.count(False)} have no interval"
    widths = []
    for row, pair in zip(rows, ends, strict=True):
        low, high = (_read(row.where, f"an end of {value}", end) for end in pair)
        widths.append(high - low)
    if not all(0 < width < math.inf for width in widths):
        return np.ones(len(rows)), "points weigh the same: some intervals have no width"
    weights = 1 / np.square(widths)
    share = float(weights.max() / weights.sum())
    note = "points weigh 1/σ²" + (f"; one has {share:.0%} of all weight" if share > HEAVY else "")
    return weights / weights.mean(), note


def _number(row: Row, name: str) -> float:
    """A cell as a number; NaN where it is empty."""
    text = row.cells.get(name, "").strip()
    return _read(row.where, f"column {name!r}", text) if text else math.nan


def _read(where: str, what: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{where}: {what}: {text!r} is not a number; fix it, or name another column") from None


def _shown(where: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={text}" for name, text in where.items())
