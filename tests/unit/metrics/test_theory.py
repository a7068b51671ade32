"""A fresh model does what theory says it must, at realistic widths; a wrong initialisation or weighting shows here.

Notation: L layers, d channels, F the MLP's width, σ the initial standard deviation, G query heads a key/value head.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.backend import select_backend

select_backend()

from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from sparsecod_megatron.config import ModelConfig, load_config  # noqa: E402
from sparsecod_megatron.metrics import variance  # noqa: E402
from sparsecod_megatron.metrics.accumulator import LayerAccumulator  # noqa: E402
from sparsecod_megatron.metrics.variance import VarianceGroup, variance_sums  # noqa: E402
from sparsecod_megatron.model import build_model, init, transformer_config, unwrap  # noqa: E402
from sparsecod_megatron.model.attention import SDPAttention  # noqa: E402
from sparsecod_megatron.model.residual import BranchNorm  # noqa: E402
from sparsecod_megatron.parallel import running_processes  # noqa: E402

WIDTH = 512
# d·σ² is that of the paper's 1B model, 2048 · 0.02², and so is F = 4d: every branch then has the 1B model's variance.
SHAPE = (
    f"model.hidden_size={WIDTH}",
    f"model.ffn_hidden_size={4 * WIDTH}",
    "model.num_attention_heads=8",
    "model.init_method_std=0.04",
    "model.vocab_size=2048",
    "precision.dtype=fp32",
    "data.seq_length=256",
    "train.global_batch_size=1",
)


def fresh(*overrides: str, flat_router: bool = False) -> list[dict[str, float]]:
    """Layer statistics of a model as it is built, over 2 × 256 random tokens; `embedding_var` is put in layer 0."""
    config = load_config(None, [*SHAPE, *overrides])
    backend = select_backend()
    with running_processes(config, communication=backend.communication, device=backend.device) as groups:
        megatron = transformer_config(config, transformer_engine=False)
        model = unwrap(build_model(config, megatron, groups, device=backend.device, transformer_engine=False)[0]).eval()
        if flat_router:
            for layer in model.decoder.layers:
                torch.nn.init.zeros_(layer.mlp.router.weight)
        group = VarianceGroup([model])
        sums = LayerAccumulator(num_layers=config.model.num_layers, names=group.names, device=backend.device)
        tokens = torch.randint(2048, (2, 256), generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), group.collecting(sums):
            model(tokens, torch.arange(256).expand(2, 256), None)
        means = sums.reduce()
    layers = [dict(group.statistics(layer)) for layer in means]
    layers[0]["embedding_var"] = means[0]["attn_in_var"]
    return layers  # type: ignore[return-value]


def test_variances_of_branches_add() -> None:
    """With independent, zero-mean output weights both branches are uncorrelated with the stream: ΔVar = Var + Var.

    Var(h + a + m) = Var(h) + Var(a) + Var(m) + 2 Cov, and E[Cov] = 0 over the output weights; what is left of Cov in
    one draw falls with d and the tokens. A token counted twice in one of the three would break it.
    """
    layers = fresh(
        "model.num_layers=4", "model.hidden_size=1024", "model.ffn_hidden_size=4096", "model.init_method_std=0.0283"
    )
    before = layers[0]["embedding_var"]
    for layer in layers:
        assert layer["out_var"] - before == pytest.approx(layer["attn_var"] + layer["mlp_var"], rel=0.02)
        before = layer["out_var"]


def mlp_variance() -> float:
    """F·σ² · E[silu(g)²] · E[u²] with gate g and up u of variance d·σ², by quadrature over g: 0.756 in this shape."""
    variance = WIDTH * 0.04**2
    g = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = torch.exp(-(g**2) / (2 * variance)) / (2 * torch.pi * variance) ** 0.5
    silu_square = torch.trapezoid(torch.nn.functional.silu(g) ** 2 * density, g)
    return float(4 * WIDTH * 0.04**2 * silu_square * variance)


def test_unscaled_outputs_grow_with_depth() -> None:
    """A branch sees a normalised input whatever the depth, so each layer adds the same variance: growth is linear in L.

    The MLP adds its closed form; attention less, as it averages values (0.2 of that here).
    The published 9.2 and 12.2 of 12 and 16 layers
    of the 1B shape are the MLP's part and little more, so they are a lower bound at this sequence length.
    """
    assert mlp_variance() == pytest.approx(0.756, rel=0.01)
    layers = fresh("model.num_layers=16")
    # The tokens of a sequence share most of their flat attention's output, so one layer is a draw of few tokens.
    assert sum(layer["mlp_var"] for layer in layers) / 16 == pytest.approx(mlp_variance(), rel=0.02)
    out = [layer["out_var"] for layer in layers]
    assert (out[15] - out[7]) / (out[7] - out[0]) == pytest.approx(8 / 7, rel=0.05)
    for num_layers, published in ((12, 9.2), (16, 12.2)):
        assert published < out[num_layers - 1] < 1.25 * published


def test_megatrons_scaled_outputs_do_not_grow() -> None:
    """Output weights of variance σ²/2L make L layers add what half of one adds, at any depth."""
    last = {depth: fresh(f"model.num_layers={depth}", "model.init=scaled")[-1]["out_var"] for depth in (6, 12)}
    assert last[6] == pytest.approx(last[12], rel=0.05)
    assert mlp_variance() / 2 < last[12] < 1.2 * mlp_variance() / 2


def scaled_mlp_variances(activation: str) -> list[float]:
    """mlp_var of 12 layers under LayerNorm scaling."""
    small = ("model.init_method_std=0.004", "model.init_std.embedding=1")
    overrides = ("model.num_layers=12", "model.layernorm_scaling=true", f"model.activation={activation}", *small)
    return [layer["mlp_var"] for layer in fresh(*overrides)]


def check_layernorm_scaling() -> None:
    """Constancy over depth of Var(branch_l) · (l + 1)^p, p = 1 for ReLU and 2 for SwiGLU."""
    for activation, power in (("relu", 1), ("swiglu", 2)):
        constant = [variance * (layer + 1) ** power for layer, variance in enumerate(scaled_mlp_variances(activation))]
        assert max(constant) / min(constant) < 1.15, activation


def test_layernorm_scaling_shrinks_branches_with_depth() -> None:
    """The branch of layer l reads s·n with s² = 1/(l+1) and n normalised, so Var(n) is the same in every layer.

    relu(W s n) = s · relu(W n): the output is s times one of constant variance, Var ∝ s² = 1/(l+1). For pre-activations
    g, u of small variance dσ²s², silu(g) = g/2 + O(g²), so silu(g)·u ≈ g·u/2 ∝ s²: Var ∝ s⁴ = 1/(l+1)².
    """
    check_layernorm_scaling()


@pytest.mark.parametrize("scaling", [False, True])
def test_normalised_branches_add_their_scale(scaling: bool) -> None:
    """Peri: each branch has mean square 1 (times 1/(l+1) under LayerNorm scaling), and the embeddings too.

    Uncorrelated, they add up to 1 + 2(l+1), or to 1 + 2·H_{l+1}, H being the harmonic number.
    """
    layers = fresh("model.num_layers=8", "model.norm_placement=peri", f"model.layernorm_scaling={scaling}".lower())
    expected = 1.0
    for index, layer in enumerate(layers):
        share = 1 / (index + 1) if scaling else 1.0
        assert layer["attn_var"] == pytest.approx(share, rel=0.02)
        assert layer["mlp_var"] == pytest.approx(share, rel=0.02)
        expected += 2 * share
        assert layer["out_var"] == pytest.approx(expected, rel=0.06)


def attention_variance(length: int, sharpness: float) -> float:
    """Variance of attention's output over N(0, 1) values, with scores of standard deviation `sharpness`."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(length, 4, 8, 64, generator=generator) for _ in range(3))
    config = TransformerConfig(num_layers=1, hidden_size=512, num_attention_heads=8, attention_dropout=0.0)
    attention = SDPAttention(config, 1, AttnMaskType.causal, "self")
    return float(attention(query * sharpness, key, value, None).var())


