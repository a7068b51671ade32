"""Run directories read back: what a run wrote, as arrays over training, whatever statistics it collected.

Nothing here knows a statistic's name. A number on a line of `metrics.jsonl` becomes a series over steps, a number of a
layer a series over steps and layers, a list of a layer's numbers (tokens per expert) one over steps, layers, entries.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from sparsecod_megatron.analysis.directory import short_names
from sparsecod_megatron.checkpoint.lineage import Parent, read_lineage
from sparsecod_megatron.config import IntervalConfig, RunConfig, load_config
from sparsecod_megatron.config.run_files import CONFIG_FILE, METRICS_FILE, STATISTICS_FILE
from sparsecod_megatron.errors import DataError
from sparsecod_megatron.mechanisms import SAVED_MECHANISMS


@dataclass(frozen=True)
class Series:
    """One quantity at the steps where it was written; what a line lacks, and what is not a number, is NaN.

    Attributes:
        steps: [points], strictly increasing.
        tokens: [points], seen by the end of each step.
        values: [points] of a metric, [points, layers] of a layer statistic, [points, layers, entries] of a vector one.
    """

    steps: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        name: the shortest end of its path that tells it from the other runs read with it.
        metrics: series by field name, as are `layers` (one number per layer) and `vectors` (several).
        lineage: runs that it continues, the nearest first; empty where it began by itself.
        notes: what a reader should know about the files, one sentence each.
    """

    name: str
    path: Path
    config: RunConfig
    metrics: dict[str, Series]
    layers: dict[str, Series]
    vectors: dict[str, Series]
    notes: tuple[str, ...]
    lineage: tuple[Parent, ...] = ()

    @property
    def kind(self) -> str:
        """`dense` or `MoE`."""
        return "MoE" if self.config.model.is_moe else "dense"


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories, each under a name of its own.

    Args:
        paths: directories that `sparsecod train` wrote.

    Raises:
        DataError: not a run directory, one given twice, or a damaged or empty file in it.
        ConfigError: its config.yaml cannot be read.
    """
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise DataError(f"{paths[index]}: given twice; name each run once")
        _check_run_directory(paths[index])
    return [_load_run(path, name) for path, name in zip(paths, short_names(resolved), strict=True)]


def _check_run_directory(path: Path) -> None:
    for name in (CONFIG_FILE, METRICS_FILE, STATISTICS_FILE):
        if not (path / name).is_file():
            raise DataError(
                f"{path}: not a run directory (no {name} in it); give one that `sparsecod train` or `sparsecod "
                "analyze` wrote"
            )


def _load_run(path: Path, name: str) -> Run:
    config = load_config(path / CONFIG_FILE, mechanisms=SAVED_MECHANISMS)
    metrics = _Columns()
    for where, record in _records(path / METRICS_FILE, metrics.notes):
        metrics.add_metrics(record, where)
    statistics = _Columns(num_layers=config.model.num_layers)
    required = any(group.interval for group in vars(config.statistics).values() if isinstance(group, IntervalConfig))
    for where, record in _records(path / STATISTICS_FILE, statistics.notes, required=required):
        statistics.add_layers(record, where)
    by_step, by_layer, vectors = metrics.series(), statistics.series(), statistics.series(vectors=True)
    notes = [*metrics.notes, *statistics.notes]
    for columns in (by_step, by_layer, vectors):
        notes.extend(filter(None, (_not_finite(title, series) for title, series in columns.items())))
    return Run(name, path, config, by_step, by_layer, vectors, tuple(notes), tuple(read_lineage(path)))


def _not_finite(name: str, series: Series) -> str:
    """A sentence on the steps without any finite value, empty if there are none; single layers may lack a field."""
    finite = np.isfinite(series.values.reshape(len(series.steps), -1))
    bad = series.steps[~finite.any(axis=1)]
    if not len(bad):
        return ""
    return f"{name} is non-finite at {len(bad):,} of {len(finite):,} steps, first at step {bad[0]:,}"


def _records(path: Path, notes: list[str], *, required: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each complete line as (where it stands, for messages; its object); steps must increase.

    Args:
        path: JSON lines.
        notes: takes a sentence if the last line was cut short.
        required: whether an empty file is an error.

    Raises:
        DataError: a line that is not an object with increasing integer `step` and `tokens`, or no line at all.
    """
    last_step = -1
    with (
        path.open("rb") as lines,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, leave=False, disable=None) as bar,
    ):
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            bar.update(len(line))
            if not line.endswith(b"\n"):
                notes.append(f"{path.name} line {number:,} was cut off by an interruption and is left out")
                break
            record = _parse(line, where)
            if record["step"] <= last_step:
                raise DataError(
                    f"{where}: step {record['step']} after step {last_step}; delete the lines of another run"
                )
            last_step = record["step"]
            yield where, record
    if last_step < 0 and required:
        raise DataError(f"{path}: holds no complete line; let the run finish its first step, or leave the run out")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); delete that line or restore the file") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: holds a {type(record).__name__}, not an object; delete the line or restore the file")
    for key in ("step", "tokens"):
        if type(record.get(key)) is not int or record[key] < 0:
            raise DataError(f"{where}: {key} is {record.get(key)!r}, not a count; delete that line or restore the file")
    return record


