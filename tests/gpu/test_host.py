"""The host runs ahead of the card: how often a step waits for it, and on which device groups of processes meet."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist

from tests.helpers.training import small_trainer, trainer_batches

pytestmark = pytest.mark.gpu


def test_a_step_waits_once() -> None:
    """CUDA's own count, of a dense model in bf16 whose kernels are compiled already."""
    from sparsecod_megatron.train.divergence import UpdateJudge
    from sparsecod_megatron.train.step import train_step

    with small_trainer("precision.dtype=bf16") as trainer:
        judge, data = UpdateJudge(trainer.config.train, {}), trainer_batches(trainer)
        pinned = [({name: value.pin_memory() for name, value in batch.items()} for batch in data[0])]
        for _ in range(3):
            train_step(trainer, pinned, judge=judge)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                train_step(trainer, pinned, judge=judge)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(entry.message) for entry in found if "synchronizing" in str(entry.message)]
    assert len(waits) == 1, waits


def test_groups_are_made_one_by_one_and_meet_here() -> None:
    """Bound to a device, each later group would be a split on all ranks; without, barriers have to be told theirs."""
    from sparsecod_megatron.parallel import wait_for_all

    with small_trainer() as trainer:
        assert dist.distributed_c10d._get_default_group().bound_device_id is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wait_for_all(trainer.backend.device)
