"""What the runs say of each claim: supported, not supported, or not separable with these seeds.

A verdict is mechanical. A difference between two places is taken seed by seed (both places have the same seeds), a
trend is each seed's least-squares slope over the labels in order; either is separable if the 95 % interval of its mean
over seeds leaves zero out. With many claims some are separable by chance, so beside that verdict stands the one that is
left after Holm's correction for all claims of the study that could be tested.

Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sparsecod_megatron.studies.intervals import Mean, mean_over_seeds, p_value, seeds_to_separate, slope
from sparsecod_megatron.studies.schema import ClaimConfig, Labels

SUPPORTED, REFUTED, NOT_SEPARABLE, NOT_MEASURED = "supported", "not supported", "not separable", "not measured"

LEVEL = 0.05
"""Probability, after correction, below which a difference is separable."""

Results = Mapping[Labels, Mapping[int, Mapping[str, float]]]
"""Place → seed → metrics; diverged cells have none."""


@dataclass(frozen=True)
class Verdict:
    """A claim and its verdict.

    Attributes:
        claim: as the study states it.
        verdict: one of the four words above.
        difference: mean over seeds of what should be above zero; None where nothing was measured.
        p_value: two-sided, of Student's t; None without two seeds.
        p_holm: corrected for the claims that it was judged with.
        verdict_holm: the verdict by it.
        seeds_needed: of a difference that is not separable, how many would do if mean and spread stayed.
    """

    claim: ClaimConfig
    verdict: str
    difference: Mean | None
    p_value: float | None
    p_holm: float | None
    verdict_holm: str
    seeds_needed: int | None = None


def judge_all(claims: Sequence[ClaimConfig], results: Results) -> list[Verdict]:
    """Decide claims, each by itself and corrected for the number of them that could be tested."""
    verdicts = [judge(claim, results) for claim in claims]
    tested = sorted((verdict.p_value, place) for place, verdict in enumerate(verdicts) if verdict.p_value is not None)
    largest = 0.0
    for rank, (value, place) in enumerate(tested):
        largest = max(largest, min((len(tested) - rank) * value, 1.0))
        verdict = verdicts[place]
        corrected = verdict.verdict if largest < LEVEL else NOT_SEPARABLE
        verdicts[place] = replace(verdict, p_holm=largest, verdict_holm=corrected)
    return verdicts


def judge(claim: ClaimConfig, results: Results) -> Verdict:
    """Decide a claim by itself; axes that it does not name are averaged over."""
    found = _differences(claim, results)
    if not found:
        return Verdict(claim, NOT_MEASURED, None, None, None, NOT_MEASURED)
    mean = mean_over_seeds(found)
    if mean.low is None or mean.high is None or mean.low <= 0 <= mean.high:
        verdict = NOT_SEPARABLE
    else:
        verdict = SUPPORTED if mean.low > 0 else REFUTED
    value, needed = p_value(mean), seeds_to_separate(mean) if verdict == NOT_SEPARABLE else None
    return Verdict(claim, verdict, mean, value, value, verdict, needed)


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
