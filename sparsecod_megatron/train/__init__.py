"""The training loop on Megatron-Core's schedules, optimizer and data parallelism."""

from sparsecod_megatron.train.loop import run_training

__all__ = ["run_training"]
