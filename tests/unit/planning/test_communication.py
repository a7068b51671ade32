"""Bytes sent in a step against sums written out by hand, and the links that they take."""

from __future__ import annotations

import pytest

from sparsecod_megatron.config import load_config
from sparsecod_megatron.planning.communication import Traffic, step_traffic
from sparsecod_megatron.planning.hardware import GPUS
from sparsecod_megatron.planning.layout import layout_of

BASE = (
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.vocab_size=256",
    "data.seq_length=32",
    "train.micro_batch_size=2",
    "train.global_batch_size=16",
)
STREAM = 2 * 32 * 64 * 2
"""Bytes of the residual stream of a micro-batch, in bf16."""
TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"


def sent(gpus: int, *overrides: str, stage: int = 0) -> dict[str, float]:
    layout = layout_of(load_config(None, [*BASE, *overrides]), gpus)
    return {traffic.group: traffic.bytes for traffic in step_traffic(layout, stage)}


def test_one_process_sends_nothing() -> None:
    assert sent(1) == {}


def test_tensor() -> None:
    """8 micro-batches; all-reduces (twice a half) of 2 branches of 4 layers in 2 passes, of embedding and output."""
    assert sent(2, f"{TP}=2") == {"tensor": 8 * (4 * 2 * 2 + 1 + 1) * 2 * STREAM / 2}


def test_sequence_parallel_gathers_inputs_again() -> None:
    plain, sequence = (
        sent(2, f"{TP}=2", f"parallel.sequence_parallel={value}")["tensor"] for value in ("false", "true")
    )
    norms = (4 * 2 + 1) * 64 * 4  # summed in fp32: twice a half of each
    assert sequence - plain == 8 * (4 * 2 + 1) * STREAM / 2 + norms


def test_latents_are_gathered_in_place_of_the_input() -> None:
    """Three gathers a layer, of 24 + 16 + 8 channels for 64; gradients of what is whole on each rank are summed."""
    ranks = ("model.q_lora_rank=24", "model.kv_lora_rank=16", "model.qk_pos_emb_head_dim=8")
    latent = ("model.multi_latent_attention=true", "model.num_query_groups=4", *ranks)
    sequence = (f"{TP}=2", "parallel.sequence_parallel=true")
    whole = 4 * ((24 + 16 + 8) * 64 + 24 + 16) * 4  # in fp32
    saved = 8 * 4 * 3 * STREAM / 2 * (64 - 48) / 64
    assert sent(2, *sequence, *latent)["tensor"] - sent(2, *sequence)["tensor"] == whole - saved


def test_full_recompute_repeats_the_forward_pass() -> None:
    full = (
        "megatron.recompute_granularity=full",
        "megatron.recompute_method=uniform",
        "megatron.recompute_num_layers=1",
    )
    assert sent(2, f"{TP}=2", *full)["tensor"] - sent(2, f"{TP}=2")["tensor"] == 8 * 4 * 2 * 2 * STREAM / 2


def test_pipeline() -> None:
    """The first stage sends activations only, the last gradients only, the middle ones both."""
    assert sent(4, f"{PP}=4") == {"pipeline": 8 * STREAM}
    assert sent(4, f"{PP}=4", stage=1) == {"pipeline": 8 * 2 * STREAM}
    assert sent(4, f"{PP}=4", stage=3) == {"pipeline": 8 * STREAM}
    chunks = "parallel.virtual_pipeline_model_parallel_size=2"
    assert sent(2, f"{PP}=2", chunks) == {"pipeline": 8 * 3 * STREAM}


def test_data() -> None:
    """Gradients in fp32 one way, weights in bf16 the other, three quarters of each."""
    layer = (64 + 2 * 32 + 64) * 64 + 3 * 64 * 128 + 2 * 64
    parameters = 4 * layer + 64 + 2 * 256 * 64
    assert sent(4) == {"data": parameters * (4 + 2) * 3 / 4}
    assert sent(4, "optimizer.optimizer=muon") == {"data": parameters * (4 + 4) * 3 / 4}


def test_context() -> None:
    """Keys and values of 2 groups of 16, half a sequence, once round forward and twice backward."""
    groups = sent(2, "parallel.context_parallel_size=2")
    assert groups["context"] == 8 * 4 * 3 * (2 * 16 * 2 * 2 * 16 * 2)
    assert groups["data"] > 0


def test_experts() -> None:
    """Two experts a token, there and back, forward and backward, half of the rows to the other rank."""
    moe = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=32", "parallel.expert_model_parallel_size=2")
    groups = sent(2, *moe)
    assert groups["expert"] == 4 * 4 * 4 * (2 * STREAM) / 2
    assert "expert data" not in groups
    experts = 4 * 4 * 3 * 64 * 32
    assert sent(4, *moe)["expert data"] == experts / 2 * (4 + 2) / 2


@pytest.mark.parametrize(
    ("traffic", "bandwidth"),
    [
        (Traffic("tensor", 8, 1, "ring", 1e9), 450e9),
        (Traffic("data", 16, 1, "ring", 1e9), 400e9),  # all eight network cards of a node
        (Traffic("data", 16, 4, "ring", 1e9), 100e9),
        (Traffic("data", 2, 8, "ring", 1e9), 50e9),
        (Traffic("pipeline", 2, 8, "point-to-point", 1e9), 50e9),
        (Traffic("pipeline", 2, 4, "point-to-point", 1e9), 450e9),
    ],
)
def test_links(traffic: Traffic, bandwidth: float) -> None:
    assert traffic.seconds(GPUS["h100"]) == pytest.approx(1e9 / bandwidth)


def test_all_to_all_over_nodes_is_held_up_by_what_leaves() -> None:
    inside, across = (Traffic("expert", size, 1, "all-to-all", 1e9).seconds(GPUS["h100"]) for size in (8, 16))
    assert inside == pytest.approx(1e9 / 450e9)
    assert across == pytest.approx(1e9 * (8 / 15 / 50e9 + 7 / 15 / 450e9))
