"""Operations per token against counts written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.flops import flops_per_token, keys_per_query
from sparsecod_megatron.config.parameters import ParameterTable


def test_dense_1b() -> None:
    """6 operations a weight of 16 layers and the output layer; the scores of 16 layers over 1024 positions."""
    table = ParameterTable.of(load_config("examples/configs/dense_1B.yaml"))
    weights = 16 * (4 * 2048**2 + 3 * 2048 * 8192) + 2048 * 50304
    assert flops_per_token(table, 1024) == 6 * weights + 12 * 16 * 2048 * 1024
    assert flops_per_token(table, 1024, convention="causal") == 6 * weights + 6 * 16 * 2048 * 1024


def test_only_active_experts_count() -> None:
    table = ParameterTable.of(load_config("examples/configs/moe_400M_2B.yaml"))
    active = 4 * 768**2 + 5 * 3 * 768 * 1536 + 768 * 32
    assert flops_per_token(table, 4096) == 6 * (16 * active + 768 * 50304) + 12 * 16 * 768 * 4096


def test_grouped_queries_save_weights_but_not_scores() -> None:
    many, few = (
        ParameterTable.of(load_config(None, [f"model.num_query_groups={groups}", "model.vocab_size=1024"]))
        for groups in (12, 3)
    )
    assert flops_per_token(many, 64) - flops_per_token(few, 64) == 6 * 12 * 768 * 2 * (12 - 3) * 64


def test_ungated_mlp_and_gates() -> None:
    """One input projection of a ReLU MLP; a doubled query projection."""
    base = ["model.vocab_size=1024", "model.num_layers=1"]
    plain = flops_per_token(ParameterTable.of(load_config(None, base)), 64)

    def difference(*overrides: str) -> float:
        return flops_per_token(ParameterTable.of(load_config(None, [*base, *overrides])), 64) - plain

    assert difference("model.activation=relu") == -6 * 768 * 2048
    assert difference("model.attention_output_gate=elementwise") == 6 * 768 * 768
    assert difference("model.untie_embeddings_and_output_weights=false") == 0


def test_dense_layers_and_top_k_of_each_layer() -> None:
    base = ["model.vocab_size=1024", "model.num_layers=3", "model.num_moe_experts=8", "model.moe_ffn_hidden_size=32"]
    plain = load_config(None, [*base, "model.moe_router_topk=1", "model.moe_router_pre_softmax=true"])
    varied = load_config(
        None,
        [
            *base,
            "model.moe_first_k_dense_layers=1",
            "model.moe_router_topk_per_layer=[1,2,4]",
            "model.moe_router_pre_softmax=true",
        ],
    )
    expert = 3 * 768 * 32
    first = 3 * 768 * 2048 - expert - 768 * 8  # the dense MLP in place of one expert and the router
    difference = flops_per_token(ParameterTable.of(varied), 64) - flops_per_token(ParameterTable.of(plain), 64)
    assert difference == 6 * (first + (2 - 1) * expert + (4 - 1) * expert)


@pytest.mark.parametrize("window", [1, 7, 100, 128, 500])
def test_windowed_keys_are_the_mean_over_positions(window: int) -> None:
    """Up to the half key that the diagonal adds: position t meets min(t + 1, window) keys."""
    model = load_config(None, [f"model.sliding_window={window}", "model.window_attn_skip_freq=2"]).model
    exact = np.minimum(np.arange(128) + 1, window).mean()
    assert keys_per_query(model, 0, 128, convention="windowed") == pytest.approx(exact, abs=0.51)
    assert keys_per_query(model, 1, 128, convention="windowed") == 64
    assert keys_per_query(model, 0, 128, convention="full") == 128
