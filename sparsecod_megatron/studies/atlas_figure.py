"""The picture of an atlas: how far each row moved the last layer's variance, and the usefulness of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from sparsecod_megatron.analysis.depth_plot import COLORS, MARKERS, STYLE
from sparsecod_megatron.files import replacing_output
from sparsecod_megatron.studies.atlas import Atlas
from sparsecod_megatron.studies.atlas_cells import USEFULNESS, VARIANCE, AtlasRow
from sparsecod_megatron.studies.picture import DPI

WIDTH, HEIGHT = 9.0, 6.0
LINEAR = 1.0
"""Up to this change of usefulness, in thousandths, the axis is linear."""


def draw_atlas(atlas: Atlas, output: Path) -> int:
    """Write the picture, with every row that has both differences, by its number.

    Args:
        atlas: what was found.
        output: a PNG file; replaced whole.

    Returns:
        Rows that are drawn.

    Raises:
        ConfigError: it cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        figure, drawn = atlas_figure(atlas)
        with replacing_output(output) as temporary:
            figure.savefig(temporary, dpi=DPI, metadata={})
    return drawn


def atlas_figure(atlas: Atlas) -> tuple[Figure, int]:
    """The figure and how many rows are in it; those without both numbers are named below it."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [(row, point) for row in atlas.rows if (point := _point(row)) is not None]
    kinds = list(dict.fromkeys(row.kind for row, _ in points))
    axes.axhline(0, color="grey", lw=0.7)
    axes.axvline(1, color="grey", lw=0.7)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=LINEAR)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for row, (ratio, change, low, high) in points:
        color, marker = _look(kinds.index(row.kind))
        axes.plot([ratio, ratio], [low, high], color=color, lw=0.6, alpha=0.5)
        # Numbers stand beside their points by turns, for many points lie close together.
        face = "none" if row.is_remedy else color
        axes.plot([ratio], [change], marker, color=color, markerfacecolor=face, markersize=4)
        side = ((3, 3), (3, -9), (-11, 3), (-11, -9))[row.number % 4]
        axes.annotate(str(row.number), (ratio, change), side, textcoords="offset points", fontsize=7, color=color)
    axes.set_xlabel("variance of the last layer ÷ control's (left: damped)")
    axes.set_ylabel("mean log usefulness − control's, × 10³ (up: more useful)")
    axes.set_title("Numbers are rows of the table; bars are 95 % intervals; hollow points are not sparsity", loc="left")
    handles = [
        Line2D([], [], color=_look(index)[0], marker=_look(index)[1], linestyle="", label=kind)
        for index, kind in enumerate(kinds)
    ]
    figure.legend(handles=handles, loc="outside right upper")
    without = [str(row.number) for row in atlas.rows if _point(row) is None]
    if without:
        axes.text(0.01, 0.01, f"without both numbers: {', '.join(without)}", transform=axes.transAxes, fontsize=7)
    return figure, len(points)


def _look(kind: int) -> tuple[str, str]:
    """Colour and marker of a kind; where colours come round again the markers are others."""
    return COLORS[kind % len(COLORS)], MARKERS[kind // len(COLORS) % len(MARKERS)]


def _point(row: AtlasRow) -> tuple[float, float, float, float] | None:
    """Ratio of variances, change of usefulness in thousandths, and the ends of its interval."""
    variance, useful = row.entries[VARIANCE], row.entries[USEFULNESS]
    if variance.value is None or variance.difference is None or useful.difference is None:
        return None
    control = variance.value.value - variance.difference.value
    ends: Sequence[float | None] = (useful.difference.low, useful.difference.high)
    change = useful.difference.value
    low, high = (change if end is None else end for end in ends)
    return variance.value.value / control, 1e3 * change, 1e3 * low, 1e3 * high
