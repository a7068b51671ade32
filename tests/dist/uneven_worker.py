"""Uneven gather and reduce-scatter over three gloo ranks: what each gets, in FOLDER/RANK.json. Arguments: FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from sparsecod_megatron.backend import select_backend

SPLITS = (4, 0, 3)
"""Rows of each rank."""


def pieces() -> list[torch.Tensor]:
    """What each rank gathers from, `[rows, 2]`."""
    return [torch.arange(rows * 2.0).view(rows, 2) + 100 * rank for rank, rows in enumerate(SPLITS)]


def main() -> None:
    """Both functions forward and backward; rank r weighs its gradients, and its summand, by r + 1."""
    backend = select_backend()
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    from sparsecod_megatron.parallel import world

    with world(communication=backend.communication):
        rank = dist.get_rank()
        mine = pieces()[rank].requires_grad_()
        gathered = gather_from_sequence_parallel_region(mine, group=dist.group.WORLD, output_split_sizes=list(SPLITS))
        (gathered * (rank + 1)).sum().backward()
        whole = (torch.arange(14.0).view(7, 2) * (rank + 1)).requires_grad_()
        scattered = reduce_scatter_to_sequence_parallel_region(
            whole, group=dist.group.WORLD, input_split_sizes=list(SPLITS)
        )
        scattered.sum().backward()
    found = {"gathered": gathered, "gathered_from": mine.grad, "scattered": scattered, "scattered_from": whole.grad}
    text = json.dumps({name: tensor.tolist() for name, tensor in found.items() if tensor is not None})
    Path(sys.argv[1], f"{rank}.json").write_text(text)


if __name__ == "__main__":
    main()
