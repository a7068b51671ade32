"""Megatron-Core's three configuration classes of one run, built in one place: model, optimizer, data parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from sparsecod_megatron.backend import Backend
from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.model.passthrough import passthrough
from sparsecod_megatron.model.precision import ddp_precision_fields, optimizer_precision_fields
from sparsecod_megatron.model.transformer_config import transformer_config

OPTIMIZER_KEYS = (
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
"""Keys of the optimizer section that are fields of the same name."""


@dataclass(frozen=True)
class MegatronConfigs:
    """All of a run.

    Attributes:
        transformer: model and layout.
        optimizer: the optimizer.
        ddp: gradients and weights of data-parallel ranks.
    """

    transformer: TransformerConfig
    optimizer: OptimizerConfig
    ddp: DistributedDataParallelConfig

    @classmethod
    def of(cls, config: RunConfig, backend: Backend) -> MegatronConfigs:
        """Those of a checked run on a backend. Local.

        Raises:
            ConfigError: Megatron-Core refuses the combination, or a `megatron:` field has no effect on this backend.
        """
        return cls(
            transformer_config(config, transformer_engine=backend.transformer_engine),
            _optimizer_config(config),
            _ddp_config(config, overlap=backend.name == "cuda"),
        )


def _shards_optimizer(optimizer: str) -> bool:
    """Whether data-parallel ranks share the optimizer's state: all do but Muon's, which steps whole matrices.

    Whatever their number: checkpoints are written by the distributed optimizer.
    """
    return optimizer != "muon"


def _optimizer_config(config: RunConfig) -> OptimizerConfig:
    section = config.optimizer
    sections = {
        **{name: getattr(section, name) for name in OPTIMIZER_KEYS},
        "min_lr": section.lr * config.schedule.min_lr_ratio,
        **optimizer_precision_fields(config.precision),
        "use_distributed_optimizer": _shards_optimizer(config.optimizer.optimizer),
    }
    # An fp32 run is one whose results are compared; `medium` would orthogonalise in bf16.
    defaults = {"muon_fp32_matmul_prec": "medium" if config.precision.dtype == "bf16" else "highest"}
    return OptimizerConfig(**passthrough(config.megatron, OptimizerConfig, sections=sections, defaults=defaults))


def _ddp_config(config: RunConfig, *, overlap: bool) -> DistributedDataParallelConfig:
    sharded = _shards_optimizer(config.optimizer.optimizer)
    sections = {"use_distributed_optimizer": sharded, **ddp_precision_fields(config.precision)}
    defaults = {
        "grad_reduce_in_fp32": True,
        "overlap_grad_reduce": overlap,
        "overlap_param_gather": overlap and sharded,
    }
    target = DistributedDataParallelConfig
    made = target(**passthrough(config.megatron, target, sections=sections, defaults=defaults))
    if "bucket_size" in config.megatron and not made.overlap_grad_reduce:
        fix = "set megatron.overlap_grad_reduce=true or remove it"
        raise ConfigError(f"megatron.bucket_size: {made.bucket_size}, but without overlap there is one; {fix}")
    return made
