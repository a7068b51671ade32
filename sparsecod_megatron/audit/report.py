"""The table of an audit, and audit.json. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsecod_megatron.files import write_text

FILE = "audit.json"


def audit_json(
    verdicts: Sequence[Mapping[str, Any]], *, config: str, notes: Sequence[str], left_out: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that was found, as plain values."""
    return {
        "config": config,
        "red": [verdict["row"] for verdict in verdicts if verdict["red"]],
        "notes": list(notes),
        "left_out": dict(left_out),
        "rows": list(verdicts),
    }


def write_audit(content: Mapping[str, Any], directory: Path) -> Path:
    """Write DIRECTORY/audit.json, whole or not at all; an older one is replaced."""
    path = directory / FILE
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def audit_text(content: Mapping[str, Any]) -> str:
    """The table, and below it what differs first in each row that is red, what was left out and why."""
    rows = content["rows"]
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["gradients"]))
    header = ["row", "against", "loss", "norm", *kinds, "stats", "weights", ""]
    lines = [header, *(_cells(row, kinds) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    below = [f"{row['row']}: {row['first']}" for row in rows if row["red"]]
    below += [f"note: {row['row']}: {row['once']}, with one seed and not with the next" for row in rows if row["once"]]
    below += [f"left out: {name}: {reason}" for name, reason in content["left_out"].items()]
    below += [f"note: {note}" for note in content["notes"]]
    return "\n".join([*text, *([""] if below else []), *below])


def _cells(row: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    name, reference = row["row"], row["against"]
    numbers = [row["loss"], row["grad_norm"], *(row["gradients"].get(kind, 0.0) for kind in kinds)]
    numbers += [row["statistics"], row["state"]]
    unknown = reference is None or not row["losses"]
    cells = [_number(number) if not unknown else "" for number in numbers]
    return [name, reference or "-", *cells, "RED" if row["red"] else "ok" if reference else "reference"]


def _number(value: float | None) -> str:
    return "inf" if value is None else "0" if value == 0 else f"{value:.0e}"
