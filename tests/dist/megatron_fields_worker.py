"""Trains with the fields of `megatron:` and writes down which code reads them. Started by torchrun with two ranks.

Argument: the JSON file to write: {"losses": {case: [loss by step]}, "read": {field: modules that read it}}.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import Any

from sparsecod_megatron.backend import Backend, select_backend
from sparsecod_megatron.config import load_config
from tests.dist.layouts import EP2, FULL_RECOMPUTE, PP2, SP, TP2, VPP2
from tests.helpers.megatron import SMALL
from tests.helpers.ranks import found_by_ranks
from tests.helpers.training import fresh_router_losses, trainer_batches

STEPS = 2
RUN = (*SMALL, "train.global_batch_size=8", "train.micro_batch_size=2", "optimizer.lr=1e-2", "optimizer.adam_eps=1e-3")
EXPERTS = (
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=24",
    "model.moe_router_load_balancing_type=none",
    "model.moe_shared_expert_intermediate_size=24",
)
SAME: dict[str, tuple[str, ...]] = {
    "ends": (PP2, "megatron.num_layers_in_first_pipeline_stage=1", "megatron.num_layers_in_last_pipeline_stage=2"),
    "embedding": (PP2, "megatron.account_for_embedding_in_pipeline_split=true"),
    "loss": (PP2, "megatron.account_for_loss_in_pipeline_split=true", "megatron.deallocate_pipeline_outputs=true"),
    "layout": (PP2, "megatron.pipeline_model_parallel_layout='Ett|tL'"),
    "chunks": (
        PP2,
        VPP2,
        "megatron.pipeline_model_parallel_layout='Et|t|t|L'",
        "megatron.microbatch_group_size_per_vp_stage=4",
        "megatron.batch_p2p_comm=false",
        "megatron.overlap_p2p_comm=false",
    ),
    "buckets": (
        "megatron.overlap_grad_reduce=true",
        "megatron.overlap_param_gather=true",
        "megatron.bucket_size=2000",
        "megatron.align_param_gather=true",
        "megatron.pad_buckets_for_high_nccl_busbw=true",
        "megatron.average_in_collective=true",
    ),
    "saved": (TP2, *FULL_RECOMPUTE, "megatron.distribute_saved_activations=true"),
    "sequence": (
        TP2,
        SP,
        "megatron.clone_scatter_output_in_embedding=false",
        "megatron.recompute_granularity=selective",
        "megatron.recompute_modules=[mlp]",
    ),
    "kernels": (
        "megatron.apply_rope_fusion=false",
        "megatron.bias_activation_fusion=false",
        "megatron.bias_dropout_fusion=true",
        "megatron.deterministic_mode=true",
        "megatron.gradient_accumulation_fusion=false",
        "megatron.grad_reduce_in_fp32=false",
        "megatron.reduce_scatter_with_fp32_accumulation=true",
    ),
}
"""Cases that must train as one process without their fields does."""
OTHER: dict[str, tuple[str, ...]] = {
    "attention": ("model.no_rope_freq=[1,0,0]", "model.softmax_scale=0.5", "model.qkv_bias=true"),
    "pairs": ("megatron.rotary_interleaved=true", "megatron.glu_linear_offset=1"),
    "coupled": ("megatron.decoupled_weight_decay=false",),
    "loss": ("precision.dtype=bf16", "megatron.cross_entropy_loss_fusion=true"),
    "capacity": (
        *EXPERTS,
        EP2,
        "model.moe_expert_capacity_factor=1.0",
        "megatron.moe_input_jitter_eps=0.1",
        "megatron.moe_pad_expert_input_to_capacity=true",
        "megatron.moe_token_drop_policy=position",
    ),
    "forced": (*EXPERTS, EP2, "megatron.moe_router_force_load_balancing=true"),
}
"""Cases that train another model, or with other numbers."""
EXCHANGES: dict[str, tuple[str, ...]] = {
    "allgather": (*EXPERTS, EP2, "megatron.moe_token_dispatcher_type=allgather"),
    "overlapped": (*EXPERTS, EP2, "megatron.moe_shared_expert_overlap=true"),
}
"""Cases that must train as one process with these experts does."""
CONFIGURATION_FILES = ("transformer_config.py", "model_parallel_config.py", "optimizer_config.py")


def record_reads() -> dict[str, set[str]]:
    """Which files read each field from now on, but those that declare it."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    read: dict[str, set[str]] = defaultdict(set)

    def getattribute(self: Any, name: str) -> Any:
        file = sys._getframe(1).f_code.co_filename
        if "megatron/core" in file and not file.endswith(CONFIGURATION_FILES):
            read[name].add(file.rpartition("megatron/core/")[2])
        return object.__getattribute__(self, name)

    for kind in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig):
        kind.__getattribute__ = getattribute  # type: ignore[method-assign,assignment]
    return read


def series(backend: Backend, groups: Any, overrides: tuple[str, ...]) -> list[float]:
    """Loss by step. Collective over all processes."""
    from sparsecod_megatron.train.setup import build_trainer
    from sparsecod_megatron.train.step import train_step

    trainer = build_trainer(load_config(None, [*RUN, *overrides]), backend, groups)
    data = trainer_batches(trainer)
    return [train_step(trainer, data).loss for _ in range(STEPS)]


def main() -> None:
    """Write the file from rank 0."""
    backend = select_backend()
    from sparsecod_megatron.parallel import process_groups

    read, losses = record_reads(), {}
    with found_by_ranks(backend, sys.argv[1]) as found:
        for name, overrides in [*SAME.items(), *EXCHANGES.items(), *((f"other-{n}", o) for n, o in OTHER.items())]:
            with process_groups(load_config(None, [*RUN, *overrides])) as groups, fresh_router_losses():
                losses[name] = series(backend, groups, overrides)
        found |= {"losses": losses, "read": {field: sorted(files) for field, files in read.items()}}


if __name__ == "__main__":
    main()
