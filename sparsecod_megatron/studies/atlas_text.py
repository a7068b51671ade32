"""An atlas as Markdown, CSV and JSON: the same cells, each with its number or the reason why there is none."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from sparsecod_megatron.studies.atlas import Atlas
from sparsecod_megatron.studies.atlas_answer import answer, effect
from sparsecod_megatron.studies.atlas_cells import (
    COLUMNS,
    EQUALITIES,
    HIGHER,
    LOWER,
    OPERATIONS,
    SPARSITY,
    TIME,
    TOLERANCE,
    USEFULNESS,
    VARIANCE,
    AtlasRow,
    Entry,
)
from sparsecod_megatron.studies.table import amount, markdown_grid

MISSING = "—"
TITLES = {
    **{column: f"Δ perplexity, {what}" for column, what in EQUALITIES.items()},
    VARIANCE: "variance of the last layer",
    "causal/causal": "causal",
    USEFULNESS: "mean log usefulness × 10³",
    "jacobian/jacobian_deviation": "Jacobian deviation",
    SPARSITY: "sparsity reached",
    OPERATIONS: "operations per token ÷ control",
    TIME: "time per token ÷ control",
}
SCALES = {USEFULNESS: 1e3}
CSV_ROW = ("row", "kind", "mechanism", "setting", "study", "place", "control", "tokens", "control_tokens", "column")
CSV_CELL = ("value", "difference", "low", "high", "seeds", "p", "p_holm", "verdict", "verdict_holm", "reason", "detail")
_SIGNS = {LOWER: "↓", HIGHER: "↑"}
_PLAIN = (SPARSITY, OPERATIONS, TIME)
"""Columns whose value is all there is to show."""


def shown(column: str, entry: Entry) -> str:
    """A cell in the page: the place's value, Δ with its interval, and signs of both verdicts; or a dash."""
    if entry.value is None or (column in EQUALITIES and entry.reason):
        return MISSING
    scale = SCALES.get(column, 1.0)
    value = _number(entry.value.value * scale)
    if column in _PLAIN or entry.difference is None:
        return f"{value}{_ends(entry.value, scale)}{_verdicts(entry)}"
    change = f"{entry.difference.value * scale:+.3g}{_ends(entry.difference, scale)}{_verdicts(entry)}"
    return change if column in EQUALITIES else f"{value}; Δ {change}"


def _verdicts(entry: Entry) -> str:
    if not entry.verdict:
        return ""
    return f" {_SIGNS.get(entry.verdict, '·')}{_SIGNS.get(entry.verdict_holm, '·')}"


def _ends(mean: Any, scale: float) -> str:
    return "" if mean.low is None else f" [{_number(mean.low * scale)}, {_number(mean.high * scale)}]"


def _number(value: float) -> str:
    return f"{value:.3g}"


def tokens_text(row: AtlasRow) -> str:
    """Tokens of the place, and of its control where they are not equal."""
    own, other = row.tokens
    text = MISSING if own is None else amount(own)
    is_unequal = own is not None and other is not None and abs(own - other) > TOLERANCE * other
    return f"{text} against {amount(other)}" if is_unequal and other is not None else text


def against(row: AtlasRow) -> str:
    """Study, place and control."""
    return f"{row.kept.study}: {row.place}" + (" (no control)" if row.control is None else f" against {row.control}")


def page(atlas: Atlas, *, command: str, picture: str) -> str:
    """The Markdown page.

    Args:
        atlas: what was found.
        command: that makes it.
        picture: path of the picture, relative to the page.
    """
    text = f"# {atlas.config.title}\n\n" + "\n\n".join(answer(atlas.rows))
    text += f"\n\n    {command}\n\n"
    text += f"![The last layer's variance against usefulness, every row by its number]({picture})\n\n"
    header = ["", "mechanism", "study: place against control", "tokens", *(TITLES[column] for column in COLUMNS)]
    for kind in dict.fromkeys(row.kind for row in atlas.rows):
        rows = [
            [str(row.number), row.name, against(row), tokens_text(row)]
            + [shown(column, row.entries[column]) for column in COLUMNS]
            for row in atlas.rows
            if row.kind == kind
        ]
        text += f"## {kind[0].upper()}{kind[1:]}\n\n{markdown_grid(header, rows)}\n"
        text += "".join(f"{note}\n\n" for note in _notes(atlas, kind))
    return text + _legend(atlas) + _missing(atlas)


def _notes(atlas: Atlas, kind: str) -> list[str]:
    """Notes of the comparisons that have rows of a kind, with the numbers of these rows."""
    found = []
    for comparison in atlas.config.comparisons:
        rows = [
            row
            for row in atlas.rows
            if (row.kind, row.kept.study, row.control) == (kind, comparison.study, comparison.control)
        ]
        if comparison.note and rows:
            found.append(f"*{_numbers(rows)}:* {comparison.note}")
    return found


