"""Uneven gather and reduce-scatter over three gloo ranks against what they mean. Started by torchrun."""

from __future__ import annotations

import torch
import torch.distributed as dist

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.parallel import world


def main() -> None:
    """Fails on any rank where a value is wrong."""
    backend = select_backend()
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    with world(communication=backend.communication, device=backend.device):
        rank, splits = dist.get_rank(), [4, 0, 3]
        pieces = [torch.arange(rows * 2.0).view(rows, 2) + 100 * index for index, rows in enumerate(splits)]
        mine = pieces[rank].clone().requires_grad_()
        gathered = gather_from_sequence_parallel_region(mine, group=dist.group.WORLD, output_split_sizes=splits)
        assert torch.equal(gathered, torch.cat(pieces)), gathered
        (gathered * (rank + 1)).sum().backward()
        # The gradient of a gather is the reduce-scatter: 1 + 2 + 3 from the three ranks' weights.
        assert torch.equal(mine.grad, torch.full_like(mine, 6.0)), mine.grad

        whole = (torch.arange(14.0).view(7, 2) * (rank + 1)).requires_grad_()
        scattered = reduce_scatter_to_sequence_parallel_region(whole, group=dist.group.WORLD, input_split_sizes=splits)
        expected = torch.split(torch.arange(14.0).view(7, 2) * 6, splits)[rank]
        assert torch.equal(scattered, expected), scattered
        scattered.sum().backward()
        assert torch.equal(whole.grad, torch.ones_like(whole)), whole.grad


if __name__ == "__main__":
    main()
