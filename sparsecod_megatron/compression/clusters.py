"""Clusters of what enters a layer: found by k-means along the principal axes, told apart by one product at inference.

With p = Aᵀ(x − m) the coordinates along k axes A, the nearest of the centroids c_i has the largest p·c_i − |c_i|²/2.
That is linear in x, so a router is a matrix [clusters, in] and as many offsets, whatever k is.

Source: k-means++: D. Arthur, S. Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecod_megatron.compression.statistics import InputStatistics, pooled
from sparsecod_megatron.compression.watching import ENOUGH_INPUTS

RESTARTS = 5
"""Beginnings of k-means, of which the best end counts."""
MAX_STEPS = 100
"""Steps of k-means from one beginning; most end earlier, where nothing moves any more."""


class Router(NamedTuple):
    """Which cluster an input belongs to.

    Attributes:
        directions: `[clusters, in]`.
        offsets: `[clusters]`.
    """

    directions: Tensor
    offsets: Tensor

    def nearest(self, rows: Tensor) -> Tensor:
        """Clusters of inputs `[rows, in]`: int64 `[rows]`. In float32, for bf16's sums would decide too coarsely."""
        scores = torch.nn.functional.linear(rows.float(), self.directions.float(), self.offsets.float())
        return scores.argmax(-1)


def fit_router(rows: Tensor, clusters: int, components: int, seed: int) -> Router:
    """The router of the clusters of a sample.

    Args:
        rows: float32 `[rows, in]`.
        clusters: at most as many; fewer where the sample has fewer different rows.
        components: principal axes along which distances are measured, at most `in`.
        seed: of the beginnings of k-means.
    """
    mean = rows.mean(0)
    centred = rows - mean
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -components:]
    centroids = k_means(centred @ axes, clusters, seed)
    directions = centroids @ axes.T
    offsets = -centroids.square().sum(1) / 2 - directions @ mean
    # What all clusters have in common decides nothing, and would cost bf16 its digits.
    return Router(directions - directions.mean(0), offsets - offsets.mean())


def k_means(points: Tensor, clusters: int, seed: int) -> Tensor:
    """Centroids with a small sum of squared distances from every point to its nearest.

    Args:
        points: float32 `[points, axes]`.
        clusters: at most as many.
        seed: of the beginnings.

    Returns:
        `[clusters, axes]`; fewer rows where there are fewer different points.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = [_settled(points, _beginning(points, clusters, generator)) for _ in range(RESTARTS)]
    return min(ends, key=lambda centroids: float(torch.cdist(points, centroids).amin(1).square().sum()))


def _beginning(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Points drawn one after the other by their squared distance to those drawn already."""
    drawn = [int(torch.randint(len(points), (1,), generator=generator))]
    squares = (points - points[drawn[-1]]).square().sum(1)
    while len(drawn) < clusters and bool(squares.any()):
        drawn.append(int(torch.multinomial(squares.cpu(), 1, generator=generator)))
        squares = squares.minimum((points - points[drawn[-1]]).square().sum(1))
    return points[drawn]


def _settled(points: Tensor, centroids: Tensor) -> Tensor:
    """Centroids moved to the means of their points until none moves."""
    for _ in range(MAX_STEPS):
        labels = torch.cdist(points, centroids).argmin(1)
        counts = labels.bincount(minlength=len(centroids))[:, None]
        means = torch.zeros_like(centroids).index_add_(0, labels, points) / counts.clamp_min(1)
        moved = torch.where(counts > 0, means, centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def shrunk(own: Sequence[InputStatistics], share: float) -> tuple[list[InputStatistics], int]:
    """Statistics of clusters, drawn towards those of all inputs, because a cluster has few.

    Σ x·xᵀ of a cluster of n of N inputs becomes (1 − share) times its own and share · n/N times that of all. One with
    fewer inputs than a quarter of their width takes that of all.

    Args:
        own: of each cluster.
        share: 0 leaves them as they are.

    Returns:
        One of each cluster, and how many took that of all.
    """
    whole, found, few = pooled(own), list[InputStatistics](), 0
    assert whole.gram is not None
    for one in own:
        assert one.gram is not None
        if one.count < ENOUGH_INPUTS * len(one.sums) and len(own) > 1:
            few += 1
            found.append(whole)
        else:  # a difference, so that a single cluster keeps its own to the last bit
            gram = one.gram + share * (whole.gram * (one.count / max(1, whole.count)) - one.gram)
            found.append(InputStatistics(one.count, one.sums, one.squares, gram))
    return found, few
