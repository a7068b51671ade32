"""Saving a run: every rank's writers fill a temporary directory, then rank 0 commits it by a rename.

Both ways to save are one: Megatron-Core forks a writer from each rank, which sees the memory of that moment. An
asynchronous save commits at a later step, once all ranks' writers have ended; a synchronous one waits for them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from sparsecod_megatron.checkpoint.directories import commit, delete_superseded, new_directory, remove_leftovers
from sparsecod_megatron.checkpoint.first_rank import on_first_rank
from sparsecod_megatron.checkpoint.invariants import verified_digests
from sparsecod_megatron.checkpoint.native import sharded_state
from sparsecod_megatron.checkpoint.parts import ModelParts, TrainingParts
from sparsecod_megatron.checkpoint.paths import step_dir_name
from sparsecod_megatron.checkpoint.random_states import gather_random_states
from sparsecod_megatron.checkpoint.state import StateFile, TrainState, layout_of, write_state
from sparsecod_megatron.checkpoint.writer import start_saving, stop_writers
from sparsecod_megatron.config import save_config
from sparsecod_megatron.config.run_files import CONFIG_FILE
from sparsecod_megatron.errors import CheckpointError
from sparsecod_megatron.parallel import any_rank, wait_for_all

logger = logging.getLogger("sparsecod")


@dataclass(frozen=True)
class _Flight:
    """A save that is not committed yet."""

    step: int
    directory: Path
    temporary: Path
    began: float


class CheckpointSaver:
    """Saves a run as `config.checkpoint` says; as a context manager, it completes a save in flight when the block ends.

    Where the block raises, peers may be gone, so what is in flight is given up without asking them.

    Args:
        checkpoints: RUN/checkpoints; what crashed saves left there is deleted.
        parts: of the run; without an optimizer, weights alone are saved.
    """

    def __init__(self, checkpoints: Path, parts: ModelParts) -> None:
        self._checkpoints, self._parts, self._config = checkpoints, parts, parts.config
        self._device = next(parts.models[0].parameters()).device
        self._calls = AsyncCallsQueue(persistent=False)
        self._flight: _Flight | None = None
        self._failed: str | None = None
        on_first_rank(lambda: remove_leftovers(checkpoints))

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        elif self._flight is not None:
            self._stop_writers()
            logger.warning("%s: its save was not complete and is given up", self._flight.directory)

    def save(self, state: TrainState) -> Path:
        """Save now; return when it is committed, or, if asynchronous, when it is under way. Collective.

        A save that is still in flight is completed first.

        Args:
            state: progress; it may change afterwards.

        Returns:
            The directory of this step's checkpoint.

        Raises:
            CheckpointError: it could not be written, or took longer than `checkpoint.save_timeout_s`; what was there
                before has not changed. An asynchronous save only logs it.
        """
        self.wait()
        self._failed = None
        directory = self._checkpoints / step_dir_name(state.step)
        try:
            self._start(directory, state)
        except CheckpointError as error:
            self._give_up(directory, str(error))
            self._warn_and_continue()
        if not self._config.checkpoint.async_save:
            self.finish()
        return directory

    def poll(self) -> None:
        """Commit a save that has been written in the meantime. Collective, cheap, nothing without one in flight."""
        if self._flight is not None:
            self._settle(self._flight, block=False)
            self._warn_and_continue()

    def wait(self) -> None:
        """Complete the save in flight, if there is one; a failure is logged. Collective."""
        if self._flight is not None:
            self._settle(self._flight, block=True)
            self._warn_and_continue()

    def finish(self) -> None:
        """Complete the save in flight, if there is one. Collective.

        Raises:
            CheckpointError: the last save failed, so that the run's last checkpoint is an earlier one.
        """
        if self._flight is not None:
            self._settle(self._flight, block=True)
        if self._failed is not None:
            raise CheckpointError(self._failed)

    def _warn_and_continue(self) -> None:
        if self._failed is not None and self._config.checkpoint.async_save:
            logger.warning("%s; training continues", self._failed)

    def _start(self, directory: Path, state: TrainState) -> None:
        """Fork the writers, which hold this moment's tensors. Collective."""
        began = time.monotonic()
        random_states = gather_random_states()
        sharded = sharded_state(self._parts)
        file = StateFile(state, {}, layout_of(self._config.parallel), random_states)
        if isinstance(self._parts, TrainingParts):
            file.scheduler = self._parts.scheduler.state_dict()
            file.digests = verified_digests(self._parts.optimizer, sharded)
        temporary = on_first_rank(partial(self._begin, directory, file))
        self._calls.schedule_async_request(start_saving(sharded, temporary))
        self._flight = _Flight(state.step, directory, temporary, began)

    def _begin(self, directory: Path, state: StateFile) -> Path:
        """Everything that rank 0 writes alone; first, so that a full disk is found where all ranks learn of it."""
        remove_leftovers(self._checkpoints)
        temporary = new_directory(directory)
        save_config(self._config, temporary / CONFIG_FILE)
        write_state(state, temporary)
        return temporary

    def _settle(self, flight: _Flight, *, block: bool) -> None:
        """Commit once all writers are done, or abandon the save. Collective."""
        limit = self._config.checkpoint.save_timeout_s
        while True:
            try:
                written = self._calls.maybe_finalize_async_calls(blocking=False)
            except CheckpointException as failures:
                # Only rank 0 holds the reason, and there may be one of each rank.
                reason = next((str(problem) for problem, _ in failures.failures.values()), "")
                self._give_up(flight.directory, on_first_rank(reason.strip))
                return
            if written:
                self._commit(flight)
                return
            overdue = bool(limit) and time.monotonic() - flight.began > limit
            if any_rank(overdue, self._device):
                reason = f"not written within checkpoint.save_timeout_s={limit:g}"
                self._give_up(flight.directory, reason)
                return
            if not block:
                return
            time.sleep(0.01)

    def _commit(self, flight: _Flight) -> None:
        section = self._config.checkpoint

        def rename_and_tidy() -> None:
            commit(flight.temporary, flight.directory)
            delete_superseded(
                self._checkpoints,
                current=flight.step,
                keep_last=section.keep_last,
                keep_every=section.keep_every,
                keep_steps=section.save_steps,
            )

        try:
            on_first_rank(rename_and_tidy)
        except CheckpointError as error:
            self._give_up(flight.directory, str(error))
            return
        self._flight = None
        logger.info("saved %s (%.1f s)", flight.directory, time.monotonic() - flight.began)

    def _give_up(self, directory: Path, reason: str) -> None:
        """End the writers and delete what they wrote. Collective."""
        self._flight = None
        self._stop_writers()
        wait_for_all(self._device)
        on_first_rank(lambda: remove_leftovers(self._checkpoints))
        self._failed = f"{directory}: not saved ({reason}); earlier checkpoints are kept"

    def _stop_writers(self) -> None:
        stop_writers(self._calls)
        self._calls = AsyncCallsQueue(persistent=False)


def save_checkpoint(checkpoints: Path, parts: ModelParts, *, state: TrainState) -> Path:
    """Save once, complete or not at all, and point `latest` at it. Collective over all processes.

    Args:
        checkpoints: the run's checkpoints folder.
        parts: as `CheckpointSaver` takes them.
        state: progress.

    Returns:
        The directory written.

    Raises:
        CheckpointError: it could not be written; what was there before has not changed.
    """
    with CheckpointSaver(checkpoints, parts) as saver:
        return saver.save(state)
