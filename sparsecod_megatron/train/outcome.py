"""What every rank must know of a step before its update, in one reduction and with one wait for the device.

The host runs ahead of a GPU: each value that it asks for stops it until everything launched so far has finished. So
loss, gradient norm and flags stay on the device until this one exchange, whose result is the same on every rank, and
whatever follows from it is decided by each rank alone. (An all-reduce of NCCL or gloo leaves identical copies.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from sparsecod_megatron.parallel import all_reduce_sums


@dataclass(frozen=True)
class Outcome:
    """One step before its update, the same on every rank.

    Attributes:
        loss: nats per token, mean over the global batch.
        grad_norm: L2 norm of the whole gradient, rank 0's; non-finite if any rank's is.
        stop: whether any rank was asked to stop.
    """

    loss: float
    grad_norm: float
    stop: bool


def agreed_outcome(loss_sums: Tensor, optimizer: MegatronOptimizer, *, stop: bool) -> Outcome:
    """Exchange what the ranks have. Collective over all processes; waits for the device once.

    Args:
        loss_sums: (Σ loss, Σ tokens) of this rank's micro-batches, [2] in fp64.
        optimizer: its gradients are ready.
        stop: whether this rank was asked to stop.
    """
    squared = squared_grad_norm(optimizer, loss_sums.device)
    # Groups of ranks compute the norm each for themselves: one that is non-finite need not be so on all of them.
    counts = ~squared.isfinite() if dist.get_rank() else torch.ones_like(squared, dtype=torch.bool)
    squared = torch.where(counts, squared, 0.0)
    packed = all_reduce_sums(torch.cat((loss_sums, squared[None], loss_sums.new_full((1,), float(stop)))))
    loss_sum, tokens, squared_norm, stops = packed.tolist()
    return Outcome(loss=loss_sum / tokens, grad_norm=squared_norm**0.5, stop=stops > 0)


@torch.no_grad()
def squared_grad_norm(optimizer: MegatronOptimizer, device: torch.device) -> Tensor:
    """Square of the global gradient norm, [] in fp64. Collective over all processes; does not wait for the device.

    Args:
        optimizer: a chain whose parts hold their gradients.
        device: device of the model, also on a rank without gradients.

    Source: Megatron-Core optimizer/optimizer.py:1270 and optimizer/clip_grads.py:51, which ask the device for it.
    """
    assert isinstance(optimizer, ChainedOptimizer)
    parts = optimizer.chained_optimizers
    if optimizer.grads_states_parallel_group_is_shared():
        gradients = [gradient for part in parts for gradient in part.get_main_grads_for_grad_norm()]
        return _squared(gradients, optimizer.get_grad_stats_parallel_group(), device)
    groups = [(part.get_main_grads_for_grad_norm(), part.get_grad_stats_parallel_group()) for part in parts]
    return torch.stack([_squared(gradients, group, device) for gradients, group in groups]).sum()


def _squared(gradients: list[Tensor], group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """Σ of squares over the ranks of a group, reduced in fp32 as upstream does."""
    total = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
    squared = total.square()
    dist.all_reduce(squared, group=group)
    return squared.double()
