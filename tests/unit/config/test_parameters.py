"""Counted parameters against the model that is really built, and against numbers worked out by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsecod_megatron.config import RunConfig, load_config
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import ConfigError
from tests.helpers.megatron import SMALL
from tests.helpers.meta import meta_model
from tests.helpers.variants import DENSE, MOE, MOE_SHAPE

VARIANTS = {**{f"dense-{name}": keys for name, keys in DENSE.items()}}
VARIANTS |= {f"moe-{name}": (*MOE_SHAPE, *keys) for name, keys in MOE.items()}

KEYS: dict[str, list[Any]] = {
    "norm_placement": ["pre", "post", "peri", "sandwich", "mix"],
    "mix_post_fraction": [0.0, 0.4, 1.0],
    "layernorm_scaling": [False, True],
    "embedding_norm": [None, False, True],
    "final_norm": [True, False],
    "qk_norm": [False, True],
    "num_query_groups": [1, 2, 4],
    "kv_channels": [6, 8, 16],
    "attention_output_gate": ["none", "elementwise"],
    "activation": ["swiglu", "geglu", "gelu", "relu", "relu2"],
    "untie_embeddings_and_output_weights": [True, False],
    "sliding_window": [None, 5],
    "qkv_bias": [False, True],
    "no_rope_freq": [None, [0, 1, 1]],
    "num_moe_experts": [None, 2, 8],
    "moe_ffn_hidden_size": [16, 20],
    "moe_first_k_dense_layers": [0, 1, 2],
    "moe_router_topk_per_layer": [None, [1, 2, 1], [2, 2, 2]],
    "moe_router_pre_softmax": [True],
    "moe_shared_expert_intermediate_size": [None, 24],
    "moe_shared_expert_gate": [False, True],
}


def layer_of(name: str) -> int | None:
    found = re.search(r"decoder\.layers\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def assert_counts(config: RunConfig, model: torch.nn.Module) -> None:
    """Total, by layer, and active: without the share of each layer's experts that its router does not choose."""
    count = ParameterTable.of(config).count()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    by_layer = [0] * config.model.num_layers
    idle = 0.0
    for name, size in sizes.items():
        layer = layer_of(name)
        if layer is not None:
            by_layer[layer] += size
            if ".experts." in name:
                idle += size * (1 - config.model.topk(layer) / (config.model.num_moe_experts or 1))
    assert count.total == sum(sizes.values()) == sum(count.by_kind.values())
    assert count.by_layer == by_layer
    assert count.active == count.total - round(idle)
    ends = ("word_embeddings", "output_layer")
    assert count.embedding == sum(size for name, size in sizes.items() if any(end in name for end in ends))


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str) -> None:
    config = load_config(None, [*SMALL, *VARIANTS[name]])
    with meta_model(config) as model:
        assert_counts(config, model)


@settings(max_examples=12)
@given(values=st.fixed_dictionaries({key: st.sampled_from(choices) for key, choices in KEYS.items()}))
def test_any_model_of_the_schema(values: dict[str, Any]) -> None:
    overrides = [f"model.{key}={'null' if value is None else value}" for key, value in values.items()]
    try:
        config = load_config(None, [*SMALL, *overrides])
    except ConfigError:
        assume(False)
    with meta_model(config) as model:
        assert_counts(config, model)


def test_dense_1b_by_hand() -> None:
    """16 layers of h 2048 and f 8192."""
    count = ParameterTable.of(load_config("examples/configs/dense_1B.yaml")).count()
    assert count.by_kind == {
        "embedding": 103_022_592,
        "output": 103_022_592,
        "final_norm": 2_048,
        "attention_norm": 32_768,
        "mlp_norm": 32_768,
        "qkv": 201_326_592,
        "attention_output": 67_108_864,
        "mlp_input": 536_870_912,
        "mlp_output": 268_435_456,
    }
    assert count.by_layer == [67_112_960] * 16
    assert (count.total, count.active, count.embedding) == (1_279_854_592, 1_279_854_592, 206_045_184)


def test_moe_400m_2b_by_hand() -> None:
    """16 layers of h 768; 32 experts of 1536, of which 4 are used, and a shared one."""
    count = ParameterTable.of(load_config("examples/configs/moe_400M_2B.yaml")).count()
    assert count.by_kind["expert_input"] == 1_207_959_552
    assert count.by_kind["expert_output"] == 603_979_776
    assert count.by_kind["router"] == 393_216
    assert count.by_kind["shared_expert_input"] + count.by_kind["shared_expert_output"] == 56_623_104
    assert (count.total, count.active) == (1_983_996_672, 398_549_760)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("dense_400M", 645_318_144, 645_318_144),
        ("moe_1B_7B", 6_919_096_320, 1_281_951_744),
        ("moe_1B_13B_ref", 13_361_547_264, 2_087_258_112),
        ("moe_ablation", 7_982_644_320, 1_238_989_920),
    ],
)
def test_paper_models(name: str, total: int, active: int) -> None:
    count = ParameterTable.of(load_config(f"examples/configs/{name}.yaml")).count()
    assert (count.total, count.active) == (total, active)
