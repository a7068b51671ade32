"""Two data-parallel ranks: a step that is no number on one of them, and spikes of the gradient. Started by torchrun.

Argument: the JSON file to write.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from tests.helpers.megatron import SMALL
from tests.helpers.training import collected_steps, poisoned, trainer_batches

if TYPE_CHECKING:
    from sparsecod_megatron.metrics import Statistics
    from sparsecod_megatron.train.setup import Trainer

RUN = (
    *SMALL,
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.on_divergence=skip",
    "optimizer.lr=1e-2",
)
STEPS = 6
POISONED = 1


def spikes(trainer: Trainer) -> list[list[Statistics]]:
    """Gradient spikes by step and layer. Collective over all processes."""
    from sparsecod_megatron.metrics.gradient_spikes import GradientSpikesGroup
    from sparsecod_megatron.model import unwrap

    group = GradientSpikesGroup([unwrap(model) for model in trainer.models], trainer.optimizer)
    return collected_steps(trainer, [group], steps=STEPS)


def poisoned_steps(trainer: Trainer) -> list[dict[str, Any]]:
    """Three steps, the second with a loss that is no number on rank 1 alone; this rank's verdicts and weights."""
    from sparsecod_megatron.train.divergence import UpdateJudge
    from sparsecod_megatron.train.step import train_step

    judge = UpdateJudge(trainer.config.train, {})
    per_step = trainer.num_microbatches(trainer.config.train.global_batch_size)

    def poison(batches: Iterator[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        for index, batch in enumerate(batches):
            if index // per_step == POISONED and dist.get_rank() == 1:
                batch = poisoned(batch)
            yield batch

    data = [poison(iterator) for iterator in trainer_batches(trainer)]
    steps = []
    for _ in range(3):
        before = [parameter.detach().clone() for parameter in trainer.models[0].parameters()]
        verdict = train_step(trainer, data, judge=judge).verdict
        after = list(trainer.models[0].parameters())
        changed = any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
        finite = all(bool(parameter.isfinite().all()) for parameter in after)
        steps.append({"diverged": verdict.diverged, "update": verdict.update, "changed": changed, "finite": finite})
    return steps


def main() -> None:
    """Write the file from rank 0."""
    config = load_config(None, list(RUN))
    backend = select_backend()
    from sparsecod_megatron.parallel import running_processes
    from sparsecod_megatron.train.setup import build_trainer

    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        collected = spikes(build_trainer(config, backend, groups))
        verdicts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(verdicts, poisoned_steps(build_trainer(config, backend, groups)))
        if dist.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps({"spikes": collected, "verdicts": verdicts}))


if __name__ == "__main__":
    main()
