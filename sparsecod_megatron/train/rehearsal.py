"""Repeats steps of a run from its checkpoint, to compare them with what the run recorded; writes nothing."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparsecod_megatron.backend import Backend
from sparsecod_megatron.checkpoint.native import load_checkpoint
from sparsecod_megatron.checkpoint.paths import run_of, step_dirs
from sparsecod_megatron.checkpoint.state import read_state
from sparsecod_megatron.config import ParallelConfig, RunConfig
from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR, CONFIG_FILE, METRICS_FILE
from sparsecod_megatron.parallel import running_processes
from sparsecod_megatron.train.data import RunData, prepare_data
from sparsecod_megatron.train.divergence import UpdateJudge
from sparsecod_megatron.train.ramp import global_batch_size
from sparsecod_megatron.train.run_dir import restore_products
from sparsecod_megatron.train.setup import build_trainer
from sparsecod_megatron.train.step import train_step

STEPS = 2
"""The first shows the weights, the second what the optimizer made of them."""
METRICS_COMPARED = ("loss", "grad_norm")
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-3}
"""Relative tolerance of a loss under another layout, by precision; of gradient norms, ten times as much."""


@dataclass(frozen=True)
class Recorded:
    """Steps that a run took after one of its checkpoints.

    Attributes:
        step_dir: the checkpoint.
        records: lines of metrics.jsonl, one a step.
        config: file of what was in force.
        layout: layout of the processes that took them.
    """

    step_dir: Path
    records: list[dict[str, Any]]
    config: Path
    layout: dict[str, Any]


def recorded_steps(run_dir: Path, *, until: Path) -> Recorded | None:
    """What can be rehearsed: the steps after the newest checkpoint that has `STEPS` recorded ones behind it. Local.

    Args:
        run_dir: RUN.
        until: the newest checkpoint to look at.

    Raises:
        CheckpointError: a checkpoint's state that cannot be read.
    """
    path = run_dir / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = {record["step"]: record for record in map(json.loads, lines) if "loss" in record}
    steps = step_dirs(run_dir / CHECKPOINTS_DIR)
    for step in sorted(steps, reverse=True):
        behind = [records.get(step + number) for number in range(1, STEPS + 1)]
        taken = [record for record in behind if record is not None]
        if steps[step].name <= until.name and len(taken) == STEPS:
            # Who saved next has taken them; the run may have changed hands at the checkpoint.
            following = min((later for later in steps if later > step), default=None)
            after = steps[following] if following is not None else steps[step]
            config = after / CONFIG_FILE if following is not None else run_dir / CONFIG_FILE
            return Recorded(steps[step], taken, config, read_state(after).layout)
    return None


def rehearse(recorded: Recorded, config: RunConfig, backend: Backend, *, nproc: int) -> list[dict[str, float]]:
    """Take the recorded steps again. Collective: each of `nproc` processes calls it.

    Args:
        recorded: what was done.
        config: in force then.
        backend: the selected backend.
        nproc: processes; of as many as the run had, they have its layout, otherwise each holds the whole model.

    Returns:
        Step, and what `METRICS_COMPARED` names, of each step.

    Raises:
        SparsecodError: data, configuration or checkpoint that cannot be used, or a step that diverged.
    """
    if not same_layout(recorded, config.parallel, nproc):
        config = replace(config, parallel=ParallelConfig())
    config, tokenizer = prepare_data(config)
    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        restore_products(run_of(recorded.step_dir))
        trainer = build_trainer(config, backend, groups)
        state = load_checkpoint(recorded.step_dir, trainer)
        data = RunData(trainer, tokenizer, state)
        data.check_unchanged(state.data)
        judge = UpdateJudge(config.train, state.monitor)
        batches, consumed, results = data.train_batches(state.consumed_samples), state.consumed_samples, []
        for step in range(state.step + 1, state.step + STEPS + 1):
            size = global_batch_size(config.train, consumed)
            result = train_step(trainer, batches, global_batch_size=size, judge=judge)
            consumed += result.samples
            results.append({"step": step, "loss": result.loss, "grad_norm": result.grad_norm})
        return results


def same_layout(recorded: Recorded, parallel: ParallelConfig, nproc: int) -> bool:
    """Whether `nproc` processes have the layout of those that took the steps. Local."""
    return recorded.layout == {**asdict(parallel), "world_size": nproc}


def first_deviation(
    recorded: Recorded, again: list[dict[str, float]], *, bitwise: bool, dtype: str
) -> tuple[str, float] | None:
    """(what is not as recorded, how far it is off relative to it), or None. Local.

    Args:
        recorded: what was written.
        again: what `rehearse` returned.
        bitwise: whether every bit must be equal.
        dtype: number format of the run's precision.
    """
    for record, result in zip(recorded.records, again, strict=True):
        for name in METRICS_COMPARED:
            before, now = record.get(name, math.nan), result[name]
            off = abs(now - before) / max(abs(before), 1e-30)
            limit = 0.0 if bitwise else TOLERANCES[dtype] * (10 if name == "grad_norm" else 1)
            if not off <= limit:
                return f"{name} of step {record['step']} was {before!r} and is {now!r}", off
    return None
