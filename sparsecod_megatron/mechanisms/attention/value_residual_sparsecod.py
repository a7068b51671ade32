"""Values of a layer mixed with those of the first: own · V_l + first · V_1, by constants or learned numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ValueMix(nn.Module):
    """own · V_l + first · V_1.

    Args:
        own: factor on the layer's values, or what a learned one begins at.
        first: the same of the first layer's.
        learn: whether they are parameters, `weight`: (own, first).

    Attributes:
        shared: what is done to the parameter before each use, for ranks that hold different heads.
    """

    def __init__(self, own: float, first: float, learn: bool) -> None:
        super().__init__()
        self.own, self.first = own, first
        self.weight = nn.Parameter(torch.tensor([own, first])) if learn else None
        self.shared: Callable[[Tensor], Tensor] | None = None

    def forward(self, value: Tensor, first_values: Tensor) -> Tensor:
        """Both of one shape → the same."""
        if self.weight is None:
            return self.own * value + self.first * first_values
        weight = self.weight if self.shared is None else self.shared(self.weight)
        return weight[0] * value + weight[1] * first_values


def extend(layer: Any, settings: dict[str, Any], config: Any, index: int) -> None:
    """Give a layer's attention its mix; a cache holds mixed values, so that it costs nothing more."""
    layer.shares_values = index == 0
    if index >= settings["start_layer"]:
        layer.self_attn.value_mix = ValueMix(settings["own"], settings["first"], settings["learn"])
