"""Trainers in this process, and steps of them with the clock stopped only when the card has done its work."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sparsecod_megatron.backend import Backend, select_backend
from sparsecod_megatron.config import RunConfig, load_config
from tools.gpu_bring_up.process import ROOT
from tools.gpu_bring_up.sizes import sizes

if TYPE_CHECKING:
    from sparsecod_megatron.train.setup import Trainer


def large_config(cuda: bool, *overrides: str) -> RunConfig:
    """dense-1B, or what stands in for it, with a warm-up so short that its first steps learn."""
    common = (*sizes(cuda).speed, "schedule.lr_warmup_steps=2")
    return load_config(ROOT / "examples/configs/dense_1B.yaml", [*common, *overrides])


def backend_for(config: RunConfig, *, transformer_engine: bool) -> Backend:
    """This process's, with Transformer Engine's layers only if it can be counted on."""
    backend = select_backend(config.backend, precision=config.precision)
    return replace(backend, transformer_engine=backend.transformer_engine and transformer_engine)


@contextlib.contextmanager
def trainer_of(config: RunConfig, *, transformer_engine: bool) -> Iterator[Trainer]:
    """A trainer on this process while the block runs; its memory is free afterwards."""
    backend = backend_for(config, transformer_engine=transformer_engine)
    from sparsecod_megatron.audit.measure import release
    from sparsecod_megatron.parallel import running_processes
    from sparsecod_megatron.train.setup import build_trainer

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        trainer = build_trainer(config, backend, groups)
        yield trainer
        release(trainer)
    del trainer, groups
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed_steps(trainer: Trainer, data: list[Iterator[dict[str, Any]]], steps: int) -> Iterator[tuple[float, float]]:
    """(loss, seconds) of each step, until the card is idle again."""
    from sparsecod_megatron.train.clock import synchronize
    from sparsecod_megatron.train.step import train_step

    for _ in range(steps):
        synchronize(trainer.backend.device)
        began = time.perf_counter()
        loss = train_step(trainer, data).loss
        synchronize(trainer.backend.device)
        yield loss, time.perf_counter() - began
