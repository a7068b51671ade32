"""Every attention and feed-forward weight of every family is found once, under its kind."""

from __future__ import annotations

import pytest
from torch import nn

from sparsecod_megatron.analysis.sparsity.matrices import find_matrices
from sparsecod_megatron.errors import ConversionError
from tests.unit.analysis.sparsity.tiny import CONFIGS, list_experts, sample, tiny_model

KINDS = {
    "gpt2": ["qkv", "o", "up", "down"],
    "gpt_neox": ["qkv", "o", "up", "down"],
    "mixtral": ["q", "k", "v", "o", "gate_up", "down"],
    "olmoe": ["q", "k", "v", "o", "gate_up", "down"],
    "gpt_oss": ["q", "k", "v", "o", "gate_up", "down"],
    "qwen2_moe": ["q", "k", "v", "o", "gate_up", "down", "gate", "up", "down"],
}


@pytest.mark.parametrize("family", CONFIGS)
def test_kinds_of_each_family(family: str) -> None:
    context = sample(tiny_model(family))
    found = find_matrices(context.layers.blocks, context.hidden_size)
    expected = KINDS.get(family, ["q", "k", "v", "o", "gate", "up", "down"])
    for layer in range(2):
        assert sorted(matrix.kind for matrix in found if matrix.layer == layer) == sorted(expected)
    of_model = {name: id(parameter) for name, parameter in context.layers.blocks.named_parameters()}
    assert all(of_model[f"{matrix.layer}.{matrix.name}"] == id(matrix.weight) for matrix in found)
    left_out = set(of_model.values()) - {id(matrix.weight) for matrix in found}
    large = [name for name, key in of_model.items() if key in left_out and not _is_small(name)]
    assert large == []


def _is_small(name: str) -> bool:
    """Biases, norms, sinks and routers are no matrices of the definition."""
    return any(part in name for part in ("bias", "norm", "ln_", "sinks", "router", "mlp.gate.", "shared_expert_gate"))


def test_listed_experts_are_found_one_by_one() -> None:
    context = sample(list_experts(tiny_model("mixtral")))
    found = find_matrices(context.layers.blocks, context.hidden_size)
    assert [matrix.name for matrix in found if matrix.kind == "down" and matrix.layer == 1] == [
        f"mlp.experts.{index}.down_proj.weight" for index in range(4)
    ]


def test_unknown_names_are_told_by_place_and_width() -> None:
    block = nn.Module()
    block.my_attention, block.net = nn.Module(), nn.Module()
    block.my_attention.enter, block.my_attention.exit = nn.Linear(8, 24), nn.Linear(12, 8)
    block.net.enter, block.net.exit = nn.Linear(8, 30), nn.Linear(30, 8)
    assert [matrix.kind for matrix in find_matrices([block], 8)] == ["qkv", "o", "up", "down"]


def test_blocks_without_matrices_are_refused() -> None:
    with pytest.raises(ConversionError, match="no linear layer"):
        find_matrices([nn.LayerNorm(4)], 4)
