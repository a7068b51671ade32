"""Places of a grid: which label each axis has."""

from __future__ import annotations

Labels = tuple[tuple[str, str], ...]
"""(axis, label) of every axis."""


def place_name(labels: Labels) -> str:
    """`axis=label,…`."""
    return ",".join(f"{axis}={label}" for axis, label in labels)
