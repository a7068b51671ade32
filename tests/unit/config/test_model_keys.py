"""What may change about a model whose weights are there, and what may not."""

from __future__ import annotations

import pytest

from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.model_keys import EFFECT_CONDITIONS, TRAINING_KEYS, model_differences
from sparsecod_megatron.config.model_schema import ModelConfig

EXPERTS = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=64")


def differing(base: tuple[str, ...], *changes: str) -> list[str]:
    before, after = load_config(None, base), load_config(None, [*base, *changes])
    return [difference.key for difference in model_differences(before, after)]


def test_the_lists_name_keys_that_exist() -> None:
    keys = vars(ModelConfig())
    assert keys.keys() >= TRAINING_KEYS.keys() | EFFECT_CONDITIONS.keys()
    assert not TRAINING_KEYS.keys() & EFFECT_CONDITIONS.keys()


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ((), ("model.init_std.qkv=0.1", "model.init=scaled", "model.mup_base_hidden_size=64")),
        ((), ("model.hidden_dropout=0.1", "model.attention_dropout=0.1", "optimizer.lr=1")),
        ((), ("model.moe_router_topk=5", "model.moe_router_dtype=fp64")),
        ((), ("model.rope_scaling_factor=4", "model.mix_post_fraction=0.5", "model.embedding_norm=false")),
        ((), ("megatron.rotary_interleaved=false", "megatron.overlap_grad_reduce=true")),
        (EXPERTS, ("model.moe_aux_loss_coeff=1", "model.ffn_hidden_size=100", "model.moe_router_bias_update_rate=1")),
    ],
)
def test_changes_that_no_trained_model_notices(base: tuple[str, ...], changes: tuple[str, ...]) -> None:
    assert differing(base, *changes) == []


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ((), "model.sliding_window=8"),
        ((), "model.rope_scaling=linear"),
        ((), "model.rotary_base=50000"),
        ((), "model.layernorm_epsilon=1e-6"),
        ((), "megatron.glu_linear_offset=0.5"),
        ((), "model.qkv_bias=true"),
        (EXPERTS, "model.moe_router_topk=3"),
        (EXPERTS, "model.moe_expert_capacity_factor=2.0"),
    ],
)
def test_changes_of_what_is_computed(base: tuple[str, ...], change: str) -> None:
    assert differing(base, change)[0] == change.partition("=")[0]
