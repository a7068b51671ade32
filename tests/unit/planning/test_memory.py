"""Planned memory of one process against real tensors, by part, within 5 %; of several in tests/dist/test_memory.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.planning.layout import layout_of
from sparsecod_megatron.planning.memory import RankMemory, forwards_in_flight, rank_memory
from tests.helpers.megatron import SMALL, megatron_model
from tests.helpers.memory import forward_bytes, step_bytes
from tests.helpers.training import fresh_router_losses, small_trainer
from tests.helpers.variants import DENSE, MOE, MOE_SHAPE

SHAPE = (
    "model.hidden_size=64",
    "model.ffn_hidden_size=160",
    "model.num_layers=2",
    "model.vocab_size=256",
    "data.seq_length=64",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
)
EXPERTS = (*MOE_SHAPE, "model.moe_ffn_hidden_size=96")
# Its list of experts a token is for three layers.
TOPK_PER_LAYER = ("model.num_layers=3", "model.moe_router_topk_per_layer=[1,2,4]", "model.moe_router_pre_softmax=true")
VARIANTS = {f"dense-{name}": keys for name, keys in DENSE.items()}
VARIANTS |= {f"moe-{name}": (*EXPERTS, *keys) for name, keys in MOE.items() if name != "capacity"}
VARIANTS["moe-topk-per-layer"] = (*EXPERTS, *TOPK_PER_LAYER)
VARIANTS["dense-no-rope"] = ("model.no_rope_freq=[0,1]",)
VARIANTS["dense-dropout"] = ("model.hidden_dropout=0.1",)
SELECTIVE = "megatron.recompute_granularity=selective"
FULL = "megatron.recompute_granularity=full"
STEPS = {
    "dense": (),
    "dense-bf16": ("precision.dtype=bf16",),
    "qk-norm-bf16": ("precision.dtype=bf16", "model.qk_norm=true"),
    "gate-bf16": ("precision.dtype=bf16", "model.attention_output_gate=elementwise"),
    "moe": EXPERTS,
    "moe-bf16": (*EXPERTS, "precision.dtype=bf16"),
    "latents-bf16": (*DENSE["latents"], "precision.dtype=bf16"),
    "latents-uniform": (
        *DENSE["latents"],
        FULL,
        "megatron.recompute_method=uniform",
        "megatron.recompute_num_layers=1",
    ),
    "tied": ("model.untie_embeddings_and_output_weights=false",),
    "uniform": (FULL, "megatron.recompute_method=uniform", "megatron.recompute_num_layers=1"),
    "uniform-2": (FULL, "megatron.recompute_method=uniform", "megatron.recompute_num_layers=2"),
    "uniform-bf16": (
        FULL,
        "megatron.recompute_method=uniform",
        "megatron.recompute_num_layers=1",
        "precision.dtype=bf16",
    ),
    "moe-uniform": (*EXPERTS, FULL, "megatron.recompute_method=uniform", "megatron.recompute_num_layers=1"),
    "block": (FULL, "megatron.recompute_method=block", "megatron.recompute_num_layers=1"),
    "core-attention-and-norms": (SELECTIVE, "megatron.recompute_modules=[core_attn,layernorm]"),
    "mlp": (SELECTIVE, "megatron.recompute_modules=[mlp]"),
    "parallel-norms": ("model.norm_placement=parallel", SELECTIVE, "megatron.recompute_modules=[layernorm]"),
    "layernorm-bf16": ("model.normalization=LayerNorm", "precision.dtype=bf16"),
    "moe-layer": (*EXPERTS, SELECTIVE, "megatron.recompute_modules=[moe]"),
}


@pytest.fixture(autouse=True)
def plain_kernels() -> Iterator[None]:
    """What is planned for: Megatron-Core's own functions; the faster ones of the CPU backend keep less."""
    select_backend(cpu_kernels="plain")
    yield
    select_backend(cpu_kernels="fast")


def planned(*overrides: str) -> RankMemory:
    """Of the small model in one process, with the reference modules."""
    config = load_config(None, [*SMALL, *SHAPE, *overrides])
    return rank_memory(layout_of(config, 1, transformer_engine=False), 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_kept_by_a_forward_pass(name: str) -> None:
    overrides = VARIANTS[name]
    with fresh_router_losses(), megatron_model(*SHAPE, *overrides) as model:
        real = forward_bytes(model, samples=2, seq_length=64, vocab_size=256)
    memory = planned(*overrides)
    assert memory.activations + memory.logits == pytest.approx(real, rel=0.02)


def test_capacity_is_an_upper_bound() -> None:
    """Planned for full experts; an uneven load leaves some of them with fewer rows."""
    overrides = (*EXPERTS, "model.moe_expert_capacity_factor=0.5")
    with fresh_router_losses(), megatron_model(*SHAPE, *overrides) as model:
        real = forward_bytes(model, samples=2, seq_length=64, vocab_size=256)
    memory, dropless = planned(*overrides), planned(*EXPERTS)
    assert real <= memory.activations + memory.logits < dropless.activations + dropless.logits


@pytest.mark.parametrize("name", STEPS)
def test_parts_of_a_training_step(name: str) -> None:
    """Weights, gradients and optimizer state after a step; the most that was kept for backward during it."""
    overrides = STEPS[name]
    with small_trainer(*SHAPE, *overrides) as trainer:
        real = step_bytes(trainer)
    memory = planned(*overrides)
    ours = {**memory.parts(), "activations": memory.activations + memory.logits}
    for part, size in real.items():
        assert ours[part] == pytest.approx(size, rel=0.05), part


def test_recompute_lowers_the_plan_in_order() -> None:
    none, mlp, full = (planned(*STEPS[name]).activations for name in ("dense", "mlp", "uniform"))
    assert full < mlp < none


@pytest.mark.parametrize(
    ("stages", "chunks", "microbatches", "expected"),
    [
        (4, 1, 8, [[4], [3], [2], [1]]),
        (4, 1, 2, [[2], [2], [2], [1]]),
        # Warm-up 2 · (2 - 1 - stage) + 2, and one more, over chunks 0 0 1 1 0 …
        (2, 2, 8, [[3, 2], [2, 1]]),
        (1, 1, 8, [[1]]),
    ],
)
def test_forwards_in_flight(stages: int, chunks: int, microbatches: int, expected: list[list[int]]) -> None:
    overrides = [
        "model.vocab_size=256",
        "model.num_layers=8",
        f"parallel.pipeline_model_parallel_size={stages}",
        f"train.global_batch_size={microbatches}",
    ]
    if chunks > 1:
        overrides.append(f"parallel.virtual_pipeline_model_parallel_size={chunks}")
    layout = layout_of(load_config(None, overrides), stages)
    assert [forwards_in_flight(layout, stage) for stage in range(stages)] == expected
