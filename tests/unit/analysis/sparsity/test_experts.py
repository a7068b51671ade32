"""Expert utilisation, importance and co-activation against naive computations, and planted dead experts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.sparsity.experts import Experts
from sparsecod_megatron.errors import ConversionError
from tests.unit.analysis.sparsity.tiny import list_experts, own_sample, sample, tiny_model

FAMILIES = ["mixtral", "qwen2_moe", "olmoe", "gpt_oss"]


def choices(context: Context, model: PreTrainedModel) -> list[Tensor]:
    """[tokens, k] of each block, from the router logits that the model itself reports."""
    with torch.no_grad():
        output = model(input_ids=context.windows[:, :-1], output_router_logits=True, use_cache=False)
    return [logits.topk(2, -1).indices for logits in output.router_logits]


def mean_loss(context: Context, model: PreTrainedModel) -> float:
    with torch.no_grad():
        logits = model(input_ids=context.windows[:, :-1], use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), context.windows[:, 1:].flatten()))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_a_naive_computation(family: str) -> None:
    model = tiny_model(family)
    context = sample(model)
    tables = Experts().run(context).tables
    dense = mean_loss(context, model)
    for layer, chosen in enumerate(choices(context, model)):
        rows = [row for row in tables["experts"] if row["layer"] == layer]
        counts = torch.bincount(chosen.flatten(), minlength=4)
        assert [row["utilisation"] for row in rows] == pytest.approx((counts / counts.sum()).tolist())
        for expert, row in enumerate(rows):
            clone = copy.deepcopy(model)
            experts = clone.model.layers[layer].mlp.experts
            with torch.no_grad():
                experts.down_proj[expert] = 0
                if hasattr(experts, "down_proj_bias"):
                    experts.down_proj_bias[expert] = 0
            assert row["importance"] == pytest.approx(mean_loss(context, clone) - dense, abs=2e-5)
        pairs = {(row["expert"], row["other"]): row for row in tables["experts_coactivation"] if row["layer"] == layer}
        for first in range(4):
            for second in range(first + 1, 4):
                both = ((chosen == first).any(1) & (chosen == second).any(1)).float().mean()
                row = pairs.get((first, second), {"token_share": 0.0})
                assert row["token_share"] == pytest.approx(float(both), abs=1e-6)
    assert mean_loss(context, model) == dense  # the model is as it was


def test_planted_dead_experts_are_recovered() -> None:
    model = tiny_model("mixtral")
    dead = {0: 2, 1: 0}
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 31] = 3.0  # a channel positive for every token, which no block moves
        for layer, expert in dead.items():
            block = model.model.layers[layer]
            block.self_attn.o_proj.weight[31] = 0
            block.mlp.experts.down_proj[:, 31] = 0
            block.mlp.gate.weight[:, 31] = 0
            block.mlp.gate.weight[expert, 31] = -1e4
    context = own_sample(model, num_samples=6)
    result = Experts().run(context)
    unused = {(row["layer"], row["expert"]) for row in result.tables["experts"] if row["utilisation"] == 0}
    chosen = enumerate(choices(context, model))
    used = {(layer, expert) for layer, index in chosen for expert in index.unique().tolist()}
    assert set(dead.items()) <= unused and unused.isdisjoint(used) and len(unused) + len(used) == 8
    assert result.values["dead_experts"] == len(unused)
    for row in result.tables["experts"]:
        assert (row["importance"] == 0) == (row["utilisation"] == 0)
    for row in result.tables["experts_coactivation"]:
        assert dead[row["layer"]] not in (row["expert"], row["other"])


def test_an_expert_that_does_nothing_is_used_but_not_missed() -> None:
    model = tiny_model("qwen2_moe")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1] = 0
    rows = Experts().run(own_sample(model, num_samples=6)).tables["experts"]
    assert rows[1]["utilisation"] > 0 and rows[1]["importance"] == pytest.approx(0, abs=1e-6)
    others = [row["importance"] for row in rows if (row["layer"], row["expert"]) != (0, 1) and row["utilisation"] > 0.1]
    assert min(map(abs, others)) > 1e-5


def test_listed_experts_give_what_fused_ones_give() -> None:
    fused, listed = (sample(tiny_model("mixtral")) for _ in range(2))
    list_experts(listed.model)
    results = [Experts().run(context) for context in (fused, listed)]
    for name in ("utilisation", "importance", "importance_low"):
        first, second = ([row[name] for row in result.tables["experts"]] for result in results)
        np.testing.assert_allclose(first, second, atol=1e-5)
    assert len(results[0].tables["experts_coactivation"]) == len(results[1].tables["experts_coactivation"])


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ConversionError, match="no routed experts.*leave experts out"):
        Experts().run(sample(tiny_model("llama")))
