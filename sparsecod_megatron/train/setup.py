"""Wraps the model for data parallelism and builds its optimizer and schedule, all Megatron-Core's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from sparsecod_megatron.backend import Backend
from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.model import build_model, transformer_config
from sparsecod_megatron.model.passthrough import passthrough


@dataclass
class Trainer:
    """What one rank trains with.

    Attributes:
        config: the run.
        backend: where it computes.
        groups: its process groups.
        megatron: Megatron-Core's configuration of the model and layout.
        models: data-parallel wrapped model chunks of this rank.
        optimizer: the distributed optimizer over them.
        scheduler: learning rate and weight decay by step.
    """

    config: RunConfig
    backend: Backend
    groups: ProcessGroupCollection
    megatron: TransformerConfig
    models: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def num_microbatches(self) -> int:
        """Forward passes of one rank in one step."""
        train = self.config.train
        return train.global_batch_size // (train.micro_batch_size * self.groups.dp.size())

    @property
    def is_first_rank(self) -> bool:
        """Whether this process writes the run's files."""
        return torch.distributed.get_rank() == 0


def build_trainer(config: RunConfig, backend: Backend, groups: ProcessGroupCollection) -> Trainer:
    """Model, optimizer and schedule of this rank, at step 0. Collective over all processes.

    Args:
        config: a checked run whose vocab_size is known.
        backend: the selected backend.
        groups: the run's process groups.
    """
    megatron = transformer_config(config, transformer_engine=backend.transformer_engine)
    chunks = build_model(config, megatron, groups, device=backend.device, transformer_engine=backend.transformer_engine)
    models = _data_parallel(config, backend, groups, megatron, chunks)
    optimizer = get_megatron_optimizer(_optimizer_config(config), models, pg_collection=None)
    scheduler = _scheduler(config, optimizer)
    _connect(megatron, models, optimizer)
    return Trainer(config, backend, groups, megatron, models, optimizer, scheduler)


def _data_parallel(
    config: RunConfig,
    backend: Backend,
    groups: ProcessGroupCollection,
    megatron: TransformerConfig,
    chunks: Sequence[torch.nn.Module],
) -> list[DistributedDataParallel]:
    overlap = backend.name == "cuda"
    # Checkpoints are written by the distributed optimizer, whatever the data-parallel size.
    ours = {"use_distributed_optimizer": True}
    defaults = {"grad_reduce_in_fp32": True, "overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
    ddp_config = DistributedDataParallelConfig(
        **passthrough(config.megatron, DistributedDataParallelConfig, ours, defaults)
    )
    models = [
        # Only the first chunk of an interleaved schedule is worth bucketing; the others are complete when their
        # backward ends.
        DistributedDataParallel(megatron, ddp_config, chunk, disable_bucketing=index > 0, pg_collection=groups)
        for index, chunk in enumerate(chunks)
    ]
    for model in models:
        model.broadcast_params()
    return models


def _optimizer_config(config: RunConfig) -> OptimizerConfig:
    section = config.optimizer
    bf16 = config.precision.dtype == "bf16"
    ours: dict[str, Any] = {
        "optimizer": "adam",
        "lr": section.lr,
        "min_lr": section.lr * config.schedule.min_lr_ratio,
        "weight_decay": section.weight_decay,
        "adam_beta1": section.adam_beta1,
        "adam_beta2": section.adam_beta2,
        "adam_eps": section.adam_eps,
        "clip_grad": section.clip_grad,
        "bf16": bf16,
        "params_dtype": torch.bfloat16 if bf16 else torch.float32,
        "use_distributed_optimizer": True,
    }
    return OptimizerConfig(**passthrough(config.megatron, OptimizerConfig, ours))


def _scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    schedule, section = config.schedule, config.optimizer
    assert schedule.lr_decay_steps is not None, "filled in when the configuration was read"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.lr * schedule.min_lr_ratio,
        lr_warmup_steps=schedule.lr_warmup_steps,
        lr_decay_steps=schedule.lr_decay_steps,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=config.train.train_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def _connect(megatron: TransformerConfig, models: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Give the schedules the functions they call: gradient reduction, loss scale, and delayed synchronisation."""
    megatron.finalize_model_grads_func = finalize_model_grads
    megatron.grad_scale_func = optimizer.scale_loss

    def one_or_list(functions: list[Any]) -> Any:
        return functions[0] if len(functions) == 1 else functions

    if models[0].ddp_config.overlap_grad_reduce:
        megatron.no_sync_func = one_or_list([model.no_sync for model in models])
    if models[0].ddp_config.overlap_param_gather and len(models) > 1:
        megatron.param_sync_func = one_or_list([model.start_param_sync for model in models])
