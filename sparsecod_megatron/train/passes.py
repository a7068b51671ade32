"""One pass of Megatron-Core's schedule over the micro-batches of a global batch, with or without gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from sparsecod_megatron.parallel.messages import StateCommunicator
from sparsecod_megatron.parallel.weights import gather_weights
from sparsecod_megatron.seams.mechanism import ResidualState, residual_state, token_halo
from sparsecod_megatron.seams.plugin import StepContext, effective_weights, extra_losses
from sparsecod_megatron.train.forward import AnswerReport, Batch, ForwardStep, make_forward_step
from sparsecod_megatron.train.setup import Trainer


def forward_backward(
    trainer: Trainer,
    data: Sequence[Iterator[Batch]],
    context: StepContext,
    *,
    samples: int,
    forward_only: bool,
    report: AnswerReport | None = None,
    entries: int = 2,
) -> torch.Tensor:
    """Forward over one global batch and, unless `forward_only`, backward. Collective over all processes.

    Args:
        trainer: this rank's model and layout.
        data: micro-batches, one iterator a model chunk.
        context: where the run is.
        samples: sequences of the global batch.
        forward_only: compute no gradient; the pass keeps no activations either.
        report: sums to be reported in place of the loss; with `forward_only`.
        entries: their number.

    Returns:
        This rank's (Σ loss in nats, Σ tokens that counted), [2] in fp64 on the device; tensor-parallel replicas hold
        the same, earlier pipeline stages zeros. With `report`, the sum of what it gave, [entries].
    """
    config, groups = trainer.config, trainer.groups
    count = trainer.num_microbatches(samples)
    forward_step = make_forward_step(
        groups.cp,
        trainer.backend.device,
        mask_documents=config.data.reset_attention_mask,
        token_halo=token_halo(config),
        answers=trainer.answers,
        report=report,
    )
    if any(plugin.has_window for plugin in trainer.plugins):
        gather_weights(trainer.models)
    data = list(data)
    terms: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if not forward_only:
        terms = extra_losses(trainer.plugins, context, count)
        for companions in filter(None, (plugin.companions() for plugin in trainer.plugins)):
            data, forward_step = _seen_before(trainer, companions, data, forward_step, count)
    # Upstream's `forward_only` leaves autograd on: activations are kept, and routers count the tokens as trained on.
    with torch.set_grad_enabled(not forward_only), effective_weights(trainer.plugins, context), terms:
        reports = _scheduled(trainer, trainer.models, data, forward_step, count, forward_only=forward_only)
    sums = torch.zeros(entries, dtype=torch.float64, device=trainer.backend.device)
    for found in reports:
        sums += found["loss"]
    return sums


def _scheduled(
    trainer: Trainer,
    models: Sequence[torch.nn.Module],
    data: list[Iterator[Batch]],
    forward_step: ForwardStep,
    count: int,
    *,
    forward_only: bool,
) -> list[Any]:
    """Megatron-Core's schedule over `count` micro-batches; what the forward steps report. Collective."""
    config, parallel = trainer.config, trainer.config.parallel
    schedule = get_forward_backward_func(
        pp_size=parallel.pipeline_model_parallel_size, vp_size=parallel.virtual_pipeline_model_parallel_size
    )
    size, length = config.train.micro_batch_size, config.data.seq_length
    packed = config.data.reset_attention_mask
    messages: dict[str, Any] = {}
    state = residual_state(config)
    if state != ResidualState() and parallel.pipeline_model_parallel_size > 1:
        groups, dtype = trainer.groups, torch.float32 if state.in_fp32 else None
        communicator = StateCommunicator(groups.pp, get_model_config(models[0]), state.columns, dtype)
        messages = {"p2p_communicator": communicator, "pg_collection": groups}
    reports: list[Any] = schedule(
        forward_step_func=forward_step,
        data_iterator=data,
        model=list(models),
        num_microbatches=count,
        seq_length=size * length if packed else length,
        micro_batch_size=1 if packed else size,
        forward_only=forward_only,
        **messages,
    )
    return reports


def _seen_before(
    trainer: Trainer,
    companions: Sequence[torch.nn.Module],
    data: list[Iterator[Batch]],
    forward_step: ForwardStep,
    count: int,
) -> tuple[list[Iterator[Batch]], ForwardStep]:
    """Data and forward step of the run's models, whose companions see each micro-batch first. Collective.

    One stage alone sees a micro-batch just before, so that nothing is kept of others. Where there are several,
    each needs what the stages before it have made of it, which takes a pass of its own over all.
    """
    if trainer.groups.pp.size() == 1:

        def both(data: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
            batch = next(data)
            with torch.no_grad():
                forward_step(iter([batch]), companions[0])
            return forward_step(iter([batch]), model)

        return data, both

    def seeing(data: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        return forward_step(data, model)[0], _no_loss

    kept = [[next(iterator) for _ in range(count)] for iterator in data]
    with torch.no_grad():
        _scheduled(trainer, companions, [iter(batches) for batches in kept], seeing, count, forward_only=True)
    return [iter(batches) for batches in kept], forward_step


def _no_loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """What a schedule takes for the loss of a model that has none."""
    return output.new_zeros(()), torch.ones((), dtype=torch.int), {}
