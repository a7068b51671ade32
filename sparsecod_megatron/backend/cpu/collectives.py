"""Gather and reduce-scatter where gloo lacks them or does needless work.

Experts under tensor parallelism receive different numbers of tokens on each rank, so Megatron gathers and scatters
unequal pieces, which gloo cannot: all-to-all can. And a group of one rank, whose piece is the whole, copies all
gradients three times and all parameters once a step to leave them as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.tensor_parallel import mappings

from sparsecod_megatron.backend.redirection import Redirection

_gather_even = mappings._gather_along_first_dim
_reduce_scatter_even = mappings._reduce_scatter_along_first_dim


def gather_along_first_dim(
    input_: torch.Tensor,
    group: dist.ProcessGroup,
    output_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """Concatenate every rank's rows. Collective over `group`.

    Args:
        input_: [rows_of_this_rank, ...].
        group: ranks to gather from.
        output_split_sizes: rows of each rank; None for equal ones.
        use_global_buffer: as upstream, for equal splits only.

    Returns:
        [sum of rows, ...].
    """
    if output_split_sizes is None or group.size() == 1:
        return _gather_even(input_, group, output_split_sizes, use_global_buffer)
    output = input_.new_empty((sum(output_split_sizes), *input_.shape[1:]))
    repeated = input_.contiguous().repeat((group.size(), *[1] * (input_.dim() - 1)))
    dist.all_to_all_single(output, repeated, output_split_sizes, [input_.shape[0]] * group.size(), group=group)
    return output


def reduce_scatter_along_first_dim(
    input_: torch.Tensor,
    group: dist.ProcessGroup,
    input_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """Sum over ranks, each keeping its own rows. Collective over `group`.

    Args:
        input_: [sum of rows, ...].
        group: ranks to reduce over.
        input_split_sizes: rows each rank keeps; None for equal ones.
        use_global_buffer: as upstream, for equal splits only.

    Returns:
        [rows_of_this_rank, ...].
    """
    if input_split_sizes is None or group.size() == 1:
        return _reduce_scatter_even(input_, group, input_split_sizes, use_global_buffer)
    rows = input_split_sizes[group.rank()]
    received = input_.new_empty((group.size() * rows, *input_.shape[1:]))
    dist.all_to_all_single(received, input_.contiguous(), [rows] * group.size(), input_split_sizes, group=group)
    return received.view(group.size(), rows, *input_.shape[1:]).sum(dim=0)


def skipped_by_one_rank(collective: Any) -> Callable[..., Any]:
    """The collective (output, input, group=…), skipped by a group of one rank that would write what is there."""

    @functools.wraps(collective)
    def run(output: torch.Tensor, input: torch.Tensor, *args: Any, group: dist.ProcessGroup, **kwargs: Any) -> Any:
        if group.size() == 1 and output.data_ptr() == input.data_ptr():
            return None
        return collective(output, input, *args, group=group, **kwargs)

    return run


def redirections() -> list[Redirection]:
    """Redirections of Megatron's uneven collectives, and of those that a single rank runs over its buffers."""
    reason = "gloo's all_gather and reduce_scatter need equal pieces"
    buffers = "distributed/param_and_grad_buffer.py"
    return [
        *(
            Redirection(
                param_and_grad_buffer,
                name,
                skipped_by_one_rank(getattr(param_and_grad_buffer, name, None)),
                f"{buffers}:{line}",
                "gloo copies within a group of one rank",
                speed_only=True,
            )
            for name, line in (("dist_reduce_scatter_func", 443), ("dist_all_gather_func", 285))
        ),
        Redirection(
            mappings, "_gather_along_first_dim", gather_along_first_dim, "tensor_parallel/mappings.py:150", reason
        ),
        Redirection(
            mappings,
            "_reduce_scatter_along_first_dim",
            reduce_scatter_along_first_dim,
            "tensor_parallel/mappings.py:193",
            reason,
        ),
    ]
