"""Which pairs of blocks the permutation score swaps: all, the adjacent ones, or a sample that stands for all."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from sparsecod_megatron.analysis.intervals import Array

Wanted = int | Literal["adjacent"] | None


@dataclass(frozen=True)
class Pairs:
    """Swaps to make, and what each counts in the mean over the pairs it stands for.

    Attributes:
        swaps: (lower, upper) block of each.
        weights: [pairs] shares of the mean, which add up to one.
        sampled_of: number of pairs of which this is a sample; None where it is all of them.
        are_adjacent: whether only neighbours are meant.
    """

    swaps: list[tuple[int, int]]
    weights: Array
    sampled_of: int | None = None
    are_adjacent: bool = False

    def sampling_variance(self, values: Array) -> float:
        """Variance of the weighted mean of `values` [pairs] by the choice of pairs; 0 where all were taken.

        One pair is drawn from each stratum, so its own spread is not seen; that of two neighbouring strata bounds it
        from above. Source: W. G. Cochran, Sampling Techniques, 3rd edition, 5A.12 (collapsed strata).
        """
        if self.sampled_of is None:
            return 0.0
        parts = values * self.weights
        even = len(parts) // 2 * 2
        differences = parts[0:even:2] - parts[1:even:2]
        squares = list(differences**2)
        if len(parts) > even:  # the odd one with its neighbour
            squares.append((parts[-1] - parts[-2]) ** 2)
        return float(np.sum(squares)) * (1 - len(parts) / self.sampled_of)


def choose_pairs(num_layers: int, wanted: Wanted, *, seed: int) -> Pairs:
    """The pairs of `num_layers` blocks.

    A sample is stratified by distance, which decides most of what a swap costs: all pairs in order of their distance,
    cut into as many runs of one length as pairs are wanted, of which each gives one at random.

    Args:
        num_layers: at least two.
        wanted: how many to sample, at least two, `adjacent`, or None for all.
        seed: seed of the sample.
    """
    if wanted == "adjacent":
        swaps = [(layer, layer + 1) for layer in range(num_layers - 1)]
        return Pairs(swaps, np.full(len(swaps), 1 / len(swaps)), are_adjacent=True)
    all_pairs = list(combinations(range(num_layers), 2))
    if wanted is None or wanted >= len(all_pairs):
        return Pairs(all_pairs, np.full(len(all_pairs), 1 / len(all_pairs)))
    generator = np.random.default_rng(seed)
    shuffled = [all_pairs[index] for index in generator.permutation(len(all_pairs))]
    by_distance = sorted(shuffled, key=lambda pair: pair[1] - pair[0])
    bounds = np.linspace(0, len(by_distance), wanted + 1).round().astype(int)
    sizes = np.diff(bounds)
    swaps = [by_distance[low + int(generator.integers(size))] for low, size in zip(bounds[:-1], sizes, strict=True)]
    return Pairs(swaps, sizes / len(all_pairs), sampled_of=len(all_pairs))
