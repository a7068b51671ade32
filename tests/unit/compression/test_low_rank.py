"""A truncated SVD: exact where the rank was planted, the best there is where it was not, and as small as it says."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from sparsecod_megatron.compression.compress import Compression, compress
from sparsecod_megatron.compression.methods.low_rank import FactoredLinear
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.errors import ConversionError
from tests.unit.compression.models import sequences, tiny
from tests.unit.compression.test_contract import gpt2, logits


def low_rank(model: PreTrainedModel, *settings: str) -> Compression:
    return compress(model, find_method("low_rank", settings), sequences(), batch_size=4)


def test_a_planted_rank_is_found_exactly() -> None:
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.copy_(torch.randn(48, 5) @ torch.randn(5, 32) / 5)
    before = logits(model)
    result = low_rank(model, "rank=5", "layers=*.up_proj")
    assert torch.allclose(logits(result.model), before, atol=1e-4)
    rows = [row for row in result.matrices if row.compressed]
    assert [row.kind for row in rows] == ["model.layers.*.mlp.up_proj"] * 2
    assert all(row.relative_error is not None and row.relative_error < 1e-5 for row in rows)
    assert all(row.stored == 5 * (32 + 48) for row in rows)
    assert {row.reason for row in result.matrices if not row.compressed} == {"not among layers=*.up_proj"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_error_is_that_of_the_singular_values_left_out(family: str) -> None:
    """Eckart and Young: no matrix of this rank is nearer."""
    model = gpt2() if family == "gpt2" else tiny(family)
    layer = model.transformer.h[0].mlp.c_fc if family == "gpt2" else model.model.layers[0].mlp.up_proj
    values = torch.linalg.svdvals(layer.weight.detach())
    name = "transformer.h.0.mlp.c_fc" if family == "gpt2" else "model.layers.0.mlp.up_proj"
    bias = getattr(layer, "bias", None)
    result = low_rank(model, "rank=7")
    row = next(row for row in result.matrices if row.name == f"{name}.weight")
    assert row.relative_error == pytest.approx(float(values[7:].norm() / values.norm()), rel=1e-4)
    factored = result.model.get_submodule(name)
    assert isinstance(factored, FactoredLinear) and factored.first.out_features == 7
    assert bias is None or torch.equal(factored.bias, bias)


def test_a_share_of_the_weights_is_stored() -> None:
    result = low_rank(tiny("llama"), "share=0.5")
    for row in result.matrices:
        outputs, inputs = row.shape
        assert row.stored == int(0.5 * outputs * inputs / (outputs + inputs)) * (outputs + inputs)
    stored, before = (sum(getattr(row, name) for row in result.matrices) for name in ("stored", "num_weights"))
    assert result.num_parameters[0] - result.num_parameters[1] == before - stored


def test_what_would_grow_stays_and_says_so() -> None:
    result = low_rank(tiny("llama"), "rank=18")  # 18 · (32 + 48) < 32 · 48, not so for 32 · 32
    assert {row.kind.rsplit(".")[-1] for row in result.matrices if row.compressed} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    with pytest.raises(
        ConversionError, match="no linear layer was compressed: a product of rank 40 would store as many"
    ):
        low_rank(tiny("llama"), "rank=40")
