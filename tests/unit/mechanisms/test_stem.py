"""STEM against a loop over tokens, a closed form and planted facts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.flops import flops_per_token
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms import MECHANISMS
from tests.helpers.megatron import SMALL, megatron_model, run_forward

select_backend()

STEM = ("mechanisms.stem.layers=[1]", "model.num_layers=2")
TOKENS = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(3))


def mlp_of(model: Any, x: Tensor, tokens: Tensor) -> Tensor:
    """The STEM layer's MLP on x [S, B, H]."""
    from sparsecod_megatron.model.tokens import token_context

    layer = model.decoder.layers[1]
    with layer._told(token_context(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), 3)):
        output, _ = layer.mlp(x)
    return output


def by_hand(model: Any, x: Tensor, tokens: Tensor) -> Tensor:
    """Token by token."""
    fc1, down = model.decoder.layers[1].mlp.linear_fc1, model.decoder.layers[1].mlp.linear_fc2.weight
    outputs = [
        [down @ (F.silu(fc1.gate.weight @ x[s, b]) * fc1.table.weight[int(tokens[b, s])]) for b in range(x.shape[1])]
        for s in range(x.shape[0])
    ]
    return torch.stack([torch.stack(row) for row in outputs])


def test_equals_a_loop_over_tokens_with_its_gradients() -> None:
    x = torch.randn(32, 2, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = torch.randn(32, 2, 32, generator=torch.Generator().manual_seed(2))
    found = []
    with megatron_model(*STEM) as model:
        parameters = [x, *model.decoder.layers[1].mlp.parameters()]
        for compute in (mlp_of, by_hand):
            output = compute(model, x, TOKENS)
            found.append([output.detach(), *torch.autograd.grad((output * weights).sum(), parameters)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_equal_rows_are_a_constant_up_projection() -> None:
    x = torch.randn(32, 2, 32, generator=torch.Generator().manual_seed(1))
    with megatron_model(*STEM) as model, torch.no_grad():
        mlp, row = model.decoder.layers[1].mlp, torch.randn(48, generator=torch.Generator().manual_seed(4))
        mlp.linear_fc1.table.weight.copy_(row.expand(64, -1))
        closed = (F.silu(x @ mlp.linear_fc1.gate.weight.T) * row) @ mlp.linear_fc2.weight.T
        torch.testing.assert_close(mlp_of(model, x, TOKENS), closed)


def test_another_token_changes_its_own_place_and_none_before() -> None:
    other = TOKENS.clone()
    other[0, 20] = (other[0, 20] + 1) % 64
    x = torch.randn(32, 2, 32, generator=torch.Generator().manual_seed(1))
    with megatron_model(*STEM) as model, torch.no_grad():
        changed = (mlp_of(model, x, other) != mlp_of(model, x, TOKENS)).any(-1)
        assert changed.nonzero().tolist() == [[20, 0]]
        before, after = run_forward(model, TOKENS), run_forward(model, other)
        assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(before[0, 20], after[0, 20])


def test_facts_of_tokens_are_learned_by_the_table_alone() -> None:
    """Every token says which one is wanted; nothing else trains, and the gate is nearly the same for all tokens."""
    wanted = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    with megatron_model(*STEM) as model:
        mlp = model.decoder.layers[1].mlp
        table = mlp.linear_fc1.table.weight
        with torch.no_grad():
            table.zero_()
            model.output_layer.weight.mul_(8)  # so that the norm in front of it leaves room for certainty
            model.embedding.word_embeddings.weight[:, 0] = 4.0
            mlp.linear_fc1.gate.weight.zero_()[:, 0] = 1.0
        optimizer = torch.optim.Adam([table], lr=0.3)
        losses = []
        for _ in range(25):
            loss = F.cross_entropy(run_forward(model, TOKENS).flatten(0, 1), wanted[TOKENS].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[0] > 3 and losses[-1] < 0.1


def test_what_the_table_is_to_the_run() -> None:
    """6 · F · H FLOPs fewer than an up projection; an embedding for decay, muP and Muon; one row of it is active."""
    config = load_config(None, [*SMALL, *STEM, "optimizer.optimizer=muon"], mechanisms=MECHANISMS)
    table, plain = ParameterTable.of(config), ParameterTable(config.model)
    rows = {row.name: row for row in table.layer(1)}
    assert rows["stem_table"].shape == (64, 48) and rows["stem_gate"].shape == (48, 32)
    assert rows["stem_table"].group == "embeddings" and not rows["stem_table"].is_orthogonalised
    assert rows["stem_gate"].is_orthogonalised and "mlp_input" not in rows
    assert flops_per_token(plain, 16) - flops_per_token(table, 16) == 6 * 48 * 32
    ours, theirs = table.count(), plain.count()
    assert ours.total - theirs.total == 48 * (64 - 32) and ours.active - theirs.active == 48 * (1 - 32)


@pytest.mark.parametrize("scheme", ["normal", "scaled", "mitchell", "small_init"])
def test_fresh_rows_are_as_large_as_what_an_up_projection_gives(scheme: str) -> None:
    """A normalised input has √H of its deviation."""
    from tests.helpers.training import small_trainer

    with small_trainer(*STEM, f"model.init={scheme}") as trainer:
        mlps = [layer.mlp.linear_fc1 for layer in trainer.models[0].module.decoder.layers]
        up = float(mlps[0].weight[48:].std())
        assert float(mlps[1].table.weight.std()) == pytest.approx(math.sqrt(32) * up, rel=0.1)
        assert float(mlps[1].gate.weight.std()) == pytest.approx(float(mlps[0].weight[:48].std()), rel=0.1)
