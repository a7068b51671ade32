"""The k largest activations of a token in an exported model's MLPs, as `topk_activation.py` trains them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def extend(layer: Any, settings: dict[str, Any], config: Any, index: int) -> None:
    """Limit what reaches each down projection of a layer."""
    k = settings["k_per_layer"][index] if settings["k_per_layer"] else settings["k"]
    for module in layer.mlp.modules():
        down = getattr(module, "down_proj", None)
        if isinstance(down, nn.Linear) and k < down.in_features:
            down.register_forward_pre_hook(partial(_keep, k))


def _keep(k: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = inputs[0]
    magnitudes = x.detach().abs()
    threshold = magnitudes.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    return (torch.where(magnitudes >= threshold, x, 0), *inputs[1:])
