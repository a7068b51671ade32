"""The run: set up, resume, train, validate, collect, save."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from sparsecod_megatron.backend import Backend
from sparsecod_megatron.checkpoint.lineage import parent_of
from sparsecod_megatron.checkpoint.paths import resume_candidates, run_of
from sparsecod_megatron.checkpoint.saver import CheckpointSaver
from sparsecod_megatron.checkpoint.state import TrainState
from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.flops import flops_per_token
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR, LOG_FILE
from sparsecod_megatron.metrics import Statistics
from sparsecod_megatron.parallel import running_processes, wait_for_all
from sparsecod_megatron.seams.mechanism import model_at
from sparsecod_megatron.train.answers import score_answers
from sparsecod_megatron.train.clock import StepClock
from sparsecod_megatron.train.data import RunData, prepare_data
from sparsecod_megatron.train.divergence import DivergenceError, UpdateJudge
from sparsecod_megatron.train.garbage import collected_in_step
from sparsecod_megatron.train.profile import StepProfiler
from sparsecod_megatron.train.ramp import global_batch_size
from sparsecod_megatron.train.restore import checkpoint_saver, initial_state, roll_back
from sparsecod_megatron.train.run_dir import RunDirectory, refuse_foreign_run, refuse_unwritable, restore_products
from sparsecod_megatron.train.run_lock import LEASE_S, locked_run
from sparsecod_megatron.train.setup import Trainer, build_trainer
from sparsecod_megatron.train.signals import stop_on_signals
from sparsecod_megatron.train.statistics import statistics_collector
from sparsecod_megatron.train.step import StepResult, evaluate, train_step
from sparsecod_megatron.train.task_evaluation import Evaluator, TaskEvaluation
from sparsecod_megatron.train.watchdog import Watchdog

logger = logging.getLogger("sparsecod")


def run_training(config: RunConfig, backend: Backend, evaluate: Evaluator | None = None) -> None:
    """Train from the configuration to its last step. Collective: every process of the run calls it.

    Args:
        config: a checked run.
        backend: the selected backend.
        evaluate: what evaluates a checkpoint; needed on rank 0 where `evaluation.interval` is not 0.

    Raises:
        SparsecodError: configuration, data or checkpoint that cannot be used; before anything is written.
        DivergenceError: loss or gradient became NaN or infinite, and `train.on_divergence` does not bear it.
    """
    # Later than the watchdog, which knows the step, and than the wait for another node's lock.
    timeout_s = max(2 * config.train.step_timeout_s or 1800.0, 2 * LEASE_S)
    config, tokenizer = prepare_data(config)
    run_dir = Path(config.logging.run_dir)
    refuse_unwritable(run_dir)
    with (
        running_processes(
            config, communication=backend.communication, device=backend.device, timeout_s=timeout_s
        ) as groups,
        locked_run(run_dir),
    ):
        checkpoints = run_dir / CHECKPOINTS_DIR
        earlier = resume_candidates(checkpoints) if config.checkpoint.resume else []
        refuse_foreign_run(run_dir, config, resuming=bool(earlier))
        parent = None if earlier else parent_of(config)
        if earlier or parent:
            restore_products(run_of(parent) if parent else run_dir)
        trainer = build_trainer(config, backend, groups)
        state = initial_state(trainer, earlier, parent)
        last_step = config.train.exit_step or config.train.train_steps
        if state.step >= last_step:
            logger.info("nothing to do: already at step %d of %d", state.step, last_step)
            return
        data = RunData(trainer, tokenizer, state)
        state.data = data.check_unchanged(state.data)
        wait_for_all(backend.device)
        recorder = (
            RunDirectory(run_dir, config, last_step=state.step, products=trainer.products, parent=parent)
            if trainer.is_first_rank
            else None
        )
        try:
            with checkpoint_saver(trainer, checkpoints) as saver:
                _Loop(trainer, data, state, recorder, checkpoints, saver, evaluate).run()
        finally:
            if recorder is not None:
                recorder.close()


def _flops_per_token(config: RunConfig) -> float:
    return flops_per_token(ParameterTable.of(config), config.data.seq_length)


class _Loop:
    """Steps of one run; holds what the steps share."""

    def __init__(
        self,
        trainer: Trainer,
        data: RunData,
        state: TrainState,
        recorder: RunDirectory | None,
        checkpoints: Path,
        saver: CheckpointSaver,
        evaluate: Evaluator | None,
    ) -> None:
        self.trainer, self.data, self.state = trainer, data, state
        self.recorder, self.checkpoints, self.saver = recorder, checkpoints, saver
        config = trainer.config
        self.last_step = config.train.exit_step or config.train.train_steps
        self.statistics = statistics_collector(trainer)
        self.saved_step = state.step
        self.counted_model, self.flops_per_token = config.model, _flops_per_token(config)
        self.profiler = StepProfiler(
            config.profile, Path(config.logging.run_dir), trainer.models, trainer.backend.device
        )
        self.judge = UpdateJudge(config.train, state.monitor)
        self.watchdog = Watchdog(
            timeout_s=config.train.step_timeout_s,
            log_path=Path(config.logging.run_dir) / LOG_FILE,
            rank=dist.get_rank(),
        )
        self.tasks = TaskEvaluation(config.evaluation, evaluate, saver, self.watchdog)

    def run(self) -> None:
        """Train to the last step, then save."""
        with (
            self._progress() as progress,
            stop_on_signals() as stop,
            self.watchdog.watching(),
            self.profiler.watching(),
            collected_in_step(self.trainer.config.train.manual_gc_interval) as collect_garbage,
        ):
            # Loading processes inherit the handlers, and so outlive a Ctrl-C until the last step is saved.
            batches = self.data.train_batches(self.state.consumed_samples)
            self.clock = StepClock(self.trainer.backend.device)
            while self.state.step < self.last_step:
                result = self._step(batches, asked_to_stop=lambda: bool(stop))
                progress.set_postfix(loss=f"{result.loss:.3f}", refresh=False)
                progress.update()
                collect_garbage(self.state.step)
                if result.stop:
                    break
            if self.saved_step != self.state.step:
                self._save()
            self.saver.finish()
        if self.state.step < self.last_step:
            logger.info("asked to stop at step %d; the same command resumes from there", self.state.step)

    def _progress(self) -> tqdm:
        hidden = None if self.trainer.is_first_rank else True
        return tqdm(total=self.last_step, initial=self.state.step, unit="step", disable=hidden)

    def _step(self, batches: list[Any], *, asked_to_stop: Callable[[], bool]) -> StepResult:
        config, step = self.trainer.config, self.state.step + 1
        size = global_batch_size(config.train, self.state.consumed_samples)
        self.profiler.begin(step)
        try:
            result = train_step(
                self.trainer,
                batches,
                global_batch_size=size,
                judge=self.judge,
                enter=lambda phase: self.watchdog.enter(step, phase),
                asked_to_stop=asked_to_stop,
                observing=self.statistics.collecting(step),
            )
        except DivergenceError:
            if self.recorder is not None:
                self.recorder.write_metrics({"step": step, "tokens": self.state.consumed_tokens, "diverged": True})
            raise
        elapsed = self.clock.lap()
        self._advance(result)
        # A step without update has no statistics of updates, and after divergence none at all.
        layers = self._collected(step) if result.verdict.update else None
        self.profiler.end(step)
        if layers is not None and self.recorder is not None:
            self.recorder.write_statistics(step=step, tokens=self.state.consumed_tokens, layers=layers)
        record = self._record(result, elapsed) | self._follow(result)
        last = step == self.last_step
        if config.train.eval_interval and (_due(step, config.train.eval_interval) or last):
            record.update(self._validate())
        evaluated = config.evaluation.interval and (_due(step, config.evaluation.interval) or last)
        if evaluated:
            with self.clock.paused():
                record.update(self.tasks.run(self.state))
            self.saved_step = step
        notable = {"validation_loss", "spike", "diverged"} & record.keys() or evaluated
        if _due(step, config.logging.log_interval) or step == 1 or last or notable:
            self._log(record)
        self.saver.poll()
        section = config.checkpoint
        if (_due(step, section.save_interval) or step in section.save_steps) and self.saved_step != step:
            self._save()
        return result

    def _advance(self, result: StepResult) -> None:
        self.state.step += 1
        self.state.optimizer_steps += int(result.verdict.update)
        self.state.consumed_samples += result.samples
        self.state.consumed_tokens += result.tokens
        self.state.monitor = self.judge.state()

    def _collected(self, step: int) -> list[Statistics] | None:
        self.watchdog.enter(step, "statistics")
        return self.statistics.reduce(step)

    def _follow(self, result: StepResult) -> dict[str, Any]:
        """Do and log what the verdict asks for beyond the update; what the line of metrics says of it."""
        verdict, step = result.verdict, self.state.step
        record: dict[str, Any] = {}
        if verdict.spike:
            logger.warning("step %d: spike, loss %.4f, gradient norm %.3f", step, result.loss, result.grad_norm)
            record["spike"] = True
        if verdict.diverged:
            logger.warning("step %d: diverged, loss %g, gradient norm %g", step, result.loss, result.grad_norm)
            record["diverged"] = True
        if verdict.diverged and self.trainer.config.train.on_divergence == "rollback":
            record["rolled_back_to_step"] = self._roll_back()
        elif not verdict.update:
            logger.warning("step %d: its update is skipped", step)
            record["skipped"] = True
        return record

    def _roll_back(self) -> int:
        """Continue with the last checkpoint's weights, after the data used since; returns its step."""
        step = self.state.step
        self.watchdog.enter(step, "rollback")
        with self.clock.paused():
            self.saver.wait()
            candidates = resume_candidates(self.checkpoints)
            if not candidates:
                raise DivergenceError(f"step {step} diverged before the first checkpoint; lower optimizer.lr")
            earlier = roll_back(self.trainer, self.state, candidates)
        self.judge.rolled_back(earlier)
        logger.warning("step %d: weights and optimizer are those of step %d again", step, earlier)
        return earlier

    def _record(self, result: StepResult, elapsed: float) -> dict[str, Any]:
        tokens_per_s = result.tokens / elapsed
        config = self.trainer.config
        if (model := model_at(config, self.trainer.context(self.state.step))) != self.counted_model:
            self.counted_model, self.flops_per_token = model, _flops_per_token(replace(config, model=model))
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

    def _validate(self) -> dict[str, float]:
        self.watchdog.enter(self.state.step, "validation")
        steps = self.trainer.config.train.eval_steps
        with self.clock.paused():
            if (task := self.data.task) is not None:
                return self.data.validation_answers(
                    lambda batches: score_answers(self.trainer, batches, task, num_steps=steps)
                )
            return self.data.validation_losses(lambda batches: evaluate(self.trainer, batches, num_steps=steps))

    def _log(self, record: dict[str, Any]) -> None:
        if self.recorder is None:
            return
        context = self.trainer.context(self.state.step)
        for plugin in self.trainer.plugins:
            for name, value in plugin.metrics(context).items():
                # What several mechanisms report has the later ones' names before it.
                record[f"{plugin.name}/{name}" if name in record else name] = value
        # JSON has no NaN.
        finite = {key: value for key, value in record.items() if not isinstance(value, float) or math.isfinite(value)}
        self.recorder.write_metrics(finite)
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
        self.watchdog.enter(self.state.step, "save")
        with self.clock.paused():
            self.saver.save(self.state)
        self.saved_step = self.state.step


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
