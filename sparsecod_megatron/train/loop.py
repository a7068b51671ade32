"""The run: set up, resume, train, validate, collect, save."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from sparsecod_megatron.backend import Backend
from sparsecod_megatron.checkpoint import TrainState, latest_step_dir, load_checkpoint, load_weights, save_checkpoint
from sparsecod_megatron.checkpoint.paths import resolve_step_dir
from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.flops import flops_per_token
from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR
from sparsecod_megatron.parallel import any_rank, running_processes
from sparsecod_megatron.train.data import RunData, prepare_data
from sparsecod_megatron.train.ramp import global_batch_size
from sparsecod_megatron.train.run_dir import RunDirectory, refuse_foreign_run
from sparsecod_megatron.train.setup import Trainer, build_trainer
from sparsecod_megatron.train.signals import stop_on_signals
from sparsecod_megatron.train.statistics import statistics_collector
from sparsecod_megatron.train.step import StepResult, evaluate, train_step

logger = logging.getLogger("sparsecod")


def run_training(config: RunConfig, backend: Backend) -> None:
    """Train from the configuration to its last step. Collective: every process of the run calls it.

    Args:
        config: a checked run.
        backend: the selected backend.

    Raises:
        SparsecodError: configuration, data or checkpoint that cannot be used; before anything is written.
        DivergenceError: loss or gradient became NaN or infinite.
    """
    tokenizer = prepare_data(config)
    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        run_dir = Path(config.logging.run_dir)
        checkpoints = run_dir / CHECKPOINTS_DIR
        start = latest_step_dir(checkpoints) if config.checkpoint.resume else None
        refuse_foreign_run(run_dir, config, resuming=start is not None)
        trainer = build_trainer(config, backend, groups)
        state = _initial_state(trainer, start)
        data = RunData(trainer, tokenizer)
        dist.barrier()
        recorder = RunDirectory(run_dir, config, last_step=state.step) if trainer.is_first_rank else None
        try:
            _Loop(trainer, data, state, recorder, checkpoints).run()
        finally:
            if recorder is not None:
                recorder.close()


def _initial_state(trainer: Trainer, resume_from: Path | None) -> TrainState:
    config = trainer.config
    loading: dict[str, Any] = {"config": config, "models": trainer.models, "groups": trainer.groups}
    if resume_from is not None:
        state = load_checkpoint(resume_from, optimizer=trainer.optimizer, scheduler=trainer.scheduler, **loading)
        logger.info("resumed from %s at step %d", resume_from, state.step)
        return state
    if config.checkpoint.init_from is not None:
        load_weights(resolve_step_dir(Path(config.checkpoint.init_from)), **loading)
        trainer.optimizer.reload_model_params()
    return TrainState()


class _Loop:
    """Steps of one run; holds what the steps share."""

    def __init__(
        self,
        trainer: Trainer,
        data: RunData,
        state: TrainState,
        recorder: RunDirectory | None,
        checkpoints: Path,
    ) -> None:
        self.trainer, self.data, self.state = trainer, data, state
        self.recorder, self.checkpoints = recorder, checkpoints
        config = trainer.config
        self.last_step = config.train.exit_step or config.train.train_steps
        self.statistics = statistics_collector(trainer)
        self.saved_step = state.step
        self.flops_per_token = flops_per_token(config.model, config.data.seq_length)

    def run(self) -> None:
        """Train to the last step, then save."""
        if self.state.step >= self.last_step:
            logger.info("nothing to do: already at step %d of %d", self.state.step, self.last_step)
            return
        batches = self.data.train_batches(self.state.consumed_samples)
        with self._progress() as progress, stop_on_signals() as stop:
            while self.state.step < self.last_step:
                record = self._step(batches)
                progress.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
                progress.update()
                # The signal may reach one rank only, and not all of them in the same step.
                if any_rank(bool(stop), self.trainer.backend.device):
                    break
        if self.saved_step != self.state.step:
            self._save()
        if self.state.step < self.last_step:
            logger.info("asked to stop at step %d; the same command goes on from there", self.state.step)

    def _progress(self) -> tqdm:
        hidden = None if self.trainer.is_first_rank else True
        return tqdm(total=self.last_step, initial=self.state.step, unit="step", disable=hidden)

    def _step(self, batches: list[Any]) -> dict[str, Any]:
        config, step = self.trainer.config, self.state.step + 1
        began = time.perf_counter()
        size = global_batch_size(config.train, self.state.consumed_samples)
        with self.statistics.collecting(step):
            result = train_step(self.trainer, batches, global_batch_size=size)
        elapsed = time.perf_counter() - began
        self._advance(result)
        layers = self.statistics.reduce(step)
        if layers is not None and self.recorder is not None:
            self.recorder.write_statistics(step=step, tokens=self.state.consumed_tokens, layers=layers)
        record = self._record(result, elapsed)
        last = step == self.last_step
        if config.train.eval_interval and (_due(step, config.train.eval_interval) or last):
            record["validation_loss"] = self._validate()
        if _due(step, config.logging.log_interval) or step == 1 or last or "validation_loss" in record:
            self._log(record)
        if _due(step, config.checkpoint.save_interval):
            self._save()
        return record

    def _advance(self, result: StepResult) -> None:
        self.state.step += 1
        self.state.optimizer_steps += 1
        self.state.consumed_samples += result.samples
        self.state.consumed_tokens += result.tokens

    def _record(self, result: StepResult, elapsed: float) -> dict[str, Any]:
        tokens_per_s = result.tokens / elapsed
        return {
            "step": self.state.step,
            "tokens": self.state.consumed_tokens,
            "global_batch_size": result.samples,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens_per_s": tokens_per_s,
            "tflops": tokens_per_s * self.flops_per_token / dist.get_world_size() / 1e12,
            "step_time_s": elapsed,
        }

    def _validate(self) -> float:
        return evaluate(self.trainer, self.data.validation_batches(), num_steps=self.trainer.config.train.eval_steps)

    def _log(self, record: dict[str, Any]) -> None:
        if self.recorder is None:
            return
        self.recorder.write_metrics(record)
        validation = f", validation loss {record['validation_loss']:.4f}" if "validation_loss" in record else ""
        logger.info(
            "step %d/%d: loss %.4f, lr %.2e, gradient norm %.3f, %.0f tokens/s%s",
            record["step"],
            self.last_step,
            record["loss"],
            record["lr"],
            record["grad_norm"],
            record["tokens_per_s"],
            validation,
        )

    def _save(self) -> None:
        trainer = self.trainer
        directory = save_checkpoint(
            self.checkpoints,
            config=trainer.config,
            models=trainer.models,
            optimizer=trainer.optimizer,
            scheduler=trainer.scheduler,
            state=self.state,
            groups=trainer.groups,
        )
        self.saved_step = self.state.step
        logger.info("saved %s", directory)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
