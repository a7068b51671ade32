"""Process groups of a run: every one of them gives up when the run says."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from tests.helpers.megatron import SMALL

LIMIT = datetime.timedelta(seconds=90)


def limits() -> dict[str, datetime.timedelta]:
    """Of every group that there is, by its name."""
    from megatron.core import parallel_state

    groups = [dist.group.WORLD, *parallel_state._global_process_group_list[1:]]
    return {group.group_desc: group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_every_group_has_the_runs_time_limit() -> None:
    """Megatron-Core's own 30 minutes would outlast `train.step_timeout_s`, and cut a longer one short."""
    backend = select_backend()
    from sparsecod_megatron.parallel import running_processes

    config = load_config(None, list(SMALL))
    with running_processes(config, communication=backend.communication, device=backend.device, timeout_s=90):
        found = limits()
    assert len(found) > 20
    assert set(found.values()) == {LIMIT}


def test_upstream_still_forgets_one() -> None:
    """Fails once Megatron-Core gives every group its time limit: then `process_groups` need not."""
    select_backend()
    from megatron.core import parallel_state

    from sparsecod_megatron.parallel import world

    with world(communication="gloo"):
        try:
            parallel_state.initialize_model_parallel(distributed_timeout_minutes=1.5)
            forgotten = {name for name, limit in limits().items() if limit != LIMIT} - {"default_pg"}
        finally:
            parallel_state.destroy_model_parallel()
    assert forgotten == {"EXPERT_DATA_PARALLEL_GROUP_GLOO"}
