"""Models of which the answer is known beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecod_megatron.analysis.affine import AffineFit
from sparsecod_megatron.analysis.scores.causal import Causal
from sparsecod_megatron.analysis.scores.jacobian import Jacobian
from sparsecod_megatron.analysis.scores.permutation import Permutation
from sparsecod_megatron.analysis.scores.skip import Skip
from sparsecod_megatron.analysis.scores.usefulness import Usefulness
from tests.unit.analysis.scores.families import context, tiny


class Affine(nn.Module):
    """A forward for a block that makes it exactly affine, whatever its weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.linear = nn.Linear(16, 16).requires_grad_(False)

    def forward(self, hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden + self.linear(hidden)


def silenced(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    """Block `layer` of a Llama writes nothing: the identity."""
    block = model.model.layers[layer]
    nn.init.zeros_(block.self_attn.o_proj.weight)
    nn.init.zeros_(block.mlp.down_proj.weight)
    return model


def test_an_affine_block_has_usefulness_one() -> None:
    model = tiny("llama")
    model.model.layers[1].forward = Affine().forward
    rows = Usefulness().run(context(model, num_samples=16)).tables["usefulness"]
    assert rows[1]["usefulness"] == pytest.approx(1.0, abs=1e-4)
    assert not rows[1]["useful"]
    assert abs(rows[0]["usefulness"] - 1) > 0.01 and abs(rows[2]["usefulness"] - 1) > 0.01


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_an_affine_map_is_found_beside_massive_and_constant_channels(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, shift = torch.randn(16, 16, generator=generator), torch.randn(16, generator=generator)
    sizes = torch.ones(16)
    sizes[3] = scale
    fit = AffineFit(16, torch.device("cpu"))
    for _ in range(20):
        x = torch.randn(4, 10, 16, generator=generator) * sizes + 5
        x[..., 7] = 2.0
        fit.add(x, x @ matrix + shift)
    test = torch.randn(50, 16, generator=generator) * sizes + 5
    test[:, 7] = 2.0
    expected = test @ matrix + shift
    assert (fit.solve()(test) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_an_identity_block_has_no_effect_at_all() -> None:
    given = context(silenced(tiny("llama"), 1))
    effects = {(row["skipped"], row["layer"]): row for row in Causal().run(given).tables["causal"]}
    assert effects[1, 2]["causal"] == 0 and effects[1, 2]["max"] == 0
    assert effects[0, 2]["causal"] > 0.01
    jacobian = Jacobian().run(given).tables["jacobian"][1]
    assert jacobian["deviation"] == pytest.approx(0, abs=1e-6)
    assert (jacobian["diagonal_mean"], jacobian["spectral"]) == pytest.approx((1, 1), abs=1e-5)
    assert jacobian["off_diagonal"] == pytest.approx(0, abs=1e-6)
    skip = Skip().run(given).tables["skip"][1]
    assert (skip["skip_loss"], skip["block_influence"]) == pytest.approx((0, 0), abs=1e-6)


def test_what_an_identity_block_would_write_is_undefined_not_zero() -> None:
    result = Causal().run(context(silenced(tiny("llama"), 2)))
    rows = {(row["skipped"], row["layer"]): row for row in result.tables["causal"]}
    assert rows[0, 2]["causal"] is None and rows[0, 2]["max"] is None
    assert result.values["causal"]["value"] == pytest.approx(rows[0, 1]["causal"])  # the mean of valid pairs only
    assert "2 pairs have no causal effect defined" in result.warnings[0]


def test_two_equal_blocks_can_trade_places() -> None:
    model = tiny("llama")
    model.model.layers[2].load_state_dict(model.model.layers[0].state_dict())
    rows = {(row["first"], row["second"]): row for row in Permutation().run(context(model)).tables["permutation"]}
    assert rows[0, 2]["permutation"] == pytest.approx(0, abs=1e-7)
    assert abs(rows[0, 1]["permutation"]) > 1e-3
