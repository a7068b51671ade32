"""Routers of binary trees in an exported model, and the trees' formulas, which `comet.py` trains with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_OF_ZERO = -1e4
"""Stands for log 0 of a branch: its exponential is 0 in fp32 and fp64, and it makes no NaN where −∞ would."""


def extend(layer: Any, settings: dict[str, Any], config: Any, index: int) -> None:
    """Take the matrix from a layer's router, and give it trees."""
    gate = getattr(layer.mlp, "gate", None)
    if gate is None:
        return
    experts, trees = config.num_moe_experts, config.topk(index)
    gate.register_parameter("weight", None)
    gate.nodes = _Projection(config.hidden_size, trees * (experts - 1), gate.dtype)
    gate.leaves = _Projection(config.hidden_size, trees * experts, gate.dtype)
    gate.logits = _TreeLogits(gate, trees, settings["gamma"])


class _Projection(nn.Linear):
    """W x + b in the router's format, whatever the weights' is.

    Args:
        hidden: channels of x.
        rows: of W.
        computed_in: the router's format.
    """

    def __init__(self, hidden: int, rows: int, computed_in: torch.dtype) -> None:
        super().__init__(hidden, rows)
        self.computed_in = computed_in

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., rows]."""
        return F.linear(*(each.to(self.computed_in) for each in (x, self.weight, self.bias)))


class _TreeLogits:
    """What a router computes in place of a product with its matrix.

    Args:
        gate: the router, with `nodes` and `leaves`.
        trees: how many.
        gamma: width of the region in which a node is undecided.
    """

    def __init__(self, gate: Any, trees: int, gamma: float) -> None:
        self._gate, self._trees, self._gamma = gate, trees, gamma

    def __call__(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., experts]."""
        decisions, leaves = (
            projection(x).unflatten(-1, (self._trees, -1)) for projection in (self._gate.nodes, self._gate.leaves)
        )
        return tree_logits(leaf_log_probabilities(decisions, self._gamma), leaves)


def leaf_log_probabilities(decisions: Tensor, gamma: float) -> Tensor:
    """log p of every leaf, from what the nodes' hyperplanes give: [..., trees, E − 1] → [..., trees, E].

    Node i has the children 2 i + 1, taken with probability S(t), and 2 i + 2; leaves are counted from the left.

    Args:
        decisions: t of every node, level by level from the root.
        gamma: S is 0 below −γ / 2 and 1 above γ / 2.
    """
    left = decisions / gamma + 0.5
    branches = log_smooth_step(torch.stack((left, 1 - left), dim=-1))
    paths = torch.zeros_like(branches[..., :1, 0])
    while (width := paths.shape[-1]) <= decisions.shape[-1]:
        paths = (paths.unsqueeze(-1) + branches[..., width - 1 : 2 * width - 1, :]).flatten(-2)
    return paths


def log_smooth_step(u: Tensor) -> Tensor:
    """log(3 u² − 2 u³) for u in (0, 1), 0 above, `LOG_OF_ZERO` below; elementwise.

    With u = t / γ + ½ that is −2 t³ / γ³ + 3 t / 2 γ + ½, in a form that keeps its digits near 0.
    """
    never, always = u <= 0, u >= 1
    inside = u.masked_fill(never | always, 1.0)
    return (2 * inside.log() + (3 - 2 * inside).log()).masked_fill(never, LOG_OF_ZERO)


def tree_logits(paths: Tensor, leaves: Tensor) -> Tensor:
    """Logits whose softmax is Σ over trees of the softmax over all trees' leaves: [..., trees, E] twice → [..., E].

    Args:
        paths: log p of every leaf.
        leaves: their own logits.
    """
    return torch.logsumexp(paths + leaves, dim=-2)
