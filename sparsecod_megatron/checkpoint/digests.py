"""What an optimizer remembers of each parameter, in a few digits that depend on neither layout nor bucket.

They are taken of the slices that the ranks step, before anything gathers them or cuts them out, and again once a
checkpoint is loaded; so numbers that were given to another parameter on the way are noticed. A digest is the sum over
the elements of their mixed bits, modulo 2^64: sums of slices add up, in whatever order they lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeAlias

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, is_main_replica
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from sparsecod_megatron.checkpoint.optimizer_state import optimizer_parts, whole_shards
from sparsecod_megatron.checkpoint.sharded import Leaf, pieces, sharded_leaves
from sparsecod_megatron.checkpoint.stream import TensorLocation

Digests: TypeAlias = dict[str, dict[str, int]]
"""By parameter of the whole model (experts of a layer together) and kind (`param`, the fp32 weights, or a moment)."""
LeafDigests: TypeAlias = tuple[Leaf, dict[str, int]]

_KINDS_SLICED = ("param", "exp_avg", "exp_avg_sq")
"""What the distributed optimizer keeps of a parameter."""
_OPTIMIZER_KEY = re.compile(r"optimizer\.state\.(\w+?)\.(.+)")
_MODULUS = 1 << 64
_STRETCH = 1 << 16
"""Elements mixed at a time, so that they stay in a core's cache."""


def tensor_digest(tensor: Tensor) -> Tensor:
    """Digest of a tensor of any shape: an int64 scalar on its device, which nothing waits for. Local."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for stretch in tensor.detach().float().reshape(-1).split(_STRETCH):
        bits = stretch.contiguous().view(torch.int32) * -1640531535
        bits ^= bits >> 15
        bits *= -2048144777
        total += bits.sum(dtype=torch.int64)
    return total


def location_of(leaf: Leaf) -> tuple[str | None, TensorLocation]:
    """What a leaf is: the optimizer's kind (None: the model's own), and its place in the checkpoint. Local."""
    found = _OPTIMIZER_KEY.fullmatch(leaf.key)
    kind, key = found.groups() if found else (None, leaf.key)
    piece = next(pieces(leaf))
    return kind, TensorLocation(key, tuple(piece.global_offset[: piece.prepend_axis_num]))


def parameter_name(place: TensorLocation) -> tuple[str, tuple[int, ...]]:
    """(name with the layer's number, the index of the expert if there is one)."""
    rest = place.key.removeprefix("decoder.layers.")
    if rest == place.key or rest[0].isdigit() or not place.index:
        return place.key, place.index
    return f"decoder.layers.{place.index[0]}.{rest}", place.index[1:]


def add_digest(digests: Digests, place: TensorLocation, kind: str, digest: int) -> None:
    """Add what one place has to the digests, in place; each expert has a weight of its own in its layer's sum."""
    name, experts = parameter_name(place)
    kinds = digests.setdefault(name, {})
    kinds[kind] = (kinds.get(kind, 0) + digest * (2 * sum(experts) + 1)) % _MODULUS


def stepped_digests(optimizer: MegatronOptimizer, model_state: ShardedStateDict) -> list[LeafDigests]:
    """Digests of what the ranks step. Collective over the data-parallel groups.

    Args:
        optimizer: has its moments.
        model_state: sharded state of its models.

    Returns:
        The leaf and the digests by kind of every parameter that this rank would write.
    """
    by_data = {id(leaf.data): leaf for _, leaf in sharded_leaves(model_state)}
    found: list[LeafDigests] = []
    for part in optimizer_parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            found += [(by_data[id(parameter)], kinds) for parameter, kinds in _sliced_digests(part)]
        else:
            found += whole_digests(whole_shards(part, model_state))
    return found


def whole_digests(optimizer_state: ShardedStateDict) -> list[LeafDigests]:
    """Digests of optimizer tensors that lie on this rank as whole shards. Local."""
    kinds = ((location_of(leaf)[0], leaf) for _, leaf in sharded_leaves(optimizer_state))
    return [(leaf, {kind: int(tensor_digest(leaf.data))}) for kind, leaf in kinds if kind]


def by_name(found: Iterable[LeafDigests], *, replicas: bool) -> Digests:
    """Digests of what this rank has, by parameter. Local.

    Args:
        found: by leaf.
        replicas: count those too that another rank has as well.
    """
    digests: Digests = {}
    for leaf, kinds in found:
        if replicas or is_main_replica(leaf.replica_id):
            for kind, digest in kinds.items():
                add_digest(digests, location_of(leaf)[1], kind, digest)
    return digests


def total(shares: Iterable[Digests]) -> Digests:
    """The sum of what several ranks have. Local."""
    result: Digests = {}
    for share in shares:
        for name, kinds in share.items():
            mine = result.setdefault(name, {})
            for kind, digest in kinds.items():
                mine[kind] = (mine.get(kind, 0) + digest) % _MODULUS
    return result


def first_difference(ours: Digests, theirs: Digests) -> str | None:
    """`exp_avg of decoder.layers.0.…`, the first that is not the same in both, or None. Local."""
    for name in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(name, {}), theirs.get(name, {})
        for kind in sorted(mine.keys() | other.keys()):
            if mine.get(kind) != other.get(kind):
                return f"{kind} of {name}"
    return None


def _sliced_digests(part: DistributedOptimizer) -> list[tuple[torch.nn.Parameter, dict[str, int]]]:
    """Digests of each parameter over all data-parallel slices; on the rank that writes them, empty elsewhere."""
    buffers = [] if part.is_stub_optimizer else part.buffers
    parameters = [parameter for buffer in buffers for parameter in buffer.param_index_map]
    # A pipeline stage of dense layers has a part for experts too, without parameters; so have all ranks of its group.
    if not parameters:
        return []
    sums = torch.zeros((len(parameters), len(_KINDS_SLICED)), dtype=torch.int64, device=parameters[0].device)
    for row, parameter in enumerate(parameters):
        if parameter in part.model_param_group_index_map:
            tensors = part._get_main_param_and_optimizer_states(parameter)
            sums[row] = torch.stack([tensor_digest(tensors[kind]) for kind in _KINDS_SLICED])
    dist.all_reduce(sums, group=part.data_parallel_group)
    if part.data_parallel_group.rank() or part.distributed_optimizer_instance_id:
        return []
    rows = [dict(zip(_KINDS_SLICED, row, strict=True)) for row in sums.tolist()]
    return list(zip(parameters, rows, strict=True))
