"""Puts a rank's trainer together: model, data-parallel wrapper, optimizer and schedule, all Megatron-Core's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from sparsecod_megatron.backend import Backend, choice
from sparsecod_megatron.checkpoint.parts import TrainingParts
from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.data.synthetic.registry import task_of
from sparsecod_megatron.model import build_model, unwrap
from sparsecod_megatron.model.megatron_configs import MegatronConfigs
from sparsecod_megatron.model.router import then_centred
from sparsecod_megatron.seams.mechanism import configured
from sparsecod_megatron.seams.plugin import Plugin, StepContext, StepParts
from sparsecod_megatron.train.optimizer import build_optimizer
from sparsecod_megatron.train.schedule import build_scheduler


@dataclass(kw_only=True)
class Trainer(TrainingParts):
    """What one rank trains with.

    Attributes:
        models: data-parallel wrapped model chunks of this rank.
        backend: where it computes.
        megatron: Megatron-Core's configuration of the model and layout.
        products: which library multiplies, as `choice.record` has it; None where there is no choice.
        answers: places of a sample that count in the loss, on average, of a synthetic task; None for text.
    """

    models: list[DistributedDataParallel]
    backend: Backend
    megatron: TransformerConfig
    products: dict[str, Any] | None
    answers: float | None

    def num_microbatches(self, global_batch_size: int) -> int:
        """Forward passes of one rank in a step of `global_batch_size` sequences."""
        return global_batch_size // (self.config.train.micro_batch_size * self.groups.dp.size())

    def context(self, step: int) -> StepContext:
        """What plugins are told of a step, counted from 1."""
        return StepContext(step, self.config.train.train_steps)

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

    Raises:
        ConfigError: a combination that Megatron-Core refuses, or a `megatron:` field that nothing here reads.
    """
    chooses = backend.name == "cpu" and config.cpu_kernels != "plain"
    products = choice.record(choice.agree()) if chooses else None
    configs = MegatronConfigs.of(config, backend)
    megatron = configs.transformer
    chunks = build_model(config, megatron, groups, device=backend.device, transformer_engine=backend.transformer_engine)
    for mechanism in configured(config):
        mechanism.read_data([unwrap(chunk) for chunk in chunks], config.data)
    models = _data_parallel(configs, groups, chunks)
    optimizer = build_optimizer(config, configs.optimizer, models, groups)
    _connect(config.model, megatron, models, optimizer)
    return Trainer(
        config=config,
        backend=backend,
        groups=groups,
        megatron=megatron,
        models=models,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer),
        plugins=_plugins(config, models, optimizer, groups),
        products=products,
        answers=task.answers_per_sample(config.data.seq_length) if (task := task_of(config.data)) else None,
    )


def _plugins(
    config: RunConfig,
    models: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
) -> list[Plugin]:
    """The mechanisms' own, which have seen the fresh weights."""
    assert isinstance(optimizer, ChainedOptimizer)
    parts = StepParts(config, [unwrap(model) for model in models], optimizer, groups)
    found = [mechanism.plugin(parts) for mechanism in configured(config)]
    plugins = [plugin for plugin in found if plugin is not None]
    for plugin in plugins:
        plugin.weights_replaced()
    return plugins


def _data_parallel(
    configs: MegatronConfigs, groups: ProcessGroupCollection, chunks: Sequence[torch.nn.Module]
) -> list[DistributedDataParallel]:
    # Nothing is broadcast: weights are drawn by their names, alike on all replicas, and FP8 ones cannot be.
    return [
        # Only the first chunk of an interleaved schedule is worth bucketing; the others are complete when their
        # backward ends.
        DistributedDataParallel(
            configs.transformer, configs.ddp, chunk, disable_bucketing=index > 0, pg_collection=groups
        )
        for index, chunk in enumerate(chunks)
    ]


def _connect(
    model: ModelConfig, megatron: TransformerConfig, models: list[DistributedDataParallel], optimizer: MegatronOptimizer
) -> None:
    """Give the schedules the functions they call: gradient reduction, loss scale, and delayed synchronisation."""
    megatron.finalize_model_grads_func = finalize_model_grads
    if model.moe_router_bias_zero_mean:
        megatron.finalize_model_grads_func = then_centred(finalize_model_grads)
    megatron.grad_scale_func = _loss_scale(optimizer)

    def one_or_list(functions: list[Any]) -> Any:
        return functions[0] if len(functions) == 1 else functions

    if models[0].ddp_config.overlap_grad_reduce:
        megatron.no_sync_func = one_or_list([model.no_sync for model in models])
    if models[0].ddp_config.overlap_param_gather and len(models) > 1:
        megatron.param_sync_func = one_or_list([model.start_param_sync for model in models])


def _loss_scale(optimizer: MegatronOptimizer) -> Callable[[torch.Tensor], torch.Tensor]:
    """`optimizer.scale_loss`, without keeping the optimizer alive.

    Its fp32 shards are views with an autograd graph, which hides a cycle through the model's configuration from the
    garbage collector: a second trainer in one process would find the first one's process groups still running, each
    with threads that wake a hundred times per second.

    Source: Megatron-Core optimizer/distrib_optimizer.py, `_build_model_and_main_param_groups`.
    """
    method = weakref.WeakMethod(optimizer.scale_loss)

    def scale(loss: torch.Tensor) -> torch.Tensor:
        bound = method()
        assert bound is not None, "the optimizer is gone"
        return bound(loss)

    return scale
