"""Steps the small run as one row says, and records what layouts must agree on."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from torch import Tensor

from sparsecod_megatron.audit.measurement import Measurement
from sparsecod_megatron.audit.rows import REFERENCE, Row
from sparsecod_megatron.audit.small import MIDDLE, STEPS
from sparsecod_megatron.audit.whole import gradient, master_weights, weights, whole_buffers, whole_parameters
from sparsecod_megatron.backend import Backend
from sparsecod_megatron.checkpoint.native import load_checkpoint
from sparsecod_megatron.checkpoint.saver import save_checkpoint
from sparsecod_megatron.checkpoint.state import TrainState
from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.parallel import process_groups
from sparsecod_megatron.train.forward import Batch
from sparsecod_megatron.train.setup import Trainer, build_trainer
from sparsecod_megatron.train.statistics import statistics_collector
from sparsecod_megatron.train.step import evaluate, train_step


def measure(row: Row, small: RunConfig, backend: Backend, checkpoints: Path) -> Measurement:
    """Train the row's steps. Collective over all processes.

    Args:
        row: what to do.
        small: from `small_run`.
        backend: the selected backend.
        checkpoints: folder of a checkpoint, the same on all processes.

    Raises:
        SparsecodError: the row cannot run, or not continue from its own checkpoint.
    """
    config, found, state = row.config(small), Measurement(), TrainState()
    with _trainer(config, backend) as trainer:
        _train(trainer, state, found, last=MIDDLE)
        if row.mechanism == "validation":
            evaluate(trainer, [_micro_batches(trainer, first_step=0) for _ in trainer.models], num_steps=1)
        if not row.mechanism.startswith("resume"):
            _finish(trainer, state, found)
            return found
        directory = save_checkpoint(checkpoints, trainer, state=state)
    # Other fresh weights, so that what continues can only come from the checkpoint.
    config = replace(config, train=replace(config.train, seed=config.train.seed + 1))
    if row.mechanism == "resume-as-dp":
        config = replace(config, parallel=REFERENCE.parallel)
    with _trainer(config, backend) as trainer:
        _finish(trainer, load_checkpoint(directory, trainer), found)
    return found


@contextlib.contextmanager
def _trainer(config: RunConfig, backend: Backend) -> Iterator[Trainer]:
    with process_groups(config) as groups:
        # Megatron keeps router losses for the whole process, with the groups of the model that logged them.
        get_moe_layer_wise_logging_tracker().clear()
        trainer = build_trainer(config, backend, groups)
        yield trainer
        release(trainer)


def release(trainer: Trainer) -> None:
    """Cut the cycles through autograd's graphs, where the garbage collector does not see them. Local.

    The trainer and the 50 threads of its process groups would stay for as long as the process. The cycles: a model
    keeps its parameters' gradient accumulators and the hooks that wait for gathered weights, which keep the model;
    token dispatchers keep what their last forward pass left.
    """
    for model in trainer.models:
        model.grad_accs.clear()
        if model.use_forward_hook:
            model.disable_forward_pre_hook(param_sync=False)
    modules = (module for model in trainer.models for module in model.modules())
    for dispatcher in (module.token_dispatcher for module in modules if hasattr(module, "token_dispatcher")):
        for name, value in list(vars(dispatcher).items()):
            if torch.is_tensor(value) and value.grad_fn is not None:
                setattr(dispatcher, name, None)


def _finish(trainer: Trainer, state: TrainState, found: Measurement) -> None:
    """From the middle to the end."""
    found.states[MIDDLE] = _whole_state(trainer)
    _train(trainer, state, found, last=STEPS)
    found.states[STEPS] = _whole_state(trainer)


def _whole_state(trainer: Trainer) -> dict[str, Tensor]:
    masters = whole_parameters(trainer, master_weights).items()
    named = {f"{name} (fp32 master)": tensor for name, tensor in masters}
    return whole_parameters(trainer, weights) | named | whole_buffers(trainer)


def _train(trainer: Trainer, state: TrainState, found: Measurement, *, last: int) -> None:
    """Step to `last`, recording."""
    collector = statistics_collector(trainer)
    data = [_micro_batches(trainer, first_step=state.step + 1) for _ in trainer.models]
    while state.step < last:
        state.step += 1
        with collector.collecting(state.step), _recording_gradients(trainer, found):
            result = train_step(trainer, data)
        state.optimizer_steps += int(result.verdict.update)
        state.consumed_samples += result.samples
        state.consumed_tokens += result.tokens
        found.losses.append(result.loss)
        found.grad_norms.append(result.grad_norm)
        found.statistics.append(collector.reduce(state.step) or [])


@contextlib.contextmanager
def _recording_gradients(trainer: Trainer, found: Measurement) -> Iterator[None]:
    """Read the gradient where Megatron has reduced it, before it is clipped."""
    megatron, finalize = trainer.megatron, trainer.megatron.finalize_model_grads_func
    assert finalize is not None

    def finalize_and_record(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        found.gradients.append(whole_parameters(trainer, gradient))

    megatron.finalize_model_grads_func = finalize_and_record
    try:
        yield
    finally:
        megatron.finalize_model_grads_func = finalize


def _micro_batches(trainer: Trainer, *, first_step: int) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches without end; a step's samples are the same in every layout."""
    config, group = trainer.config, trainer.groups.dp
    train, length = config.train, config.data.seq_length
    assert config.model.vocab_size is not None
    for step in itertools.count(first_step):
        generator = torch.Generator().manual_seed(step)
        # Squared, so that small ids are frequent and routers see an uneven stream.
        uniform = torch.rand(train.global_batch_size, length + 1, generator=generator)
        ids = (uniform.square() * config.model.vocab_size).long()
        positions = torch.arange(length).repeat(train.global_batch_size, 1)
        if config.data.reset_position_ids:
            second = torch.randint(1, length, (train.global_batch_size, 1), generator=generator)
            positions = torch.where(positions < second, positions, positions - second)
        whole = {
            "tokens": ids[:, :-1],
            "labels": ids[:, 1:],
            "loss_mask": torch.ones(len(ids), length),
            "position_ids": positions,
        }
        size = train.micro_batch_size
        for start in range(group.rank() * size, train.global_batch_size, size * group.size()):
            yield {name: tensor[start : start + size].contiguous() for name, tensor in whole.items()}
