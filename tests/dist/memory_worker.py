"""Measures the memory of one training step on every rank of several layouts. Started by torchrun with four ranks.

Argument: the JSON file to write, {layout: [{part: bytes} by rank]}.
"""

from __future__ import annotations

import sys

import torch.distributed as dist

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import RunConfig, load_config
from tests.dist.layouts import CP2, EP2, ETP1, FULL_RECOMPUTE, PP2, SP, TP2, VPP2, Layout
from tests.helpers.memory import step_bytes
from tests.helpers.ranks import found_by_ranks
from tests.helpers.training import fresh_router_losses

RUN = (
    "model.num_layers=4",
    "model.hidden_size=128",
    "model.ffn_hidden_size=320",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "model.vocab_size=512",
    "data.seq_length=64",
    "train.global_batch_size=16",
    "train.micro_batch_size=2",
)
MODELS = {
    "dense": (),
    # The plan assumes an even load; random logits, new in every pass, come close.
    "moe": (
        "model.num_moe_experts=8",
        "model.moe_ffn_hidden_size=96",
        "model.moe_shared_expert_intermediate_size=64",
        "megatron.moe_router_force_load_balancing=true",
    ),
}
BF16 = "precision.dtype=bf16"
TIED = "model.untie_embeddings_and_output_weights=false"
PP4 = "parallel.pipeline_model_parallel_size=4"
LAYOUTS = [
    Layout("dp4", "dense", 4, ()),
    Layout("dp4-bf16", "dense", 4, (BF16,)),
    Layout("tp2", "dense", 4, (TP2,)),
    Layout("tp2-sp-bf16", "dense", 4, (TP2, SP, BF16)),
    Layout("pp2-tied", "dense", 4, (PP2, TIED)),
    Layout("pp4", "dense", 4, (PP4,)),
    Layout("pp2-vpp2", "dense", 4, (PP2, VPP2)),
    Layout("cp2", "dense", 4, (CP2,)),
    Layout("pp2-full-recompute", "dense", 4, (PP2, *FULL_RECOMPUTE)),
    Layout("tp2-pp2", "dense", 4, (TP2, PP2, SP)),
    Layout("ep2", "moe", 4, (EP2,)),
    Layout("ep4-bf16", "moe", 4, ("parallel.expert_model_parallel_size=4", BF16)),
    Layout("tp2-ep2", "moe", 4, (TP2, SP, EP2)),
    Layout("tp2-ep2-etp1", "moe", 4, (TP2, SP, EP2, ETP1)),
    Layout("pp2-ep2", "moe", 4, (PP2, EP2)),
]


def layout_config(layout: Layout) -> RunConfig:
    """The run of a layout."""
    return load_config(None, ["precision.dtype=fp32", *RUN, *MODELS[layout.model], *layout.overrides])


def main() -> None:
    """Write the file from rank 0."""
    # Memory is planned for Megatron-Core's own functions; the faster ones keep less.
    backend = select_backend(cpu_kernels="plain")
    from sparsecod_megatron.parallel import process_groups
    from sparsecod_megatron.train.setup import build_trainer

    with found_by_ranks(backend, sys.argv[1]) as measured:
        for layout in LAYOUTS:
            config = layout_config(layout)
            with fresh_router_losses(), process_groups(config) as groups:
                parts = step_bytes(build_trainer(config, backend, groups))
                ranks: list[dict[str, int]] = [{}] * dist.get_world_size()
                dist.all_gather_object(ranks, {**parts, "stage": groups.pp.rank()})
                measured[layout.name] = ranks


if __name__ == "__main__":
    main()
