"""Where a run's weights, optimizer and progress come from: a checkpoint, another run's weights, or nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from sparsecod_megatron.checkpoint.native import load_checkpoint, load_latest, start_from_weights
from sparsecod_megatron.checkpoint.paths import resolve_step_dir, run_of
from sparsecod_megatron.checkpoint.saver import CheckpointSaver
from sparsecod_megatron.checkpoint.state import TrainState
from sparsecod_megatron.train.setup import Trainer

logger = logging.getLogger("sparsecod")


def checkpoint_saver(trainer: Trainer, checkpoints: Path) -> CheckpointSaver:
    """What saves this run into `checkpoints`. Collective over all processes."""
    return CheckpointSaver(checkpoints, trainer)


def initial_state(trainer: Trainer, resume_from: Sequence[Path], parent: Path | None = None) -> TrainState:
    """Load what the run starts with. Collective over all processes.

    Args:
        trainer: filled with the checkpoint's tensors.
        resume_from: step directories of this run, the preferred one first; without one the run continues
            the parent's, or starts at step 0, from `checkpoint.init_from` if that is set.
        parent: step directory that the run branches from.

    Raises:
        CheckpointError: absent, all damaged, or of another model.
    """
    config = trainer.config
    if resume_from:
        state = load_latest(resume_from, trainer)
        logger.info("resumed from step %d of %s", state.step, config.logging.run_dir)
        return state
    if parent is not None:
        state = load_checkpoint(parent, trainer)
        logger.info("branched from step %d of %s", state.step, run_of(parent))
        return state
    if config.checkpoint.init_from is not None:
        source = resolve_step_dir(Path(config.checkpoint.init_from))
        start_from_weights(source, trainer, densify=config.checkpoint.densify)
    return TrainState()


def roll_back(trainer: Trainer, state: TrainState, candidates: Sequence[Path]) -> int:
    """Take weights, optimizer and random states from a checkpoint. Collective over all processes.

    Step, schedule and data position stay: the batches since the checkpoint are skipped, and the run still ends after
    as many steps, on the data that was indexed for them.

    Args:
        trainer: trainer of the run.
        state: progress of the run; its `optimizer_steps` become the checkpoint's.
        candidates: step directories of this run, the preferred one first.

    Returns:
        The checkpoint's step.

    Raises:
        CheckpointError: all damaged.
    """
    scheduler, steps = trainer.scheduler, trainer.scheduler.num_steps
    earlier = load_latest(candidates, trainer)
    # Loading put the schedule back to the checkpoint's step.
    scheduler.num_steps = steps
    scheduler.step(increment=0)
    state.optimizer_steps = earlier.optimizer_steps
    return earlier.step
