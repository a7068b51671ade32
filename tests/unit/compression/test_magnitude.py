"""Exact counts of zeros, and planted weights that must be the ones to go."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.compression.compress import compress
from sparsecod_megatron.compression.patterns import parse_pattern
from sparsecod_megatron.compression.registry import find_method
from tests.unit.compression.models import sequences, tiny
from tests.unit.compression.test_contract import gpt2


def kept(weight: Tensor, pattern: str, per: str | None = None) -> Tensor:
    return parse_pattern(pattern, per).keep(weight.abs())


@pytest.mark.parametrize("sparsity", ["0.01", "0.3", "0.5", "0.7", "0.99"])
def test_counts_are_exact_also_where_weights_are_equal(sparsity: str) -> None:
    for weight in (torch.randn(3, 6, 64), torch.ones(3, 6, 64), torch.zeros(3, 6, 64)):
        rows = int(float(sparsity) * 64 + 0.5)
        assert ((~kept(weight, sparsity, "row")).sum(-1) == rows).all()
        assert ((~kept(weight, sparsity)).sum((-2, -1)) == int(float(sparsity) * 6 * 64 + 0.5)).all()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8"])
def test_of_every_group_of_neighbours_the_largest_stay(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    weight = torch.randn(5, 3 * m)
    mask = kept(weight, pattern)
    for row, group in itertools.product(range(5), range(3)):
        values = weight[row, group * m : (group + 1) * m].abs()
        expected = {index for index in range(m) if (values > values[index]).sum() < n}
        assert set(mask[row, group * m : (group + 1) * m].nonzero().flatten().tolist()) == expected


def test_a_share_of_rows_and_of_the_matrix_differ_where_rows_do() -> None:
    """One row is tiny: by matrix it goes whole, by row half of each."""
    weight = torch.rand(4, 8) + 1
    weight[2] *= 1e-3
    assert torch.equal(kept(weight, "0.25"), (weight > 0.5))
    assert ((~kept(weight, "0.25", "row")).sum(-1) == 2).all()


def test_planted_weights_go_from_the_model_and_nothing_else_does() -> None:
    model = tiny("qwen2_moe")
    planted = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            mask = torch.rand_like(weight).argsort(-1) < weight.shape[-1] // 2  # half of every row
            if name.endswith(("_proj.weight", "_proj")) and "embed" not in name:
                away = torch.where(weight < 0, -0.1, 0.1)  # no weight that stays is near zero by chance
                weight.add_(away)[mask] *= 1e-4
                planted[name] = mask
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    result = compress(model, find_method("magnitude", ["pattern=0.5", "per=row"]), sequences(), batch_size=4)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:  # biases and norms
            assert torch.equal(weight, before[name])
            continue
        assert torch.equal(weight == 0, planted.get(name, torch.zeros_like(weight, dtype=torch.bool))), name
        assert torch.equal(weight[weight != 0], before[name][weight != 0])
    left = {row.kind: row.reason for row in result.matrices if not row.compressed}
    assert left == {
        "model.layers.*.mlp.gate": "routers, convolutions and other weights outside linear layers",
        "model.layers.*.mlp.shared_expert_gate": "a gate of one output",
    }
    assert {row.zeros for row in result.matrices if row.compressed} == {0.5}


def test_rows_are_outputs_also_where_the_layer_is_stored_transposed() -> None:
    model = gpt2()
    compress(model, find_method("magnitude", ["pattern=2:4"]), sequences(), batch_size=4)
    weight = model.transformer.h[1].mlp.c_fc.weight  # [in, out]
    assert ((weight.T.unflatten(-1, (-1, 4)) != 0).sum(-1) == 2).all()


def test_columns_that_the_pattern_does_not_divide_are_named() -> None:
    result = compress(tiny("llama"), find_method("magnitude", ["pattern=3:6"]), sequences(), batch_size=4)
    left = {row.kind: row.reason for row in result.matrices if not row.compressed}
    assert set(left.values()) == {"columns must be a multiple of 6"}
    assert [row.kind for row in result.matrices if row.compressed] == ["model.layers.*.mlp.down_proj"] * 2  # 48 wide
    assert any(warning.endswith("columns must be a multiple of 6") for warning in result.warnings)
