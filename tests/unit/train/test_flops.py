"""Operations per token against a count written out by hand."""

from __future__ import annotations

from sparsecod_megatron.config import load_config
from sparsecod_megatron.train.flops import flops_per_token


def test_dense_1b() -> None:
    """6 operations a weight of 16 layers and the output layer; the scores of 16 layers over 1024 positions."""
    model = load_config("examples/configs/dense_1B.yaml").model
    weights = 16 * (4 * 2048**2 + 3 * 2048 * 8192) + 2048 * 50304
    assert flops_per_token(model, 1024) == 6 * weights + 12 * 16 * 2048 * 1024


def test_only_active_experts_count() -> None:
    model = load_config("examples/configs/moe_400M_2B.yaml").model
    active = 4 * 768**2 + 5 * 3 * 768 * 1536 + 768 * 32
    assert flops_per_token(model, 4096) == 6 * (16 * active + 768 * 50304) + 12 * 16 * 768 * 4096


def test_grouped_queries_save_weights_but_not_scores() -> None:
    many, few = (
        load_config(None, [f"model.num_query_groups={groups}", "model.vocab_size=1024"]).model for groups in (12, 3)
    )
    assert flops_per_token(many, 64) - flops_per_token(few, 64) == 6 * 12 * 768 * 2 * (12 - 3) * 64
