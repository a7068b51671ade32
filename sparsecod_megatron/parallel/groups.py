"""Starts and stops the process groups of a run.

Megatron-Core keeps its groups in `parallel_state`; they are created here once and handed on as a
ProcessGroupCollection.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import random
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.rendezvous import rendezvous

from sparsecod_megatron.config import RunConfig, data_parallel_size

ProcessGroups: TypeAlias = ProcessGroupCollection
TIMEOUT_S = 1800.0
"""Time limit of a collective where a run does not set one."""


@contextlib.contextmanager
def running_processes(
    config: RunConfig, *, communication: str, device: torch.device, timeout_s: float = TIMEOUT_S
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
    with (
        world(communication=communication, timeout_s=timeout_s),
        process_groups(config, timeout_s=timeout_s) as groups,
    ):
        if device.type == "cuda":
            # The barriers of torch and Megatron-Core take the device that this group was first used with.
            dist.all_reduce(torch.zeros(1, device=device))
        yield groups


@contextlib.contextmanager
def world(*, communication: str, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """torch.distributed over the processes that torchrun started, or over this one. Collective over all processes.

    Args:
        communication: torch.distributed backend; with `nccl`, the process is bound to its GPU already.
        timeout_s: after this long a collective that some rank never joins raises.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"attempt_{_attempt()}", store)
    else:
        store, rank, size = dist.HashStore(), 0, 1
    store.set_timeout(timeout)
    # Without `device_id`, given which every group that is made later is a split of this one on all ranks, members or
    # not: Megatron-Core makes 11,000 of them on 1,024 ranks (torch's distributed_c10d.py, `perform_nocolor_split`).
    dist.init_process_group(communication, store=store, rank=rank, world_size=size, timeout=timeout)
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
def process_groups(config: RunConfig, *, timeout_s: float = TIMEOUT_S) -> Iterator[ProcessGroups]:
    """Groups of one layout over running processes, seeded. Collective over all processes.

    Args:
        config: layout and seed.
        timeout_s: time limit of collectives in every group.

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
            # Upstream makes a timedelta of it, which takes fractions.
            distributed_timeout_minutes=timeout_s / 60,
        )
        # The one group that upstream makes without it (megatron-core 0.16.1 parallel_state.py:1279).
        forgotten = parallel_state.get_expert_data_parallel_group_gloo()
        # torch 2.14 has a public name, and a warning for this one.
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        set_timeout(datetime.timedelta(seconds=timeout_s), forgotten)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        _seed(config.train.seed, groups)
        yield groups
    finally:
        parallel_state.destroy_model_parallel()


def _seed(seed: int, groups: ProcessGroups) -> None:
    """Megatron's convention: stages differ by 100, tensor-parallel ranks through the tracker, replicas are equal."""
    stage_seed = seed + 100 * groups.pp.rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)
