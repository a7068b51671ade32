"""Muon through Megatron-Core, and all that training knows of how upstream builds it: what changes there ends here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, muon
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.process_groups_config import ProcessGroupCollection

from sparsecod_megatron.config import ModelConfig

_EXPERTS_SPREAD = ParamPredicate(name="spread_experts", fn=lambda parameter: not getattr(parameter, "allreduce", True))
"""Parameters of experts that are spread over ranks."""
_ENTRY_OF_EXPERTS: Any = {"spread_experts": True}
"""An entry more in their parameter group. Upstream's Muon finds it by `list.remove`, which compares dictionaries, and
those of equal length down to their tensors: an error where as many matrices are in experts as outside of them."""


def build_muon(
    model: ModelConfig,
    fields: OptimizerConfig,
    models: Sequence[DistributedDataParallel],
    overrides: dict[ParamKey, Any],
    groups: ProcessGroupCollection,
) -> ChainedOptimizer:
    """One Muon for matrices, another for experts spread over ranks, and AdamW for the rest. Collective.

    Args:
        model: the `model` section.
        fields: Megatron-Core's configuration of the optimizer.
        models: wrapped for data parallelism, without the distributed optimizer.
        overrides: overrides of parameter groups.
        groups: the run's process groups.
    """
    overrides = overrides | {ParamKey(predicate=_EXPERTS_SPREAD): _ENTRY_OF_EXPERTS}
    chain = muon.get_megatron_muon_optimizer(fields, list(models), config_overrides=overrides, pg_collection=groups)
    # Upstream removes the experts' groups from the list that it walks through, which would miss a neighbour.
    assert not any(group["is_expert_parallel"] for group in chain.chained_optimizers[0].param_groups)
    if model.attention_output_gate == "elementwise":
        _split_gate(model, chain)
    return chain


def _split_gate(model: ModelConfig, chain: ChainedOptimizer) -> None:
    """Tell Muon the rows of a query group under an elementwise gate, of which upstream does not know: the gate's."""
    channels = model.head_dim
    queries = model.num_attention_heads // model.query_groups * channels
    for part in chain.chained_optimizers:
        if isinstance(part.optimizer, muon.TensorParallelMuon):
            part.optimizer.qkv_split_shapes = [queries, queries, channels, channels]
