"""A transformer layer with its own values of some configuration fields, such as the experts per token."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


class VariedLayer(TransformerLayer):
    """Megatron's layer, built from a copy of the model's configuration with `changes` applied.

    Args:
        config: the model's.
        submodules: the layer's.
        changes: TransformerConfig fields and their values in this layer.
        **arguments: TransformerLayer's others.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        changes: dict[str, Any],
        **arguments: Any,
    ) -> None:
        own = copy.copy(config)
        for name, value in changes.items():
            assert hasattr(own, name), f"TransformerConfig has no field {name}"
            setattr(own, name, value)
        super().__init__(own, submodules, **arguments)