def _legend(atlas: Atlas) -> str:
    tested = {column: _tested(atlas, column) for column in COLUMNS}
    families = ", ".join(
        f"{'Δ perplexity' if column in EQUALITIES else TITLES[column]} {number}"
        for column, number in tested.items()
        if number
    )
    return (
        "## How to read it\n\n"
        "A cell is the place's mean over seeds, then Δ, the mean difference from the study's control, seed by seed, "
        "with Student's 95 % interval, as the studies' claims have it. The first sign is the plain verdict, the second "
        "the one after Holm's correction for all rows that were tested by the same metric: "
        "↓ separably lower, ↑ separably higher, · not separable. Depth is used where causal, usefulness and Jacobian "
        f"deviation are high (docs/DEPTH_SCORES.md). Rows tested: {families}; the three columns of "
        "Δ perplexity are one family, each comparison counted once.\n\n"
        f"Tokens, parameters and operations are equal within {TOLERANCE:.0%}, because budgets are whole steps. "
        "Parameters are all that the model stores, zeros included, and their column asks for equal tokens too. "
        "Effective operations are those of `sparsecod plan` without products with weights that are held at zero; "
        "attention that skips keys, and units that are off, count as dense. Other scores are compared where tokens or "
        "effective operations are equal. Sparsity is the share of zeros among weights that may be zero, of units that "
        "are off, or of parameters that a token does not meet. Time per token was measured on a machine that did other "
        "work: operations are the exact cost, and only large ratios of time mean something.\n\n"
    )


def _tested(atlas: Atlas, column: str) -> int:
    columns = tuple(EQUALITIES) if column in EQUALITIES else (column,)
    if column in EQUALITIES and column != columns[0]:
        return 0
    return sum(any(row.entries[each].p_value is not None for each in columns) for row in atlas.rows)


def _missing(atlas: Atlas) -> str:
    """What has no number, counted by reason; and results that are not shown."""
    cells = [(column, row.entries[column].reason, row) for row in atlas.rows for column in COLUMNS]
    empty = [(column, reason, row) for column, reason, row in cells if reason]
    counts = Counter((column, reason) for column, reason, _ in empty)
    lines = [
        [TITLES[column], reason, str(number), _numbers(row for c, r, row in empty if (c, r) == (column, reason))]
        for (column, reason), number in counts.items()
    ]
    text = f"## Cells without a number\n\n{len(empty)} of {len(cells)}.\n\n"
    text += markdown_grid(["column", "reason", "cells", "rows"], lines)
    several = sum(len(row.kept.cells[row.place]) < 2 for row in atlas.rows)
    if several:
        text += f"\n{several} rows have one seed, so no interval.\n"
    shorter = [
        f"{kept.path.name}: {', '.join(places)} of {kept.study}, which a longer run shows"
        for kept, places in atlas.shorter
    ]
    others = [f"{name}: {why}" for name, why in atlas.left_out.items()]
    absent = [f"{study}: no result was given" for study in atlas.missing]
    for title, entries in (("Shorter runs", shorter), ("Left out", others), ("Not there", absent)):
        if entries:
            text += f"\n{title} ({len(entries)}):\n\n" + "".join(f"- {entry}\n" for entry in entries)
    return text


def _numbers(rows: Any) -> str:
    """1–3, 7: numbers of rows, runs of them joined."""
    numbers, runs = [row.number for row in rows], list[list[int]]()
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def plain(atlas: Atlas, *, command: str) -> dict[str, Any]:
    """Everything as plain values, for `atlas.json`."""
    return {
        "title": atlas.config.title,
        "command": command,
        "answer": answer(atlas.rows),
        "rows": [
            {
                "number": row.number,
                "kind": row.kind,
                "mechanism": row.mechanism,
                "setting": row.setting,
                "is_remedy": row.is_remedy,
                "effect": effect(row),
                "file": row.kept.path.name,
                "study": row.kept.study,
                "place": row.place,
                "control": row.control,
                "tokens": row.tokens[0],
                "control_tokens": row.tokens[1],
                "seeds": len(row.kept.cells[row.place]),
                "cells": {column: asdict(row.entries[column]) for column in COLUMNS},
            }
            for row in atlas.rows
        ],
        "shorter_runs": [{"file": kept.path.name, "places": places} for kept, places in atlas.shorter],
        "not_given": atlas.missing,
        "left_out": atlas.left_out,
    }


def as_json(atlas: Atlas, *, command: str) -> str:
    """`atlas.json`."""
    return json.dumps(plain(atlas, command=command), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def as_csv(atlas: Atlas) -> str:
    """One line per cell: row, column, value, difference with its ends, p, verdicts, or the reason."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*CSV_ROW, *CSV_CELL])
    for row in atlas.rows:
        for column in COLUMNS:
            entry = row.entries[column]
            mean = entry.difference or entry.value
            writer.writerow(
                [row.number, row.kind, row.mechanism, row.setting, row.kept.study, row.place, row.control, *row.tokens]
                + [column, entry.value and entry.value.value, entry.difference and entry.difference.value]
                + [mean and mean.low, mean and mean.high, mean and mean.count, entry.p_value, entry.p_holm]
                + [entry.verdict, entry.verdict_holm, entry.reason, entry.detail]
            )
    return stream.getvalue()
