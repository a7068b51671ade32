"""CETT against its formula, the PPL-1 % target, planted neurons, and mixtures of both kinds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.sparsity.activation import TOLERANCE_PERCENT, Activation, CettCurve
from sparsecod_megatron.analysis.sparsity.cett import NeuronSample, ThresholdSearch
from sparsecod_megatron.analysis.sparsity.cutting import capture, run_cut
from sparsecod_megatron.analysis.sparsity.neurons import NeuronSite, find_sites
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.hf.matrices import Matrix, find_matrices
from tests.unit.analysis.sparsity.tiny import CONFIGS, list_experts, own_sample, sample, tiny_model


def sites_of(context: Context) -> list[NeuronSite]:
    return find_sites(find_matrices(context.model, context.layers))


def sample_of(activations: Tensor, down: Tensor) -> NeuronSample:
    layer = nn.Linear(down.shape[1], down.shape[0], bias=False)
    layer.weight = nn.Parameter(down, requires_grad=False)
    site = NeuronSite("mlp.down_proj.weight", [Matrix(0, "down", "mlp.down_proj.weight", layer, "weight")])
    return NeuronSample(activations, torch.zeros(len(activations)).long(), (activations @ down.t()).norm(dim=1), site)


@given(st.integers(0, 1000), st.integers(4, 40), st.floats(0.05, 3))
def test_cett_is_monotone_and_hits_its_target(seed: int, neurons: int, tail: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes, signs = torch.randn(2, 24, neurons, generator=generator)
    activations = sizes.mul(tail).exp() * signs
    orthogonal = torch.linalg.qr(torch.randn(neurons, neurons, generator=generator)).Q
    found = sample_of(activations, orthogonal)  # neurons that cannot cancel: strictly monotone
    levels = found.norms().flatten().quantile(torch.linspace(0, 1, 15)).tolist()
    curve = [found.cett(level) for level in levels]
    assert all(later >= earlier - 1e-6 for earlier, later in zip(curve, curve[1:], strict=False))
    assert curve[-1] == pytest.approx(1, abs=1e-5)
    search = ThresholdSearch(found)
    targets = (0.5, 0.1, 0.2, 0.9, 0.05)
    reached = {target: found.cett(search.threshold(target)) for target in targets}
    ordered = found.norms().flatten().sort().values
    for target, value in reached.items():
        above = ordered[ordered > search.threshold(target)]
        exact = abs(value - target) <= 1.001e-4 * target
        assert exact or (value <= target < found.cett(float(above[0])) if len(above) else value <= target)


@given(st.integers(0, 200))
def test_cett_of_random_directions_is_monotone_but_for_cancellation(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = sample_of(torch.randn(64, 96, generator=generator), torch.randn(48, 96, generator=generator))
    levels = found.norms().flatten().quantile(torch.linspace(0, 1, 12)).tolist()
    curve = [found.cett(level) for level in levels]
    assert all(later >= earlier - 0.02 for earlier, later in zip(curve, curve[1:], strict=False))


def test_cett_follows_its_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    activations, down = torch.randn(5, 7, generator=generator), torch.randn(4, 7, generator=generator)
    epsilon, ratios = 1.2, []
    for a in activations:
        small = torch.zeros(4)
        for i in range(7):
            contribution = a[i] * down[:, i]
            small = small + (contribution if contribution.norm() <= epsilon else 0)
        ratios.append(float(small.norm() / (down @ a).norm()))
    assert sample_of(activations, down).cett(epsilon) == pytest.approx(sum(ratios) / 5, rel=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_watching_changes_nothing_and_captures_what_the_site_puts_out(family: str) -> None:
    context = sample(tiny_model(family))
    sites = sites_of(context)
    expected = context.replay.losses(context.replay.trace(*_held_out(context)))
    found = run_cut(context, sites, [-1.0] * len(sites))
    torch.testing.assert_close(found.losses, expected, rtol=1e-5, atol=1e-5)
    assert found.counts[..., 0].sum() == 0
    torch.testing.assert_close(
        context.replay.losses(context.replay.trace(*_held_out(context))), expected, rtol=0, atol=0
    )
    for captured in capture(context, sites):
        assert captured is not None
        biased = family in ("gpt2", "gpt_neox", "gpt_oss")  # biases are part of FFN(x), not of any neuron
        assert captured.cett(float("inf")) == pytest.approx(1, abs=0.3 if biased else 1e-4)


def _held_out(context: Context) -> tuple[Tensor, Tensor]:
    windows = context.part("held_out")
    return windows[:, :-1], windows[:, 1:]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_ppl_one_percent_hits_one_percent(family: str) -> None:
    context = own_sample(tiny_model(family), num_samples=32)
    result = Activation().run(context)
    assert result.values["ppl_percent_reached"]
    assert result.values["ppl_increase_percent"]["value"] == pytest.approx(1, abs=TOLERANCE_PERCENT)
    sites = sites_of(context)
    epsilons = [row["epsilon"] for row in result.tables["activation"]]
    dense, cut = (run_cut(context, sites, values).losses.mean() for values in ([-1.0] * len(sites), epsilons))
    assert float(torch.exp(cut - dense)) == pytest.approx(1.01, abs=TOLERANCE_PERCENT / 100)
    at_target = [row for row in result.tables["activation_curve"] if row["cett"] == result.values["cett"]]
    sparsity = result.values["sparsity"]
    assert sparsity["value"] == pytest.approx(at_target[0]["sparsity"], abs=0.02)
    assert 0 < sparsity["low"] <= sparsity["value"] <= sparsity["high"] < 1


def _plant(model: PreTrainedModel, layer: int, dead: int) -> None:
    """Let a block's first neurons never fire, and shrink the next ones to nothing that matters."""
    mlp = model.model.layers[layer].mlp
    with torch.no_grad():
        mlp.up_proj.weight[:dead] = 0
        mlp.down_proj.weight[:, dead : 2 * dead] *= 1e-6


