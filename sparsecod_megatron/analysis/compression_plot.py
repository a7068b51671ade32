"""Depth scores of compressed models against their sparsity, a line for each method: which depth does pruning use up?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sparsecod_megatron.analysis.compressions import CompressionTable, scores_of
from sparsecod_megatron.analysis.depth_left import HALVES, Interval, usefulness_left
from sparsecod_megatron.analysis.depth_plot import COLORS, DPI, MARKERS, STYLE, without_date
from sparsecod_megatron.errors import DataError
from sparsecod_megatron.files import replacing_output

WIDTH, HEIGHT = 2.5, 2.5
NORMAL_95 = 1.96
"""Standard errors of a 95 % interval."""
Points = dict[tuple[str, str], Interval]
"""What a panel shows of each (method, pattern)."""


@dataclass(frozen=True)
class _Panel:
    """One chart of a table.

    Attributes:
        title: in two lines at most.
        lines: points by the style of their line.
        neutral: value that means no change.
    """

    title: str
    lines: dict[str, Points]
    neutral: float = 0.0


def plot_scores_by_sparsity(tables: Sequence[CompressionTable], output: Path) -> None:
    """Write the figure.

    Args:
        tables: each made with `--scores`.
        output: .png, .svg or .pdf; replaced whole.

    Raises:
        DataError: a table without depth scores.
        ConfigError: `output` cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        figure = scores_by_sparsity(tables)
        with replacing_output(output) as temporary:
            figure.savefig(temporary, dpi=DPI, metadata=without_date(output))


def scores_by_sparsity(tables: Sequence[CompressionTable]) -> Figure:
    """The figure: a row for each table; in it the change of loss, then that of each depth score, with 95 % intervals.

    Where a table has the usefulness of each block, its last chart has what is left of it in the half of the blocks that
    the dense model uses most (lines), and in the other half (dashed). Patterns n:m have points without a line: they lie
    beside the shares, not between them.

    Raises:
        DataError: a table without depth scores.
    """
    for table in tables:
        if not table.score_names():
            raise DataError(f"{table.path}: its rows have no depth scores; make the table with --scores")
    panels = [_panels(table) for table in tables]
    columns = max(map(len, panels))
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * len(tables) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(tables), columns, squeeze=False)
    methods = list(dict.fromkeys(row["method"] for table in tables for row in table.compressed))
    for line, table, own in zip(grid, tables, panels, strict=True):
        for axes, panel in zip(line, own, strict=False):
            _draw(axes, table, methods, panel)
        for axes in line[len(own) :]:
            axes.set_axis_off()
        if len(tables) > 1:
            line[0].set_ylabel(table.name)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    return figure


def _panels(table: CompressionTable) -> list[_Panel]:
    losses = {_key(row): _loss(row) for row in table.compressed if row.get("loss_change") is not None}
    panels = [_Panel("change of loss, nats", {"-": losses})]
    for score, name in table.score_names():
        found = {
            _key(row): _change(entry)
            for row in table.compressed
            for entry in scores_of(row)
            if (entry["score"], entry["name"]) == (score, name)
        }
        panels.append(_Panel(f"change of {score}" + ("" if name == score else f",\n{name}"), {"-": found}))
    if left := usefulness_left(table):
        by_half = {half: {key: shares[half] for key, shares in left.items()} for half in HALVES}
        title = "log usefulness left in blocks\nused most (–) and least (- -)"
        panels.append(_Panel(title, {"-": by_half["most"], "--": by_half["least"]}, neutral=1.0))
    return panels


def _draw(axes: Axes, table: CompressionTable, methods: Sequence[str], panel: _Panel) -> None:
    for number, method in enumerate(methods):
        of_method = [row for row in table.compressed if row["method"] == method]
        style: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "capsize": 2, "lw": 1}
        style["marker"] = MARKERS[number % len(MARKERS)]
        for line, points in panel.lines.items():
            for apart in (False, True):
                chosen = [row for row in of_method if (":" in row["pattern"]) == apart and _key(row) in points]
                if not chosen:
                    continue
                at = sorted((row["zeros"], *points[_key(row)]) for row in chosen)
                zeros, values = [each[0] for each in at], [each[1] for each in at]
                ends = [[value - low for _, value, low, _ in at], [high - value for _, value, _, high in at]]
                style["markerfacecolor"] = "none" if apart or line != "-" else None
                label = f"{method}, n:m" if apart else method
                bars = axes.errorbar(zeros, values, yerr=ends, linestyle="none" if apart else line, **style)
                bars.set_label(label if line == "-" else "")
    axes.axhline(panel.neutral, color="grey", lw=0.7)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("zeros of the pruned weights")
    axes.set_title(panel.title, loc="left")


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["method"], row["pattern"]


def _loss(row: dict[str, Any]) -> Interval:
    change, half = row["loss_change"], NORMAL_95 * (row["loss_change_stderr"] or 0.0)
    return change, change - half, change + half


def _change(entry: dict[str, Any]) -> Interval:
    value, ends = entry["difference"], (entry["low"], entry["high"])
    low, high = (value if end is None else end for end in ends)
    return value, low, high
