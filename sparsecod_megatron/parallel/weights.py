"""Weights as the last update left them, on every rank, for whoever reads them outside of a step.

With `overlap_param_gather` (CUDA's default) a data-parallel rank has new values only of what it steps itself; the rest
arrive in the next forward pass. Until then its weights are a mixture of two steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel


def gather_weights(models: Sequence[torch.nn.Module]) -> None:
    """Do now what the hooks of the next forward pass would do. Collective over the data-parallel groups.

    Nothing is left to do where no gather is outstanding, and the next forward pass finds it done.

    Args:
        models: model chunks of this rank, wrapped for data parallelism or not.

    Source: Megatron-Core distributed/distributed_data_parallel.py, `_make_forward_pre_hook`.
    """
    for model in models:
        if isinstance(model, DistributedDataParallel) and model.use_forward_hook:
            for bucket_group in (*model.bucket_groups, *model.expert_parallel_bucket_groups):
                bucket_group.finish_param_sync(skip_next_bucket_dispatch=True)
