"""Laws of a study: fitted to its cells, or refused in the words that say why; a study is not stopped by either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsecod_megatron.errors import DataError
from sparsecod_megatron.studies.law_points import Row, Selected, select
from sparsecod_megatron.studies.law_text import coefficients_text, held_out_text
from sparsecod_megatron.studies.laws import LawFit, fit_law
from sparsecod_megatron.studies.schema import Labels, LawConfig, setting_name

Points = Mapping[Labels, Mapping[int, Sequence[Mapping[str, Any]]]]
"""Place → seed → `step`, `tokens`, `metrics` and `intervals` of its checkpoints, where several are scored."""
RUN = "(cell)"
"""Column of the cell that a point is of."""
UNCHANGED = ("parameters_total", "parameters_active", "parameters_non_embedding", "active_share")
"""Metrics of a cell that all its checkpoints have."""
HEADER = ("law", "coefficients [95 %]", "points", "largest left out", "notes")


@dataclass(frozen=True)
class StudyLaw:
    """A law that a study asks for.

    Attributes:
        config: as the study states it.
        selected: points of its cells; None without any.
        fit: the law; None where it is refused.
        refusal: why, or nothing.
    """

    config: LawConfig
    selected: Selected | None
    fit: LawFit | None
    refusal: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {} if self.fit is None else self.fit.as_dict()
        points = [] if self.selected is None else list(self.selected.notes)
        return asdict(self.config) | {"refused": self.refusal or None, "points": points} | found

    @property
    def cells(self) -> list[str]:
        """Its row of the study's table, under `HEADER`."""
        where = "".join(f", {axis}={label}" for axis, label in self.config.where.items())
        name = f"{self.config.law}: {self.config.y} of {', '.join(self.config.x)}{where}"
        if self.fit is None or self.selected is None:
            return [name, "–", "–", "–", f"refused: {self.refusal}"]
        fit, notes = self.fit, [*self.fit.notes, *self.selected.notes]
        units = "".join(f"; {variable.shown}" for variable in fit.form.variables if variable.unit != 1)
        text = f"{fit.form.formula}: {coefficients_text(fit)}{units}"
        return [name, text, str(fit.num_points), held_out_text(fit), "; ".join(notes) or "–"]


def fit_laws(
    laws: Sequence[LawConfig],
    results: Mapping[Labels, Mapping[int, Mapping[str, float]]],
    points: Points,
) -> list[StudyLaw]:
    """Every law, with cells or their checkpoints for its points; seeds of one place are runs of their own.

    Args:
        laws: of the study.
        results: place → seed → metrics.
        points: place → seed → what was measured of its checkpoints.
    """
    cells = [_row(labels, seed, found) for labels, of_seed in results.items() for seed, found in of_seed.items()]
    checkpoints = [
        _row(labels, seed, _at(point, results[labels][seed]), point["intervals"])
        for labels, of_seed in points.items()
        for seed, of_cell in of_seed.items()
        for point in of_cell
    ]
    return [_fit(law, checkpoints if law.over == "checkpoints" else cells) for law in laws]


def _row(
    labels: Labels, seed: int, metrics: Mapping[str, float], intervals: Mapping[str, tuple[float, float]] | None = None
) -> Row:
    """A point; of a cell without the intervals of its scores, which leave out what another seed would give."""
    where = f"{setting_name(labels)}, seed {seed}"
    cells = dict(labels) | {key: repr(number) for key, number in metrics.items()} | {RUN: where}
    return Row(where, cells, {name: (repr(low), repr(high)) for name, (low, high) in (intervals or {}).items()})


def _at(point: Mapping[str, Any], cell: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a checkpoint: what was measured of it, and of the cell what training does not change."""
    sizes = {name: cell[name] for name in UNCHANGED if name in cell}
    return {**sizes, **point["metrics"], "tokens": point["tokens"]}


def _fit(law: LawConfig, rows: Sequence[Row]) -> StudyLaw:
    selected = None
    try:
        selected = select(rows, law.x, law.y, where=law.where, group=RUN)
        return StudyLaw(law, selected, fit_law(law.law, selected.points), "")
    except DataError as error:
        return StudyLaw(law, selected, None, str(error))
