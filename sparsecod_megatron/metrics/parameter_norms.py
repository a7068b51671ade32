"""Norms of every layer's gradient, weights and update, each parameter counted once under every layout.

Definitions, over all parameters of a layer (embeddings, output layer and final norm are in no layer):

    grad_norm     L2 of the gradient of the global batch, after data-parallel reduction, before clipping
    param_norm    L2 of the weights that the step starts from
    update_ratio  ‖W_new − W_old‖ / ‖W_old‖ of the optimizer step

Weights are the optimizer's fp32 master weights, so an update that bf16 would round away still counts.

Every element is counted by one process: under the distributed optimizer each data-parallel rank owns a slice of the
master weights and of the reduced gradient, else (Muon) the first of them owns all; tensor- and expert-parallel ranks
hold different ones, and what tensor-parallel ranks hold alike (norms, router) is left to the first of them, as in
Megatron-Core's own gradient norm. So Σ squares over processes is the square
of the norm. The accumulator yields Σ value / Σ count, which is a plain sum if the counts add up to 1: the first process
of the pipeline stage that holds the layer counts 1, the others 0.

The step itself is untouched. The gradient is read where Megatron's `finalize_model_grads_func`, a field of its
configuration, returns: reduced, in the buffers that the optimizer reads next. The weights are read by hooks before and
after the step of torch's optimizer. A collected step holds one fp32 copy of this rank's slices of the layers' weights
while the optimizer steps; other steps hold nothing.

Source: Megatron-Core optimizer/distrib_optimizer.py (slices), optimizer/optimizer.py (whole) and
tensor_parallel/layers.py (replicas).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor

from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.metrics.accumulator import LayerAccumulator
from sparsecod_megatron.metrics.group import Statistics

_Held: TypeAlias = tuple[torch.nn.Parameter, Tensor, tuple[int, int]]
"""A parameter, the fp32 weights that this process holds of it, and their span in the flattened parameter."""


class ParameterNormsGroup:
    """grad_norm, param_norm, update_ratio.

    Args:
        models: the GPTModel chunks of this rank, without wrappers.
        optimizer: the optimizers over them.

    Raises:
        ConfigError: the optimizer keeps the master weights to itself.
    """

    names: tuple[str, ...] = ("grad_squares", "param_squares", "update_squares")
    maxima: tuple[str, ...] = ()

    def __init__(self, models: Sequence[GPTModel], optimizer: ChainedOptimizer) -> None:
        layers = [layer for model in models for layer in model.decoder.layers]
        self._layers = [layer.layer_number - 1 for layer in layers]
        rows = {parameter: row for row, layer in enumerate(layers) for parameter in layer.parameters()}
        parts = [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
        self._device = next(models[0].parameters()).device
        self._owned = [_owned_slices(part, rows, models[0].pg_collection, self._device) for part in parts]
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
                stack.enter_context(owned.observing_update(weights, update))
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

        def finalize_and_see(*args: Any, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            for owned in self._owned:
                _add_squares(squares, owned.rows, owned.gradients())

        config.finalize_model_grads_func = finalize_and_see
        try:
            yield
        finally:
            config.finalize_model_grads_func = finalize


@dataclass(frozen=True)
class _OwnedSlices:
    """What one optimizer of this process owns of the layers' parameters, without replicas.

    Attributes:
        optimizer: steps the master weights.
        rows: layer of each slice, as a row of the sums, [slices].
        parameters: the model's, whole.
        spans: (start, end) of each slice in its flattened parameter.
        masters: fp32 weights of each slice, end − start of them in any shape.
    """

    optimizer: torch.optim.Optimizer
    rows: Tensor
    parameters: list[torch.nn.Parameter]
    spans: list[tuple[int, int]]
    masters: list[Tensor]

    def gradients(self) -> list[Tensor]:
        """This step's reduced gradient of each slice, views of the data-parallel buffers."""
        pairs = zip(self.parameters, self.spans, strict=True)
        return [parameter.main_grad.view(-1)[start:end] for parameter, (start, end) in pairs]  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def observing_update(self, weights: Tensor, update: Tensor) -> Iterator[None]:
        """Add Σ W_old² to `weights` and Σ (W_new − W_old)² to `update`, both [layers], when the optimizer steps."""
        old: list[Tensor] = []

        @torch.no_grad()
        def before(*_: Any) -> None:
            if self.masters:
                old.extend(torch.empty_like(master) for master in self.masters)
                torch._foreach_copy_(old, self.masters)
                _add_squares(weights, self.rows, old)

        @torch.no_grad()
        def after(*_: Any) -> None:
            if self.masters:
                torch._foreach_sub_(old, self.masters)
                _add_squares(update, self.rows, old)
            old.clear()

        handles = [self.optimizer.register_step_pre_hook(before), self.optimizer.register_step_post_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _owned_slices(
    part: MegatronOptimizer,
    rows: Mapping[torch.nn.Parameter, int],
    groups: ProcessGroupCollection,
    device: torch.device,
) -> _OwnedSlices:
    if part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        raise ConfigError(
            "megatron.use_precision_aware_optimizer: true hides the master weights that statistics.norms reads; "
            "set it to false, or statistics.norms.interval to 0"
        )
    held = _sharded_masters(part) if isinstance(part, DistributedOptimizer) else _whole_masters(part, groups)
    owned = [
        entry for entry in held if entry[0] in rows and param_is_not_tensor_parallel_duplicate(entry[0], groups.tp)
    ]
    return _OwnedSlices(
        optimizer=part.optimizer,
        rows=torch.tensor([rows[parameter] for parameter, _, _ in owned], dtype=torch.int64, device=device),
        parameters=[parameter for parameter, _, _ in owned],
        spans=[span for _, _, span in owned],
        masters=[master for _, master, _ in owned],
    )


def _sharded_masters(part: DistributedOptimizer) -> Iterator[_Held]:
    """What this data-parallel rank steps."""
    models = [*part.model_fp32_groups, *part.model_float16_groups]
    masters = [*part.shard_fp32_groups, *part.shard_fp32_from_float16_groups]
    for parameter, master in zip(itertools.chain(*models), itertools.chain(*masters), strict=True):
        span = part._get_model_param_range_map(parameter)["param"]
        yield parameter, master, (span.start, span.end)


def _whole_masters(part: MegatronOptimizer, groups: ProcessGroupCollection) -> Iterator[_Held]:
    """What every data-parallel rank steps alike, on the first of them."""
    if isinstance(part, Float16OptimizerWithFloat16Params):
        models = [*part.float16_groups, *part.fp32_from_fp32_groups]
        masters = [*part.fp32_from_float16_groups, *part.fp32_from_fp32_groups]
    else:
        models = masters = [part.get_parameters()]
    for parameter, master in zip(itertools.chain(*models), itertools.chain(*masters), strict=True):
        is_expert_parallel = not getattr(parameter, "allreduce", True)
        if (groups.expt_dp if is_expert_parallel else groups.dp_cp).rank() == 0:
            yield parameter, master, (0, parameter.numel())


@torch.no_grad()
def _add_squares(squares: Tensor, rows: Tensor, tensors: list[Tensor]) -> None:
    """Add the squared L2 norm of each tensor to its row of `squares`, in one fused pass over all of them."""
    if tensors:
        norms = torch.stack(torch._foreach_norm(tensors, dtype=torch.float32))
        squares.index_add_(0, rows, norms.double().square())
