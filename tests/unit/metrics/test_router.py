"""Router statistics of real mixtures of experts against numpy on the router's inputs, and Megatron's own trackers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.megatron import megatron_model, run_forward
from tests.helpers.training import ROUTER_FIELDS, fresh_router_losses

EXPERTS, TOPK, LAYERS = 5, 2, 3
# Without the data-parallel wrapper there is no buffer for the fused weight gradient.
PLAIN = "megatron.gradient_accumulation_fusion=false"
MOE = (PLAIN, f"model.num_moe_experts={EXPERTS}", f"model.moe_router_topk={TOPK}", "model.moe_ffn_hidden_size=24")
LIMITED = ("model.moe_expert_capacity_factor=0.75",)
SIGMOID = ("model.moe_router_score_function=sigmoid", "model.moe_router_enable_expert_bias=true")


@pytest.fixture(autouse=True)
def own_router_losses() -> Iterator[None]:
    """Nothing from another test's model."""
    with fresh_router_losses():
        yield


def token_batches(count: int = 2) -> list[Tensor]:
    return [torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(index)) for index in range(count)]


def uneven(model: Any) -> None:
    """Make the router prefer some experts by far."""
    for layer in model.decoder.layers:
        if not hasattr(layer.mlp, "router"):
            continue
        with torch.no_grad():
            layer.mlp.router.weight.mul_(torch.linspace(0.3, 3.0, EXPERTS)[:, None])
            if layer.mlp.router.expert_bias is not None:
                layer.mlp.router.expert_bias.copy_(torch.linspace(0.4, -0.4, EXPERTS))


def collect(model: Any, batches: list[Tensor]) -> list[dict[str, Any]]:
    """Statistics by layer of one step over these micro-batches."""
    from sparsecod_megatron.metrics.accumulator import LayerAccumulator
    from sparsecod_megatron.metrics.router import RouterGroup

    group = RouterGroup([model])
    sums = LayerAccumulator(num_layers=LAYERS, names=group.names, device=torch.device("cpu"))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with group.collecting(sums):
        for tokens in batches:
            run_forward(model, tokens).square().mean().backward()
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    return [group.statistics(means) for means in sums.reduce()]


def router_logits(model: Any, batches: list[Tensor]) -> list[list[np.ndarray]]:
    """By layer and micro-batch, [tokens, E] fp64, from what goes into each router."""
    inputs: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]
    handles = [
        layer.mlp.router.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].detach().double().flatten(0, 1).numpy())
        )
        for layer, seen in zip(model.decoder.layers, inputs, strict=True)
    ]
    for tokens in batches:
        run_forward(model, tokens)
    for handle in handles:
        handle.remove()
    weights = [layer.mlp.router.weight.detach().double().numpy() for layer in model.decoder.layers]
    return [[x @ weight.T for x in seen] for seen, weight in zip(inputs, weights, strict=True)]


def by_hand(
    micro_batches: list[np.ndarray], *, sigmoid: bool, bias: np.ndarray, capacity: float | None
) -> dict[str, Any]:
    """The definitions, one token at a time, over a list of logits [tokens, E]."""
    counts, kept, probability, slots, aux, z = np.zeros(EXPERTS), 0, 0.0, 0, [], []
    for logits in micro_batches:
        routed, top_only, mean_probabilities = np.zeros(EXPERTS), np.zeros(EXPERTS), np.zeros(EXPERTS)
        for row in logits:
            scores = 1 / (1 + np.exp(-row)) if sigmoid else np.exp(row)
            probabilities = scores / scores.sum()
            chosen = np.argsort(-(scores + bias))[:TOPK]
            routed[chosen] += 1
            top_only[np.argsort(-probabilities)[:TOPK]] += 1
            probability += probabilities[chosen].sum()
            mean_probabilities += probabilities / len(logits)
            z.append(np.log(np.exp(row).sum()) ** 2)
        limit = math.inf if capacity is None else math.ceil(len(logits) * TOPK / EXPERTS * capacity)
        counts += routed
        kept += np.minimum(routed, limit).sum()
        slots += len(logits) * TOPK
        aux.append(EXPERTS * (top_only / (len(logits) * TOPK) * mean_probabilities).sum())
    shares = counts / slots
    return {
        "tokens_per_expert": counts.tolist(),
        "load_entropy": -(shares[shares > 0] * np.log(shares[shares > 0])).sum() / math.log(EXPERTS),
        "load_max_over_mean": counts.max() / counts.mean(),
        "dropped_frac": 1 - kept / slots,
        "mean_topk_prob": probability / slots,
        "aux_loss": np.mean(aux),
        "z_loss": np.mean(z),
    }


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert set(ours) == set(theirs) == ROUTER_FIELDS
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-12, err_msg=name)


