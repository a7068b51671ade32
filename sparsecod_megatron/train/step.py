"""One optimizer step, and one validation, over all micro-batches of all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from sparsecod_megatron.parallel import all_reduce_sums
from sparsecod_megatron.train.forward import Batch, make_forward_step
from sparsecod_megatron.train.setup import Trainer


class DivergenceError(ArithmeticError):
    """The loss or the gradient is no longer a number; raised on all ranks alike, before the weights change."""


@dataclass(frozen=True)
class StepResult:
    """What one step measured, the same on every rank.

    Attributes:
        loss: nats per token, mean over the global batch.
        tokens: that counted in it.
        grad_norm: L2 norm of the whole gradient before clipping.
        lr: learning rate used.
    """

    loss: float
    tokens: int
    grad_norm: float
    lr: float


def train_step(trainer: Trainer, data: Sequence[Iterator[Batch]]) -> StepResult:
    """Forward and backward over one global batch, then one update. Collective over all processes.

    Args:
        trainer: this rank's model, optimizer and schedule.
        data: micro-batches, one iterator a model chunk.

    Raises:
        DivergenceError: loss or gradient norm is NaN or infinite; nothing was updated.
    """
    for model in trainer.models:
        model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    loss, tokens = _forward_backward(trainer, data, forward_only=False)
    # The schedule counts from 1, so that the first step of a warm-up already moves the weights.
    trainer.scheduler.step(increment=1)
    lr = trainer.optimizer.param_groups[0]["lr"]
    grad_norm = _update(trainer, loss)
    return StepResult(loss=loss, tokens=tokens, grad_norm=grad_norm, lr=lr)


def evaluate(trainer: Trainer, data: Sequence[Iterator[Batch]], *, num_steps: int) -> float:
    """Mean loss over `num_steps` global batches, in nats per token. Collective over all processes."""
    for model in trainer.models:
        model.eval()
    total, count = 0.0, 0
    for _ in range(num_steps):
        loss, tokens = _forward_backward(trainer, data, forward_only=True)
        total, count = total + loss * tokens, count + tokens
    for model in trainer.models:
        model.train()
    return total / count


def _forward_backward(trainer: Trainer, data: Sequence[Iterator[Batch]], *, forward_only: bool) -> tuple[float, int]:
    """(mean loss, tokens) of one global batch, the same on every rank."""
    config, groups = trainer.config, trainer.groups
    parallel = config.parallel
    schedule = get_forward_backward_func(
        pp_size=parallel.pipeline_model_parallel_size, vp_size=parallel.virtual_pipeline_model_parallel_size
    )
    reports = schedule(
        forward_step_func=make_forward_step(groups.cp, trainer.backend.device),
        data_iterator=list(data),
        model=list(trainer.models),
        num_microbatches=trainer.num_microbatches,
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        forward_only=forward_only,
    )
    sums = torch.zeros(2, dtype=torch.float64, device=trainer.backend.device)
    for report in reports:
        sums += report["loss"]
    # Tensor-parallel replicas add the same to both sums; earlier pipeline stages add nothing.
    loss_sum, tokens = all_reduce_sums(sums).tolist()
    return loss_sum / tokens, round(tokens / groups.tp.size())


def _update(trainer: Trainer, loss: float) -> float:
    """Clip and step, unless the numbers are broken; returns the gradient's norm before clipping."""
    optimizer, clip = trainer.optimizer, trainer.config.optimizer.clip_grad
    assert isinstance(optimizer, megatron_optimizer.ChainedOptimizer)
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise DivergenceError(f"loss {loss}, gradient norm {grad_norm}; lower optimizer.lr or look at the data")
    if clip > 0:
        for part in optimizer.chained_optimizers:
            megatron_optimizer.clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=clip, total_norm=grad_norm)
    optimizer.step_with_ready_grads()
    return grad_norm
