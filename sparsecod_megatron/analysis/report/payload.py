"""The data inside the page: every series of every run, thinned to what a screen can show, as plain JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsecod_megatron.analysis.compressions import CompressionTable
from sparsecod_megatron.analysis.directory import AnalysisDirectory
from sparsecod_megatron.analysis.report.analysis_payload import analyses_payload
from sparsecod_megatron.analysis.report.branches import grown
from sparsecod_megatron.analysis.report.compressions_payload import compressions_payload
from sparsecod_megatron.analysis.report.decimate import evenly_spaced, kept_points
from sparsecod_megatron.analysis.report.facts import run_facts
from sparsecod_megatron.analysis.report.fields import (
    describe_layer_field,
    describe_metric,
    ordered_layer_fields,
    ordered_metrics,
)
from sparsecod_megatron.analysis.runs import Run, Series

POINTS_PER_SERIES = 600
# A number takes about 11 characters, an expert's token count 5: together under 5 MB, which opens at once.
LAYER_NUMBERS = 360_000
VECTOR_NUMBERS = 100_000


def report_payload(
    runs: Sequence[Run], analyses: Sequence[AnalysisDirectory] = (), compressions: Sequence[CompressionTable] = ()
) -> dict[str, Any]:
    """Everything the page shows.

    Args:
        runs: in the order of the page; names differ.
        analyses: likewise.
        compressions: likewise.

    Returns:
        `fields` and `metrics`: what is known of each name, in the page's order.
        `runs`: each with `name`, `kind`, `facts`, `notes`, and series by name in `metrics`, `layers`, `vectors`.
        A series is `steps` and `tokens` [points], `total` points before thinning, and `values`: [points] of a metric,
        [layers, points] of a layer statistic, [points, layers, entries] of a vector; null where a number is non-finite.
        `analyses`: see `analyses_payload`; `compressions`: see `compressions_payload`.
    """
    layer_rows = sum(series.values.shape[1] for run in runs for series in run.layers.values())
    vector_rows = sum(series.values[0].size for run in runs for series in run.vectors.values())
    layer_limit = max(2, min(POINTS_PER_SERIES, LAYER_NUMBERS // max(1, layer_rows)))
    vector_limit = max(2, min(POINTS_PER_SERIES, VECTOR_NUMBERS // max(1, vector_rows)))
    layer_names = {name for run in runs for name in (*run.layers, *run.vectors)}
    metric_names = {name for run in runs for name in run.metrics}
    return {
        "fields": {name: describe_layer_field(name) for name in ordered_layer_fields(layer_names)},
        "metrics": {name: describe_metric(name) for name in ordered_metrics(metric_names)},
        "runs": [
            {
                "name": run.name,
                "kind": run.kind,
                "facts": run_facts(run),
                "notes": list(run.notes),
                "metrics": {name: _metric(series) for name, series in sorted(grown(run, runs).items())},
                "layers": {name: _layers(run.layers[name], layer_limit) for name in sorted(run.layers)},
                "vectors": {name: _vectors(run.vectors[name], vector_limit) for name in sorted(run.vectors)},
            }
            for run in runs
        ],
        "analyses": analyses_payload(analyses),
        "compressions": compressions_payload(compressions),
    }


def _metric(series: Series) -> dict[str, Any]:
    kept = kept_points(series.values[:, None], POINTS_PER_SERIES)
    return {**_axis(series, kept), "values": _numbers(series.values[kept], digits=6)}


def _layers(series: Series, limit: int) -> dict[str, Any]:
    kept = kept_points(series.values, limit)
    return {**_axis(series, kept), "values": _numbers(series.values[kept].T, digits=5)}


def _vectors(series: Series, limit: int) -> dict[str, Any]:
    kept = evenly_spaced(len(series.steps), limit)
    return {**_axis(series, kept), "values": _numbers(series.values[kept], digits=6)}


def _axis(series: Series, kept: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {"steps": series.steps[kept].tolist(), "tokens": series.tokens[kept].tolist(), "total": len(series.steps)}


def _numbers(values: npt.NDArray[np.float64], *, digits: int) -> list[Any]:
    """Nested lists of numbers rounded to that many significant digits, None where non-finite."""
    if values.ndim > 1:
        return [_numbers(row, digits=digits) for row in values]
    return [_number(value, digits) for value in values.tolist()]


def _number(value: float, digits: int) -> float | int | None:
    if not np.isfinite(value):
        return None
    if value.is_integer() and abs(value) < 2**53:
        return int(value)
    return float(f"{value:.{digits}g}")
