"""Saves and loads a run: weights and optimizer state in Megatron-Core's sharded format, the rest in state.json.

Of the optimizer only tensors are stored (`optimizer_state.py`); its parameter groups are rebuilt by the run that loads.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException

from sparsecod_megatron.checkpoint.optimizer_state import optimizer_tensors, set_optimizer_tensors
from sparsecod_megatron.checkpoint.paths import point_latest_to, step_dir_name
from sparsecod_megatron.checkpoint.state import (
    StateFile,
    TrainState,
    check_same_model,
    gather_random_states,
    layout_of,
    read_state,
    restore_random_states,
    write_state,
)
from sparsecod_megatron.config import RunConfig, save_config
from sparsecod_megatron.config.run_files import CONFIG_FILE
from sparsecod_megatron.errors import CheckpointError
from sparsecod_megatron.model import unwrap


def save_checkpoint(
    checkpoints: Path,
    *,
    config: RunConfig,
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    state: TrainState,
    groups: ProcessGroupCollection,
) -> Path:
    """Write RUN/checkpoints/step_…, complete or not at all, and point `latest` at it. Collective over all processes.

    Args:
        checkpoints: the run's checkpoints folder.
        config: kept to recognise the model when loading.
        models: model chunks of this rank, wrapped or not.
        optimizer: of the models.
        scheduler: learning-rate schedule.
        state: progress.
        groups: the run's process groups.

    Returns:
        The directory written.
    """
    directory = checkpoints / step_dir_name(state.step)
    temporary = directory.with_name(directory.name + ".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    sharded = _model_state(models, groups)
    # Data-parallel rank 0 has gathered the others' parts; they write none.
    tensors = optimizer_tensors(optimizer, sharded, metadata=_metadata(groups), is_loading=False)
    tensors = {index: part for index, part in tensors.items() if part}
    sharded |= {"optimizer": tensors} if tensors else {}
    dist_checkpointing.save(sharded, str(temporary))
    random_states = gather_random_states()
    if dist.get_rank() == 0:
        save_config(config, temporary / CONFIG_FILE)
        write_state(StateFile(state, scheduler.state_dict(), layout_of(config.parallel), random_states), temporary)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
        point_latest_to(directory)
    dist.barrier()
    return directory


def load_checkpoint(
    directory: Path,
    *,
    config: RunConfig,
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    groups: ProcessGroupCollection,
) -> TrainState:
    """Continue from a checkpoint of any layout. Collective over all processes.

    Args:
        directory: a step directory.
        config: must describe the same model.
        models: model chunks of this rank, wrapped or not.
        optimizer: of the models.
        scheduler: learning-rate schedule.
        groups: the run's process groups.

    Returns:
        Progress at that step. Under the same layout random states are restored too, and the run goes on bit for bit.

    Raises:
        CheckpointError: absent, damaged, or of another model.
    """
    saved = read_state(directory)
    check_same_model(config, directory)
    sharded = _model_state(models, groups)
    sharded["optimizer"] = optimizer_tensors(optimizer, sharded, metadata=_metadata(groups), is_loading=True)
    loaded = _load(sharded, directory)
    _set_model_state(models, loaded)
    set_optimizer_tensors(optimizer, loaded["optimizer"], saved.train.optimizer_steps)
    scheduler.load_state_dict(saved.scheduler)
    if saved.layout == layout_of(config.parallel):
        restore_random_states(saved.random_states)
    return saved.train


def load_weights(
    directory: Path, *, config: RunConfig, models: Sequence[torch.nn.Module], groups: ProcessGroupCollection
) -> None:
    """Load the weights alone. Collective over all processes.

    Raises:
        CheckpointError: absent, damaged, or of another model.
    """
    read_state(directory)
    check_same_model(config, directory)
    _set_model_state(models, _load(_model_state(models, groups), directory))


def _load(sharded: ShardedStateDict, directory: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(sharded, str(directory))
    except CheckpointException as failures:
        # torch's own, which is no Exception: what went wrong on each rank.
        error: BaseException = next(iter(failures.failures.values()))[0]
    except (CheckpointingException, OSError, RuntimeError, KeyError, EOFError) as problem:
        error = problem
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    raise CheckpointError(f"{directory}: cannot be loaded ({reason}); choose another step") from error


def _metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    """How tensors are written: by parameter, so that every layout can read them.

    Source: Megatron-Core optimizer/distrib_optimizer.py, `sharded_state_dict`; the default format cannot be loaded,
    `dp_reshardable` only under the same model-parallel layout.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": groups.dp_cp,
    }


def _chunk_names(models: Sequence[torch.nn.Module]) -> list[str]:
    return ["model"] if len(models) == 1 else [f"model{index}" for index in range(len(models))]


def _model_state(models: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> ShardedStateDict:
    metadata = _metadata(groups)
    return {
        name: unwrap(model).sharded_state_dict(metadata=metadata)
        for name, model in zip(_chunk_names(models), models, strict=True)
    }


def _set_model_state(models: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for name, model in zip(_chunk_names(models), models, strict=True):
        unwrap(model).load_state_dict(loaded[name], strict=True)
