"""One optimizer step, and one validation, over all micro-batches of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from sparsecod_megatron.parallel import all_reduce_sums
from sparsecod_megatron.train.divergence import Verdict, require_finite
from sparsecod_megatron.train.forward import Batch, make_forward_step
from sparsecod_megatron.train.schedule import nominal_lr
from sparsecod_megatron.train.setup import Trainer


@dataclass(frozen=True)
class StepResult:
    """What one step measured, the same on every rank.

    Attributes:
        loss: nats per token, mean over the global batch.
        samples: sequences of the global batch.
        tokens: that counted in it.
        grad_norm: L2 norm of the whole gradient before clipping.
        lr: learning rate used, of parameters that have none of their own.
        verdict: whether the weights changed, and why not.
    """

    loss: float
    samples: int
    tokens: int
    grad_norm: float
    lr: float
    verdict: Verdict


def train_step(
    trainer: Trainer,
    data: Sequence[Iterator[Batch]],
    *,
    global_batch_size: int | None = None,
    judge: Callable[[float, float], Verdict] = require_finite,
    enter: Callable[[str], None] = lambda phase: None,
) -> StepResult:
    """Forward and backward over one global batch, then one update. Collective over all processes.

    Args:
        trainer: this rank's model, optimizer and schedule.
        data: micro-batches, one iterator a model chunk.
        global_batch_size: sequences of this step; None is the configuration's.
        judge: says from (loss, gradient norm), on all ranks alike, whether the weights change.
        enter: told each phase as it begins.

    Raises:
        DivergenceError: loss or gradient norm is NaN or infinite and the judge refuses that; nothing was updated.
    """
    enter("forward and backward")
    for model in trainer.models:
        model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    samples = global_batch_size or trainer.config.train.global_batch_size
    loss, tokens = _forward_backward(trainer, data, samples=samples, forward_only=False)
    # The schedule counts from 1, so that the first step of a warm-up already moves the weights.
    trainer.scheduler.step(increment=1)
    enter("optimizer")
    optimizer = trainer.optimizer
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    verdict = judge(loss, grad_norm)
    if verdict.update:
        _update(trainer, grad_norm)
    lr = nominal_lr(trainer.scheduler)
    return StepResult(loss=loss, samples=samples, tokens=tokens, grad_norm=grad_norm, lr=lr, verdict=verdict)


def evaluate(trainer: Trainer, data: Sequence[Iterator[Batch]], *, num_steps: int) -> float:
    """Mean loss over `num_steps` global batches, in nats per token. Collective over all processes."""
    for model in trainer.models:
        model.eval()
    total, count = 0.0, 0
    for _ in range(num_steps):
        samples = trainer.config.train.global_batch_size
        loss, tokens = _forward_backward(trainer, data, samples=samples, forward_only=True)
        total, count = total + loss * tokens, count + tokens
    for model in trainer.models:
        model.train()
    return total / count


def _forward_backward(
    trainer: Trainer, data: Sequence[Iterator[Batch]], *, samples: int, forward_only: bool
) -> tuple[float, int]:
    """(mean loss, tokens) of one global batch, the same on every rank."""
    config, groups = trainer.config, trainer.groups
    parallel = config.parallel
    schedule = get_forward_backward_func(
        pp_size=parallel.pipeline_model_parallel_size, vp_size=parallel.virtual_pipeline_model_parallel_size
    )
    size, length = config.train.micro_batch_size, config.data.seq_length
    packed = config.data.reset_attention_mask
    reports = schedule(
        forward_step_func=make_forward_step(groups.cp, trainer.backend.device, mask_documents=packed),
        data_iterator=list(data),
        model=list(trainer.models),
        num_microbatches=trainer.num_microbatches(samples),
        seq_length=size * length if packed else length,
        micro_batch_size=1 if packed else size,
        forward_only=forward_only,
    )
    sums = torch.zeros(2, dtype=torch.float64, device=trainer.backend.device)
    for report in reports:
        sums += report["loss"]
    # Tensor-parallel replicas add the same to both sums; earlier pipeline stages add nothing.
    loss_sum, tokens = all_reduce_sums(sums).tolist()
    return loss_sum / tokens, round(tokens / groups.tp.size())


def _update(trainer: Trainer, grad_norm: float) -> None:
    """Clip the gradient of this norm, and step."""
    optimizer, clip = trainer.optimizer, trainer.config.optimizer.clip_grad
    assert isinstance(optimizer, megatron_optimizer.ChainedOptimizer)
    if clip > 0:
        for part in optimizer.chained_optimizers:
            if parameters := part.get_parameters():
                megatron_optimizer.clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=grad_norm)
    optimizer.step_with_ready_grads()
