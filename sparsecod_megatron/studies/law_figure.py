"""The figure of a fitted law: its curve through the points, or what it says against what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from sparsecod_megatron.analysis.depth_plot import COLORS
from sparsecod_megatron.studies.laws import LawFit, Points
from sparsecod_megatron.studies.picture import LOG_SPAN, picture

CURVE_POINTS = 200


def draw_law(path: Path, fit: LawFit, points: Points, *, variables: Sequence[str], value: str) -> None:
    """Write a law's figure.

    Args:
        path: picture; replaced.
        fit: the law.
        points: that it was fitted to.
        variables: names of its variables.
        value: name of what it is of.

    Raises:
        ConfigError: the file cannot be written.
    """
    with picture(path) as axes:
        if len(variables) == 1:
            _curve(axes, fit, points)
            axes.set_xlabel(variables[0])
            axes.set_ylabel(value)
        else:
            said, low, high = fit.curve.predict(points.variables)
            ends = np.maximum([said - low, high - said], 0.0)
            axes.errorbar(points.values, said, yerr=ends, fmt="o", color=COLORS[0], capsize=2, markersize=3)
            both = [min(points.values.min(), said.min()), max(points.values.max(), said.max())]
            axes.plot(both, both, color="0.6", linewidth=0.8)
            axes.set_xlabel(f"{value}, measured")
            axes.set_ylabel(f"{value}, by the law")
        axes.set_title(f"{fit.form.name}: {fit.form.formula}", loc="left")


def _curve(axes: Axes, fit: LawFit, points: Points) -> None:
    (places,) = points.variables
    line = np.geomspace(places.min(), places.max(), CURVE_POINTS)
    said, low, high = fit.curve.predict(line[None])
    axes.fill_between(line, low, high, color=COLORS[0], alpha=0.2, linewidth=0)
    axes.plot(line, said, color=COLORS[0])
    axes.plot(places, points.values, "o", color=COLORS[1], markersize=3)
    if places.max() > LOG_SPAN * places.min():
        axes.set_xscale("log")
