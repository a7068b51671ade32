"""A study's cells: every combination of the grid's labels with every seed, as complete run configurations."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecod_megatron.config import RunConfig, load_config
from sparsecod_megatron.config.fields import bound_problems
from sparsecod_megatron.config.typed import merge_typed, read_updates
from sparsecod_megatron.data.synthetic.registry import task_of
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.studies.budget import set_budget
from sparsecod_megatron.studies.cell_checks import NamedRun, check_cells
from sparsecod_megatron.studies.forms import find_law
from sparsecod_megatron.studies.schema import AxisConfig, Labels, ScoresConfig, StudyConfig, setting_name
from sparsecod_megatron.studies.steps import scored_steps

_LABEL = re.compile(r"[\w.+-]+")
CELLS_FOLDER, RUN_FOLDER = "cells", "run"


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Attributes:
        name: `axis=label,…,seed=N`, also its folder's.
        labels: its place in the grid.
        seed: seed of weights and data.
        directory: where everything of it is written.
        config: its run, complete.
    """

    name: str
    labels: Labels
    seed: int
    directory: Path
    config: RunConfig


@dataclass(frozen=True)
class Study:
    """A study's file and the cells that it makes, in the order of the grid, seeds last."""

    config: StudyConfig
    cells: tuple[Cell, ...]
    output: Path

    def cell(self, name: str) -> Cell:
        """The cell of that name.

        Raises:
            ConfigError: there is no such cell.
        """
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise ConfigError(f"--cell {name}: no such cell; choose one of {', '.join(cell.name for cell in self.cells)}")


def load_study(path: Path, output: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study and every cell's run.

    Args:
        path: a YAML file.
        output: directory of the study.
        overrides: `a.b=c` strings that replace keys of the study.

    Raises:
        ConfigError: a study, or a cell's run, that cannot be; names the cell.
    """
    config = merge_typed(StudyConfig, read_updates(StudyConfig, path, overrides))
    for problem in bound_problems(config):
        raise ConfigError(f"{path}: {problem}")
    axes = [_axis(path, axis) for axis in config.grid]
    _check(path, config, axes)
    base, common = path.parent / config.base, _assignments(config.run)
    runs: dict[Labels, list[str]] = {}
    for combination in itertools.product(*(axis.items() for axis in axes)):
        labels = tuple((axis.name, label) for axis, (label, _) in zip(config.grid, combination, strict=True))
        runs[labels] = [*common, *(change for _, changes in combination for change in changes)]
    try:
        runs = set_budget(config.budget, base, runs)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    cells = tuple(
        _cell(base, changes, labels, seed, output, config.scores)
        for labels, changes in runs.items()
        for seed in config.seeds
    )
    check_cells(path, config, [NamedRun(cell.name, cell.config) for cell in cells])
    return Study(config, cells, output)


def _cell(base: Path, changes: Sequence[str], labels: Labels, seed: int, output: Path, scores: ScoresConfig) -> Cell:
    name = ",".join(filter(None, [setting_name(labels), f"seed={seed}"]))
    directory = output / CELLS_FOLDER / name
    own = [f"train.seed={seed}", f"logging.run_dir={_flow(str(directory / RUN_FOLDER))}"]
    try:
        config = load_config(base, [*changes, *own], mechanisms=MECHANISMS)
        if steps := scored_steps(scores, config.train.train_steps):
            kept = sorted({*config.checkpoint.save_steps, *steps})
            config = load_config(base, [*changes, *own, f"checkpoint.save_steps={kept}"], mechanisms=MECHANISMS)
        task_of(config.data)  # refuses a synthetic task that cannot be
        return Cell(name, labels, seed, directory, config)
    except ConfigError as error:
        raise ConfigError(f"cell {name}: {error}") from None


def _axis(path: Path, axis: AxisConfig) -> dict[str, list[str]]:
    """Changes of the run by label."""
    where = f"{path}: grid axis {axis.name!r}"
    if (axis.key is None) != (axis.values is None) or (axis.key is None) == (axis.cells is None):
        raise ConfigError(f"{where}: give either key and values, or cells")
    if axis.cells is not None:
        changes = {}
        for label, content in axis.cells.items():
            if not isinstance(content, dict):
                raise ConfigError(
                    f"{where}: {label}: {content!r} is not a set of changes; give `a.b: c`, or {{}} for none"
                )
            changes[label] = _assignments(content)
    else:
        assert axis.values is not None
        changes = {_label(value): [f"{axis.key}={_flow(value)}"] for value in axis.values}
        if len(changes) < len(axis.values):
            raise ConfigError(f"{where}: a value is given twice; give each once")
    for label in [axis.name, *changes]:
        if not _LABEL.fullmatch(label):
            raise ConfigError(f"{where}: {label!r} names folders; use letters, digits and . _ + - only")
    if not changes:
        raise ConfigError(f"{where}: no cells; give at least one")
    return changes


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _flow(value: Any) -> str:
    """A value as an override writes it: JSON, which is YAML but for escapes of characters beyond 16 bits."""
    return json.dumps(value, ensure_ascii=False)


def _assignments(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`a.b=c` strings of nested or dotted keys."""
    found = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            found.extend(_assignments(value, f"{prefix}{key}."))
        else:
            found.append(f"{prefix}{key}={_flow(value)}")
    return found


def _check(path: Path, config: StudyConfig, axes: Sequence[Mapping[str, Any]]) -> None:
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(f"{path}: seeds: {config.seeds}; give one or more, each once")
    labels = {axis.name: set(changes) for axis, changes in zip(config.grid, axes, strict=True)}
    if len(labels) < len(axes):
        raise ConfigError(f"{path}: grid: two axes have one name; give each its own")
    places = [("budget.reference", config.budget.reference)]
    for number, law in enumerate(config.laws):
        find_law(law.law).check_variables(f"{path}: laws[{number}].x", law.x)
        places.append((f"laws[{number}].where", law.where))
        if law.over == "checkpoints" and config.scores.steps < 2:
            raise ConfigError(
                f"{path}: laws[{number}].over: checkpoints, but scores.steps={config.scores.steps} scores the last "
                "alone; set it to 2 or more"
            )
    for number, claim in enumerate(config.claims):
        trends = [axis for axis in (claim.rises_along, claim.falls_along) if axis is not None]
        if len(trends) + bool(claim.higher and claim.lower) != 1 or bool(claim.higher) != bool(claim.lower):
            raise ConfigError(f"{path}: claims[{number}]: give higher and lower, or one of rises_along, falls_along")
        for axis in trends:
            if len(labels.get(axis, ())) < 2:
                raise ConfigError(f"{path}: claims[{number}]: {axis!r} is not an axis of two labels or more")
        places += [(f"claims[{number}].higher", claim.higher), (f"claims[{number}].lower", claim.lower)]
    for where, place in places:
        for axis, label in place.items():
            if label not in labels.get(axis, ()):
                known = ", ".join(f"{name}: {'|'.join(sorted(values))}" for name, values in labels.items())
                raise ConfigError(f"{path}: {where}: {axis}={label} is not in the grid ({known})")
