"""Residual paths of small models, without the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecod_megatron.config import load_config
from sparsecod_megatron.mechanisms import MECHANISMS
from tests.helpers.megatron import SMALL

HIDDEN, LAYERS, EPS = 6, 4, 1e-5


def path_of(name: str, *, hidden: int = HIDDEN, layers: int = LAYERS, **settings: Any) -> Any:
    """A mechanism's path for a model of these sizes."""
    shape = (f"model.hidden_size={hidden}", f"model.num_layers={layers}", f"model.layernorm_epsilon={EPS}")
    config = load_config(None, [*SMALL, *shape, "model.num_attention_heads=1", "model.num_query_groups=1"])
    return MECHANISMS.settings_class(name)(**settings).residual_path(config.model)


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_module(module: Any, seed: int = 5) -> tuple[Any, dict[str, Tensor]]:
    """With drawn parameters in place of what it begins at."""
    for index, parameter in enumerate(module.parameters()):
        parameter.data = drawn(tuple(parameter.shape), seed + index)
    return module, {name: value.detach() for name, value in module.named_parameters()}
