"""One pass of Megatron-Core's schedule over the micro-batches of a global batch, with or without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from sparsecod_megatron.parallel.weights import gather_weights
from sparsecod_megatron.seams.mechanism import token_halo
from sparsecod_megatron.seams.plugin import StepContext, effective_weights
from sparsecod_megatron.train.forward import Batch, make_forward_step
from sparsecod_megatron.train.setup import Trainer


def forward_backward(
    trainer: Trainer, data: Sequence[Iterator[Batch]], context: StepContext, *, samples: int, forward_only: bool
) -> torch.Tensor:
    """Forward over one global batch and, unless `forward_only`, backward. Collective over all processes.

    Args:
        trainer: this rank's model and layout.
        data: micro-batches, one iterator a model chunk.
        context: where the run is.
        samples: sequences of the global batch.
        forward_only: compute no gradient; the pass keeps no activations either.

    Returns:
        This rank's (Σ loss in nats, Σ tokens that counted), [2] in fp64 on the device; tensor-parallel replicas hold
        the same, earlier pipeline stages zeros.
    """
    config, groups = trainer.config, trainer.groups
    parallel = config.parallel
    schedule = get_forward_backward_func(
        pp_size=parallel.pipeline_model_parallel_size, vp_size=parallel.virtual_pipeline_model_parallel_size
    )
    size, length = config.train.micro_batch_size, config.data.seq_length
    packed = config.data.reset_attention_mask
    forward_step = make_forward_step(
        groups.cp, trainer.backend.device, mask_documents=packed, token_halo=token_halo(config)
    )
    if any(plugin.has_window for plugin in trainer.plugins):
        gather_weights(trainer.models)
    # Upstream's `forward_only` leaves autograd on: activations are kept, and routers count the tokens as trained on.
    with torch.set_grad_enabled(not forward_only), effective_weights(trainer.plugins, context):
        reports = schedule(
            forward_step_func=forward_step,
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
    return sums
