"""AdamW on Megatron-Core's distributed optimizer, or Muon (`train/muon.py`), from the `optimizer` section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.model.passthrough import passthrough
from sparsecod_megatron.model.precision import optimizer_precision_fields
from sparsecod_megatron.train.parameter_groups import group_overrides


def shards_optimizer(config: RunConfig) -> bool:
    """Whether data-parallel ranks share the optimizer's state: all do but Muon's, which steps whole matrices."""
    return config.optimizer.optimizer != "muon"


def build_optimizer(
    config: RunConfig, models: Sequence[DistributedDataParallel], groups: ProcessGroupCollection
) -> MegatronOptimizer:
    """The optimizer of this rank's model chunks, without state. Collective over all processes.

    Args:
        config: a checked run.
        models: wrapped for data parallelism, as `shards_optimizer` says.
        groups: the run's process groups.

    Returns:
        A chain: one optimizer for what is replicated and one for experts spread over ranks; under Muon these two for
        matrices, routers among them, and AdamW for embeddings, output layer and vectors.
    """
    fields, overrides = optimizer_config(config), group_overrides(config)
    if config.optimizer.optimizer == "muon":
        from sparsecod_megatron.train.muon import build_muon  # upstream moves its parts about; AdamW must not care

        return build_muon(config.model, fields, models, overrides, groups)
    return get_megatron_optimizer(fields, list(models), config_overrides=overrides, pg_collection=None)


def optimizer_config(config: RunConfig) -> OptimizerConfig:
    """Megatron-Core's configuration of this run's optimizer. Local."""
    section = config.optimizer
    bf16 = config.precision.dtype == "bf16"
    same_name = (
        "optimizer",
        "lr",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_eps",
        "clip_grad",
        "muon_momentum",
        "muon_use_nesterov",
        "muon_num_ns_steps",
        "muon_scale_mode",
        "muon_extra_scale_factor",
        "muon_tp_mode",
    )
    ours: dict[str, Any] = {
        **{name: getattr(section, name) for name in same_name},
        "min_lr": section.lr * config.schedule.min_lr_ratio,
        **optimizer_precision_fields(config.precision),
        "use_distributed_optimizer": shards_optimizer(config),
    }
    # An fp32 run is one whose results are compared; `medium` would orthogonalise in bf16.
    defaults = {"muon_fp32_matmul_prec": "medium" if bf16 else "highest"}
    return OptimizerConfig(**passthrough(config.megatron, OptimizerConfig, ours, defaults))
