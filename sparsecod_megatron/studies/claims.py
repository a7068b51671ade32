"""What the runs say of each claim: supported, not supported, or not separable with these seeds.

A verdict is mechanical. A difference between two places is taken seed by seed (both places have the same seeds), a
trend is each seed's least-squares slope over the labels in order; either is separable if the 95 % interval of its mean
over seeds leaves zero out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsecod_megatron.studies.intervals import Mean, mean_over_seeds, slope
from sparsecod_megatron.studies.schema import ClaimConfig, Labels

SUPPORTED, REFUTED, NOT_SEPARABLE, NOT_MEASURED = "supported", "not supported", "not separable", "not measured"

Results = Mapping[Labels, Mapping[int, Mapping[str, float]]]
"""Place → seed → metrics; diverged cells have none."""


@dataclass(frozen=True)
class Verdict:
    """A claim and its verdict.

    Attributes:
        claim: as the study states it.
        verdict: one of the four words above.
        difference: mean over seeds of what should be above zero; None where nothing was measured.
    """

    claim: ClaimConfig
    verdict: str
    difference: Mean | None


def judge(claim: ClaimConfig, results: Results) -> Verdict:
    """Decide a claim that the grid can decide; axes that it does not name are averaged over."""
    found = _differences(claim, results)
    if not found:
        return Verdict(claim, NOT_MEASURED, None)
    mean = mean_over_seeds(found)
    if mean.low is None or mean.high is None or mean.low <= 0 <= mean.high:
        return Verdict(claim, NOT_SEPARABLE, mean)
    return Verdict(claim, SUPPORTED if mean.low > 0 else REFUTED, mean)


def _differences(claim: ClaimConfig, results: Results) -> list[float]:
    """What the claim says is above zero, for each seed that has all values."""
    if claim.higher:
        places = [claim.lower, claim.higher]
    else:
        axis = claim.rises_along or claim.falls_along
        assert axis is not None
        places = [{axis: label} for label in dict.fromkeys(dict(labels)[axis] for labels in results)]
    found = []
    for seed in dict.fromkeys(seed for of_place in results.values() for seed in of_place):
        values = [_value(place, seed, claim.metric, results) for place in places]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            found.append(-slope(known) if claim.falls_along else slope(known))
    return found


def _value(place: Mapping[str, str], seed: int, metric: str, results: Results) -> float | None:
    """Mean of a seed's metric over the cells at a place; None where one of them lacks it."""
    cells: Sequence[Mapping[str, float]] = [
        of_seed.get(seed, {}) for labels, of_seed in results.items() if place.items() <= dict(labels).items()
    ]
    if not cells or any(metric not in cell for cell in cells):
        return None
    return sum(cell[metric] for cell in cells) / len(cells)
