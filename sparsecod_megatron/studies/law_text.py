"""What a fitted law says, for people: lines of the command line, a row of a study's table."""

from __future__ import annotations

from collections.abc import Sequence

from sparsecod_megatron.analysis.intervals import Interval
from sparsecod_megatron.studies.laws import LawFit


def law_lines(fit: LawFit, variables: Sequence[str], value: str) -> list[str]:
    """Formula, coefficients, score and notes.

    Args:
        fit: the law.
        variables: columns of its variables.
        value: column that it is of.
    """
    runs = "" if fit.num_groups == fit.num_points else f" of {fit.num_groups} runs"
    width = max(map(len, fit.coefficients))
    return [
        f"{value} = {fit.form.formula}; {_legend(fit, variables)}; {fit.num_points} points{runs}",
        *(f"  {name:{width}}  {_shown(found)}" for name, found in fit.coefficients.items()),
        f"  residual {fit.residual:.3g}{' of logarithms' if fit.form.is_log else ''}; {held_out_text(fit)}",
        *(f"  note: {note}" for note in fit.notes),
    ]


def coefficients_text(fit: LawFit) -> str:
    """All coefficients on one line."""
    return ", ".join(f"{name} {_shown(found)}" for name, found in fit.coefficients.items())


def held_out_text(fit: LawFit) -> str:
    """The honest score."""
    found = fit.held_out
    if found is None:
        return "too few points to leave the largest out"
    points = "the largest" if found.count == 1 else f"the {found.count} largest"
    return f"fitted without {points}: {found.predicted:.4g} for {found.measured:.4g}, {found.error:.2%} off"


def _legend(fit: LawFit, variables: Sequence[str]) -> str:
    return ", ".join(f"{variable.shown} = {name}" for variable, name in zip(fit.form.variables, variables, strict=True))


def _shown(found: Interval) -> str:
    value, low, high = ("–" if end is None else f"{end:.4g}" for end in found)
    return f"{value} [{low}, {high}]"
