"""The table of several compressions of one model: Markdown for people, CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsecod_megatron.analysis.compressions import DENSE, TABLE_FILE
from sparsecod_megatron.files import write_text
from sparsecod_megatron.studies.table import amount, markdown_grid

SAME_SPARSITY = 1e-3
"""Shares of zeros that differ by more than this are not the same sparsity."""

_NOTE = """All rows: the same calibration sequences, scored windows and seed. Zeros are counted among the weights
outside embeddings and output layer. Changes of loss have the standard error over the same windows; errors of outputs
are ‖X(W' − W)ᵀ‖ / ‖XWᵀ‖ over the inputs that the rule saw. Neurons' distance is W₁ between the outputs of a matrix's
rows before and after, in their standard deviations before, where the method measures it. Bytes are those of the
tensors, zeros included."""


def unequal_sparsities(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A warning for each pattern whose rows have different shares of zeros, so that they cannot be compared."""
    found = []
    for pattern in dict.fromkeys(row["pattern"] for row in rows if row["pattern"]):
        zeros = {row["method"]: row["zeros"] for row in rows if row["pattern"] == pattern}
        if max(zeros.values()) - min(zeros.values()) > SAME_SPARSITY:
            named = ", ".join(f"{method} {share:.2%}" for method, share in zeros.items())
            found.append(f"pattern {pattern}: rows of different sparsity are not comparable: zeros of {named}")
    return found


def write_table(output: Path, rows: Sequence[dict[str, Any]], command: str) -> str:
    """Write `table.md`, `table.csv` and `table.json`, each whole.

    Args:
        output: directory.
        rows: as `compress_all` makes them, the dense one first.
        command: that made it.

    Returns:
        The Markdown.
    """
    warnings = unequal_sparsities(rows)
    warnings += [f"{_name(row)}: {warning}" for row in rows for warning in row["warnings"]]
    text = _markdown(rows, warnings, command)
    write_text(output / "table.md", text)
    write_text(output / "table.csv", _csv(rows))
    content = {"command": command, "rows": list(rows), "warnings": warnings}
    write_text(output / TABLE_FILE, json.dumps(content, indent=1) + "\n")
    return text


def _name(row: dict[str, Any]) -> str:
    return f"{row['method']} {row['pattern']}".strip()


def _markdown(rows: Sequence[dict[str, Any]], warnings: Sequence[str], command: str) -> str:
    header = ["method", "pattern", "zeros", "perplexity [95 %]", "change of loss ± s.e.", "output error, mean (worst)"]
    header += ["non-zero parameters", "bytes", "seconds", "peak memory"]
    lines = [[*_identity(row), *_quality(row), *_size(row)] for row in rows]
    if any(row.get("neuron_distance") for row in rows):
        header.append("neurons' distance, mean (worst)")
        lines = [[*line, _mean_and_worst(row.get("neuron_distance"))] for line, row in zip(lines, rows, strict=True)]
    text = f"`{command}`\n\n{markdown_grid(header, lines)}"
    if any(row.get("scores") for row in rows):
        text += f"\n{_scores(rows)}"
    text += f"\n{_NOTE}\n"
    return text + "".join(f"\nwarning: {warning}\n" for warning in warnings)


def _identity(row: dict[str, Any]) -> list[str]:
    zeros = "–" if row["method"] == DENSE else f"{row['zeros']:.2%}"
    return [f"`{row['method']}`", row["pattern"] or "–", zeros]


def _quality(row: dict[str, Any]) -> list[str]:
    change, stderr = row.get("loss_change"), row.get("loss_change_stderr")
    shown_change = "–" if change is None else f"{change:+.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
    return [perplexity_text(row["perplexity"]), shown_change, _mean_and_worst(row.get("output_error"))]


def _mean_and_worst(quantity: dict[str, Any] | None) -> str:
    """What a row has of all matrices where it is measured."""
    if quantity is None:
        return "–"
    return f"{quantity['mean']:.3f} ({quantity['worst']:.3f} {quantity['worst_matrix']})"


def _size(row: dict[str, Any]) -> list[str]:
    memory, seconds = row.get("peak_memory_bytes"), row.get("seconds")
    return [
        amount(row["nonzero_parameters"]),
        amount(row["bytes"]),
        "–" if seconds is None else f"{seconds:.1f}",
        "–" if memory is None else f"{memory / 2**20:.0f} MiB",
    ]


def perplexity_text(result: dict[str, Any]) -> str:
    """With its interval, which is that of the loss, raised to the exponent."""
    if result["loss_low"] is None:
        return f"{result['perplexity']:.3f}"
    low, high = math.exp(result["loss_low"]), math.exp(result["loss_high"])
    return f"{result['perplexity']:.3f} [{low:.3f}, {high:.3f}]"


def _scores(rows: Sequence[dict[str, Any]]) -> str:
    """Every number of a depth score: before → after, the paired difference and its interval."""
    lines = [
        [
            f"`{row['method']}`",
            row["pattern"] or "–",
            f"{entry['score']}: {entry['name']}",
            f"{entry['first']:.4g} → {entry['second']:.4g}",
            f"{entry['difference']:+.3g}"
            + ("" if entry["low"] is None else f" [{entry['low']:+.3g}, {entry['high']:+.3g}]"),
        ]
        for row in rows
        for entry in row.get("scores", [])
    ]
    return markdown_grid(["method", "pattern", "score", "dense → compressed", "paired difference [95 %]"], lines)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each number of each row."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "pattern", "metric", "value", "low", "high"])
    for row in rows:
        for metric, value, low, high in _numbers(row):
            writer.writerow([row["method"], row["pattern"], metric, value, low, high])
    return stream.getvalue()


def _numbers(row: dict[str, Any]) -> list[tuple[str, float | None, float | None, float | None]]:
    result = row["perplexity"]
    found = [("loss", result["loss"], result["loss_low"], result["loss_high"])]
    plain = {"perplexity": result["perplexity"]}
    for quantity in ("output_error", "neuron_distance"):
        found_of = row.get(quantity) or {}
        plain |= {f"{quantity}_{which}": found_of.get(which) for which in ("mean", "worst")}
    names = ("zeros", "loss_change", "loss_change_stderr", "num_parameters", "nonzero_parameters", "bytes", "seconds")
    plain |= {name: row.get(name) for name in (*names, "peak_memory_bytes")}
    found += [(name, value, None, None) for name, value in plain.items() if value is not None]
    for entry in row.get("scores", []):
        name = f"{entry['score']}/{entry['name']}"
        found.append((name, entry["second"], None, None))
        found.append((f"{name}_change", entry["difference"], entry["low"], entry["high"]))
    return found
