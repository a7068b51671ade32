"""Walks over the sharded state from which Megatron-Core writes a checkpoint and into which it reads one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory

Leaf: TypeAlias = ShardedTensor | ShardedTensorFactory


def leaves(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """What a nested state holds, each with its path. Local."""
    if isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, (*path, key))
    else:
        yield path, state


def sharded_leaves(state: ShardedStateDict) -> Iterator[tuple[tuple[Any, ...], Leaf]]:
    """The tensors of a sharded state, each with its path. Local."""
    for path, leaf in leaves(state):
        if isinstance(leaf, ShardedTensor | ShardedTensorFactory):
            yield path, leaf


def pieces(leaf: Leaf) -> Iterator[ShardedTensor]:
    """What is saved of a leaf: itself, or the parts that it is saved in. Local."""
    if isinstance(leaf, ShardedTensor):
        yield leaf
    else:
        yield from (part for part in nested_values(leaf.build()) if isinstance(part, ShardedTensor))
