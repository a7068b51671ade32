"""AdamW on Megatron-Core's distributed optimizer, or Muon, from the `optimizer` section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer, muon
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.process_groups_config import ProcessGroupCollection

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.model.passthrough import passthrough
from sparsecod_megatron.model.precision import optimizer_precision_fields
from sparsecod_megatron.train.parameter_groups import group_overrides

_SPREAD_EXPERTS = ParamPredicate(name="spread_experts", fn=lambda parameter: not getattr(parameter, "allreduce", True))
"""Parameters of experts that are spread over ranks."""
_ANOTHER_LENGTH: Any = {"spread_experts": True}
"""An entry more in their parameter group. Upstream's Muon finds it by `list.remove`, which compares dictionaries, and
those of equal length down to their tensors: an error where as many matrices are in experts as outside of them."""


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

    Raises:
        ConfigError: Muon without the package that it comes from.
    """
    if config.optimizer.optimizer == "muon":
        return _muon(config, models, groups)
    return get_megatron_optimizer(
        optimizer_config(config), list(models), config_overrides=group_overrides(config), pg_collection=None
    )


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


def _muon(
    config: RunConfig, models: Sequence[DistributedDataParallel], groups: ProcessGroupCollection
) -> ChainedOptimizer:
    if not muon.HAVE_EMERGING_OPTIMIZERS:
        raise ConfigError(
            "optimizer.optimizer: 'muon' needs NVIDIA's Emerging-Optimizers (module emerging_optimizers), which is not "
            "installed; install it from NVIDIA-NeMo, or set optimizer.optimizer=adam"
        )
    overrides = group_overrides(config) | {ParamKey(predicate=_SPREAD_EXPERTS): _ANOTHER_LENGTH}
    chain = muon.get_megatron_muon_optimizer(
        optimizer_config(config), list(models), config_overrides=overrides, pg_collection=groups
    )
    # Upstream removes the experts' groups from the list that it walks through, which would miss a neighbour.
    assert not any(group["is_expert_parallel"] for group in chain.chained_optimizers[0].param_groups)
    if config.model.attention_output_gate == "elementwise":
        _split_gate(config, chain)
    return chain


def _split_gate(config: RunConfig, chain: ChainedOptimizer) -> None:
    """Tell Muon the rows of a query group under an elementwise gate, of which upstream does not know: the gate's."""
    channels = config.model.head_dim
    queries = config.model.num_attention_heads // config.model.query_groups * channels
    for part in chain.chained_optimizers:
        if isinstance(part.optimizer, muon.TensorParallelMuon):
            part.optimizer.qkv_split_shapes = [queries, queries, channels, channels]
