"""Evaluation of the running model every N steps, by a function from outside that reads a checkpoint.

The checkpoint is one of this step, saved as all others are, so evaluation works under every layout and anyone can
repeat it later. One rank evaluates; what it changes for the whole process are random states, which are put back.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

from sparsecod_megatron.checkpoint.random_states import unchanged_random_states
from sparsecod_megatron.checkpoint.saver import CheckpointSaver
from sparsecod_megatron.checkpoint.state import TrainState
from sparsecod_megatron.config import EvaluationConfig
from sparsecod_megatron.errors import CheckpointError
from sparsecod_megatron.parallel.processes import PATIENCE
from sparsecod_megatron.train.watchdog import Watchdog

logger = logging.getLogger("sparsecod")

Evaluator = Callable[[Path], Mapping[str, float]]
"""From a step directory to numbers by name."""


class TaskEvaluation:
    """Evaluates checkpoints of a run on rank 0 while the others wait. Collective over all processes.

    Args:
        section: section of the configuration; an interval of 0 starts nothing.
        evaluate: called on rank 0, where alone it must be given.
        saver: saver of the run.
        watchdog: watchdog of this rank.
    """

    def __init__(
        self, section: EvaluationConfig, evaluate: Evaluator | None, saver: CheckpointSaver, watchdog: Watchdog
    ) -> None:
        self._section, self._evaluate, self._saver, self._watchdog = section, evaluate, saver, watchdog
        if section.interval:
            # A group of its own: waiting is bounded neither by the other groups' time limit nor by a GPU's queue;
            # `evaluation.timeout_s` bounds the evaluation itself.
            self._waiting = dist.new_group(backend="gloo", timeout=PATIENCE)

    def run(self, state: TrainState) -> dict[str, float]:
        """Save this step and evaluate what was saved. Collective over all processes.

        A checkpoint that could not be saved, or an evaluation that fails, is logged: a run is worth more than its
        curves.

        Returns:
            The evaluator's numbers on rank 0, none elsewhere.

        Raises:
            CheckpointError: a synchronous save failed.
        """
        self._watchdog.enter(state.step, "save")
        step_dir = self._saver.save(state)
        try:
            self._saver.finish()
        except CheckpointError as error:
            logger.warning("%s; step %d is not evaluated", error, state.step)
            return {}
        limit = self._section.timeout_s or math.inf
        self._watchdog.enter(state.step, "evaluation", timeout_s=limit, key="evaluation.timeout_s")
        values = self._numbers(step_dir, state.step) if dist.get_rank() == 0 else {}
        dist.barrier(group=self._waiting)
        return values

    def _numbers(self, step_dir: Path, step: int) -> dict[str, float]:
        assert self._evaluate is not None, "rank 0 of an evaluated run was given no evaluator"
        began = time.perf_counter()
        try:
            with unchanged_random_states():
                values = dict(self._evaluate(step_dir))
        except Exception:  # whatever a model, a library or a task raises
            logger.warning("step %d: not evaluated; training continues", step, exc_info=True)
            return {}
        finally:
            gc.collect()  # models are full of cycles, and the memory of this one is needed
        logger.info("step %d: evaluated in %.1f s", step, time.perf_counter() - began)
        return values
