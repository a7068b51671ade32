"""Starts and stops the process groups of a run.

Megatron-Core keeps its groups in `parallel_state`; they are created here once and handed on as a
ProcessGroupCollection.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import TypeAlias

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.rendezvous import rendezvous

from sparsecod_megatron.config import RunConfig, data_parallel_size

ProcessGroups: TypeAlias = ProcessGroupCollection


@contextlib.contextmanager
def running_processes(
    config: RunConfig, *, communication: str, device: torch.device, timeout_s: float = 1800.0
) -> Iterator[ProcessGroups]:
    """The run's processes and their groups while the block runs. Collective over all processes.

    Args:
        config: layout and seed; checked against the number of processes.
        communication: torch.distributed backend, `gloo` or `nccl`.
        device: device of this rank.
        timeout_s: after this long a collective that some rank never joins raises.

    Yields:
        Every group of the layout.

    Raises:
        ConfigError: the layout does not fit the number of processes.
    """
    data_parallel_size(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    with world(communication=communication, device=device, timeout_s=timeout_s), process_groups(config) as groups:
        yield groups


@contextlib.contextmanager
def world(*, communication: str, device: torch.device, timeout_s: float = 1800.0) -> Iterator[None]:
    """torch.distributed over the processes that torchrun started, or over this one. Collective over all processes."""
    timeout = datetime.timedelta(seconds=timeout_s)
    device_id = device if device.type == "cuda" else None
    if "RANK" in os.environ:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"attempt_{_attempt()}", store)
    else:
        store, rank, size = dist.HashStore(), 0, 1
    store.set_timeout(timeout)
    dist.init_process_group(
        communication, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id
    )
    try:
        yield
    except BaseException:
        # With peers inside a collective that this rank never joins, waiting for them would hide what happened here.
        if dist.get_world_size() == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _attempt() -> str:
    """Which start of the ranks this is: torchrun's store outlives them, and with it the addresses of those that died.

    Agents of several nodes count on their own, each the failures of its node; there, torchrun needs
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 to restart, which gives every start a store of its own.

    Source: torch/distributed/elastic/rendezvous/dynamic_rendezvous.py, `next_rendezvous`.
    """
    one_node = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"


@contextlib.contextmanager
def process_groups(config: RunConfig) -> Iterator[ProcessGroups]:
    """Groups of one layout over running processes, seeded. Collective over all processes.

    Raises:
        ConfigError: the layout does not fit the number of processes.
    """
    data_parallel_size(config, world_size=dist.get_world_size())
    parallel = config.parallel
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        _seed(config.train.seed, groups)
        yield groups
    finally:
        parallel_state.destroy_model_parallel()


def _seed(seed: int, groups: ProcessGroups) -> None:
    """Megatron's convention: stages differ by 100, tensor-parallel ranks through the tracker, replicas are equal."""
    stage_seed = seed + 100 * groups.pp.rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)
