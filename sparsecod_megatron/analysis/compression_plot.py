"""Depth scores of compressed models against their sparsity, a line for each method: which depth does pruning use up?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sparsecod_megatron.analysis.compressions import CompressionTable, scores_of
from sparsecod_megatron.analysis.depth_plot import COLORS, DPI, MARKERS, STYLE, without_date
from sparsecod_megatron.errors import DataError
from sparsecod_megatron.files import replacing_output

WIDTH, HEIGHT = 2.5, 2.4
NORMAL_95 = 1.96
"""Standard errors of a 95 % interval."""
Point = tuple[float, float, float]
"""A change, and the ends of its interval."""


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

    Rows of a pattern n:m have no line: they lie beside the shares, not between them.

    Raises:
        DataError: a table without depth scores.
    """
    for table in tables:
        if not table.score_names():
            raise DataError(f"{table.path}: its rows have no depth scores; make the table with --scores")
    columns = max(1 + len(table.score_names()) for table in tables)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * len(tables) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(tables), columns, squeeze=False)
    methods = list(dict.fromkeys(row["method"] for table in tables for row in table.compressed))
    for line, table in zip(grid, tables, strict=True):
        panels: list[tuple[str, Callable[[dict[str, Any]], Point | None]]] = [("change of loss, nats", _loss)]
        for score, name in table.score_names():
            title = f"change of {score}" if name == score else f"change of {score}: {name}"
            panels.append((title, lambda row, key=(score, name): _score(row, key)))  # type: ignore[misc]
        for axes, (title, point) in zip(line, panels, strict=False):
            _draw(axes, table, methods, point)
            axes.set_title(title if len(tables) == 1 else f"{table.name}: {title}", loc="left")
        for axes in line[len(panels) :]:
            axes.set_axis_off()
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    return figure


def _draw(
    axes: Axes, table: CompressionTable, methods: Sequence[str], point: Callable[[dict[str, Any]], Point | None]
) -> None:
    for number, method in enumerate(methods):
        of_method = [row for row in table.compressed if row["method"] == method]
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        for apart in (False, True):
            found = [(row["zeros"], point(row)) for row in of_method if (":" in row["pattern"]) == apart]
            points = sorted((zeros, at) for zeros, at in found if at is not None)
            if not points:
                continue
            values = [at[0] for _, at in points]
            ends = [[at[0] - at[1] for _, at in points], [at[2] - at[0] for _, at in points]]
            style = {"color": color, "marker": marker, "linestyle": "none" if apart else "-", "capsize": 2}
            label = f"{method}, n:m" if apart else method
            filled = {"markerfacecolor": "none"} if apart else {}
            axes.errorbar([zeros for zeros, _ in points], values, yerr=ends, label=label, lw=1, **style, **filled)
    axes.axhline(0, color="grey", lw=0.7)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("zeros of the pruned weights")


def _loss(row: dict[str, Any]) -> Point | None:
    change, stderr = row.get("loss_change"), row.get("loss_change_stderr")
    if change is None:
        return None
    return change, change - NORMAL_95 * (stderr or 0), change + NORMAL_95 * (stderr or 0)


def _score(row: dict[str, Any], key: tuple[str, str]) -> Point | None:
    for entry in scores_of(row):
        if (entry["score"], entry["name"]) == key:
            value = entry["difference"]
            return value, *(value if entry[end] is None else entry[end] for end in ("low", "high"))
    return None
