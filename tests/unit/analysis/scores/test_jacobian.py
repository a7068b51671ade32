"""Jacobians against one backward pass of the real block per output channel, on every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from sparsecod_megatron.analysis.isolation import isolated
from sparsecod_megatron.analysis.jacobians import token_jacobians
from sparsecod_megatron.analysis.scores.jacobian import Jacobian
from sparsecod_megatron.errors import ConversionError
from tests.unit.analysis.scores import naive
from tests.unit.analysis.scores.families import ALL_FAMILIES, NUM_LAYERS, context, tiny


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_entry_of_every_token(family: str) -> None:
    given = context(tiny(family), num_samples=3)
    trace = next(given.traces("all", title=""))
    rows, positions = torch.tensor([0, 2]), torch.tensor([[0, 10, 4], [7, 1, 9]])
    for layer in range(NUM_LAYERS):
        with isolated(given.replay, trace, layer) as apart:
            apart.check(torch.arange(3), positions[[0, 1, 1]])
            found = token_jacobians(apart, rows, positions)
        for i, row in enumerate(rows.tolist()):
            for j, position in enumerate(positions[i].tolist()):
                expected = naive.token_jacobian(given.model, given.layers.blocks, given.windows[row], layer, position)
                assert expected.isfinite().all() and expected.norm() > 0
                torch.testing.assert_close(found[i, j], expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-5)


def test_sinks_count_beside_a_massive_channel() -> None:
    """The sinks of attention, far smaller than one channel of the stream, are in the Jacobian."""
    model = tiny("gpt_oss")
    model.model.embed_tokens.weight.data[:, 0] += 3000
    for name, weight in model.named_parameters():
        if "layernorm" in name:  # the channel counts for nothing but the size of the stream
            weight.data.mul_(750)[0] = 0
        if "sinks" in name:
            weight.data.fill_(1.0)
    given = context(model, num_samples=1)
    trace = next(given.traces("all", title=""))
    place = torch.tensor([[6]])
    with isolated(given.replay, trace, 1) as apart:
        apart.check(torch.arange(1), place)
        found = token_jacobians(apart, torch.arange(1), place)[0, 0]
    expected = naive.token_jacobian(model, given.layers.blocks, given.windows[0], 1, 6)
    model.model.layers[1].self_attn.sinks.data.fill_(-100.0)
    without = naive.token_jacobian(model, given.layers.blocks, given.windows[0], 1, 6)
    branch = (expected - torch.eye(len(expected))).norm()
    assert (found - expected).norm() < 1e-3 * branch < 1e-2 * (without - expected).norm()


def test_the_numbers_and_the_references() -> None:
    given = context(tiny("llama"), num_samples=3, reference=True)
    score = Jacobian(tokens_per_sequence=4)
    result = score.run(given)
    positions = score.draw_positions(3, given.seq_length, given.generator())
    for layer, row in enumerate(result.tables["jacobian"]):
        jacobians = torch.stack(
            [
                naive.token_jacobian(given.model, given.layers.blocks, window, layer, place)
                for window, places in zip(given.windows, positions.tolist(), strict=True)
                for place in places
            ]
        )
        identity, diagonal = torch.eye(16), jacobians.diagonal(dim1=1, dim2=2)
        squares = (jacobians**2).sum(dim=(1, 2))
        expected = {
            "deviation": (jacobians - identity).norm(dim=(1, 2)) / 4,
            "diagonal_mean": diagonal.mean(dim=1),
            "diagonal_std": diagonal.std(dim=1, correction=0),
            "off_diagonal": 1 - (diagonal**2).sum(dim=1) / squares,
            "spectral": torch.linalg.svdvals(jacobians)[:, 0],
        }
        for name, values in expected.items():
            assert row[name] == pytest.approx(float(values.mean()), rel=1e-4), name
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        reference = naive.reference_jacobian(given.model, given.layers.blocks, given.windows, layer)
        assert row["ref_jacobian"] == pytest.approx(reference, rel=1e-4)
    assert result.num_tokens == 12


def test_the_reference_sums_micro_batches() -> None:
    model = tiny("gpt_neox")
    whole, single = (context(model, num_samples=3, reference=True, memory_gib=size) for size in (2.0, 1e-9))
    values = [Jacobian().run(given).values["ref_jacobian"] for given in (whole, single)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_estimates_agree_with_exact_numbers_within_their_error() -> None:
    given = context(tiny("llama"), num_samples=6)
    exact = Jacobian(exact=True).run(given).tables["jacobian"]
    estimated = Jacobian(exact=False, num_probes=128).run(given).tables["jacobian"]
    for one, other in zip(exact, estimated, strict=True):
        assert 0 < other["deviation_stderr"] < 0.05 * one["deviation"]
        assert abs(one["deviation"] - other["deviation"]) < 4 * other["deviation_stderr"]
        assert other["diagonal_mean"] == pytest.approx(one["diagonal_mean"], abs=0.1)


def test_estimates_do_not_depend_on_micro_batches() -> None:
    model = tiny("llama")
    tables = [Jacobian(exact=False).run(context(model, memory_gib=size)).tables["jacobian"] for size in (2.0, 1e-9)]
    for one, other in zip(*tables, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_estimates_standard_error_is_the_spread_of_repeated_estimates() -> None:
    given = context(tiny("gpt2"), num_samples=2)
    trace = next(given.traces("all", title=""))
    from sparsecod_megatron.analysis.jacobians import estimated_numbers

    rows, positions = torch.arange(2), torch.tensor([[3], [6]])
    with isolated(given.replay, trace, 1) as apart:
        apart.check(rows, positions)
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (200, 16, 2, 1, 16), generator=generator) * 2 - 1
        runs = [estimated_numbers(apart, rows, positions, drawn) for drawn in signs]
    spread = torch.stack([numbers.deviation for numbers in runs]).var(dim=0)
    claimed = torch.stack([numbers.deviation_variance for numbers in runs]).mean(dim=0)
    assert (claimed / spread).numpy() == pytest.approx(np.ones((2, 1)), rel=0.4)


@pytest.mark.parametrize(
    "model",
    [
        MambaForCausalLM(MambaConfig(vocab_size=67, hidden_size=16, num_hidden_layers=2, state_size=4)),
        BloomForCausalLM(BloomConfig(vocab_size=67, hidden_size=16, n_layer=2, n_head=4)),
    ],
    ids=["mamba", "bloom"],
)
def test_refuses_blocks_whose_tokens_it_cannot_take_apart(model: MambaForCausalLM | BloomForCausalLM) -> None:
    with pytest.raises(ConversionError, match="cannot be taken apart; leave jacobian out of --scores"):
        Jacobian().run(context(model))


def test_a_router_that_rounding_decides_is_no_mixing_of_tokens() -> None:
    """Where the two best experts are close, another shape of the batch chooses the other, as half precision may."""
    model = tiny("mixtral", num_experts_per_tok=1)
    gate = model.model.layers[1].mlp.gate
    whole, sizes = gate.forward, []

    def rounded(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores, indices = whole(hidden)
        sizes.append(len(logits))
        best = logits.topk(2)
        margins = best.values[:, 0] - best.values[:, 1]
        close = (margins <= margins.quantile(0.2)) & (len(logits) != sizes[0])
        return logits, scores, torch.where(close[:, None], best.indices[:, 1:], indices)

    gate.forward = rounded
    with pytest.raises(ConversionError, match=r"for \d+ of \d+ tokens, which rounding alone .* --dtype float32"):
        Jacobian().run(context(model))


@pytest.mark.parametrize("massive", [0.0, 3000.0])
def test_refuses_a_block_that_mixes_tokens_outside_attention(massive: float) -> None:
    """However large one channel of the residual stream is, as in most trained models."""
    model = tiny("llama")
    if massive:
        model.model.embed_tokens.weight.data[:, 0] += massive
        for name, weight in model.named_parameters():
            if "layernorm" in name:  # the channel counts for nothing but the size of the stream
                weight.data.mul_(massive / 4)[0] = 0
    mlp = model.model.layers[1].mlp
    whole = mlp.forward
    mlp.forward = lambda x: whole(x + x.cumsum(dim=1))
    before = model.config._attn_implementation
    with pytest.raises(ConversionError, match="mixes tokens outside its attention"):
        Jacobian().run(context(model))
    assert model.config._attn_implementation == before
