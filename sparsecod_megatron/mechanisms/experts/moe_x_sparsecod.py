"""The router of an exported model that chooses experts by how few units they would use, as `moe_x.py` trains it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def extend(layer: Any, settings: dict[str, Any], config: Any, index: int) -> None:
    """Take the matrix from a layer's router, and give it logits that follow from the experts' weights."""
    gate = getattr(layer.mlp, "gate", None)
    if gate is not None:
        gate.register_parameter("weight", None)
        gate.logits = _SparsityLogits(layer.mlp.experts, gate.dtype)


class _SparsityLogits:
    """−erf(m / √(2 s²)), with mean m and variance s² of a unit's input over an expert's units.

    Args:
        experts: whose `up_proj` [units, hidden] are looked at.
        dtype: that it computes in.
    """

    def __init__(self, experts: nn.ModuleList, dtype: torch.dtype) -> None:
        self.experts, self.dtype = experts, dtype
        self._of: tuple[Any, ...] = ()
        self._moments: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., experts]."""
        x = x.to(self.dtype)
        mean, variance = self._current()
        spread = 2 * (x.square() @ variance.t())
        return -torch.erf((x @ mean.t()) * spread.clamp_min(torch.finfo(x.dtype).tiny).rsqrt())

    @torch.no_grad()
    def _current(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [experts, hidden]; taken again where a weight is another, or has changed in place."""
        weights: list[Tensor] = [expert.up_proj.weight for expert in self.experts]  # type: ignore[union-attr, misc]
        of = tuple((weight.data_ptr(), weight._version, weight.dtype) for weight in weights)
        if self._moments is None or of != self._of:
            exact = [weight.float() for weight in weights]
            mean = torch.stack([weight.mean(dim=0) for weight in exact])
            square = torch.stack([weight.square().mean(dim=0) for weight in exact])
            self._of = of
            self._moments = mean.to(self.dtype), (square - mean.square()).clamp_min(0).to(self.dtype)
        return self._moments
