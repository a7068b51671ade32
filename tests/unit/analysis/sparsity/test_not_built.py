"""Why Routing Transformer and graph-aware attention are not built: each reason of docs/SPARSE_ATTENTION.md."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecod_megatron.analysis.sparsity.attention import HIDDEN
from sparsecod_megatron.analysis.sparsity.selection import BLOCK


def routing_attention(query: Tensor, key: Tensor, value: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [n, d], and which queries are in a cluster with a key that they may see.

    Each of c centroids takes the n / c queries and keys nearest to it, of the whole sequence; a query attends causally
    to the keys of its clusters. Source: Roy et al., Routing Transformer (arXiv 2003.05997), section 4.1.
    """
    queries, keys = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    size = len(query) // len(centroids)
    total, count = torch.zeros_like(value), torch.zeros(len(query))
    for centroid in F.normalize(centroids, dim=-1):
        members, seen = ((x @ centroid).topk(size).indices.sort().values for x in (queries, keys))
        scores = queries[members] @ keys[seen].T * math.sqrt(query.shape[-1])
        hidden = seen > members[:, None]
        weights = scores.masked_fill(hidden, HIDDEN).softmax(-1) * ~hidden.all(-1, keepdim=True)
        total[members] += weights @ value[seen]
        count[members] += ~hidden.all(-1)
    return total / count.clamp(min=1)[:, None], count > 0


def test_routing_lets_later_tokens_choose_for_earlier_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(64, 16, generator=generator) for _ in range(3))
    centroids = torch.randn(8, 16, generator=generator)
    before, has_cluster = routing_attention(query, key, value, centroids)
    others = [torch.cat([x[:24], torch.randn(40, 16, generator=generator)]) for x in (query, key, value)]
    after, _ = routing_attention(*others, centroids)
    changed = (before[:24] - after[:24]).abs().amax(-1) > 1e-6
    assert changed.sum() >= 6  # of the first 24 positions, which no later token may reach
    assert (~has_cluster).sum() >= 3  # queries that attend to nothing at all


def test_the_same_clusters_by_earlier_tokens_alone_would_not_leak() -> None:
    """So it is the choice over the whole sequence, not clustering, that looks ahead."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(64, 16, generator=generator) for _ in range(3))
    centroids = torch.randn(8, 16, generator=generator)

    def nearest(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        same = (query @ centroids.T).argmax(-1)[:, None] == (key @ centroids.T).argmax(-1)
        visible = (same | torch.eye(64, dtype=torch.bool)).tril()
        return (query @ key.T).masked_fill(~visible, -torch.inf).softmax(-1) @ value

    others = [torch.cat([x[:24], torch.randn(40, 16, generator=generator)]) for x in (query, key, value)]
    assert torch.equal(nearest(query, key, value)[:24], nearest(*others)[:24])


def sharpened(query: Tensor, key: Tensor, value: Tensor, threshold: float) -> Tensor:
    """Graph-aware attention (arXiv 2501.02393): the softmax map, thresholded to a graph, times the values."""
    weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
    return torch.where(weights > threshold, weights, 0) @ value


def test_a_graph_of_attention_is_no_mask_that_a_fused_kernel_takes() -> None:
    """The threshold falls on normalised weights, which a fused kernel never has: a mask after the fact renormalises."""
    query, key, value = (torch.randn(1, 2, 64, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    weights = (query @ key.mT / math.sqrt(8)).softmax(-1)
    masked = F.scaled_dot_product_attention(query, key, value, attn_mask=weights > 0.02)
    assert (masked - sharpened(query, key, value, 0.02)).abs().max() > 0.1


def test_a_graph_of_attention_keeps_a_map_of_every_pair_for_its_gradient() -> None:
    def kept(length: int, attend: object) -> int:
        tensors = [torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3)]
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attend(*tensors)  # type: ignore[operator]
        return sum(sizes.values())

    fused = [kept(n, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)) for n in (256, 1024)]
    graph = [kept(n, lambda q, k, v: sharpened(q, k, v, 0.01)) for n in (256, 1024)]
    assert fused[1] == pytest.approx(4 * fused[0], rel=0.01) and graph[1] > 14 * graph[0]
    assert graph[1] > 10 * fused[1]


def test_slices_of_the_hidden_state_do_not_fit_grouped_keys_and_a_hard_graph_has_no_gradient() -> None:
    """Its values are slices of the hidden state, reshaped to the key heads: with grouped queries there are too many."""
    hidden, key_heads, width = torch.randn(1, BLOCK, 32), 2, 8
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        hidden.view(1, BLOCK, key_heads, width)
    query = torch.randn(4, BLOCK, 8, requires_grad=True)
    weights = (query @ query.detach().mT).softmax(-1)
    assert weights.requires_grad and not (weights > 0.02).float().requires_grad


def test_a_group_norm_over_maps_looks_ahead() -> None:
    """Its differential mode normalises flattened maps: rows of earlier queries move with later tokens."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 4, 32, 32, generator=generator)
    hidden = torch.ones(32, 32, dtype=torch.bool).triu(1)

    def normed(scores: Tensor) -> Tensor:
        return F.group_norm(scores.masked_fill(hidden, -torch.inf).softmax(-1), 2)

    changed = scores.clone()
    changed[:, :, 20:] += 5 * torch.randn(1, 4, 12, 32, generator=generator)
    assert (normed(scores) - normed(changed))[:, :, :20].abs().max() > 0.01
