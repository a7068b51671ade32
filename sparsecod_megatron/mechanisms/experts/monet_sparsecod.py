"""Product-key experts in an exported model, and their formulas, which `monet.py` trains with."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Reduction = Callable[[Tensor], Tensor]
"""From what one rank has of the keys to that of all ranks."""
EPSILON = 1e-5
"""Added to variances, as batch norm does."""


def extend(layer: Any, settings: dict[str, Any], config: Any, index: int) -> None:
    """Put product-key experts in the place of a layer's MLP."""
    layer.mlp = _ProductKeyMLP(layer.mlp, settings, config)


class _ProductKeyMLP(nn.Module):
    """down(act(up(x) + bias), gates of the keys).

    Args:
        plain: the MLP that it replaces.
        settings: of the mechanism.
        config: of the model.
    """

    def __init__(self, plain: Any, settings: dict[str, Any], config: Any) -> None:
        super().__init__()
        self.act, self.up_proj = plain.act, plain.up_proj
        self.keys = _Keys(settings, config.hidden_size, config.intermediate_size)
        self.down_proj = _Output(self.keys, config.hidden_size, config.intermediate_size, settings["decomposition"])

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., hidden]."""
        return self.down_proj(self.act(self.up_proj(x) + self.keys.unit_bias), self.keys(x))


class _Keys(nn.Module):
    """Gates of a token's keys, biases, and the statistics that decide which keys a token has.

    Args:
        settings: of the mechanism.
        hidden: channels of a token.
        width: units of all experts.
    """

    def __init__(self, settings: dict[str, Any], hidden: int, width: int) -> None:
        super().__init__()
        experts, self.heads = settings["experts"], settings["heads"]
        self.reach = quantile(settings["k"], experts)
        self.projection = nn.Linear(hidden, experts * 2 * self.heads, bias=False)
        self.unit_bias, self.output_bias = (nn.Parameter(torch.zeros(size)) for size in (width, experts * hidden))
        self.register_buffer("mean", torch.zeros(2 * self.heads))
        self.register_buffer("variance", torch.ones(2 * self.heads))

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., experts, 2, heads], in fp32."""
        logits = self.projection(x).float().unflatten(-1, (-1, 2, self.heads))
        return key_gates(logits, self.mean, self.variance, self.reach)  # type: ignore[arg-type]


class _Output(nn.Module):
    """The output projection, of units and gates.

    Args:
        keys: which hold the output's bias.
        hidden: channels of a token.
        width: units of all experts.
        decomposition: `vertical` or `horizontal`.
    """

    def __init__(self, keys: _Keys, hidden: int, width: int, decomposition: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden, width).normal_(std=0.02))
        self._keys, self.is_vertical = (keys,), decomposition == "vertical"

    def forward(self, units: Tensor, gates: Tensor) -> Tensor:
        """[..., width] and [..., experts, 2, heads] → [..., hidden]."""
        return experts_output(units, gates, self.weight, self._keys[0].output_bias, is_vertical=self.is_vertical)


def quantile(k: int, experts: int) -> float:
    """The value that k of `experts` normal numbers are expected to reach."""
    return NormalDist().inv_cdf(1 - k / experts) if k < experts else -float("inf")


def key_gates(
    logits: Tensor,
    mean: Tensor,
    variance: Tensor,
    reach: float,
    *,
    largest: Reduction = lambda x: x,
    total: Reduction = lambda x: x,
) -> Tensor:
    """Softmax over the keys whose logit reaches a threshold, or is the token's largest: [..., experts, 2, heads] twice.

    Args:
        logits: of all keys of this rank.
        mean: of each key's and head's logits, over tokens and experts, [2 · heads].
        variance: the same.
        reach: standard deviations above the mean at which the threshold lies.
        largest: elementwise maximum over the ranks that share the experts.
        total: sum over them.
    """
    with torch.no_grad():
        top = largest(logits.amax(dim=-3, keepdim=True))
        threshold = mean.float() + reach * (variance.float() + EPSILON).sqrt()
        has_key = logits >= torch.minimum(top, threshold.unflatten(0, logits.shape[-2:]))
    weights = (logits - top).masked_fill(~has_key, -torch.inf).exp()
    return weights / total(weights.sum(dim=-3, keepdim=True))


def experts_output(
    units: Tensor,
    gates: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    is_vertical: bool,
    total: Reduction = lambda x: x,
) -> Tensor:
    """Σ over heads and experts (i, j) of g1_i g2_j · expert_ij, of this rank's keys: [..., width] → [..., hidden].

    An expert's units stand together in the width: m of them, or m / 2 of the first key and m / 2 of the second.

    Args:
        units: activations.
        gates: [..., experts, 2, heads].
        weight: [hidden, width].
        bias: [experts · hidden].
        is_vertical: whether both keys have units, or the first alone.
        total: sum over the ranks that share the experts.
    """
    gates = gates.to(units.dtype)
    experts, halves = gates.shape[-3], 2 if is_vertical else 1
    held = units.unflatten(-1, (experts, halves, -1)).transpose(-3, -2)  # [..., halves, experts, m / halves]
    by_key = gates.movedim(-2, -3)  # [..., 2, experts, heads]
    # What a head has of one key's units goes to the experts of the other key.
    summed = total(by_key[..., :halves, :, :].transpose(-2, -1) @ held)  # [..., halves, heads, m / halves]
    passed = by_key.flip(-3)[..., :halves, :, :] @ summed
    shares, biases = gates.sum(dim=-1), bias.view(experts, -1)  # [..., experts, 2] and [experts, hidden]
    if not is_vertical:
        return F.linear(passed.flatten(-3), weight) + F.linear(shares[..., 1], biases.t())
    own = held * shares.transpose(-2, -1).unsqueeze(-1)
    outputs = []
    for key, (rows, offset) in enumerate(zip(weight.chunk(2), biases.chunk(2, dim=-1), strict=True)):
        inputs = (own[..., key, :, :], passed[..., 1 - key, :, :])
        ordered = torch.stack(inputs if key == 0 else inputs[::-1], dim=-2).flatten(-3)
        outputs.append(F.linear(ordered, rows) + F.linear(shares[..., key], offset.t()))
    return torch.cat(outputs, dim=-1)
