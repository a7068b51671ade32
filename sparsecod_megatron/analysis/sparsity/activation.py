"""The `activation` score: how few feed-forward neurons the model needs for each token.

Thresholds are fitted on one half of the sample: one CETT for the whole model fixes each site's own ε. The other half
says what cutting below them costs. *PPL-p% sparsity* is the share of neurons cut at the CETT that raises perplexity by
p %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecod_megatron.analysis.intervals import Array, Interval, bootstrap, ratio_of_sums
from sparsecod_megatron.analysis.scores.base import Bars, Lines, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.sparsity.cett import ThresholdSearch
from sparsecod_megatron.analysis.sparsity.cutting import CutPass, capture, run_cut
from sparsecod_megatron.analysis.sparsity.neurons import NeuronSite, find_sites
from sparsecod_megatron.analysis.sparsity.normality import normality_rows
from sparsecod_megatron.hf.matrices import find_matrices

GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
TOLERANCE_PERCENT = 0.05
MAX_BISECTIONS = 20
_CUT, _ZERO, _SEEN = range(3)


class Activation:
    """Exact zeros, CETT curve, PPL-p% sparsity, and the distance of neuron outputs from a normal distribution.

    Args:
        ppl_percent: p, the rise in perplexity that is allowed.
    """

    name = "activation"

    def __init__(self, ppl_percent: float = 1.0) -> None:
        self._ppl_percent = ppl_percent

    def run(self, context: Context) -> Result:
        """Fit thresholds on the first half, then bisect the CETT on the second.

        Args:
            context: the model and a sample of at least two sequences.

        Raises:
            ConfigError: a sample of one sequence.
            ConversionError: no feed-forward network was found.
        """
        matrices = find_matrices(context.model, context.layers)
        sites = find_sites(matrices)
        curve = CettCurve(context, sites)
        cett = curve.bisect(self._ppl_percent)
        found, dense = curve.at(cett), curve.dense
        reached = abs(curve.ppl_increase(cett) - self._ppl_percent) <= TOLERANCE_PERCENT
        increase = _increase_interval(found, dense, context.seed)
        rows = _site_rows(sites, found, dense, context.seed)
        normality = normality_rows(context, matrices)
        return Result(
            values={
                "num_networks": len(sites),
                "ppl_percent": self._ppl_percent,
                "ppl_percent_reached": reached,
                "cett": cett,
                "ppl_increase_percent": increase.as_dict(),
                "sparsity": curve.crossing(self._ppl_percent, seed=context.seed).as_dict(),
                "exact_zero": _share(dense.counts.sum(0), _ZERO, context.seed),
                "wasserstein": _mean([row["wasserstein_mean"] for row in normality]),
                "wasserstein_normal": _mean([row["wasserstein_normal"] for row in normality]),
            },
            tables={"activation": rows, "activation_curve": curve.rows(), "activation_wasserstein": normality},
            per_sequence={
                "sparsity": _per_sequence(found.counts.sum(0), _CUT),
                "exact_zero": _per_sequence(dense.counts.sum(0), _ZERO),
            },
            figures=_figures(rows, curve.rows(), self._ppl_percent, len(context.layers)),
            warnings=_warnings(increase, reached, self._ppl_percent),
            num_sequences=len(dense.losses),
            num_tokens=len(dense.losses) * context.seq_length,
        )


class CettCurve:
    """The model with small neurons cut, by CETT; each CETT is evaluated once.

    Args:
        context: the model and the sample.
        sites: sites of the model.
    """

    def __init__(self, context: Context, sites: Sequence[NeuronSite]) -> None:
        self._context = context
        self._sites = sites
        samples = capture(context, sites)
        self._searches = [ThresholdSearch(sample) if sample else None for sample in samples]
        self.dense = run_cut(context, sites, [-1.0] * len(sites))
        self._passes: dict[float, CutPass] = {}

    def at(self, cett: float) -> CutPass:
        """The pass with that CETT in every site; ε is 0 in mixtures that no token to fit on was routed to."""
        if cett not in self._passes:
            epsilons = [search.threshold(cett) if search else 0.0 for search in self._searches]
            self._passes[cett] = run_cut(self._context, self._sites, epsilons)
        return self._passes[cett]

    def ppl_increase(self, cett: float) -> float:
        """`exp(L_sparse − L) − 1`, in percent."""
        return 100 * math.expm1(float(self.at(cett).losses.mean() - self.dense.losses.mean()))

    def bisect(self, percent: float) -> float:
        """The CETT that raises perplexity by `percent`, within 0.05 points where the sample resolves that.

        Perplexity may fall before it rises, so the search starts at the last point of `GRID` that is below.
        """
        below = [cett for cett in GRID if self.ppl_increase(cett) < percent]
        low = below[-1] if below else 0.0
        if low == GRID[-1]:
            return low
        high = min(cett for cett in GRID if cett > low)
        for _ in range(MAX_BISECTIONS):
            best = min((c for c in (low, high) if c > 0), key=lambda c: abs(self.ppl_increase(c) - percent))
            if abs(self.ppl_increase(best) - percent) <= TOLERANCE_PERCENT:
                return best
            middle = (low + high) / 2
            low, high = (middle, high) if self.ppl_increase(middle) < percent else (low, middle)
        return low or high

    def crossing(self, percent: float, *, seed: int) -> Interval:
        """Share of neurons cut where perplexity passes `percent` for good, between evaluated points.

        The interval draws sequences for loss and share alike; the thresholds stay.
        """
        passes = [self.dense, *(found for _, found in sorted(self._passes.items()))]
        rise = np.stack([(found.losses - self.dense.losses).numpy() for found in passes], axis=1)
        counts = torch.stack([found.counts.sum(0) for found in passes], 1).double().numpy()  # [sequences, points, 3]

        def statistic(weights: Array) -> Array:
            increases = 100 * np.expm1(weights @ rise / weights.sum(1, keepdims=True))
            shares = (weights @ counts[..., _CUT]) / (weights @ counts[..., _SEEN])
            return np.array([_last_below(*pair, percent) for pair in zip(increases, shares, strict=True)])

        return bootstrap(statistic, len(rise), seed=seed).at()

    def rows(self) -> list[dict[str, Any]]:
        """One row for every CETT evaluated, ascending."""
        return [
            {
                "cett": cett,
                "ppl_increase_percent": self.ppl_increase(cett),
                "sparsity": float(found.counts[..., _CUT].sum() / found.counts[..., _SEEN].sum()),
            }
            for cett, found in sorted(self._passes.items())
        ]


def _last_below(increases: Array, shares: Array, percent: float) -> float:
    """The share at which the increase passes `percent` for good, linear between points; the first increase is 0."""
    last = int(np.flatnonzero(increases < percent)[-1])
    if last + 1 == len(shares):
        return float(shares[last])
    part = (percent - increases[last]) / (increases[last + 1] - increases[last])
    return float(shares[last] + part * (shares[last + 1] - shares[last]))


def _share(counts: Tensor, which: int, seed: int) -> dict[str, float | None]:
    """Interval of a share of the neurons seen; `counts` is [sequences, 3]."""
    numbers = counts.double().numpy()
    return ratio_of_sums(numbers[:, which], numbers[:, _SEEN], seed=seed).at().as_dict()


def _per_sequence(counts: Tensor, which: int) -> list[float | None]:
    return (counts[:, which] / counts[:, _SEEN]).tolist()


def _increase_interval(found: CutPass, dense: CutPass, seed: int) -> Interval:
    """Interval of the rise in perplexity, from paired sequences."""
    difference = (found.losses - dense.losses).numpy()
    statistic = bootstrap(
        lambda weights: 100 * np.expm1(weights @ difference / weights.sum(1)), len(difference), seed=seed
    )
    return statistic.at()


def _site_rows(sites: Sequence[NeuronSite], found: CutPass, dense: CutPass, seed: int) -> list[dict[str, Any]]:
    rows = []
    for site, epsilon, cut, whole in zip(sites, found.epsilons, found.counts, dense.counts, strict=True):
        share = _share(cut, _CUT, seed)
        rows.append(
            {
                "layer": site.layer,
                "name": site.name,
                "epsilon": epsilon,
                "sparsity": share["value"],
                "sparsity_low": share["low"],
                "sparsity_high": share["high"],
                "exact_zero": _share(whole, _ZERO, seed)["value"],
            }
        )
    return rows


def _figures(
    rows: Sequence[dict[str, Any]], curve: Sequence[dict[str, Any]], percent: float, num_layers: int
) -> tuple[Bars | Lines, ...]:
    by_layer = [[row for row in rows if row["layer"] == layer] for layer in range(num_layers)]
    return (
        Lines(
            "activation_curve",
            "Perplexity by share of neurons cut",
            [row["sparsity"] for row in curve],
            {"rise in perplexity": [row["ppl_increase_percent"] for row in curve]},
            "share of neurons cut",
            "rise in perplexity, %",
            line=percent,
        ),
        Bars(
            "activation_sparsity",
            f"Neurons cut at {percent:g} % more perplexity",
            [_mean([row["sparsity"] for row in found]) for found in by_layer],
            "share of neurons",
        ),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _warnings(increase: Interval, reached: bool, percent: float) -> tuple[str, ...]:
    warnings = []
    if not reached:
        warnings.append(
            f"perplexity rises by {increase.value:.3g} % at the CETT found instead of {percent:g} %: the sample does "
            "not resolve it, or cutting every neuron costs less"
        )
    if increase.contains(0):
        warnings.append(f"this sample cannot tell {percent:g} % more perplexity from none; raise --samples")
    return tuple(warnings)
