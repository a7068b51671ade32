"""Norms of every layer's gradient, weights and update, each parameter counted once under every layout.

Definitions, over all parameters of a layer (embeddings, output layer and final norm are in no layer):

    grad_norm     L2 of the gradient of the global batch, after data-parallel reduction, before clipping
    param_norm    L2 of the weights that the step starts from
    update_ratio  ‖W_new − W_old‖ / ‖W_old‖ of the optimizer step

Weights are the optimizer's fp32 master weights, so an update that bf16 would round away still counts.

Every element is counted by one process (`owned_slices.py`), so Σ squares over processes is the square of the norm. The
accumulator yields Σ value / Σ count, which is a plain sum if the counts add up to 1: the first process of the pipeline
stage that holds the layer counts 1, the others 0.

The step itself is untouched. The gradient is read where Megatron's `finalize_model_grads_func`, a field of its
configuration, returns: reduced, in the buffers that the optimizer reads next. The weights are read by hooks before and
after the step of torch's optimizer. A collected step holds one fp32 copy of this rank's slices of the layers' weights
while the optimizer steps; other steps hold nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from sparsecod_megatron.metrics.accumulator import LayerAccumulator
from sparsecod_megatron.metrics.group import Statistics
from sparsecod_megatron.parallel.owned_slices import OwnedSlices, owned_slices


class ParameterNormsGroup:
    """grad_norm, param_norm, update_ratio.

    Args:
        models: the GPTModel chunks of this rank, without wrappers.
        optimizer: the optimizers over them.
    """

    names: tuple[str, ...] = ("grad_squares", "param_squares", "update_squares")
    maxima: tuple[str, ...] = ()

    def __init__(self, models: Sequence[GPTModel], optimizer: ChainedOptimizer) -> None:
        layers = [layer for model in models for layer in model.decoder.layers]
        self._layers = [layer.layer_number - 1 for layer in layers]
        self._device = next(models[0].parameters()).device
        self._owned = owned_slices(models, optimizer)
        self._config = models[0].config
        self._count = 1 if models[0].pg_collection.tp_dp_cp.rank() == 0 else 0

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """Observe the end of the backward pass and the optimizer step inside the block. Local."""
        squares = torch.zeros((3, len(self._layers)), dtype=torch.float64, device=self._device)
        gradient, weights, update = squares
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._observing_gradient(gradient))
            for owned in self._owned:
                stack.enter_context(_observing_update(owned, weights, update))
            yield
        for name, row in zip(self.names, squares, strict=True):
            for layer, value in zip(self._layers, row, strict=True):
                sums.add(layer, name, value, self._count)

    def statistics(self, means: dict[str, float]) -> Statistics:
        """One layer's statistics."""
        gradient, weights, update = (math.sqrt(means[name]) for name in self.names)
        return {"grad_norm": gradient, "param_norm": weights, "update_ratio": update / weights}

    @contextlib.contextmanager
    def _observing_gradient(self, squares: Tensor) -> Iterator[None]:
        """Add each layer's Σ gradient² to `squares` [layers] once the gradient is reduced."""
        config, finalize = self._config, self._config.finalize_model_grads_func
        assert finalize is not None, "training reduces its gradients through Megatron's configuration"

        def finalize_and_measure(*args: Any, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            for owned in self._owned:
                _add_squares(squares, owned.rows, owned.gradients())

        config.finalize_model_grads_func = finalize_and_measure
        try:
            yield
        finally:
            config.finalize_model_grads_func = finalize


@contextlib.contextmanager
def _observing_update(owned: OwnedSlices, weights: Tensor, update: Tensor) -> Iterator[None]:
    """Add Σ W_old² to `weights` and Σ (W_new − W_old)² to `update`, both [layers], when the optimizer steps."""
    old: list[Tensor] = []

    @torch.no_grad()
    def before(*_: Any) -> None:
        if owned.masters:
            old.extend(torch.empty_like(master) for master in owned.masters)
            torch._foreach_copy_(old, owned.masters)
            _add_squares(weights, owned.rows, old)

    @torch.no_grad()
    def after(*_: Any) -> None:
        if owned.masters:
            torch._foreach_sub_(old, owned.masters)
            _add_squares(update, owned.rows, old)
        old.clear()

    handles = [owned.optimizer.register_step_pre_hook(before), owned.optimizer.register_step_post_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _add_squares(squares: Tensor, rows: Tensor, tensors: list[Tensor]) -> None:
    """Add the squared L2 norm of each tensor to its row of `squares`, in one fused pass over all of them."""
    if tensors:
        norms = torch.stack(torch._foreach_norm(tensors, dtype=torch.float32))
        squares.index_add_(0, rows, norms.double().square())
