"""A study's one table: one row per place of the grid, means over seeds with intervals, and the claims' verdicts."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsecod_megatron.files import write_text
from sparsecod_megatron.studies.cell import is_done, read_result
from sparsecod_megatron.studies.claims import Results, Verdict, judge_all
from sparsecod_megatron.studies.grid import Study
from sparsecod_megatron.studies.intervals import Mean, mean_over_seeds
from sparsecod_megatron.studies.kept import FinishedCell
from sparsecod_megatron.studies.law_points import STUDY_COLUMNS
from sparsecod_megatron.studies.schema import Labels, StudyConfig
from sparsecod_megatron.studies.study_laws import HEADER, StudyLaw, fit_laws

SIZE_COLUMNS = ("parameters_total", "parameters_active", "tokens")
"""Columns that come first; the same for all seeds."""


@dataclass(frozen=True)
class Row:
    """One place of the grid.

    Attributes:
        labels: axis → label.
        sizes: values of `SIZE_COLUMNS`.
        metrics: means over the seeds that have the metric.
        num_seeds: cells that are done.
        num_diverged: those of them whose training diverged.
    """

    labels: Labels
    sizes: dict[str, float]
    metrics: dict[str, Mean]
    num_seeds: int
    num_diverged: int


@dataclass(frozen=True)
class Table:
    """The cells, their metrics by place and seed, one row per place, the verdicts, and the laws."""

    cells: Sequence[FinishedCell]
    results: Results
    rows: list[Row]
    verdicts: list[Verdict]
    laws: list[StudyLaw]


def finished_cells(study: Study) -> list[FinishedCell]:
    """The cells of a study's directory that are done.

    Raises:
        ConfigError: a cell that was run or measured otherwise than the study says.
    """
    found = []
    for cell in study.cells:
        if is_done(study, cell):
            result = read_result(cell.directory)
            points = result.get("points", [])
            found.append(FinishedCell(cell.labels, cell.seed, result["metrics"], points, bool(result["diverged"])))
    return found


def make_table(config: StudyConfig, cells: Sequence[FinishedCell]) -> Table:
    """Rows, verdicts and laws of these cells."""
    results: dict[Labels, dict[int, dict[str, float]]] = {}
    points: dict[Labels, dict[int, list[dict[str, Any]]]] = {}
    for cell in cells:
        results.setdefault(cell.labels, {})[cell.seed] = cell.metrics
        points.setdefault(cell.labels, {})[cell.seed] = cell.points
    diverged = Counter(cell.labels for cell in cells if cell.diverged)
    rows = [_row(labels, of_seed, diverged[labels]) for labels, of_seed in results.items()]
    verdicts = judge_all(config.claims, results)
    return Table(cells, results, rows, verdicts, fit_laws(config.laws, results, points))


def write_table(study: Study, table: Table, *, command: str) -> str:
    """Write `table.md`, `table.csv` and `table.json` into the study's directory.

    Args:
        study: what was asked for.
        table: what was found.
        command: that made it.

    Returns:
        The Markdown.
    """
    text = markdown(study.config, table, command)
    write_text(study.output / "table.md", text)
    write_text(study.output / "table.csv", _csv(study, table))
    content = {
        "study": study.config.name,
        "command": command,
        "rows": [asdict(row) | {"labels": dict(row.labels)} for row in table.rows],
        "cells": [asdict(cell) | {"labels": dict(cell.labels)} for cell in table.cells],
        "claims": [asdict(verdict) for verdict in table.verdicts],
        "laws": [law.as_dict() for law in table.laws],
    }
    write_text(study.output / "table.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    return text


def markdown_grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(mean: Mean | None) -> str:
    """A mean with its interval, for people."""
    if mean is None:
        return "–"
    interval = "" if mean.low is None or mean.high is None else f" [{_number(mean.low)}, {_number(mean.high)}]"
    return f"{_number(mean.value)}{interval}"


def amount(value: float) -> str:
    """A count with its unit: 6.3M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _row(labels: Labels, of_seed: Mapping[int, Mapping[str, float]], num_diverged: int) -> Row:
    names = dict.fromkeys(name for metrics in of_seed.values() for name in metrics)
    means = {
        name: mean_over_seeds([metrics[name] for metrics in of_seed.values() if name in metrics]) for name in names
    }
    sizes = {name: means[name].value for name in SIZE_COLUMNS if name in means}
    return Row(labels, sizes, means, len(of_seed), num_diverged)


def markdown(config: StudyConfig, table: Table, command: str) -> str:
    """What `table.md` holds."""
    axes = [axis.name for axis in config.grid]
    header = [*axes, "parameters", "active", "tokens", *config.columns, "seeds"]
    rows = [
        [
            *(label for _, label in row.labels),
            *(amount(row.sizes[name]) if name in row.sizes else "–" for name in SIZE_COLUMNS),
            *(shown(row.metrics.get(name)) for name in config.columns),
            f"{row.num_seeds}" + (f", {row.num_diverged} diverged" if row.num_diverged else ""),
        ]
        for row in table.rows
    ]
    text = f"# {config.name}\n\n{config.question}\n\n`{command}`\n\n{markdown_grid(header, rows)}"
    text += "\nMeans over seeds, with Student's 95 % interval where there are two seeds or more.\n"
    if table.verdicts:
        claims = [
            [verdict.claim.text, verdict.claim.published or "–", verdict.claim.metric, shown(verdict.difference)]
            + [_plain(verdict), _corrected(verdict)]
            for verdict in table.verdicts
        ]
        tested = sum(verdict.p_value is not None for verdict in table.verdicts)
        header = ["claim", "published", "metric", "difference or slope [95 %], above 0 as claimed", "here"]
        header.append(f"corrected for {tested} claims (Holm)")
        text += f"\n{markdown_grid(header, claims)}"
        if any(verdict.seeds_needed is not None for verdict in table.verdicts):
            text += "\nBehind *not separable*: seeds that would do if mean and spread stayed as they are.\n"
    if table.laws:
        text += f"\n{markdown_grid(HEADER, [law.cells for law in table.laws])}"
    return text


def _plain(verdict: Verdict) -> str:
    needed = "" if verdict.seeds_needed is None else f" ({verdict.seeds_needed} seeds)"
    return f"**{verdict.verdict}**{needed}"


def _corrected(verdict: Verdict) -> str:
    return verdict.verdict_holm + ("" if verdict.p_holm is None else f" (p {verdict.p_holm:.2g})")


def _csv(study: Study, table: Table) -> str:
    """Every metric of every place: mean, ends of the interval, seeds."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    axes = [axis.name for axis in study.config.grid]
    writer.writerow([*axes, *STUDY_COLUMNS])
    for row in table.rows:
        for name, mean in row.metrics.items():
            writer.writerow([*(label for _, label in row.labels), name, mean.value, mean.low, mean.high, mean.count])
    return stream.getvalue()


def _number(value: float) -> str:
    return f"{value:.4g}"
