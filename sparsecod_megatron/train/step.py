"""One optimizer step, and one validation, over all micro-batches of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import optimizer as megatron_optimizer

from sparsecod_megatron.parallel import all_reduce_sums
from sparsecod_megatron.parallel.owned_slices import working_parts
from sparsecod_megatron.seams.plugin import Plugin, StepContext
from sparsecod_megatron.train.balance import balanced_by_step
from sparsecod_megatron.train.divergence import Verdict, require_finite
from sparsecod_megatron.train.forward import Batch
from sparsecod_megatron.train.outcome import agreed_outcome
from sparsecod_megatron.train.passes import forward_backward
from sparsecod_megatron.train.schedule import nominal_lr
from sparsecod_megatron.train.setup import Trainer
from sparsecod_megatron.train.unchanged import KeptBuffers, evaluating


@dataclass(frozen=True)
class StepResult:
    """What one step measured, the same on every rank.

    Attributes:
        loss: nats per token that counts in the loss, mean over the global batch.
        samples: sequences of the global batch.
        tokens: tokens of it.
        grad_norm: L2 norm of the whole gradient before clipping.
        lr: learning rate of parameters that have none of their own.
        verdict: whether the weights changed, and why not.
        stop: whether any rank was asked to stop.
    """

    loss: float
    samples: int
    tokens: int
    grad_norm: float
    lr: float
    verdict: Verdict
    stop: bool


def train_step(
    trainer: Trainer,
    data: Sequence[Iterator[Batch]],
    *,
    global_batch_size: int | None = None,
    judge: Callable[[float, float], Verdict] = require_finite,
    enter: Callable[[str], None] = lambda phase: None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    observing: AbstractContextManager[None] | None = None,
) -> StepResult:
    """Forward and backward over one global batch, then one update. Collective over all processes.

    A step whose update is left out, or whose judge raises, leaves every weight, buffer and moment as it was, and
    Adam's count of updates; data and schedule move on.

    Args:
        trainer: this rank's model, optimizer and schedule.
        data: micro-batches, one iterator a model chunk.
        global_batch_size: sequences of this step; None is the configuration's.
        judge: says from (loss, gradient norm), which are the same on every rank, whether the weights change.
        enter: told each phase as it begins.
        asked_to_stop: whether this rank was; the ranks tell each other.
        observing: entered around the pass that trains and the update; a pass before it, which only counts, is none of
            a statistic's business.

    Raises:
        DivergenceError: loss or gradient norm is NaN or infinite and the judge refuses that; nothing was updated.
    """
    enter("forward and backward")
    for model in trainer.models:
        model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    samples = global_batch_size or trainer.config.train.global_batch_size
    context = trainer.context(trainer.scheduler.num_steps + 1)
    with balanced_by_step(trainer, data, context, samples=samples) as batches, observing or nullcontext():
        buffers = KeptBuffers(trainer.models)
        sums = forward_backward(trainer, batches, context, samples=samples, forward_only=False)
        for plugin in trainer.plugins:
            plugin.on_gradients(context)
        # The schedule counts from 1, so that the first step of a warm-up already moves the weights.
        trainer.scheduler.step(increment=1)
        enter("optimizer")
        trainer.optimizer.prepare_grads()
        found = agreed_outcome(sums, trainer.optimizer, stop=asked_to_stop())
        verdict = _judge(judge, found.loss, found.grad_norm, buffers)
        if verdict.update:
            with _after_update(trainer, context):
                _update(trainer, found.grad_norm)
        for plugin in trainer.plugins:
            plugin.step_ended(context, updated=verdict.update)
    lr = nominal_lr(trainer.scheduler)
    # Tokens that were computed, also where only answers count in the loss.
    tokens = samples * trainer.config.data.seq_length
    return StepResult(samples=samples, tokens=tokens, lr=lr, verdict=verdict, **vars(found))


def _judge(judge: Callable[[float, float], Verdict], loss: float, grad_norm: float, buffers: KeptBuffers) -> Verdict:
    """The verdict; if it is to leave the step out, or raises, the buffers are put back."""
    update = False
    try:
        verdict = judge(loss, grad_norm)
        update = verdict.update
        return verdict
    finally:
        if not update:
            buffers.restore()


def evaluate(trainer: Trainer, data: Sequence[Iterator[Batch]], *, num_steps: int) -> float:
    """Mean loss over `num_steps` global batches, in nats per token. Collective over all processes.

    Nothing of the training changes: no weight, buffer, random state or mode. Weights that `overlap_param_gather` has
    not gathered yet are gathered by the forward passes.
    """
    samples = trainer.config.train.global_batch_size
    context = trainer.context(trainer.scheduler.num_steps)
    with evaluating(trainer.models):
        sums = [forward_backward(trainer, data, context, samples=samples, forward_only=True) for _ in range(num_steps)]
    total, count = 0.0, 0
    for loss_sum, tokens_of_replicas in all_reduce_sums(torch.stack(sums)).tolist():
        tokens = round(tokens_of_replicas / trainer.groups.tp.size())
        total, count = total + loss_sum / tokens_of_replicas * tokens, count + tokens
    return total / count


@contextmanager
def _after_update(trainer: Trainer, context: StepContext) -> Iterator[None]:
    """Let the plugins act on what each optimizer steps inside the block, before its weights are gathered."""
    with ExitStack() as hooks:
        for plugin in trainer.plugins:
            assert isinstance(trainer.optimizer, megatron_optimizer.ChainedOptimizer)
            for part in working_parts(trainer.optimizer):

                def after(optimizer: Any, *_: Any, plugin: Plugin = plugin) -> None:
                    plugin.after_update(context, optimizer)

                hooks.callback(part.optimizer.register_step_post_hook(after).remove)
        yield


def _update(trainer: Trainer, grad_norm: float) -> None:
    """Clip the gradient of this norm, and step."""
    optimizer, clip = trainer.optimizer, trainer.config.optimizer.clip_grad
    assert isinstance(optimizer, megatron_optimizer.ChainedOptimizer)
    if clip > 0:
        for part in optimizer.chained_optimizers:
            if parameters := part.get_parameters():
                megatron_optimizer.clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=grad_norm)
    optimizer.step_with_ready_grads()
