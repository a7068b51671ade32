"""Megatron's parallel linear product with `products`, and its weight gradient straight into `main_grad`."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

from sparsecod_megatron.backend import choice
from sparsecod_megatron.backend.cpu import products


class Linear(torch.autograd.Function):
    """x · weightᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, accumulate: bool) -> Tensor:
        """[..., in] and [out, in] → [..., out]; `accumulate`: gradients add to `weight.main_grad`, if there is one."""
        ctx.save_for_backward(x, weight)
        # Not saved with the others: it changes in place between forward and backward.
        ctx.main_grad = getattr(weight, "main_grad", None) if accumulate else None
        return products.output(x, weight, choice.in_use().output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """[..., out] → gradients of x and weight."""
        x, weight = ctx.saved_tensors
        by_onednn = choice.in_use()
        grad_x = products.input_gradient(grad, weight, by_onednn.input_gradient) if ctx.needs_input_grad[0] else None
        rows = grad.flatten(0, -2), x.flatten(0, -2)
        return grad_x, weight_gradient(weight, ctx.main_grad, *rows, by_onednn=by_onednn.weight_gradient), None


def weight_gradient(
    weight: Tensor, main_grad: Tensor | None, grad: Tensor, x: Tensor, *, by_onednn: bool
) -> Tensor | None:
    """What a backward pass returns for a weight [out, in] after grad [tokens, out] and x [tokens, in].

    Once the gradient is in `main_grad`, that is a tensor without values, which only makes the data-parallel wrapper's
    hook run; zeros where the weight is also an embedding, whose own gradient is added to it.
    """
    if main_grad is None:
        return products.weight_gradient(grad, x, by_onednn)
    products.add_weight_gradient(main_grad, grad, x, by_onednn)
    if not hasattr(weight, "grad_added_to_main_grad"):
        # A copy, from hooks on saved tensors: the wrapper would not see the mark, and add what is returned.
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    grad_output_buffer: list[Tensor] | None = None,
    wgrad_deferral_limit: int | None = 0,
    tp_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """input [..., in] times weight [out / TP, in]; sequence parallelism and deferred gradients stay upstream's.

    Source: Megatron-Core tensor_parallel/layers.py, `linear_with_grad_accumulation_and_async_allreduce` (arguments).
    """
    if sequence_parallel or grad_output_buffer is not None:
        return layers.LinearWithGradAccumulationAndAsyncCommunication.apply(
            input,
            weight,
            bias,
            gradient_accumulation_fusion,
            allreduce_dgrad,
            sequence_parallel,
            grad_output_buffer,
            wgrad_deferral_limit,
            tp_group,
        )
    if allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, tp_group)
    product = Linear.apply(input, weight, gradient_accumulation_fusion)
    return product if bias is None else product + bias
