"""The part of the page's data that tables of compressions bring: a row for each method and pattern."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sparsecod_megatron.analysis.compressions import CompressionTable, scores_of
from sparsecod_megatron.analysis.report.analysis_payload import rounded

_PLAIN = (
    ("zeros", "zeros"),
    ("change of loss", "loss_change"),
    ("its standard error", "loss_change_stderr"),
    ("non-zero parameters", "nonzero_parameters"),
    ("bytes", "bytes"),
    ("seconds", "seconds"),
    ("peak memory, bytes", "peak_memory_bytes"),
)
"""Numbers without an interval: title, and key in a row."""


def compressions_payload(tables: Sequence[CompressionTable]) -> list[dict[str, Any]]:
    """Everything the page shows of tables.

    Args:
        tables: in the order of the page; names differ.

    Returns:
        Each with `name`, `command`, `warnings`, `columns` [title] and `rows` [{name, cells}]; a cell is {value, low,
        high}, rounded, null where a row has no such number and ends null where there is no interval.
    """
    return [
        {
            "name": table.name,
            "command": table.command,
            "warnings": table.warnings,
            "columns": list(_cells(table, table.rows[0])) if table.rows else [],
            "rows": [
                {"name": f"{row['method']} {row['pattern']}".strip(), "cells": list(_cells(table, row).values())}
                for row in table.rows
            ],
        }
        for table in tables
    ]


def _cells(table: CompressionTable, row: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """Title → cell, the same titles for every row of a table."""
    plain = {title: _cell(row.get(key)) for title, key in _PLAIN}
    perplexity, error = row["perplexity"], row.get("output_error") or {}
    ends = [None if perplexity[end] is None else math.exp(perplexity[end]) for end in ("loss_low", "loss_high")]
    found = {"zeros": plain.pop("zeros"), "perplexity [95 %]": _cell(perplexity["perplexity"], *ends)}
    found |= {title: plain.pop(title) for title in ("change of loss", "its standard error")}
    found |= {f"output error, {which}": _cell(error.get(which)) for which in ("mean", "worst")}
    measured = {(entry["score"], entry["name"]): entry for entry in scores_of(row)}
    for score, name in table.score_names():
        entry = measured.get((score, name), {})
        found[f"{score}: {name}"] = _cell(entry.get("second"))
        found[f"{score}: {name}, change [95 %]"] = _cell(entry.get("difference"), entry.get("low"), entry.get("high"))
    return found | plain


def _cell(value: Any, low: Any = None, high: Any = None) -> dict[str, Any] | None:
    return None if value is None else rounded({"value": value, "low": low, "high": high})
