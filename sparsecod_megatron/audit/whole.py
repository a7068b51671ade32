"""Gradients, weights and buffers of the whole model on one process, whatever the layout, by name.

Where a tensor lies in the whole model is what Megatron-Core says when it writes a checkpoint; what it holds is read
from the buffers of gradients and the optimizer's fp32 weights, not through a checkpoint, which is one of the things
audited.

Source: Megatron-Core dist_checkpointing/optimizer.py (a tensor shaped like a parameter takes the parameter's place).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from sparsecod_megatron.checkpoint.native import model_sharded_state
from sparsecod_megatron.checkpoint.sharded import Leaf, sharded_leaves
from sparsecod_megatron.parallel.owned_slices import held_slices, working_parts
from sparsecod_megatron.train.setup import Trainer

Read = Callable[[torch.nn.Parameter, Tensor, tuple[int, int]], Tensor]
"""What to take of a parameter, its fp32 weights held here, and their span in it: as many elements as the span."""


@dataclass(frozen=True)
class _Piece:
    """A part of one tensor of the whole model."""

    key: str
    prepended: int
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: npt.NDArray[np.float32]


def gradient(parameter: torch.nn.Parameter, master: Tensor, span: tuple[int, int]) -> Tensor:
    """A `Read`: the reduced gradient that this process steps with."""
    reduced: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return reduced.view(-1)[span[0] : span[1]]


def weights(parameter: torch.nn.Parameter, master: Tensor, span: tuple[int, int]) -> Tensor:
    """A `Read`: what the forward pass takes, where this process steps it."""
    return parameter.detach().float().view(-1)[span[0] : span[1]]


def master_weights(parameter: torch.nn.Parameter, master: Tensor, span: tuple[int, int]) -> Tensor:
    """A `Read`: the fp32 weights that this process steps."""
    return master.reshape(-1)


def whole_parameters(trainer: Trainer, read: Read) -> dict[str, Tensor]:
    """What `read` takes of every parameter, [shape of the whole tensor] in fp32. Collective over all processes.

    Returns:
        By name in the whole model, layers and experts counted from 0, in the order of the forward pass; empty but on
        rank 0.
    """
    local = _local_values(trainer, read)
    places = {id(place.data): place for place in _places(trainer)}
    unplaced = [tuple(parameter.shape) for parameter in local if id(parameter) not in places]
    assert not unplaced, f"Megatron-Core names no place in the whole model for parameters of shapes {unplaced}"
    placed: dict[int, Any] = {
        index: make_sharded_optimizer_tensor(places[id(parameter)], values, prefix="")
        for index, (parameter, values) in enumerate(local.items())
    }
    apply_factories(placed)
    return _assembled(nested_values(placed))


def whole_buffers(trainer: Trainer) -> dict[str, Tensor]:
    """Every buffer that a checkpoint holds (expert bias), as `whole_parameters`. Collective over all processes."""
    parameters = {id(parameter) for model in trainer.models for parameter in model.parameters()}
    return _assembled(
        place for place in _places(trainer) if isinstance(place, ShardedTensor) and id(place.data) not in parameters
    )


def _places(trainer: Trainer) -> list[Leaf]:
    """Where this rank's tensors lie in the whole model."""
    return [leaf for _, leaf in sharded_leaves(model_sharded_state(trainer.models, trainer.groups))]


@torch.no_grad()
def _local_values(trainer: Trainer, read: Read) -> dict[torch.nn.Parameter, Tensor]:
    """This rank's parameters → what all data-parallel ranks hold of them together, [shape of its shard]."""
    assert isinstance(trainer.optimizer, ChainedOptimizer)
    groups = trainer.groups
    held = [entry for part in working_parts(trainer.optimizer) for entry in held_slices(part, groups)]
    parameters = [parameter for model in trainer.models for parameter in model.parameters()]
    # In one buffer for each group, so that the ranks of one need to agree on no order but the model's.
    values: dict[torch.nn.Parameter, Tensor] = {}
    for spread, group in ((False, groups.dp_cp), (True, groups.expt_dp)):
        chosen = [each for each in parameters if getattr(each, "allreduce", True) is not spread]
        flat = torch.zeros(sum(each.numel() for each in chosen), device=trainer.backend.device)
        values |= dict(zip(chosen, flat.split([each.numel() for each in chosen]), strict=True))
        for parameter, master, span in held:
            if getattr(parameter, "allreduce", True) is not spread:
                values[parameter][span[0] : span[1]] = read(parameter, master, span)
        if flat.numel():
            dist.all_reduce(flat, group=group)
    return {parameter: flat.view(parameter.shape) for parameter, flat in values.items()}


def _assembled(places: Iterable[Any]) -> dict[str, Tensor]:
    pieces = [
        _Piece(
            place.key.lstrip("."),
            place.prepend_axis_num,
            tuple(place.global_shape),
            tuple(place.global_offset),
            place.data.detach().float().cpu().numpy(),  # tensors take ten times as long to send
        )
        for place in places
        if is_main_replica(place.replica_id)
    ]
    first = dist.get_rank() == 0
    everybody: list[list[_Piece]] | None = [[] for _ in range(dist.get_world_size())] if first else None
    dist.gather_object(pieces, everybody)
    whole: dict[str, Tensor] = {}
    for piece in (piece for part in everybody or [] for piece in part):
        # Layers and experts that are axes of one tensor become tensors of their own.
        index, shape = piece.offset[: piece.prepended], piece.shape[piece.prepended :]
        # What no rank holds stays NaN, which equals nothing.
        tensor = whole.setdefault(_name(piece.key, index), torch.full(shape, torch.nan))
        offset = piece.offset[piece.prepended :]
        place = tuple(slice(start, start + size) for start, size in zip(offset, piece.values.shape, strict=True))
        tensor[place] = torch.from_numpy(piece.values)
    return {name: whole[name] for name in sorted(whole, key=_order)}


def _name(key: str, index: tuple[int, ...]) -> str:
    """`layers.mlp.experts.experts.linear_fc1.weight` (1, 3) → `layers.1.mlp.experts.3.linear_fc1.weight`."""
    for number, marker in zip(index, (r"(layers)", r"(experts)(?=\.linear|$)"), strict=False):
        key = re.sub(marker, rf"\g<1>.{number}", key, count=1)
    return key.replace("experts.experts", "experts")


def _order(name: str) -> tuple[int, int, int, str]:
    """Rank in the forward pass: embedding, layers, what follows them; in a layer attention, the rest, the MLP."""
    layer = re.search(r"layers\.(\d+)\.(input_layernorm|self_attention)?(mlp)?", name)
    if layer:
        return 1, int(layer[1]), 0 if layer[2] else 2 if layer[3] else 1, name
    return (0 if name.startswith("embedding") else 2), 0, 0, name
