"""Cumulative errors of tail truncation: how much of a feed-forward output its smallest neurons make up.

`CETT(ε) = mean over rows of ‖Σ_{‖n_i‖ ≤ ε} n_i‖ / ‖FFN(x)‖`. It grows with ε, except where small neurons cancel each
other. Source: Luo et al., Sparsing Law (arXiv 2411.02335).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecod_megatron.analysis.sparsity.neurons import NeuronSite

_LEVELS = 1 << 16  # thresholds to choose from: shares of neurons resolved to 2e-5
_TOLERANCE = 1e-4  # of the CETT asked for, relative


@dataclass(frozen=True)
class NeuronSample:
    """Rows of one site, captured in a pass of the unchanged model.

    Attributes:
        activations: a_i, `[rows, neurons]`.
        experts: network of each row, `[rows]`.
        output_norms: `‖FFN(x)‖`, `[rows]`, fp32.
        site: where they were captured.
    """

    activations: Tensor
    experts: Tensor
    output_norms: Tensor
    site: NeuronSite

    def norms(self) -> Tensor:
        """`‖n_i‖`, `[rows, neurons]`, fp32."""
        columns = torch.stack([self.site.column_norms(e) for e in range(self.site.num_experts)])
        return self.activations.float().abs() * columns[self.experts]

    def cett(self, epsilon: float) -> float:
        """CETT at a threshold; rows whose output is zero have nothing to lose and count as 0."""
        small = torch.where(self.norms() <= epsilon, self.activations, 0)
        lost = torch.zeros_like(self.output_norms)
        for expert in self.experts.unique().tolist():
            rows = self.experts == expert
            lost[rows] = torch.linalg.vector_norm((small[rows] @ self.site.down(expert).t()).float(), dim=-1)
        ratio = torch.where(self.output_norms > 0, lost / self.output_norms, 0)
        return float(ratio.double().mean())


class ThresholdSearch:
    """Thresholds of one site by the CETT they cause; every evaluation narrows all later searches.

    Args:
        sample: rows of the site, at least one.
    """

    def __init__(self, sample: NeuronSample) -> None:
        self._sample = sample
        levels = sample.norms().flatten().sort().values
        stride = max(1, levels.numel() // _LEVELS)
        self._levels = torch.cat([levels[::stride], levels[-1:]]).unique().cpu()
        self._known: dict[int, float] = {}

    def threshold(self, cett: float) -> float:
        """The threshold ε of that CETT, by bisection over the captured neuron norms.

        Args:
            cett: wanted, at least 0.

        Returns:
            An ε whose CETT is within 0.01 % of the one wanted, or the largest tested with no more than that.
        """
        low, high = -1, len(self._levels) - 1
        for level, value in self._known.items():
            low = max(low, level) if value <= cett else low
        for level, value in self._known.items():
            high = min(high, level) if level > low and value > cett else high
        if self._at(high) <= cett * (1 + _TOLERANCE):  # all neurons together lose 1, but for rounding
            return float(self._levels[high])
        while high - low > 1:
            middle = (low + high) // 2
            value = self._at(middle)
            if abs(value - cett) <= _TOLERANCE * cett:
                return float(self._levels[middle])
            low, high = (middle, high) if value <= cett else (low, middle)
        return float(self._levels[low]) if low >= 0 else 0.0

    def _at(self, level: int) -> float:
        if level not in self._known:
            self._known[level] = self._sample.cett(float(self._levels[level]))
        return self._known[level]
