"""Fused experts as linear layers, temporarily, so that what enters each expert can be seen.

transformers 5 keeps the experts of a layer in two 3-D parameters, `[experts, out, in]`, multiplied in one call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class SeparateExperts(nn.Module):
    """One pair of linear layers per expert, computing what the fused module computes.

    Args:
        fused: experts of stock transformers, without biases and with weights `[experts, out, in]`.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.entry_name = "gate_up_proj" if fused.has_gate else "up_proj"
        self.activate = fused._apply_gate if fused.has_gate else fused.act_fn
        self.entries = nn.ModuleList(_linear(weight) for weight in getattr(fused, self.entry_name))
        self.exits = nn.ModuleList(_linear(weight) for weight in fused.down_proj)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """[tokens, hidden], and the chosen experts and their weights, both [tokens, topk] → [tokens, hidden]."""
        output = torch.zeros_like(x)
        for index in experts.unique().tolist():
            if index >= len(self.entries):
                continue  # the router's mark for a slot that is not used
            rows, slots = torch.where(experts == index)
            expert_output = self.exits[index](self.activate(self.entries[index](x[rows])))
            output.index_add_(0, rows, (expert_output * weights[rows, slots, None]).to(output.dtype))
        return output

    @torch.no_grad()
    def write_back(self, fused: Any) -> None:
        """Copy the weights as they now are into the fused parameters."""
        for name, linears in ((self.entry_name, self.entries), ("down_proj", self.exits)):
            for slot, linear in zip(getattr(fused, name), linears, strict=True):
                slot.copy_(linear.weight)


@contextlib.contextmanager
def separate_experts(model: nn.Module) -> Iterator[None]:
    """Replace fused experts by linear layers, in place, and fuse them again when the block ends well."""
    fused = {name: module for name, module in model.named_modules() if is_fused(module)}
    for name, module in fused.items():
        model.set_submodule(name, SeparateExperts(module))
    yield
    for name, module in fused.items():
        separate = model.get_submodule(name)
        assert isinstance(separate, SeparateExperts)
        separate.write_back(module)
        model.set_submodule(name, module)


def is_fused(module: nn.Module) -> bool:
    """Whether `SeparateExperts` computes what this module computes."""
    if not hasattr(module, "has_gate"):  # set on experts by transformers' `use_experts_implementation`
        return False
    special = [getattr(module, name, False) for name in ("is_transposed", "has_bias", "has_post_expert_norm")]
    entry = getattr(module, "gate_up_proj" if module.has_gate else "up_proj", None)
    return not any(special) and isinstance(entry, nn.Parameter) and entry.ndim == 3


def _linear(weight: Tensor) -> nn.Linear:
    """A layer on this matrix `[out, in]` itself, not on a copy."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear
