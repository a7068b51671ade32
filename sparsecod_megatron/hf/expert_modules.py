"""Modules that are projections: linear layers, and those that hold all experts in three-dimensional parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsecod_megatron.errors import ConversionError

ExpertsForward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [tokens, hidden], chosen experts [tokens, k], their weights [tokens, k]) → [tokens, hidden]."""
ROW_BYTES = 16
"""Bytes of which rows of torch's product of all experts at once are multiples."""
FUSED_MULTIPLE = ROW_BYTES // 2
"""Widths of fused experts that are chosen must be multiples, so that their rows are whole in bf16 too."""


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts of a layer as three-dimensional parameters."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.ndim == 3


def is_stacked_linear(module: nn.Module) -> bool:
    """Whether a module holds one linear layer per expert, `[experts, out, in]`, for rows already sorted by expert."""
    weight = getattr(module, "weight", None)
    is_convolution = isinstance(module, nn.modules.conv._ConvNd)
    return isinstance(weight, nn.Parameter) and weight.ndim == 3 and not is_convolution


def avoid_unaligned_products(model: PreTrainedModel) -> None:
    """Let a model whose experts have such widths multiply one expert at a time. Local.

    torch's product of all experts at once, transformers' default, refuses rows whose bytes 16 does not divide.
    """
    experts = (module for module in model.modules() if is_fused_experts(module))
    weights = (weight for module in experts for weight in module.parameters(recurse=False) if weight.ndim == 3)
    if any(weight.shape[-1] * weight.element_size() % ROW_BYTES for weight in weights):
        model.set_experts_implementation("eager")


def is_projection(module: nn.Module) -> bool:
    """Whether a module multiplies its input by weight matrices of its own."""
    return isinstance(module, nn.Linear | Conv1D) or is_fused_experts(module) or is_stacked_linear(module)


def expert_activations(experts: nn.Module, hidden: Tensor, expert: int) -> Tensor:
    """Inputs of one fused expert's down projection.

    Args:
        experts: the module that holds them.
        hidden: `[rows, hidden]`.
        expert: index of the expert.

    Returns:
        `[rows, neurons]`.

    Raises:
        ConversionError: the module does not let its activation be called.
    """
    name = "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias", None)
    inner = F.linear(
        hidden,
        weight.t() if getattr(experts, "is_transposed", False) else weight,
        None if bias is None else bias[expert],
    )
    activate: Callable[[Tensor], Tensor] | None = getattr(
        experts, "act_fn" if name == "up_proj" else "_apply_gate", None
    )
    if activate is None:
        raise ConversionError(
            f"{type(experts).__name__}: its experts' activation is not a function of their own, so neurons cannot be "
            "seen; leave activation out of --scores"
        )
    return activate(inner)


def unwatchable(module: nn.Module) -> ConversionError:
    """The refusal of experts whose module is not told the router's choice."""
    return ConversionError(
        f"{type(module).__name__}: its experts are not told which tokens are theirs, so they cannot be watched; leave "
        "activation and experts out of --scores"
    )


@contextmanager
def replaced_forward(module: nn.Module, forward: ExpertsForward) -> Iterator[None]:
    """Replace the forward of one fused-experts module temporarily.

    The three tensors keep their order in every model of transformers, but not their names, nor whether they are passed
    by name.

    Raises:
        ConversionError: experts that are not told the router's choice.
    """
    signature = inspect.signature(module.forward)
    if len(signature.parameters) < 3:
        raise unwatchable(module)

    def bound(*args: Tensor, **kwargs: Tensor) -> Tensor:
        hidden, index, weights = list(signature.bind(*args, **kwargs).arguments.values())[:3]
        return forward(hidden, index, weights)

    module.forward = bound
    try:
        yield
    finally:
        del module.forward  # the class's own again
