"""AdamW on Megatron-Core's distributed optimizer, or Muon (`train/muon.py`), from the `optimizer` section."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.train.parameter_groups import group_overrides


def build_optimizer(
    config: RunConfig,
    fields: OptimizerConfig,
    models: Sequence[DistributedDataParallel],
    groups: ProcessGroupCollection,
) -> MegatronOptimizer:
    """The optimizer of this rank's model chunks, without state. Collective over all processes.

    Args:
        config: a checked run.
        fields: Megatron-Core's configuration of the optimizer.
        models: wrapped for data parallelism.
        groups: the run's process groups.

    Returns:
        A chain: one optimizer for what is replicated and one for experts spread over ranks; under Muon these two for
        matrices, routers among them, and AdamW for embeddings, output layer and vectors.
    """
    overrides = group_overrides(config)
    if config.optimizer.optimizer == "muon":
        from sparsecod_megatron.train.muon import build_muon  # upstream moves its parts about; AdamW must not care

        return build_muon(config.model, fields, models, overrides, groups)
    return get_megatron_optimizer(fields, list(models), config_overrides=overrides, pg_collection=None)