CASES: dict[str, tuple[str, ...]] = {
    "softmax after top-k": (),
    "softmax before top-k": ("model.moe_router_pre_softmax=true",),
    "capacity": LIMITED,
    "padded to capacity": (*LIMITED, "megatron.moe_pad_expert_input_to_capacity=true"),
    "sigmoid and bias": SIGMOID,
    "sigmoid, bias and capacity": (*SIGMOID, *LIMITED),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_numpy(case: str) -> None:
    """Two micro-batches through three layers whose routers overload some experts."""
    batches, sigmoid, limited = token_batches(), "sigmoid" in case, "capacity" in case
    with megatron_model(*MOE, *CASES[case]) as model:
        uneven(model)
        ours = collect(model, batches)
        bias = np.linspace(0.4, -0.4, EXPERTS) if sigmoid else np.zeros(EXPERTS)
        capacity = 0.75 if limited else None
        theirs = [
            by_hand(seen, sigmoid=sigmoid, bias=bias, capacity=capacity) for seen in router_logits(model, batches)
        ]
    for got, expected in zip(ours, theirs, strict=True):
        assert_equal(got, expected)
        assert sum(got["tokens_per_expert"]) == 2 * 2 * 13 * TOPK
        assert got["load_max_over_mean"] > 1.2 and got["load_entropy"] < 0.99
        assert (got["dropped_frac"] > 0.05) if limited else (got["dropped_frac"] == 0)


DEPTHS = {
    "alike": (),
    "top-k by layer": ("model.moe_router_topk_per_layer=[1,2,3]", "model.moe_router_pre_softmax=true"),
    "dense first": ("model.moe_first_k_dense_layers=1",),
}


@pytest.mark.parametrize("depth", DEPTHS)
def test_losses_are_those_that_megatron_trains(depth: str) -> None:
    """In one process Megatron's trackers hold the sum over micro-batches of each layer's unscaled losses."""
    batches = token_batches()
    with megatron_model(*MOE, *DEPTHS[depth]) as model:
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        uneven(model)
        tracker = get_moe_layer_wise_logging_tracker()
        ours = collect(model, batches)
        sums = {name: entry["values"].tolist() for name, entry in tracker.items()}
    for name, theirs in (("aux_loss", "load_balancing_loss"), ("z_loss", "z_loss")):
        expected = [value / len(batches) for value in sums[theirs]]
        # Megatron's tracker has a zero for a dense layer, ours nothing.
        assert [layer.get(name, 0.0) for layer in ours] == pytest.approx(expected, rel=1e-5)


RECOMPUTE = {
    "full": ("full", "megatron.recompute_method=uniform", "megatron.recompute_num_layers=1"),
    "selective": ("selective", "megatron.recompute_modules=[moe]"),
}


@pytest.mark.parametrize("granularity", RECOMPUTE)
def test_a_recomputed_forward_counts_once(granularity: str) -> None:
    first, *rest = RECOMPUTE[granularity]
    collected, forwards = [], []
    for overrides in ((), (f"megatron.recompute_granularity={first}", *rest)):
        with megatron_model(*MOE, *overrides) as model:
            uneven(model)
            calls: list[int] = []
            model.decoder.layers[0].mlp.router.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            collected.append(collect(model, token_batches()))
            forwards.append(len(calls))
    plain, recomputed = collected
    assert forwards == [2, 4]
    for ours, theirs in zip(recomputed, plain, strict=True):
        assert_equal(ours, theirs)


def test_extremes_of_load() -> None:
    from sparsecod_megatron.metrics.router import RouterGroup

    with megatron_model(*MOE) as model:
        group = RouterGroup([model])
    others = dict.fromkeys(("router_kept", "router_topk_prob", "router_aux_loss", "router_z_loss"), 1.0)
    tokens = [name for name in group.names if name not in others]
    assert len(tokens) == EXPERTS
    balanced = group.statistics({**others, **dict.fromkeys(tokens, 7.0)})
    assert (balanced["load_entropy"], balanced["load_max_over_mean"]) == pytest.approx((1.0, 1.0))
    collapsed = group.statistics({**others, **dict.fromkeys(tokens, 0.0), tokens[3]: 7.0})
    assert (collapsed["load_entropy"], collapsed["load_max_over_mean"]) == pytest.approx((0.0, EXPERTS))


def test_dense_models_have_no_router() -> None:
    from sparsecod_megatron.metrics.router import RouterGroup

    with megatron_model(PLAIN) as model:
        group = RouterGroup([model])
        assert group.names == ()
        assert collect(model, token_batches(1)) == [{}] * LAYERS
