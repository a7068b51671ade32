"""Feed-forward layers by the names of their linear layers: for methods that treat them otherwise than attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsecod_megatron.compression.experts import is_fused

LAYOUTS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
"""Names of a feed-forward layer's linear layers: those whose outputs are its inner channels, and the one they enter."""


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One feed-forward layer, or the fused experts of a layer.

    Attributes:
        name: of the module in the model.
        module: it.
        entries: names of its linear layers whose outputs are the inner channels, or of the fused parameter.
        exit: name of the one that they enter.
    """

    name: str
    module: Any
    entries: tuple[str, ...]
    exit: str

    @property
    def is_fused(self) -> bool:
        """Whether weights are `[experts, out, in]`."""
        return is_fused(self.module)

    @property
    def exit_name(self) -> str:
        """Name of the parameter behind the inner channels."""
        return f"{self.name}.{self.exit}" if self.is_fused else f"{self.name}.{self.exit}.weight"

    @property
    def exit_weights(self) -> list[Tensor]:
        """`[out, inner]`, of each expert, or of the one layer."""
        if self.is_fused:
            return list(self.module.get_parameter(self.exit).detach())
        layer = self.module.get_submodule(self.exit)
        weight = layer.weight.detach()
        return [weight.T if isinstance(layer, Conv1D) else weight]

    @property
    def width(self) -> int:
        """Inner channels."""
        return self.exit_weights[0].shape[1]

    def width_in(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Inner channels in a model with these axes."""
        axes = shapes[self.exit_name]
        is_transposed = not self.is_fused and isinstance(self.module.get_submodule(self.exit), Conv1D)
        return axes[0] if is_transposed else axes[-1]


def feed_forwards(model: nn.Module) -> list[FeedForward]:
    """Every feed-forward layer of a known layout, in the model's order."""
    found = []
    for name, module in model.named_modules():
        if is_fused(module):
            found.append(FeedForward(name, module, ("gate_up_proj" if module.has_gate else "up_proj",), "down_proj"))
            continue
        for entries, leaving in LAYOUTS:
            layers = [getattr(module, part, None) for part in (*entries, leaving)]
            if all(isinstance(layer, nn.Linear | Conv1D) for layer in layers):
                found.append(FeedForward(name, module, entries, leaving))
                break
    return found
