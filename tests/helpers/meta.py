"""A model of any size built without memory: every tensor on the meta device, in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import ParallelConfig, RunConfig


@contextlib.contextmanager
def meta_model(config: RunConfig) -> Iterator[torch.nn.Module]:
    """The GPTModel of `config` while the block runs, whole whatever the layout that it names."""
    backend = select_backend()
    from sparsecod_megatron.model import build_model, transformer_config, unwrap
    from sparsecod_megatron.parallel import running_processes

    train = replace(config.train, global_batch_size=1, micro_batch_size=1)
    config = replace(config, parallel=ParallelConfig(), train=train)
    meta = torch.device("meta")
    with (
        running_processes(config, communication=backend.communication, device=backend.device) as groups,
        # Linear layers ask for it by name: their memory would be taken, and only then given up. It is never touched,
        # but a process whose heap has grown beyond the machine's memory cannot fork any more.
        mock.patch.object(torch.cuda, "current_device", return_value=meta),
        meta,
    ):
        megatron = transformer_config(config, transformer_engine=False)
        yield unwrap(build_model(config, megatron, groups, device=meta, transformer_engine=False)[0])


def parameter_counts(model: torch.nn.Module, config: RunConfig) -> tuple[int, int]:
    """(all parameters, those that serve one token): without the experts that its router does not choose."""
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    experts = config.model.num_moe_experts or 1
    chosen = config.model.moe_router_topk if config.model.is_moe else 1
    return total, total - routed // experts * (experts - chosen)
