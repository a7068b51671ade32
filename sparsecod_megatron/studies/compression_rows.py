"""What is told of a compression: the numbers of its row, and the report beside a model that is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import transformers

from sparsecod_megatron import __version__
from sparsecod_megatron.compression.changes import compressed_fraction
from sparsecod_megatron.compression.compress import Compression
from sparsecod_megatron.compression.modelopt import modelopt_version
from sparsecod_megatron.evaluation.perplexity import PerplexityResult, ScoredWindows
from sparsecod_megatron.evaluation.result import ModelResult, differences
from sparsecod_megatron.hf.residency import Residency


def compression_row(
    compression: Compression, pattern: str, before: ModelResult, after: ModelResult, cost: Mapping[str, Any]
) -> dict[str, Any]:
    """The numbers of a compressed model, plain data.

    Args:
        compression: what became of it.
        pattern: as given, or empty.
        before: what the dense model scored.
        after: what it scores.
        cost: further numbers.
    """
    changes = {change.metric: change for change in differences(before, after)}
    return {
        "method": compression.method.name,
        "pattern": pattern,
        "settings": asdict(compression.method.settings),
        "warnings": compression.warnings,
        **measured(compression.residency, after),
        "zeros": _zeros(compression),
        "compressed_fraction": compressed_fraction(compression.matrices),
        "loss_change": changes["loss"].value if "loss" in changes else None,
        "loss_change_stderr": changes["loss"].stderr if "loss" in changes else None,
        "output_error": _over_matrices(compression, "output_error"),
        "neuron_distance": _over_matrices(compression, "neuron_distance"),
        **cost,
    }


def measured(residency: Residency, result: ModelResult) -> dict[str, Any]:
    """What every row has: loss of each window, and the size of the model."""
    assert result.perplexity is not None and result.windows is not None
    windows = {"sums": result.windows.sums.tolist(), "counts": result.windows.counts.tolist()}
    weights = list(residency.model.parameters())
    return {
        "perplexity": asdict(result.perplexity),
        "windows": windows,
        "num_parameters": sum(weight.numel() for weight in weights),
        "nonzero_parameters": sum(int(torch.count_nonzero(weight)) for _, weight in residency.named_parameters()),
        "bytes": sum(weight.numel() * weight.element_size() for weight in weights),
    }


def scored_result(row: Mapping[str, Any]) -> ModelResult:
    """What a row was scored, as it was before it became plain data."""
    perplexity, windows = PerplexityResult(**row["perplexity"]), row["windows"]
    arrays = (np.array(windows["sums"]), np.array(windows["counts"]))
    scored = ScoredWindows(*arrays, perplexity.seq_length, perplexity.stride)
    return ModelResult(row["method"], perplexity=perplexity, windows=scored)


def _zeros(compression: Compression) -> float:
    """Share of zeros among all weights that could be compressed, taken or not."""
    rows = compression.matrices
    return sum(row.zeros * row.stored for row in rows) / sum(row.stored for row in rows)


def _over_matrices(compression: Compression, quantity: str) -> dict[str, Any] | None:
    """Mean of a field of `MatrixChange` over the matrices where it is measured, and the worst of them."""
    values = {row.name: getattr(row, quantity) for row in compression.matrices}
    measured = {name: value for name, value in values.items() if value is not None}
    if not measured:
        return None
    worst = max(measured, key=lambda name: measured[name])
    return {
        "mean": sum(measured.values()) / len(measured),
        "worst": measured[worst],
        "worst_matrix": worst,
        "num_matrices": len(measured),
    }


def report_of(
    compression: Compression, settings: Mapping[str, Any], before: ModelResult, after: ModelResult
) -> dict[str, Any]:
    """What `compression.json` holds.

    Args:
        compression: what became of the model.
        settings: what it was compressed and scored with.
        before: what the dense model scored.
        after: what it scores.
    """
    assert before.perplexity is not None and after.perplexity is not None
    versions = {"sparsecod_megatron": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    if compression.method.needs.modelopt:
        versions["modelopt"] = modelopt_version()
    return {
        "settings": {**settings, "method": compression.method.name, "set": asdict(compression.method.settings)},
        "before": asdict(before.perplexity),
        "after": asdict(after.perplexity),
        "differences": [asdict(difference) for difference in differences(before, after)],
        "compressed_fraction": compressed_fraction(compression.matrices),
        "matrices": [asdict(matrix) for matrix in compression.matrices],
        "num_parameters": dict(zip(("before", "after"), compression.num_parameters, strict=True)),
        "warnings": compression.warnings,
        "versions": versions,
    }
