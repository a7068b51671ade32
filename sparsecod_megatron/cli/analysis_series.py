"""Analyses of every checkpoint of a run, or of several models: what is done is left alone, and what is new is added."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecod_megatron.errors import ConfigError

if TYPE_CHECKING:
    from sparsecod_megatron.analysis.analyze import Analysis
    from sparsecod_megatron.analysis.directory import AnalysisDirectory
    from sparsecod_megatron.analysis.series import Point
    from sparsecod_megatron.parallel.processes import Processes

SERIES_FILE = "series.json"
"""What was asked for; says that the analyses beside it belong together."""
STEP, REVISION, MODEL = "step", "revision", "model"
"""What the axis is: steps of a run, steps in the names of a folder's models, or models as they were given."""
STAGE = re.compile(r"stage\d+")
"""What OLMo's revisions begin with, as in `stage1-step721901-tokens6056B`."""
Measure = Callable[[Path, dict[str, Any]], "Analysis"]


@dataclass(frozen=True)
class Member:
    """A model of the series.

    Attributes:
        path: its directory.
        point: its place.
    """

    path: Path
    point: Point


def run_series(
    models: Sequence[Path], output: Path, request: dict[str, Any], measure: Measure, processes: Processes
) -> Analysis:
    """Measure what has not been, and put all of it together. Collective over the processes.

    Args:
        models: one run with checkpoints, one folder of models, or several models.
        output: an analysis directory for every model, and the series beside them.
        request: what numbers depend on besides the model.
        measure: analyses one model, recording the facts that it is given; collective.
        processes: those that share the work.

    Returns:
        The whole series, which the first process has written.

    Raises:
        ConfigError: the output holds a series that was measured otherwise, or of other models.
        CheckpointError: a checkpoint whose progress cannot be read.
    """
    from sparsecod_megatron.analysis.analyze import write_analysis
    from sparsecod_megatron.analysis.directory import is_analysis
    from sparsecod_megatron.analysis.series import series_analysis
    from sparsecod_megatron.files import write_text

    axis, members = processes.from_first(lambda: _members(models))
    request = {**request, "axis": axis, **({} if axis == MODEL else {"run": str(models[0])})}
    processes.from_first(lambda: _check(output, request, members))
    for member in members:
        folder = output / member.point.name
        if processes.from_first(functools.partial(is_analysis, folder)):
            continue
        facts = {"place": member.point.place, "tokens": member.point.tokens}
        found = measure(member.path, facts)
        if processes.is_first:
            write_text(output / SERIES_FILE, json.dumps(request, indent=1) + "\n")
            write_analysis(found, folder)
    points, analyses = processes.from_first(lambda: _read(output))
    whole = series_analysis(points, analyses, axis=axis)
    if processes.is_first:
        write_analysis(whole, output)
    return whole


def _members(models: Sequence[Path]) -> tuple[str, list[Member]]:
    """What the axis is, and the models along it."""
    from sparsecod_megatron.analysis.series import Point
    from sparsecod_megatron.checkpoint.paths import step_dirs
    from sparsecod_megatron.checkpoint.state import read_state
    from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR

    if len(models) > 1:
        return MODEL, [
            Member(path, Point(f"{place:03d}_{path.resolve().name}", place))
            for place, path in enumerate(models, start=1)
        ]
    steps = step_dirs(models[0] / CHECKPOINTS_DIR)
    if not steps:
        return REVISION, _revisions(models[0])
    return STEP, [
        Member(path, Point(path.name, step, read_state(path).train.consumed_tokens)) for step, path in steps.items()
    ]


def _revisions(folder: Path) -> list[Member]:
    """The HuggingFace directories in a folder, in the order of the steps that their names tell."""
    from sparsecod_megatron.analysis.series import Point
    from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR
    from sparsecod_megatron.files import MODEL_CONFIG_FILE

    found = sorted(path.parent for path in folder.glob(f"*/{MODEL_CONFIG_FILE}"))
    if not found:
        raise ConfigError(
            f"--every-checkpoint {folder}: no {CHECKPOINTS_DIR}/step_… in it, and no folders of models; give a "
            "training run, a folder of revisions, or several models"
        )
    stages = sorted({match[0] for path in found if (match := STAGE.search(path.name))})
    if len(stages) > 1:
        raise ConfigError(
            f"--every-checkpoint {folder}: has revisions of {' and '.join(stages)}, whose steps each begin at 0; give "
            "a folder of one of them"
        )
    by_number: dict[int, Member] = {}
    for path in found:
        number = revision_number(path.name)
        if number is None or number in by_number:
            raise ConfigError(
                f"--every-checkpoint {folder}: {path.name} has no number of its own, and revisions stand in the order "
                "of theirs; name them as in step1000, or give the models one by one"
            )
        by_number[number] = Member(path, Point(path.name, number, revision_tokens(path.name)))
    return [by_number[number] for number in sorted(by_number)]


def revision_number(name: str) -> int | None:
    """What `step` is followed by in a revision's name, else its last number; None where it has none."""
    step = re.search(r"step[-_]?(\d+)", name)
    numbers = [step[1]] if step else re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else None


def revision_tokens(name: str) -> int | None:
    """What `tokens` is followed by, in thousands (K), millions, billions or trillions; None where it is not there."""
    found = re.search(r"tokens[-_]?(\d+)([KMBT]?)", name)
    return int(found[1]) * 1000 ** " KMBT".index(found[2] or " ") if found else None


def _check(output: Path, request: dict[str, Any], members: Sequence[Member]) -> None:
    """Refuse an output that holds something else."""
    from sparsecod_megatron.analysis.directory import is_analysis

    path = output / SERIES_FILE
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in request | before if request.get(key) != before.get(key))
        if changed:
            key = changed[0]
            raise ConfigError(
                f"{path}: was measured with {key} {before.get(key)}, not {request.get(key)}; give another --output, or "
                "the options that it was measured with"
            )
    elif is_analysis(output):
        raise ConfigError(f"--output {output}: holds an analysis of one model; give another folder")
    places = {member.point.place: member.path for member in members}
    for point, analysis in zip(*_read(output), strict=True):
        model, wanted = analysis.settings["model"], str(places.get(point.place, analysis.settings["model"]))
        if model != wanted:
            raise ConfigError(
                f"{analysis.path}: is of {model}, not {wanted}; give another --output, or the models in their old "
                "order with new ones behind them"
            )


def _read(output: Path) -> tuple[list[Point], list[AnalysisDirectory]]:
    """Every analysis there, in order; those of checkpoints that have been removed since are kept."""
    from sparsecod_megatron.analysis.directory import is_analysis, load_analyses
    from sparsecod_megatron.analysis.series import Point

    folders = [path for path in output.iterdir() if path.is_dir()] if output.is_dir() else []
    analyses = load_analyses([path for path in folders if is_analysis(path)])
    analyses = [analysis for analysis in analyses if "place" in analysis.settings]  # others lie there by chance
    analyses.sort(key=lambda analysis: int(analysis.settings["place"]))
    points = [
        Point(analysis.path.name, analysis.settings["place"], analysis.settings["tokens"]) for analysis in analyses
    ]
    return points, analyses
