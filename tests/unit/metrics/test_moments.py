"""Channel moments against scipy and numpy in float64, on tensors and through a real Megatron-Core model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from sparsecod_megatron.metrics.accumulator import LayerAccumulator
from sparsecod_megatron.metrics.moments import CHUNK_ELEMENTS, MomentsGroup, in_chunks, token_cosines, token_shapes
from tests.helpers.megatron import megatron_model, run_forward

CPU = torch.device("cpu")
LAYERS = 3
# Without the data-parallel wrapper there is no buffer for the fused weight gradient.
PLAIN = "megatron.gradient_accumulation_fusion=false"
MOE = ("model.num_moe_experts=5", "model.moe_router_topk=2", "model.moe_ffn_hidden_size=24")
SAMPLERS: dict[str, Callable[[torch.Generator, tuple[int, int]], Tensor]] = {
    "gaussian": lambda generator, shape: torch.randn(shape, generator=generator),
    "heavy tails": lambda generator, shape: torch.randn(shape, generator=generator) ** 3,
    "skewed": lambda generator, shape: torch.randn(shape, generator=generator).exp(),
}


def assert_shapes_equal_scipy(x: Tensor, *, rtol: float, atol: float) -> None:
    """Every row of `token_shapes` against its definition; elements within rounding of 3 std may count either way."""
    skew, kurt, outlier_frac, top_mass, peak = token_shapes(x).double().numpy()
    exact = x.double().numpy()
    np.testing.assert_allclose(skew, stats.skew(exact, axis=1), rtol=rtol, atol=atol)
    np.testing.assert_allclose(kurt, stats.kurtosis(exact, axis=1, fisher=False), rtol=rtol)
    z = np.abs(stats.zscore(exact, axis=1))
    assert np.all(outlier_frac >= (z > 3 + 1e-4).mean(axis=1) - 1e-7)
    assert np.all(outlier_frac <= (z > 3 - 1e-4).mean(axis=1) + 1e-7)
    top = np.sort(np.abs(exact), axis=1)[:, -10:]
    np.testing.assert_allclose(top_mass, np.linalg.norm(top, axis=1) / np.linalg.norm(exact, axis=1), rtol=1e-5)
    np.testing.assert_allclose(peak, np.abs(exact).max(axis=1), rtol=1e-6)


@given(
    tokens=st.integers(1, 20),
    channels=st.integers(2, 400),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    scale=st.floats(-6, 6).map(lambda exponent: 10.0**exponent),
    offset=st.floats(-3, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_shapes_equal_scipy(tokens: int, channels: int, sampler: str, scale: float, offset: float, seed: int) -> None:
    x = scale * (SAMPLERS[sampler](torch.Generator().manual_seed(seed), (tokens, channels)) + offset)
    # What the rounding of x to fp32 has taken away, no formula finds again.
    assume(bool((x.std(dim=1) > 1e-2 * x.abs().amax(dim=1)).all()))
    # Two channels that nearly agree keep few digits of their difference, in float64 too: their skewness is exactly 0.
    assert_shapes_equal_scipy(x, rtol=2e-4, atol=2e-4 if channels < 8 else 1e-5)


@pytest.mark.parametrize("mean", [100.0, -1000.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_large_mean_costs_no_digits(sampler: str, mean: float) -> None:
    x = SAMPLERS[sampler](torch.Generator().manual_seed(0), (500, 256)) + mean
    assert_shapes_equal_scipy(x, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(token_shapes(x)[0].double().mean(), stats.skew(x.double(), axis=1).mean(), rtol=1e-4)


def test_moments_are_biased_and_the_tail_is_cut_at_three_biased_deviations() -> None:
    """By hand: m2 = 3/16, m3 = 3/32, m4 = 21/256 of (0, 0, 0, 1); 3.05 biased deviations are 2.95 unbiased ones."""
    skew, kurt, *_ = token_shapes(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    np.testing.assert_allclose([skew.item(), kurt.item()], [2 / math.sqrt(3), 7 / 3], rtol=1e-6)
    near = torch.tensor([[1.0, 0.0] + [0.2025, -0.2025] * 7])
    deviations = abs(near[0, 0] - near.mean())
    assert deviations / near.std() < 3 < deviations / near.std(correction=0)
    assert token_shapes(near)[2].item() == pytest.approx(1 / 16)


def test_top_mass_is_a_share_of_the_norm_and_not_of_its_square() -> None:
    assert token_shapes(torch.full((1, 40), -2.0))[3].item() == pytest.approx(math.sqrt(10 / 40))
    assert token_shapes(torch.tensor([[3.0, -4.0, 0.0]]))[3].item() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 0.1, -1234.5678, 1e-8, 3e7])
@pytest.mark.parametrize("channels", [1, 7, 256, 2048])
def test_constant_tokens_count_as_zero(value: float, channels: int, dtype: torch.dtype) -> None:
    skew, kurt, outlier_frac, top_mass, peak = token_shapes(torch.full((3, channels), value, dtype=dtype))
    assert skew.tolist() == kurt.tolist() == outlier_frac.tolist() == [0.0, 0.0, 0.0]
    expected = math.sqrt(min(10, channels) / channels) if value else 0.0
    np.testing.assert_allclose(top_mass, expected, rtol=1e-5)
    np.testing.assert_allclose(peak, abs(torch.tensor(value, dtype=dtype).item()), rtol=1e-6)


def test_not_a_number_stays_visible() -> None:
    x = torch.randn(4, 64)
    x[2, 5] = float("nan")
    shapes = token_shapes(x)
    assert shapes[[0, 1, 3, 4], 2].isnan().all()
    assert not shapes[:, [0, 1, 3]].isnan().any()


def test_bf16_is_computed_in_fp32() -> None:
    x, y = torch.randn(2, 50, 300).bfloat16()
    assert torch.equal(token_shapes(x), token_shapes(x.float()))
    assert torch.equal(token_cosines(x, y), token_cosines(x.float(), y.float()))


@given(
    tokens=st.integers(1, 20),
    channels=st.integers(1, 300),
    scale=st.floats(1e-6, 1e6),
    seed=st.integers(0, 2**32 - 1),
)
def test_cosines_equal_torch(tokens: int, channels: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, step = torch.randn(2, tokens, channels, generator=generator)
    before, after = scale * before, before + 0.3 * step
    expected = torch.cosine_similarity(before.double(), after.double(), dim=-1)
    np.testing.assert_allclose(token_cosines(before, after)[0], expected, rtol=1e-5, atol=1e-6)


def test_a_token_of_zeros_has_cosine_zero() -> None:
    x = torch.randn(2, 30)
    assert token_cosines(torch.zeros(2, 30), x).tolist() == [[0.0, 0.0]]


def test_chunks_change_nothing() -> None:
    """Tensors of several chunks, the last one smaller, and tokens longer than a chunk."""
    for shape in [(5, 250, 900), (3, 1200, 300), (2, 1, CHUNK_ELEMENTS + 1)]:
        x, y = torch.randn(2, *shape)
        flat = [tensor.reshape(-1, shape[-1]) for tensor in (x, y)]
        assert flat[0].numel() > 2 * CHUNK_ELEMENTS
        torch.testing.assert_close(in_chunks(token_shapes, x), token_shapes(flat[0]), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(in_chunks(token_cosines, x, y), token_cosines(*flat), rtol=1e-6, atol=1e-6)


def test_inputs_are_left_alone() -> None:
    x = torch.randn(20, 64)
    before = x.clone()
    token_shapes(x)
    token_cosines(x, x)
    assert torch.equal(x, before)


def test_one_graph_holds_the_whole_computation_off_the_cpu() -> None:
    """What the GPU compiles has no graph breaks: traced on the device that computes nothing."""
    x = torch.randn(8, 64).to("meta")
    assert torch.compile(token_shapes, backend="eager", fullgraph=True)(x).shape == (5, 8)
    assert torch.compile(token_cosines, backend="eager", fullgraph=True)(x, x).shape == (1, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_on_cuda_equals_cpu(dtype: torch.dtype) -> None:
    group = MomentsGroup([])
    x, y = (torch.randn(2, 64, 3, 2048) ** 3).to(dtype)
    for function, tensors in ((token_shapes, (x,)), (token_cosines, (x, y))):
        on_gpu = group._per_token(function, *(tensor.cuda() for tensor in tensors)).cpu()
        torch.testing.assert_close(on_gpu, in_chunks(function, *tensors).double(), rtol=1e-4, atol=1e-5)


def collect(model: Any, *batches: Tensor, backward: bool = False) -> list[dict[str, float]]:
    """Statistics by layer of one step over these micro-batches."""
    group = MomentsGroup([model])
    sums = LayerAccumulator(num_layers=LAYERS, names=group.names, maxima=group.maxima, device=CPU)
    with group.collecting(sums):
        for tokens in batches:
            logits = run_forward(model, tokens)
            if backward:
                logits.square().mean().backward()
    return [group.statistics(means) for means in sums.reduce()]


def assert_close(ours: list[dict[str, float]], theirs: list[dict[str, float]], rtol: float, atol: float = 0.0) -> None:
    assert [sorted(layer) for layer in ours] == [sorted(layer) for layer in theirs]
    for got, expected in zip(ours, theirs, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=rtol, atol=atol, err_msg=name)


def token_batch(*shape: int) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(0))


def by_hand(x: np.ndarray, prefix: str) -> dict[str, float]:
    """The statistics of one place from all its tokens [tokens, channels] in float64."""
    skew, kurt = stats.skew(x, axis=1), stats.kurtosis(x, axis=1, fisher=False)
    top = np.sort(np.abs(x), axis=1)[:, -10:]
    values = {
        "skew": skew.mean(),
        "skew_std": skew.std(),
        "kurt": kurt.mean(),
        "kurt_std": kurt.std(),
        "outlier_frac": (np.abs(stats.zscore(x, axis=1)) > 3).mean(),
        "top_mass": (np.linalg.norm(top, axis=1) / np.linalg.norm(x, axis=1)).mean(),
    }
    return {f"{prefix}_{name}": float(value) for name, value in values.items()}


def observe_by_hand(layer: Any, record: dict[str, list[Tensor]]) -> None:
    """Keep what goes into the layer, what its two branches give, and what comes out."""
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: record["in"].append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    layer.register_forward_hook(lambda module, args, result: record["out"].append(result[0]))
    layer.self_attention.register_forward_hook(lambda module, args, result: record["attn"].append(result[0]))
    layer.mlp.register_forward_hook(lambda module, args, result: record["mlp"].append(result[0]))


@pytest.mark.parametrize("overrides", [(), MOE], ids=["dense", "moe"])
def test_equals_scipy_on_what_a_model_computes(overrides: tuple[str, ...]) -> None:
    batches = token_batch(2, 3, 16)
    seen: list[dict[str, list[Tensor]]] = [{"in": [], "attn": [], "mlp": [], "out": []} for _ in range(LAYERS)]
    with megatron_model(PLAIN, *overrides) as model:
        # Weights far from their initial ones: no place is Gaussian, and every layer turns its input.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8 * torch.rand_like(parameter))
        ours = collect(model, *batches)
        for layer, record in zip(model.decoder.layers, seen, strict=True):
            observe_by_hand(layer, record)
        for batch in batches:
            run_forward(model, batch)
    theirs = []
    for record in seen:
        tensors = {name: torch.cat(parts, dim=1).detach().double().flatten(0, 1) for name, parts in record.items()}
        layer = by_hand(tensors["out"].numpy(), "out") | by_hand(tensors["attn"].numpy(), "attn")
        layer |= by_hand(tensors["mlp"].numpy(), "mlp")
        layer["cos"] = float(torch.cosine_similarity(tensors["in"], tensors["out"], dim=-1).mean())
        layer["massive"] = float(tensors["out"].abs().max())
        theirs.append(layer)
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up() -> None:
    """Uneven micro-batches give what one batch gives: every token weighs the same, and spreads are over all tokens."""
    tokens = token_batch(5, 16)
    with megatron_model() as model:
        assert_close(collect(model, tokens[:1], tokens[1:3], tokens[3:]), collect(model, tokens), rtol=1e-6, atol=1e-7)


def test_sums_of_two_ranks_add_up() -> None:
    """What two ranks with unequal shares of the tokens accumulate gives, added, what one rank with all of them does."""
    tokens = token_batch(5, 16)
    with megatron_model() as model:
        group = MomentsGroup([model])

        def accumulate(batch: Tensor) -> LayerAccumulator:
            sums = LayerAccumulator(num_layers=LAYERS, names=group.names, maxima=group.maxima, device=CPU)
            with group.collecting(sums):
                run_forward(model, batch)
            return sums

        first, second = accumulate(tokens[:2]), accumulate(tokens[2:])
        first._sums += second._sums
        torch.maximum(first._maxima, second._maxima, out=first._maxima)
        assert_close(
            [group.statistics(means) for means in first.reduce()], collect(model, tokens), rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize(
    "recompute",
    [
        ("megatron.recompute_granularity=full", "megatron.recompute_method=uniform", "megatron.recompute_num_layers=1"),
        ("megatron.recompute_granularity=selective", "megatron.recompute_modules=[layernorm,mlp]"),
    ],
    ids=["full", "selective"],
)
def test_a_recomputed_forward_changes_nothing(recompute: tuple[str, ...]) -> None:
    def with_backward(*overrides: str) -> list[dict[str, float]]:
        with megatron_model(PLAIN, *overrides) as model:
            return collect(model, *token_batch(2, 2, 16), backward=True)

    assert_close(with_backward(*recompute), with_backward(), rtol=1e-6, atol=1e-7)
