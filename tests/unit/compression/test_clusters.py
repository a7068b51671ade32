"""Clusters against every partition there is, and a router against distances to the means of what it routes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.compression.clusters import fit_router, k_means, shrunk
from sparsecod_megatron.compression.statistics import InputStatistics


def cost(points: Tensor, labels: Tensor) -> float:
    groups = [points[labels == label] for label in labels.unique()]
    return sum(float((group - group.mean(0)).square().sum()) for group in groups)


@pytest.mark.parametrize("clusters", [1, 2, 3])
def test_no_partition_of_a_few_points_is_better(clusters: int) -> None:
    points = torch.randn(8, 2, generator=torch.Generator().manual_seed(3))
    centroids = k_means(points, clusters, seed=0)
    found = float(torch.cdist(points, centroids).amin(1).square().sum())
    partitions = itertools.product(range(clusters), repeat=8)
    assert found == pytest.approx(min(cost(points, torch.tensor(labels)) for labels in partitions), rel=1e-5)


def test_fewer_different_points_than_clusters_give_fewer() -> None:
    points = torch.eye(3)[torch.tensor([0, 1, 2, 1, 0])]
    centroids = k_means(points, 5, seed=0)
    assert sorted(centroids.tolist()) == sorted(torch.eye(3).tolist())


@pytest.mark.parametrize("components", [12, 3])
def test_the_router_takes_the_nearest_mean_along_the_principal_axes(components: int) -> None:
    """Means of what is routed to each cluster are its centroid, where k-means has settled; axes by an SVD."""
    generator = torch.Generator().manual_seed(1)
    blobs = 3 * torch.randn(4, 12, generator=generator)
    rows = blobs[torch.randint(4, (400,), generator=generator)] + torch.randn(400, 12, generator=generator) + 50
    labels = fit_router(rows, 4, components, seed=0).nearest(rows)
    axes = torch.linalg.svd(rows.double() - rows.double().mean(0), full_matrices=False).Vh[:components]
    points = rows.double() @ axes.T
    means = torch.stack([points[labels == label].mean(0) for label in range(4)])
    assert torch.equal(torch.cdist(points, means).argmin(1), labels)


def test_planted_blobs_are_found_in_bf16_too() -> None:
    """A common offset a hundred times the distances would leave bf16 nothing to decide by."""
    generator = torch.Generator().manual_seed(2)
    truth = torch.randint(3, (300,), generator=generator)
    rows = 100 + 8 * torch.eye(16)[truth] + 0.1 * torch.randn(300, 16, generator=generator)
    router = fit_router(rows, 3, 16, seed=0)
    for each in (router, type(router)(router.directions.bfloat16(), router.offsets.bfloat16())):
        pairs = {(int(label), int(true)) for label, true in zip(each.nearest(rows), truth, strict=True)}
        assert len(pairs) == 3


def test_statistics_are_drawn_towards_those_of_all_inputs() -> None:
    parts = [torch.randn(count, 8, generator=torch.Generator().manual_seed(count)) for count in (30, 10, 1)]
    own = [InputStatistics.empty(8, gram=True, device=torch.device("cpu")) for _ in parts]
    for one, rows in zip(own, parts, strict=True):
        one.add(rows)
    whole = torch.cat(parts).double()
    found, few = shrunk(own, 0.25)
    for one, rows in zip(found[:2], parts, strict=False):
        wanted = 0.75 * rows.double().T @ rows.double() + 0.25 * len(rows) / 41 * whole.T @ whole
        assert one.gram is not None and torch.allclose(one.gram.double(), wanted, atol=1e-4)
    assert few == 1 and found[2].count == 41 and found[2].gram is not None
    assert torch.allclose(found[2].gram.double(), whole.T @ whole, atol=1e-4)
    alone, few = shrunk(own[:1], 0.25)
    assert alone[0].gram is not None and own[0].gram is not None and few == 0
    assert torch.equal(alone[0].gram, own[0].gram)
