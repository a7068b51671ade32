"""A transformer layer or its attention with own values of some configuration fields, such as the experts per token."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class Varied:
    """Mixed into a module of Megatron-Core's, which then gets a copy of the model's configuration with `changes`.

    Args:
        config: the model's.
        *arguments: the module's others.
        changes: TransformerConfig fields and their values in this module.
        **options: the module's others.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, changes: dict[str, Any], **options: Any) -> None:
        own = copy.copy(config)
        for name, value in changes.items():
            assert hasattr(own, name), f"TransformerConfig has no field {name}"
            setattr(own, name, value)
        parent: Any = super()
        parent.__init__(own, *arguments, **options)


class OwnOutput:
    """Mixed into an expert's output projection, whose bias Megatron-Core adds in place (mlp.py:247).

    With one rank its result is a view of what a function of its own made, which autograd lets nobody change.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The projection's, with an output in memory of its own."""
        parent: Any = super()
        output, bias = parent.forward(x)
        return output.clone(), bias


class VariedLayer(Varied, TransformerLayer):
    """Megatron's layer."""


class VariedAttention(Varied, SelfAttention):
    """Megatron's attention."""
