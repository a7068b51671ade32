"""A study's figures: each metric over the first axis, variance by depth, and one metric by another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sparsecod_megatron.analysis.depth_plot import COLORS, MARKERS
from sparsecod_megatron.studies.block_metrics import by_block
from sparsecod_megatron.studies.cell import trained_run
from sparsecod_megatron.studies.grid import Study
from sparsecod_megatron.studies.law_figure import draw_law
from sparsecod_megatron.studies.metrics import last_variances
from sparsecod_megatron.studies.picture import LOG_SPAN, picture
from sparsecod_megatron.studies.schema import Labels, setting_name
from sparsecod_megatron.studies.table import Row, Table

FIGURES_FOLDER = "figures"
BY_BLOCK = {
    "answers/skip_accuracy": "change of accuracy without the block",
    "integrated_gradients/integrated_gradients": "nats per item that the branch accounts for",
    "token_skip/needs": "share of tokens that need the block",
}
"""Metric of single blocks → what a figure's axis calls it."""


def draw_figures(study: Study, table: Table) -> list[Path]:
    """Write one picture per measured column, pair of metrics and law, one of the variance and one of answers by depth.

    Raises:
        ConfigError: a file cannot be written.
    """
    drawn = []
    for metric in study.config.columns:
        if any(metric in row.metrics for row in table.rows):
            drawn.append(study.output / FIGURES_FOLDER / f"{metric.replace('/', '_')}.png")
            _draw(drawn[-1], metric, study, table)
    for across, up in ((pair.across, pair.up) for pair in study.config.scatter):
        if any(across in row.metrics and up in row.metrics for row in table.rows):
            drawn.append(study.output / FIGURES_FOLDER / f"{up}_by_{across}.png".replace("/", "_"))
            _draw_pairs(drawn[-1], across, up, study, table)
    for number, law in enumerate(table.laws, start=1):
        if law.fit is not None and law.selected is not None:
            drawn.append(study.output / FIGURES_FOLDER / f"law_{number}_{law.config.law}.png")
            draw_law(drawn[-1], law.fit, law.selected.points, variables=law.config.x, value=law.config.y)
    variances = {labels: found for labels in table.results if (found := _mean_variances(study, labels, table))}
    if variances:
        drawn.append(study.output / FIGURES_FOLDER / "variance_by_depth.png")
        _draw_by_layer(drawn[-1], variances, "residual stream variance", f"{study.config.name}: out_var after training")
    for metric, meaning in BY_BLOCK.items():
        means = {labels: found for labels in table.results if (found := _mean_by_block(table, labels, metric))}
        if means:
            drawn.append(study.output / FIGURES_FOLDER / f"{metric.rpartition('/')[2]}_by_block.png")
            _draw_by_layer(drawn[-1], means, meaning, f"{study.config.name}: what each block is for", log=False)
    return drawn


def _mean_variances(study: Study, labels: Labels, table: Table) -> list[float]:
    """`out_var` of every layer at the end of training, the geometric mean over the seeds that have it."""
    cells = [cell for cell in study.cells if cell.labels == labels and cell.seed in table.results[labels]]
    runs = [last_variances(trained_run(cell)) for cell in cells]
    known = [layers for layers in runs if layers and min(layers) > 0]
    return np.exp(np.log(known).mean(axis=0)).tolist() if known else []


def _mean_by_block(table: Table, labels: Labels, metric: str) -> list[float]:
    """A metric of every block, the mean over the seeds that have it."""
    known = [found for metrics in table.results[labels].values() if (found := by_block(metrics, metric))]
    return np.mean(known, axis=0).tolist() if known else []


def _draw_by_layer(
    path: Path, lines: Mapping[Labels, Sequence[float]], meaning: str, title: str, *, log: bool = True
) -> None:
    """A line over the layers for every place of the grid."""
    with picture(path) as axes:
        for index, (labels, layers) in enumerate(lines.items()):
            color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
            axes.plot(range(len(layers)), layers, color=color, marker=marker, label=setting_name(labels))
        if log:
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel(meaning)
        axes.set_title(title, loc="left")
        axes.legend()


def _draw_pairs(path: Path, across: str, up: str, study: Study, table: Table) -> None:
    """Means of both metrics at every place, and its seeds; a colour per label of the first axis, a marker per rest."""
    with picture(path) as axes:
        first = list(dict.fromkeys(row.labels[:1] for row in table.rows))
        others = list(dict.fromkeys(row.labels[1:] for row in table.rows))
        seen = []
        for row in (row for row in table.rows if across in row.metrics and up in row.metrics):
            round_, number = divmod(first.index(row.labels[:1]), len(COLORS))
            # Where colours come round again the markers are others.
            color, marker = COLORS[number], MARKERS[(others.index(row.labels[1:]) + round_) % len(MARKERS)]
            seeds = [found for found in table.results[row.labels].values() if across in found and up in found]
            axes.plot([found[across] for found in seeds], [found[up] for found in seeds], ".", color=color, alpha=0.4)
            x, y = row.metrics[across].value, row.metrics[up].value
            axes.plot([x], [y], marker=marker, color=color, linestyle="", label=setting_name(row.labels))
            seen += [x, *(found[across] for found in seeds)]
        if min(seen) > 0 and max(seen) > LOG_SPAN * min(seen):
            axes.set_xscale("log")
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.set_title(study.config.name, loc="left")
        axes.legend(fontsize="x-small")


def _draw(path: Path, metric: str, study: Study, table: Table) -> None:
    with picture(path) as axes:
        labels = list(dict.fromkeys(row.labels[0][1] for row in table.rows)) if study.config.grid else [""]
        others = list(dict.fromkeys(row.labels[1:] for row in table.rows))
        for index, other in enumerate(others):
            rows = [row for row in table.rows if row.labels[1:] == other and metric in row.metrics]
            _draw_line(axes, metric, rows, labels, table, index, setting_name(other))
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel(study.config.grid[0].name if study.config.grid else "")
        axes.set_ylabel(metric)
        axes.set_title(study.config.name, loc="left")
        if len(others) > 1:
            axes.legend()


def _draw_line(
    axes: Axes, metric: str, rows: Sequence[Row], labels: Sequence[str], table: Table, index: int, name: str
) -> None:
    """Means with intervals, joined, and one dot per seed beside them."""
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    places = np.array([labels.index(row.labels[0][1]) if row.labels else 0 for row in rows], dtype=np.float64)
    means = [row.metrics[metric] for row in rows]
    values = np.array([mean.value for mean in means])
    ends = np.array(
        [
            (0.0, 0.0) if mean.low is None or mean.high is None else (mean.value - mean.low, mean.high - mean.value)
            for mean in means
        ]
    ).T
    axes.errorbar(places, values, yerr=ends, color=color, marker=marker, capsize=2, linewidth=1.2, label=name)
    for place, row in zip(places, rows, strict=True):
        seeds = [metrics[metric] for metrics in table.results[row.labels].values() if metric in metrics]
        axes.plot([place + 0.06] * len(seeds), seeds, ".", color=color, alpha=0.5, markersize=3)
