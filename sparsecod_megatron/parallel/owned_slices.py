"""Which weights each process steps: slices for statistics of parameters, every element on one process.

Under the distributed optimizer each data-parallel rank owns a slice of the master weights and of the reduced gradient,
else (Muon) the first of them owns all; tensor- and expert-parallel ranks hold different ones, and what tensor-parallel
ranks hold alike (norms, router) is left to the first of them, as in Megatron-Core's own gradient norm. So a sum over
processes counts every element once.

Source: Megatron-Core optimizer/distrib_optimizer.py (slices), optimizer/optimizer.py (whole) and
tensor_parallel/layers.py (replicas).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor

Held: TypeAlias = tuple[torch.nn.Parameter, Tensor, tuple[int, int]]
"""A parameter, the fp32 weights that this process holds of it, and their span in the flattened parameter."""


@dataclass(frozen=True)
class OwnedSlices:
    """What one optimizer of this process owns of the layers' parameters, without replicas.

    Attributes:
        optimizer: steps the master weights.
        layers: layer of each slice, as a row of the sums; of layers that share it, a slice stands here once for each.
        rows: the same on the device, [slices].
        parameters: the model's, whole.
        spans: (start, end) of each slice in its flattened parameter.
        masters: fp32 weights of each slice, end − start of them in any shape.
    """

    optimizer: torch.optim.Optimizer
    layers: list[int]
    rows: Tensor
    parameters: list[torch.nn.Parameter]
    spans: list[tuple[int, int]]
    masters: list[Tensor]

    def gradients(self) -> list[Tensor]:
        """This step's reduced gradient of each slice, views of the data-parallel buffers."""
        pairs = zip(self.parameters, self.spans, strict=True)
        return [parameter.main_grad.view(-1)[start:end] for parameter, (start, end) in pairs]  # type: ignore[attr-defined]


def owned_slices(models: Sequence[GPTModel], optimizer: ChainedOptimizer) -> list[OwnedSlices]:
    """What this process owns of its layers, one entry per optimizer of the chain. Local.

    Args:
        models: the GPTModel chunks of this rank, without wrappers; their layers, in order, are the rows.
        optimizer: the optimizers over them.
    """
    layers = [layer for model in models for layer in model.decoder.layers]
    rows: dict[torch.nn.Parameter, list[int]] = {}
    for row, layer in enumerate(layers):
        for parameter in layer.parameters():
            rows.setdefault(parameter, []).append(row)
    device = next(models[0].parameters()).device
    return [_owned_slices(part, rows, models[0].pg_collection, device) for part in working_parts(optimizer)]


def working_parts(optimizer: ChainedOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chain but Megatron-Core's stubs; one may still have no parameters on this rank. Local."""
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]


def _owned_slices(
    part: MegatronOptimizer,
    rows: Mapping[torch.nn.Parameter, list[int]],
    groups: ProcessGroupCollection,
    device: torch.device,
) -> OwnedSlices:
    # Embedding, output layer and final norm have no row: they are in no layer.
    found = [
        (row, entry)
        for entry in held_slices(part, groups)
        if param_is_not_tensor_parallel_duplicate(entry[0], groups.tp)
        for row in rows.get(entry[0], [])
    ]
    layers, owned = [row for row, _ in found], [entry for _, entry in found]
    return OwnedSlices(
        optimizer=part.optimizer,
        layers=layers,
        rows=torch.tensor(layers, dtype=torch.int64, device=device),
        parameters=[parameter for parameter, _, _ in owned],
        spans=[span for _, _, span in owned],
        masters=[master for _, master, _ in owned],
    )


def held_slices(part: MegatronOptimizer, groups: ProcessGroupCollection) -> Iterator[Held]:
    """What this process steps of all its parameters; of what tensor-parallel ranks hold alike, each its own. Local."""
    return _sharded_masters(part) if isinstance(part, DistributedOptimizer) else _whole_masters(part, groups)


def _sharded_masters(part: DistributedOptimizer) -> Iterator[Held]:
    """What this data-parallel rank steps."""
    # Both lists in the optimizer's own order; the master of an fp32 parameter is a view of it.
    models = [*part.model_fp32_groups, *part.model_float16_groups]
    masters = [*part.shard_fp32_groups, *part.shard_fp32_from_float16_groups]
    for parameter, master in zip(itertools.chain(*models), itertools.chain(*masters), strict=True):
        # A private method, but nothing else says which part of a parameter this rank steps.
        span = part._get_model_param_range_map(parameter)["param"]
        yield parameter, master, (span.start, span.end)


def _whole_masters(part: MegatronOptimizer, groups: ProcessGroupCollection) -> Iterator[Held]:
    """What every data-parallel rank steps alike, on the first of them."""
    if isinstance(part, Float16OptimizerWithFloat16Params):
        models = [*part.float16_groups, *part.fp32_from_fp32_groups]
        masters = [*part.fp32_from_float16_groups, *part.fp32_from_fp32_groups]
    else:
        # An fp32 optimizer steps the parameters themselves.
        models = masters = [part.get_parameters()]
    for parameter, master in zip(itertools.chain(*models), itertools.chain(*masters), strict=True):
        # Megatron-Core marks so the parameters of experts that are spread over ranks.
        is_expert_parallel = not getattr(parameter, "allreduce", True)
        if (groups.expt_dp if is_expert_parallel else groups.dp_cp).rank() == 0:
            yield parameter, master, (0, parameter.numel())
