"""The reduction of metrics: sums are carried, reduced once in one packed collective, and divided last."""

from __future__ import annotations

import torch
import torch.distributed as dist


def all_reduce_sums(sums: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum a buffer over ranks, in place. Collective over `group` (None: all processes).

    Replicas add the same value to numerator and denominator, absent pipeline stages add zero to both; so a ratio of two
    entries is the global one under every layout, and no rank needs to know which others hold what.

    Args:
        sums: any shape, the same on every rank; fp32 or fp64.
        group: ranks that take part.

    Returns:
        `sums`, holding the total.
    """
    assert sums.dtype in (torch.float32, torch.float64), "sums need at least fp32"
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
    return sums


def reduced(
    values: torch.Tensor, group: dist.ProcessGroup, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> torch.Tensor:
    """Reduce a tensor over ranks, in place; one that is alone sends nothing. Collective over `group`.

    Args:
        values: any shape and type, the same on every rank.
        group: ranks that take part.
        operation: how.

    Returns:
        `values`, reduced.
    """
    if group.size() > 1:
        dist.all_reduce(values, op=operation, group=group)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds on any process. Collective over all processes; waits for the device."""
    value = torch.full((1,), float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item() > 0)


def wait_for_all(device: torch.device) -> None:
    """Until every process is here. Collective over all processes."""
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