def test_planted_sparse_neurons_are_recovered() -> None:
    model = tiny_model("llama")
    _plant(model, layer=1, dead=12)
    context = own_sample(model, num_samples=8)
    rows = Activation().run(context).tables["activation"]
    assert [row["exact_zero"] for row in rows] == [0.0, 12 / 48]
    assert rows[1]["sparsity"] > rows[0]["sparsity"] + 0.1
    counts = CettCurve(context, sites_of(context)).at(1e-4).counts.sum(1)
    cut = (counts[:, 0] / counts[:, 2]).tolist()  # next to nothing may be lost: only what was planted goes
    assert cut[0] < 0.05 and 24 / 48 <= cut[1] < 24 / 48 + 0.05


def test_sequences_are_counted_apart() -> None:
    context = sample(tiny_model("llama"), num_samples=6)
    sites = sites_of(context)
    together = run_cut(context, sites, [0.5, 2.0]).counts
    single = sample(tiny_model("llama"), num_samples=6, memory_gib=1e-9)
    assert single.micro_batch == 1 and context.micro_batch > 1
    assert torch.equal(together, run_cut(single, sites_of(single), [0.5, 2.0]).counts)
    assert (together[..., 2] == 24 * 48).all()


def test_fused_and_listed_experts_give_the_same_numbers() -> None:
    fused, listed = (sample(tiny_model("mixtral")) for _ in range(2))
    list_experts(listed.model)
    curves = [CettCurve(context, sites_of(context)) for context in (fused, listed)]
    torch.testing.assert_close(curves[0].dense.losses, curves[1].dense.losses, rtol=1e-5, atol=1e-5)
    for cett in (0.1, 0.4):
        assert curves[0].at(cett).epsilons == pytest.approx(curves[1].at(cett).epsilons, rel=1e-3)
        first, second = (curve.at(cett).counts.double() for curve in curves)
        torch.testing.assert_close(first, second, rtol=2e-3, atol=2)


def test_one_sequence_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match="--samples 1"):
        Activation().run(sample(tiny_model("llama"), num_samples=1))