@pytest.mark.parametrize(("length", "published"), [(64, 0.074), (512, 0.0133)])
def test_flat_attention_shrinks_values_harmonically(length: int, published: float) -> None:
    """Position t averages t values of variance 1, leaving 1/t; over T positions that is H_T / T."""
    harmonic = sum(1 / t for t in range(1, length + 1)) / length
    assert harmonic == pytest.approx(published, rel=0.01)
    flat = attention_variance(length, 0.0)
    assert flat == pytest.approx(harmonic, rel=0.03)
    assert attention_variance(length, 1.0) > 1.3 * flat
    assert attention_variance(length, 4.0) > 2 * attention_variance(length, 1.0)


def test_grouped_queries_change_nothing_at_initialisation() -> None:
    """Var(Σ_h W_h v_h) = d σ² Var(v) whether heads share their value v_h or not: random W do not see it."""
    variances = [fresh("model.num_layers=2", f"model.num_query_groups={groups}")[0]["attn_var"] for groups in (8, 4, 2)]
    assert max(variances) / min(variances) < 1.15


@pytest.mark.parametrize("group", [2, 8])
def test_mean_pooled_values_lose_the_group_size(group: int) -> None:
    """A GQA model made by averaging the values of G heads has independent terms averaged: Var / G."""
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(64, 256, generator=generator), torch.randn(8, 64, 256, generator=generator) * 256**-0.5

    def variance(heads: Tensor) -> float:
        return float(torch.einsum("td,hkd->thk", x, heads).var())

    pooled = weights.view(8 // group, group, 64, 256).mean(dim=1)
    assert variance(pooled) == pytest.approx(variance(weights) / group, rel=0.05)


@pytest.mark.parametrize("pre_softmax", [True, False], ids=["softmax-then-top-k", "top-k-then-softmax"])
def test_a_flat_router_mixes_independent_experts(pre_softmax: bool) -> None:
    """Var(Σ g_e f_e) = Σ g_e² Var(f): k/E² of one expert's variance where g = 1/E, 1/k where g is renormalised.

    One expert's variance is that of a dense MLP of its width.
    """
    experts, chosen = 8, 4
    single = fresh("model.num_layers=1", "model.ffn_hidden_size=512")[0]["mlp_var"]
    mixed = fresh(
        "model.num_layers=1",
        f"model.num_moe_experts={experts}",
        f"model.moe_router_topk={chosen}",
        "model.moe_ffn_hidden_size=512",
        f"model.moe_router_pre_softmax={str(pre_softmax).lower()}",
        flat_router=True,
    )[0]["mlp_var"]
    weight = chosen / experts**2 if pre_softmax else 1 / chosen
    assert mixed == pytest.approx(weight * single, rel=0.1)


class TestMutations:
    """Errors of the kind that the theory tests are there for; each must break one."""

    def test_scaled_initialisation_instead_of_normal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(init._SCHEMES, "normal", init._SCHEMES["scaled"])
        with pytest.raises(AssertionError):
            test_unscaled_outputs_grow_with_depth()

    @pytest.mark.parametrize("shift", [0, 2], ids=["from-zero", "one-too-far"])
    def test_layernorm_scaling_with_a_shifted_index(self, monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
        monkeypatch.setattr(ModelConfig, "scale", lambda self, layer: max(layer + shift, 1) ** -0.5)
        with pytest.raises(AssertionError, match="relu"):
            check_layernorm_scaling()

    def test_layernorm_scaling_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ModelConfig, "scale", lambda self, layer: 1.0)
        with pytest.raises(AssertionError, match="relu"):
            check_layernorm_scaling()

    def test_tokens_counted_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first half of the MLP branch's tokens enters the sum a second time."""

        def counted_twice(x: Tensor) -> tuple[Tensor, Tensor]:
            once, squares = variance_sums(x)
            return once + variance_sums(x[: len(x) // 2])[0], squares

        monkeypatch.setattr(variance, "variance_sums", counted_twice)
        with pytest.raises(AssertionError):
            test_unscaled_outputs_grow_with_depth()

    def test_a_branch_observed_before_its_norm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(BranchNorm, "branch_norm", None)
        with pytest.raises(AssertionError):
            test_normalised_branches_add_their_scale(scaling=True)
