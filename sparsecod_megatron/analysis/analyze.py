"""Runs scores on a sample and writes an analysis directory: scores.json, one CSV per table, one picture per figure."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsecod_megatron.analysis.directory import PLOTS_FOLDER, SCORES_FILE
from sparsecod_megatron.analysis.plots import draw
from sparsecod_megatron.analysis.products import fast_products
from sparsecod_megatron.analysis.scores.base import Result, Score
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.files import replacing_output


@dataclass(frozen=True)
class Analysis:
    """Results of one model by score name, and what they were measured with."""

    settings: dict[str, Any]
    results: dict[str, Result]


def analyze(context: Context, scores: Sequence[Score], *, settings: dict[str, Any]) -> Analysis:
    """Run the scores one after another.

    Args:
        context: model and sample.
        scores: from the registry, or any of the protocol.
        settings: further facts to record, such as the paths of model and data; values that JSON holds.

    Raises:
        ConfigError: the sample is too small for a score.
        ConversionError: the architecture does not let a score be computed.
    """
    with fast_products(context.model.device):
        results = {score.name: score.run(context) for score in scores}
    facts = {
        "architecture": type(context.model).__name__,
        "block_list": context.layers.name,
        "num_layers": len(context.layers),
        "hidden_size": context.hidden_size,
        "dtype": str(context.dtype).removeprefix("torch."),
        "device": context.device.type,
        "num_samples": context.num_sequences,
        "seq_length": context.seq_length,
        "seed": context.seed,
        "sample_sha256": hashlib.sha256(context.windows.numpy().tobytes()).hexdigest(),
    }
    if context.items is not None:
        facts |= {"task": context.items.name, "items": len(context.items), "items_sha256": context.items.digest()}
    return Analysis(settings | facts, results)


def write_analysis(analysis: Analysis, output: Path) -> list[Path]:
    """Write every file of an analysis directory, each whole or not at all, `scores.json` last.

    Args:
        analysis: what was measured.
        output: the directory; made where needed, files of the same names are replaced.

    Returns:
        The files.

    Raises:
        ConfigError: a file cannot be written.
    """
    files = []
    for result in analysis.results.values():
        for name, rows in result.tables.items():
            files.append(output / f"{name}.csv")
            _write(files[-1], _csv(rows))
        for figure in result.figures:
            files.append(output / PLOTS_FOLDER / f"{figure.name}.png")
            draw(figure, files[-1])
    files.append(output / SCORES_FILE)
    _write(files[-1], json.dumps(_as_json(analysis), indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return files


def _as_json(analysis: Analysis) -> dict[str, Any]:
    scores = {
        name: {
            "values": result.values,
            "num_sequences": result.num_sequences,
            "num_tokens": result.num_tokens,
            "warnings": list(result.warnings),
            "tables": result.tables,
            "per_sequence": result.per_sequence,
            "figures": [{"kind": figure.kind, **asdict(figure)} for figure in result.figures],
        }
        for name, result in analysis.results.items()
    }
    finite: dict[str, Any] = _without_nan({"settings": analysis.settings, "scores": scores})
    return finite


def _without_nan(value: Any) -> Any:
    """The same with None for non-finite numbers, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(_without_nan(rows))
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    with replacing_output(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
