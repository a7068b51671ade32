"""What differs between two rows: how much, which first, and whether it is more than rounding."""

from __future__ import annotations

import math

import pytest
import torch

from sparsecod_megatron.audit.compare import FP32, Verdict, compare
from sparsecod_megatron.audit.measurement import Measurement
from sparsecod_megatron.audit.report import audit_json, audit_text
from sparsecod_megatron.audit.rows import REFERENCE, Row
from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.parameters import ParameterTable

TABLE = ParameterTable(ModelConfig(num_layers=1, vocab_size=4))
NAMES = ("embedding.word_embeddings.weight", "decoder.layers.0.mlp.linear_fc1.weight", "output_layer.weight")


def measured() -> Measurement:
    """Two steps of a made-up run, the same each time."""
    generator = torch.Generator().manual_seed(0)
    tensors = [{name: torch.randn(4, 8, generator=generator) for name in NAMES} for _ in range(3)]
    layer = {"out_var": 2.0, "grad_norm": 1.0, "tokens_per_expert": [30.0, 34.0]}
    return Measurement([5.0, 4.0], [1.0, 2.0], [[dict(layer)], [dict(layer)]], tensors[:2], {2: tensors[2]})


def verdict(found: Measurement, *, exact: bool = False, expected: Measurement | None = None) -> Verdict:
    row = Row(REFERENCE, "overlap", "fp32", against="1 process", exact=exact)
    return compare(row, found, expected or measured(), table=TABLE, on_cpu=True)


def test_equal_is_green() -> None:
    same = verdict(measured(), exact=True)
    assert (same.red, same.loss, same.state, set(same.gradients.values())) == (False, 0.0, 0.0, {0.0})


def test_relative_size_of_a_gradient() -> None:
    """By kind of tensor, over the tensor's norm; small enough is rounding, unless the rows must be equal."""
    found = measured()
    found.gradients[1][NAMES[1]] *= 1 + 1e-5
    assert verdict(found).gradients["mlp_input"] == pytest.approx(1e-5, rel=0.02)
    assert not verdict(found).red
    assert verdict(found, exact=True).first.startswith(f"step 2: gradient of {NAMES[1]}, off by 1.0e-05")


def test_the_first_lies_next_to_the_fault() -> None:
    """Forward pass, then gradients from the output to the embedding, then what follows from them."""
    found, order = measured(), []
    found.losses[0] += 1
    found.grad_norms[0] += 1
    found.statistics[0][0] = {"out_var": 3.0, "grad_norm": 2.0, "tokens_per_expert": [31.0, 33.0]}
    found.gradients[0] = {name: tensor + 1 for name, tensor in found.gradients[0].items()}
    found.states[2] = {name: tensor + 1 for name, tensor in found.states[2].items()}
    right = measured()
    for mend in (
        lambda: found.statistics[0][0].update(out_var=2.0),
        lambda: found.statistics[0][0].update(tokens_per_expert=[30.0, 34.0]),
        lambda: found.gradients[0].update({NAMES[2]: right.gradients[0][NAMES[2]]}),
        lambda: found.gradients.__setitem__(0, right.gradients[0]),
        lambda: found.statistics[0][0].update(grad_norm=1.0),
        lambda: found.losses.__setitem__(0, 5.0),
        lambda: found.grad_norms.__setitem__(0, 1.0),
        lambda: found.states.update(right.states),
    ):
        order.append(verdict(found).first.partition(", off")[0])
        mend()
    assert order == [
        "step 1: out_var of layer 0",
        "step 1: tokens_per_expert of layer 0",
        f"step 1: gradient of {NAMES[2]}",
        f"step 1: gradient of {NAMES[1]}",
        "step 1: grad_norm of layer 0",
        "step 1: loss 6 instead of 5",
        "step 1: gradient norm 2 instead of 1",
        f"{NAMES[0]} after step 2",
    ]
    assert not verdict(found).red


def test_a_tensor_that_is_absent_or_not_finite_is_red() -> None:
    for spoil in (
        lambda gradients: gradients.pop(NAMES[0]),
        lambda gradients: gradients[NAMES[0]].fill_(math.nan),
        lambda gradients: gradients.update({"decoder.layers.0.mlp.linear_fc2.weight": torch.ones(1)}),
    ):
        found = measured()
        spoil(found.gradients[0])
        assert verdict(found).red


def test_a_gradient_of_rounding_alone_is_no_difference() -> None:
    """A tensor a million times smaller than the others is measured by the whole."""
    found, expected = measured(), measured()
    for each, value in ((found, 1e-9), (expected, -1e-9)):
        each.gradients[0][NAMES[1]].fill_(value)
    assert 0 < verdict(found, expected=expected).gradients["mlp_input"] < FP32.gradients


def test_references_and_rows_that_could_not_run() -> None:
    diverged = measured()
    diverged.losses[1] = math.nan
    reference = Row(REFERENCE, "plain", "fp32", against=None)
    row = Row(REFERENCE, "overlap", "fp32", against="1 process")
    assert compare(reference, measured(), None, table=TABLE, on_cpu=True).first is None
    assert "non-finite" in compare(reference, diverged, None, table=TABLE, on_cpu=True).first
    assert compare(row, "no memory", measured(), table=TABLE, on_cpu=True).first == "could not run: no memory"
    assert (
        "1 process, which it must equal, could not run"
        in compare(row, measured(), "no memory", table=TABLE, on_cpu=True).first
    )


def test_table() -> None:
    found = measured()
    found.gradients[0][NAMES[0]] = torch.full((4, 8), math.inf)
    reference = compare(Row(REFERENCE, "plain", "fp32", against=None), measured(), None, table=TABLE, on_cpu=True)
    rows = [reference.json(), verdict(measured()).json(), verdict(found).json() | {"row": "dp2"}]
    content = audit_json(rows, config="a.yaml", notes=["no dropout"], left_out={"cp2": "documents"})
    lines = audit_text(content).splitlines()
    assert content["red"] == ["dp2"]
    assert lines[0].split() == [
        "row",
        "against",
        "loss",
        "norm",
        "output",
        "mlp_input",
        "embedding",
        "stats",
        "weights",
    ]
    assert [line.split()[-1] for line in lines[2:5]] == ["reference", "ok", "RED"]
    assert f"dp2: step 1: gradient of {NAMES[0]}, off by inf" in lines
    assert lines[-2:] == ["left out: cp2: documents", "note: no dropout"]


@pytest.mark.parametrize(
    ("name", "model", "red"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.bias", {"qkv_bias": True}, False),
        ("decoder.layers.0.self_attention.linear_qkv.bias (fp32 master)", {"qkv_bias": True}, False),
        ("decoder.final_layernorm.weight", {"layernorm_zero_centered_gamma": True}, False),
        ("decoder.final_layernorm.weight", {}, True),
        (NAMES[1], {}, True),
    ],
)
def test_what_began_at_zero_is_as_far_off_as_gradients(name: str, model: dict[str, bool], red: bool) -> None:
    """In bf16 a bias after two steps is two updates, each with a gradient's error; weights are far larger."""
    table = ParameterTable(ModelConfig(num_layers=1, vocab_size=4, **model))
    row = Row(REFERENCE, "overlap", "bf16", against="1 process", exact=False)
    found, expected = measured(), measured()
    expected.states[2][name] = torch.ones(8)
    for factor, is_red in ((1.05, red), (1.5, True)):
        found.states[2][name] = factor * torch.ones(8)
        assert compare(row, found, expected, table=table, on_cpu=True).red is is_red
