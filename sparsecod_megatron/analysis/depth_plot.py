"""The project's central figure: residual variance against depth, after training and while it grew, one line per run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sparsecod_megatron.analysis.runs import Run
from sparsecod_megatron.errors import DataError
from sparsecod_megatron.files import replacing_output

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, distinguishable with every kind of colour vision; markers for print in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BRANCHES: tuple[tuple[str, Literal["--", ":"], str], ...] = (
    ("attn_var", "--", "attention branch"),
    ("mlp_var", ":", "MLP branch"),
)
STEPS_SHOWN = 4
DPI = 220
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.markersize": 3.5,
    "svg.hashsalt": "sparsecod",  # the same runs give the same bytes
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


def plot_variance_by_depth(runs: Sequence[Run], output: Path) -> None:
    """Write the figure.

    Args:
        runs: each with `out_var`; the branches' variances are drawn where present.
        output: .png, .svg or .pdf; replaced whole.

    Raises:
        DataError: a run without `out_var`.
        ConfigError: `output` cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        figure = variance_by_depth(runs)
        with replacing_output(output) as temporary:
            figure.savefig(temporary, dpi=DPI, metadata=without_date(output))


def without_date(output: Path) -> dict[str, Any]:
    """Metadata of a figure's file that are the same on every day."""
    dates: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    return dates[output.suffix]


def variance_by_depth(runs: Sequence[Run]) -> Figure:
    """The figure: left each run at its last collected step with its branches, right `out_var` at several steps.

    Raises:
        DataError: a run without `out_var`.
    """
    for run in runs:
        if "out_var" not in run.layers:
            raise DataError(f"{run.path}: no out_var in its statistics; train with statistics.variance.interval=1")
    figure = Figure(figsize=(6.9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    last, training = figure.subplots(1, 2)
    for index, run in enumerate(runs):
        _draw_last(last, run, COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)])
        _draw_training(training, run, COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)])
    last.set_title("At the last step", loc="left")
    training.set_title("While training", loc="left")
    for axes in (last, training):
        axes.set_yscale("log")
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    last.set_ylabel("variance over channels")
    training.set_ylabel("residual stream variance")
    branches = [
        Line2D([], [], color="0.4", linewidth=0.9, linestyle=style, label=label)
        for name, style, label in BRANCHES
        if any(name in run.layers for run in runs)
    ]
    streams = last.get_legend_handles_labels()[0]
    figure.legend(handles=[*streams, *branches], loc="outside lower center", ncols=4)
    training.legend(handles=_shade_key(runs))
    return figure


def _draw_last(axes: Axes, run: Run, color: str, marker: str) -> None:
    layers = np.arange(run.config.model.num_layers)
    series = run.layers["out_var"]
    label = f"{run.name} ({run.kind}), step {series.steps[-1]:,}"
    axes.plot(layers, series.values[-1], color=color, marker=marker, linewidth=1.6, label=label)
    for name, style, _ in BRANCHES:
        if name in run.layers:
            axes.plot(layers, run.layers[name].values[-1], color=color, linestyle=style, linewidth=0.9)


def _draw_training(axes: Axes, run: Run, color: str, marker: str) -> None:
    series = run.layers["out_var"]
    chosen = shown_steps(run)
    for index, strength in zip(chosen, _strengths(len(chosen)), strict=True):
        layers = np.arange(series.values.shape[1])
        axes.plot(layers, series.values[index], color=_paler(color, strength), marker=marker, linewidth=1.2)


def shown_steps(run: Run) -> npt.NDArray[np.int64]:
    """Indices of the collected steps that the right panel shows: the first, the last, and some evenly apart in log."""
    points = len(run.layers["out_var"].steps)
    return np.unique(np.geomspace(1, points, min(STEPS_SHOWN, points)).round().astype(np.int64)) - 1


def _shade_key(runs: Sequence[Run]) -> list[Line2D]:
    """Legend in grey: which shade is which step; where the runs' steps differ, only the first and the last shade."""
    steps = [tuple(run.layers["out_var"].steps[shown_steps(run)].tolist()) for run in runs]
    labels = [f"step {step:,}" for step in steps[0]] if len(set(steps)) == 1 else ["first collected step", "last"]
    strengths = _strengths(len(labels))
    return [
        Line2D([], [], color=_paler("#000000", strength), linewidth=1.6, label=label)
        for label, strength in zip(labels, strengths, strict=True)
    ]


def _strengths(count: int) -> npt.NDArray[np.float64]:
    return np.linspace(1, 0.3, count)[::-1]


def _paler(color: str, strength: float) -> tuple[float, float, float]:
    red, green, blue = (1 - strength * (1 - channel) for channel in to_rgb(color))
    return (red, green, blue)
