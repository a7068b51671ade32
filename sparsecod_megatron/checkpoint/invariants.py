"""What must hold of every checkpoint, whatever its layout, looked at when it is saved and when it is loaded.

The fp32 weights that the optimizer steps, cast to the model's type, are the model's weights; and the optimizer's
tensors of a parameter are those that the ranks step of it, by their digests. Numbers that are cut out in the wrong
place, or weights that are a step old, break one or the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sparsecod_megatron.checkpoint.digests import (
    Digests,
    by_name,
    first_difference,
    location_of,
    parameter_name,
    stepped_digests,
    total,
    whole_digests,
)
from sparsecod_megatron.checkpoint.first_rank import first_problem
from sparsecod_megatron.checkpoint.sharded import Leaf, leaves, sharded_leaves
from sparsecod_megatron.checkpoint.stream import TensorLocation
from sparsecod_megatron.errors import CheckpointError

MASTER_KINDS = ("param", "fp32_param")
"""What the distributed optimizer and Muon call the fp32 weights."""
REPAIR = "`sparsecod doctor RUN --repair NEW_RUN` writes a run whose optimizer starts afresh from the model's weights"


def verified_digests(optimizer: MegatronOptimizer, sharded: ShardedStateDict) -> Digests:
    """Digests of what is about to be written, which is what the ranks step. Collective over all processes.

    Args:
        optimizer: optimizer of the models.
        sharded: what this rank writes of models and optimizer.

    Returns:
        On rank 0 those of the whole model, elsewhere nothing.

    Raises:
        CheckpointError: on all ranks, where fp32 weights are not the model's, or an optimizer's tensor is another's.
    """
    model_state = {name: part for name, part in sharded.items() if name not in ("optimizer", "mechanisms")}
    stepped = stepped_digests(optimizer, model_state)
    written = by_name(whole_digests(sharded.get("optimizer", {})), replicas=True)
    tensors = [(leaf, leaf.data) for _, leaf in sharded_leaves(sharded) if not is_float8tensor(leaf.data)]
    problem = _unlike_its_master(tensors, types={})
    if (moved := first_difference(written, by_name(stepped, replicas=True))) and not problem:
        problem = f"{moved} as gathered is not what the ranks step"
    if reason := first_problem(problem):
        raise CheckpointError(reason)
    return _whole(by_name(stepped, replicas=False))


def require_own_masters(
    directory: Path, sharded: ShardedStateDict, loaded: Mapping[str, Any], metadata: Metadata
) -> None:
    """Refuse a checkpoint whose fp32 weights are not the model's weights. Collective over all processes.

    Does not cover weights in FP8, which are not a plain cast: they have scales.

    Args:
        directory: the checkpoint.
        sharded: what was asked for.
        loaded: what came, under the same paths.
        metadata: metadata of the checkpoint.

    Raises:
        CheckpointError: on all ranks; says how to repair it.
    """
    tensors = dict(leaves(loaded))
    types = {
        key: entry.properties.dtype
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    asked = [(leaf, tensors[path]) for path, leaf in sharded_leaves(sharded)]
    if reason := first_problem(_unlike_its_master(asked, types)):
        raise CheckpointError(f"{directory}: {reason}; {REPAIR}")


def require_digests(
    directory: Path, optimizer: MegatronOptimizer, model_state: ShardedStateDict, saved: Digests
) -> None:
    """Refuse an optimizer whose loaded tensors are not those that were saved of each parameter. Collective.

    Args:
        directory: the checkpoint.
        optimizer: has loaded it.
        model_state: sharded state of its models.
        saved: the checkpoint's digests; empty where it has none, and then nothing is compared.

    Raises:
        CheckpointError: on all ranks, naming the first.
    """
    if not saved:
        return
    now = _whole(by_name(stepped_digests(optimizer, model_state), replicas=False))
    problem = first_difference(saved, now) if dist.get_rank() == 0 else None
    if moved := first_problem(problem):
        raise CheckpointError(
            f"{directory}: {moved} as loaded is not what was saved of it; this layout cannot resume from it"
        )


def same_weights(master: Tensor, weight: Tensor, saved_as: torch.dtype) -> bool:
    """Whether fp32 weights, cast to what the checkpoint holds and then to what was loaded, are these. Local."""
    cast = master.to(saved_as).to(weight.dtype)
    return torch.equal(cast, weight) or bool(((cast == weight) | (cast.isnan() & weight.isnan())).all())


def _unlike_its_master(tensors: Iterable[tuple[Leaf, Tensor]], types: Mapping[str, torch.dtype]) -> str | None:
    """The first of the weights on this rank that is not its master, in words.

    Args:
        tensors: tensors of model and optimizer, each with the leaf that tells its place.
        types: what the checkpoint holds of each key; else what is here.
    """
    weights: dict[TensorLocation, Tensor] = {}
    masters: dict[TensorLocation, Tensor] = {}
    for leaf, tensor in tensors:
        kind, place = location_of(leaf)
        if kind is None:
            weights[place] = tensor.detach()
        elif kind in MASTER_KINDS:
            masters[place] = tensor.detach()
    # A stage that holds a copy of tied embeddings steps them and writes none.
    for place, master in ((place, master) for place, master in masters.items() if place in weights):
        weight = weights[place]
        if not same_weights(master, weight.to(master.device), types.get(place.key, weight.dtype)):
            name, expert = parameter_name(place)
            return f"the optimizer's fp32 weights of {name}{list(expert) or ''} are not the model's"
    return None


def _whole(mine: Digests) -> Digests:
    """The sum over all processes, on rank 0. Collective."""
    shares: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, shares, dst=0)
    return total(shares or [])
