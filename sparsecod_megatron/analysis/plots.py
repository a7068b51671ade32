"""Draws a score's figures: heat maps, bars with intervals, curves over depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from sparsecod_megatron.analysis.depth_plot import COLORS, MARKERS, STYLE
from sparsecod_megatron.analysis.scores.base import Bars, Figure, HeatMap, Lines, Number
from sparsecod_megatron.files import replacing_output

WIDTH, HEIGHT = 4.6, 3.4
DPI = 160


def draw(figure: Figure, output: Path) -> None:
    """Write one figure as a picture.

    Args:
        figure: what to show.
        output: .png; replaced whole.

    Raises:
        ConfigError: `output` cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.subplots()
        if isinstance(figure, HeatMap):
            _draw_heat_map(canvas, axes, figure)
        elif isinstance(figure, Bars):
            _draw_bars(axes, figure)
        else:
            _draw_lines(axes, figure)
        axes.set_title(figure.title, loc="left")
        with replacing_output(output) as temporary:
            canvas.savefig(temporary, dpi=DPI, metadata={})


def _draw_heat_map(canvas: Canvas, axes: Axes, figure: HeatMap) -> None:
    values = np.array([[_float(value) for value in row] for row in figure.values])
    limit = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    colors = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if figure.diverging else {"cmap": "viridis"}
    axes.grid(False)
    image = axes.imshow(values, interpolation="nearest", **colors)
    canvas.colorbar(image, ax=axes)
    axes.set_xlabel(figure.column_label)
    axes.set_ylabel(figure.row_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_bars(axes: Axes, figure: Bars) -> None:
    values = _array(figure.values)
    places = np.arange(len(values))
    axes.bar(places, values, color=COLORS[0], width=0.7)
    if len(figure.low):
        ends = np.stack([values - _array(figure.low), _array(figure.high) - values]).clip(min=0)
        axes.errorbar(places, values, yerr=np.nan_to_num(ends), fmt="none", ecolor="0.2", elinewidth=0.9, capsize=2)
    _reference_line(axes, figure.line)
    axes.set_xlabel(figure.x_label)
    axes.set_ylabel(figure.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_lines(axes: Axes, figure: Lines) -> None:
    for index, (label, values) in enumerate(figure.series.items()):
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        axes.plot(figure.x, _array(values), color=color, marker=marker, label=label)
    _reference_line(axes, figure.line)
    axes.set_xlabel(figure.x_label)
    axes.set_ylabel(figure.y_label)
    if all(float(point).is_integer() for point in figure.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(figure.series) > 1:
        axes.legend()


def _reference_line(axes: Axes, line: float | None) -> None:
    if line is not None:
        axes.axhline(line, color="0.3", linewidth=0.9, linestyle="--")


def _array(values: Sequence[Number]) -> npt.NDArray[np.float64]:
    return np.array([_float(value) for value in values])


def _float(value: Number) -> float:
    return np.nan if value is None else float(value)
