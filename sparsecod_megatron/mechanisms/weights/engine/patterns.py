"""Which weights compete with each other: n of m neighbours along a matrix's input."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.parameter_kind import ParameterKind


def parsed_pattern(text: str) -> tuple[int, int] | None:
    """(n, m) of `2:4`, or None if it is not a pattern with 1 ≤ n < m."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None:
        return None
    n, m = int(found[1]), int(found[2])
    return (n, m) if 1 <= n < m else None


def smallest_of_each(weight: Tensor, n: int, m: int) -> Tensor:
    """True where a weight is not among the n largest magnitudes of its group; of equal ones the first is the larger.

    Args:
        weight: [out, in], `in` a multiple of m.
        n: kept of each group.
        m: neighbours along `in`.
    """
    # One tensor for each place in the groups: passes over long rows, where a group's own few would be slow to walk.
    places = [place.abs() for place in weight.detach().unflatten(-1, (-1, m)).unbind(-1)]
    # How many of its group are larger: all later ones, until one loses.
    counts = torch.int8 if m <= 128 else torch.int16
    larger = [torch.full_like(place, m - 1 - at, dtype=counts) for at, place in enumerate(places)]
    for first in range(m):
        for second in range(first + 1, m):
            wins = (places[first] >= places[second]).view(torch.int8)
            larger[second] += wins
            larger[first] -= wins
    dead = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    for count, place in zip(larger, dead.unflatten(-1, (-1, m)).unbind(-1), strict=True):
        torch.ge(count, n, out=place)
    return dead


def exceeding_groups(weight: Tensor, n: int, m: int) -> int:
    """Number of groups with more than n live weights.

    Args:
        weight: [out, in], `in` a multiple of m.
        n: allowed in each group.
        m: neighbours along `in`.
    """
    return int(((weight != 0).unflatten(-1, (-1, m)).sum(-1, dtype=torch.uint8) > n).sum())


def indivisible_groups(key: str, pattern: str, rows: list[ParameterKind], config: RunConfig) -> Iterator[str]:
    """The problem, if there is one, of groups that matrices or their tensor-parallel shards cannot hold.

    Args:
        key: of the pattern, for the message.
        pattern: `n:m`.
        rows: of the matrices.
        config: the run.
    """
    found = parsed_pattern(pattern)
    if found is None:
        yield f"{key}: {pattern!r} is not a pattern n:m with n below m; write, for example, '2:4'"
        return
    parallel, seen = config.parallel, set()
    for row in rows:
        split = {
            "tensor": ("parallel.tensor_model_parallel_size", parallel.tensor_model_parallel_size),
            "expert": ("parallel.expert_tensor_parallel_size", parallel.expert_tensor_size),
        }.get(row.split, ("", 1))
        ranks = split[1] if row.dimension == 1 else 1
        if row.shape[1] % (found[1] * ranks) and row.name not in seen:
            seen.add(row.name)
            shared = f" over {split[0]}={ranks}" if ranks > 1 else ""
            inputs = f"the {row.shape[1]} inputs of {row.name}{shared}"
            yield f"{key}: {pattern} has groups of {found[1]}, which do not divide {inputs}; change one of them"
