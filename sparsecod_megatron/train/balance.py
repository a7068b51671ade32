"""The experts' load over a whole step, which `global_aux_loss` needs before the first micro-batch is trained on.

f of a step is known once all its micro-batches have been routed, but the gradient of the first already needs it. So a
step of several micro-batches begins with a forward pass over all of them, without gradients and with the random
numbers of the pass that trains: f is exact, the same in every layout, and nothing of it has to be carried from step to
step or kept in a checkpoint. That costs a third more of a step's computation. With one micro-batch per rank there is no
such pass.

Source: Qiu et al., Demons in the Detail (arXiv 2501.11873), who take f of the micro-batches so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from sparsecod_megatron.checkpoint.random_states import unchanged_random_states
from sparsecod_megatron.model.router import StepRouter
from sparsecod_megatron.parallel import all_reduce_sums
from sparsecod_megatron.seams.plugin import StepContext
from sparsecod_megatron.train.forward import Batch
from sparsecod_megatron.train.passes import forward_backward
from sparsecod_megatron.train.setup import Trainer


@contextmanager
def balanced_by_step(
    trainer: Trainer, data: Sequence[Iterator[Batch]], context: StepContext, *, samples: int
) -> Iterator[Sequence[Iterator[Batch]]]:
    """Give every router the load of the step that is trained inside the block. Collective over all processes.

    Args:
        trainer: this rank's model and layout.
        data: micro-batches, one iterator a model chunk.
        context: the step.
        samples: sequences of the step.

    Yields:
        The step's micro-batches; `data` itself where no router asks for more than it sees.
    """
    model, count = trainer.config.model, trainer.num_microbatches(samples)
    if not model.is_moe or model.moe_router_load_balancing_type != "global_aux_loss" or count == 1:
        yield data
        return
    kept = [[next(iterator) for _ in range(count)] for iterator in data]
    modules = (module for model in trainer.models for module in model.modules())
    routers = [module for module in modules if isinstance(module, StepRouter) and module.balances_steps]
    for router in routers:
        router.counted = torch.zeros(router.num_experts, dtype=torch.float64, device=trainer.backend.device)
    try:
        with unchanged_random_states():
            again = [iter(batches) for batches in kept]
            forward_backward(trainer, again, context, samples=samples, forward_only=True)
        _share_loads(routers)
        yield [iter(batches) for batches in kept]
    finally:
        for router in routers:
            router.counted = router.step_load = None


def _share_loads(routers: Sequence[StepRouter]) -> None:
    """From each rank's counts to shares over all tokens. Collective over the processes of a pipeline stage."""
    counts = [router.counted for router in routers if router.counted is not None]
    if not counts:
        return
    stacked = torch.stack(counts)
    all_reduce_sums(stacked, routers[0].tp_dp_cp_group)
    for router, load in zip(routers, stacked / stacked.sum(dim=1, keepdim=True), strict=True):
        router.counted, router.step_load = None, load.float()
