"""Two data-parallel ranks save after a step whose new weights nobody has gathered. Started by torchrun.

Arguments: the folder to save into, and the JSON file for what each rank is told.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import CheckpointError
from tests.dist.layouts import BUCKETS
from tests.helpers.megatron import SMALL
from tests.helpers.training import trainer_batches

RUN = (*SMALL, *BUCKETS, "train.global_batch_size=4", "train.micro_batch_size=2", "schedule.lr_warmup_steps=0")


def main() -> None:
    """Write the file from rank 0."""
    config = load_config(None, [*RUN, "optimizer.lr=1e-2", "precision.dtype=bf16"])
    backend = select_backend()
    from sparsecod_megatron.checkpoint import native
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.parallel import running_processes
    from sparsecod_megatron.train.setup import build_trainer
    from sparsecod_megatron.train.step import train_step

    def nothing(models: Any) -> None:
        """In the place of what gathers weights."""

    native.gather_weights = nothing
    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        trainer = build_trainer(config, backend, groups)
        train_step(trainer, trainer_batches(trainer))
        told: list[Any] = [None] * dist.get_world_size()
        try:
            save_checkpoint(Path(sys.argv[1]), trainer, state=TrainState(step=1, optimizer_steps=1))
            reason = "saved"
        except CheckpointError as error:
            reason = str(error)
        dist.all_gather_object(told, reason)
        if dist.get_rank() == 0:
            Path(sys.argv[2]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
