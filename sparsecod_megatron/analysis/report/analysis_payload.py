"""The part of the page's data that analyses bring: facts, numbers with their intervals, figures, warnings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from sparsecod_megatron.analysis.directory import AnalysisDirectory, with_ends

DIGITS = 6
_FACTS = (
    ("Architecture", "architecture"),
    ("Layers", "num_layers"),
    ("Hidden size", "hidden_size"),
    ("Text", "data"),
    ("Sequences", "num_samples"),
    ("Tokens per sequence", "seq_length"),
    ("Seed", "seed"),
    ("Precision", "dtype"),
    ("Model", "model"),
)
_PATHS = ("data", "model")
"""Settings that are paths: their last part says enough."""


def analyses_payload(analyses: Sequence[AnalysisDirectory]) -> list[dict[str, Any]]:
    """Everything the page shows of analyses.

    Args:
        analyses: in the order of the page; names differ.

    Returns:
        Each with `name`, `kind`, `facts` [[name, text]], `values` [{score, name, value, low, high}], `warnings`
        [{score, text}] and `figures` [{kind, name, …}] as in `scores.json`, numbers rounded.
    """
    return [
        {
            "name": analysis.name,
            "kind": "analysis",
            "facts": [[title, _text(key, analysis.settings.get(key))] for title, key in _FACTS],
            "values": [
                {"score": score, "name": name, **rounded(with_ends(value))}
                for score, result in analysis.scores.items()
                for name, value in result["values"].items()
            ],
            "warnings": [
                {"score": score, "text": text}
                for score, result in analysis.scores.items()
                for text in result["warnings"]
            ],
            "figures": [rounded(figure) for result in analysis.scores.values() for figure in result["figures"]],
        }
        for analysis in analyses
    ]


def _text(key: str, value: Any) -> str:
    if value is None:
        return "not recorded"
    if key in _PATHS:
        return PurePath(value).name
    return f"{value:,}" if type(value) is int else str(value)


def rounded(value: Any) -> Any:
    """The same with fewer digits, and None for non-finite numbers."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
