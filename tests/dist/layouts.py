"""The layouts that must all compute what one process computes."""

from __future__ import annotations

from dataclasses import dataclass

TP2 = "parallel.tensor_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
CP2 = "parallel.context_parallel_size=2"
EP2 = "parallel.expert_model_parallel_size=2"
ETP1 = "parallel.expert_tensor_parallel_size=1"
FULL_RECOMPUTE = (
    "megatron.recompute_granularity=full",
    "megatron.recompute_method=uniform",
    "megatron.recompute_num_layers=1",
)
SELECTIVE_RECOMPUTE = ("megatron.recompute_granularity=selective", "megatron.recompute_modules=[core_attn,layernorm]")

BUCKETS = ("megatron.overlap_grad_reduce=true", "megatron.overlap_param_gather=true", "megatron.bucket_size=5000")
"""How CUDA trains by default, with many small buckets, some of which end in padding."""


@dataclass(frozen=True)
class Layout:
    """A model spread over processes.

    Attributes:
        name: shown by pytest.
        model: `dense` or `moe`.
        nproc: number of processes.
        overrides: of the configuration.
    """

    name: str
    model: str
    nproc: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class SpreadCase:
    """What a worker trains in each of its layouts.

    Attributes:
        model: `dense` or `moe`.
        subject: what is tried in it.
        layout: a name of the worker's; empty for one process.
    """

    model: str
    subject: str
    layout: str = ""

    @property
    def name(self) -> str:
        """Shown by pytest, and the key of the worker's file."""
        return "-".join(filter(None, (self.model, self.subject, self.layout)))


LAYOUTS = [  # with CUDA's defaults; test_optimizers.py and test_variants.py have a CPU's, one bucket and no overlap
    Layout("dp2", "dense", 2, BUCKETS),
    Layout("tp2", "dense", 2, (TP2, *BUCKETS)),
    Layout("tp2-sp", "dense", 2, (TP2, SP, *BUCKETS)),
    Layout("pp2", "dense", 2, (PP2, *BUCKETS)),
    Layout("pp2-vpp2", "dense", 2, (PP2, VPP2, *BUCKETS)),
    Layout("cp2", "dense", 2, (CP2, *BUCKETS)),
    Layout("tp2-sp-full-recompute", "dense", 2, (TP2, SP, *FULL_RECOMPUTE, *BUCKETS)),
    Layout("ep2", "moe", 2, (EP2, *BUCKETS)),
    Layout("cp2-ep2-selective-recompute", "moe", 2, (CP2, EP2, *SELECTIVE_RECOMPUTE, *BUCKETS)),
    Layout("tp2-ep2-etp1", "moe", 2, (TP2, SP, EP2, ETP1, *BUCKETS)),
]
LARGE_LAYOUTS = [  # resumed in, with the same comparison
    Layout("tp2-pp2", "dense", 4, (TP2, PP2, *BUCKETS)),
    Layout("tp2-ep2", "moe", 4, (TP2, SP, EP2, *BUCKETS)),
]
