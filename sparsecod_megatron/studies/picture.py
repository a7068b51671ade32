"""The frame of all figures of studies and laws: one size, one style, written whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sparsecod_megatron.analysis.depth_plot import STYLE
from sparsecod_megatron.files import replacing_output

DPI = 160
LOG_SPAN = 30
"""Largest over smallest value from which an axis is logarithmic."""


@contextlib.contextmanager
def picture(path: Path) -> Iterator[Axes]:
    """Axes to draw on; the file is written when the block ends well.

    Raises:
        ConfigError: it cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure.subplots()
        with replacing_output(path) as temporary:
            figure.savefig(temporary, dpi=DPI, metadata={})