@dataclass
class _Columns:
    """Fields of many lines, gathered column by column: a Python object per number would take ten times the memory.

    Attributes:
        num_layers: rows of a point; None if the lines hold plain metrics.
    """

    num_layers: int | None = None
    notes: list[str] = field(default_factory=list)
    _steps: dict[str, array[int]] = field(default_factory=dict)
    _tokens: dict[str, array[int]] = field(default_factory=dict)
    _values: dict[str, array[float]] = field(default_factory=dict)
    _widths: dict[str, int | None] = field(default_factory=dict)
    _left_out: set[str] = field(default_factory=set)

    def add_metrics(self, record: dict[str, Any], where: str) -> None:
        """Take one line of metrics.jsonl."""
        for name, value in record.items():
            if name not in ("step", "tokens"):
                self._add(name, {0: value}, record, where)

    def add_layers(self, record: dict[str, Any], where: str) -> None:
        """Take one line of layer_statistics.jsonl."""
        assert self.num_layers is not None
        by_name: dict[str, dict[int, Any]] = {}
        layers = record.get("layers")
        if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
            raise DataError(f"{where}: layers is not a list of objects; delete that line or restore the file")
        for values in layers:
            layer = values.get("layer")
            if type(layer) is not int or not 0 <= layer < self.num_layers:
                raise DataError(
                    f"{where}: layer is {layer!r}, but config.yaml has model.num_layers={self.num_layers}; "
                    "the two belong to different runs"
                )
            for name, value in values.items():
                if name != "layer":
                    by_name.setdefault(name, {})[layer] = value
        for name, by_layer in by_name.items():
            self._add(name, by_layer, record, where)

    def _add(self, name: str, by_layer: dict[int, Any], record: dict[str, Any], where: str) -> None:
        by_layer = {layer: value for layer, value in by_layer.items() if value is not None}
        widths = {len(value) if isinstance(value, list) else None for value in by_layer.values()}
        if name in self._left_out or not widths:
            return
        width = self._widths.setdefault(name, next(iter(widths)))
        if widths != {width}:
            raise DataError(f"{where}: {name} no longer has {width or 1} entries; restore the file")
        absent = [float("nan")] * (width or 1)
        rows = (by_layer.get(layer, absent) for layer in range(self.num_layers or 1))
        flat = [number for row in rows for number in (row if isinstance(row, list) else (row,))]
        try:
            numbers = array("d", flat)
        except (TypeError, OverflowError):
            numbers = array("d")
        if not numbers or (self.num_layers is None and width is not None):
            self._left_out.add(name)
            self.notes.append(f"{name} is not a number everywhere and is left out")
            return
        self._steps.setdefault(name, array("q")).append(record["step"])
        self._tokens.setdefault(name, array("q")).append(record["tokens"])
        self._values.setdefault(name, array("d")).extend(numbers)

    def series(self, *, vectors: bool = False) -> dict[str, Series]:
        """The numbers, or the lists of numbers, gathered so far."""
        layers = () if self.num_layers is None else (self.num_layers,)
        found = {}
        for name, width in self._widths.items():
            if name not in self._left_out and (width is not None) == vectors:
                shape = (len(self._steps[name]), *layers, *([] if width is None else [width]))
                values = np.array(self._values[name]).reshape(shape)
                found[name] = Series(np.array(self._steps[name]), np.array(self._tokens[name]), values)
        return found
