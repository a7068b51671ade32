"""The reference's own numbers beside ours on real models: where they agree, where they differ, and by what."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsecod_megatron.metrics.collector import StatisticsCollector
from sparsecod_megatron.metrics.moments import MomentsGroup
from sparsecod_megatron.metrics.reference import ReferenceGroup
from sparsecod_megatron.metrics.variance import VarianceGroup
from tests.helpers.megatron import megatron_model, run_forward

LAYERS, CHANNELS = 3, 32
LAST = LAYERS - 1
# Without the data-parallel wrapper there is no buffer for the fused weight gradient.
PLAIN = "megatron.gradient_accumulation_fusion=false"
MOE = ("model.num_moe_experts=5", "model.moe_router_topk=2", "model.moe_ffn_hidden_size=24")
RECOMPUTE = (
    "megatron.recompute_granularity=full",
    "megatron.recompute_method=uniform",
    "megatron.recompute_num_layers=1",
)


def token_batch(*shape: int) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(0))


def collect(model: Any, *batches: Tensor) -> list[dict[str, Any]]:
    """All groups side by side over one step of these micro-batches, backward included."""
    groups = {
        "variance": VarianceGroup([model]),
        "moments": MomentsGroup([model]),
        "reference": ReferenceGroup([model]),
    }
    names = [name for group in groups.values() for name in (*group.names, *group.maxima)]
    assert len(set(names)) == len(names), "groups share one buffer"
    collector = StatisticsCollector(groups, dict.fromkeys(groups, 1), num_layers=LAYERS, device=torch.device("cpu"))
    with collector.collecting(1):
        for tokens in batches:
            run_forward(model, tokens).square().mean().backward()
    layers = collector.reduce(1)
    assert layers is not None
    return layers


def record(model: Any, *batches: Tensor) -> tuple[list[dict[str, list[np.ndarray]]], list[np.ndarray]]:
    """By layer and place, one array [tokens, channels] a micro-batch; and what the final norm gives."""
    layers: list[dict[str, list[np.ndarray]]] = [{"attn": [], "mlp": [], "out": []} for _ in range(LAYERS)]
    final: list[np.ndarray] = []

    def keep(into: list[np.ndarray], tensor: Tensor) -> None:
        into.append(tensor.detach().double().flatten(0, 1).numpy())

    for layer, seen in zip(model.decoder.layers, layers, strict=True):
        layer.self_attention.register_forward_hook(
            lambda module, args, result, seen=seen: keep(seen["attn"], result[0])
        )
        layer.mlp.register_forward_hook(lambda module, args, result, seen=seen: keep(seen["mlp"], result[0]))
        layer.register_forward_hook(lambda module, args, result, seen=seen: keep(seen["out"], result[0]))
    model.decoder.final_layernorm.register_forward_hook(lambda module, args, result: keep(final, result))
    with torch.no_grad():
        for tokens in batches:
            run_forward(model, tokens)
    return layers, final


def variance(parts: list[np.ndarray]) -> float:
    return float(np.concatenate(parts).var(axis=1, ddof=1).mean())


def mean_norm(parts: list[np.ndarray]) -> float:
    return float(np.mean([np.linalg.norm(part) for part in parts]))


@pytest.mark.parametrize("overrides", [(), MOE], ids=["dense", "moe"])
def test_reference_numbers_stand_beside_ours(overrides: tuple[str, ...]) -> None:
    """The last layer's variance and the mixtures of experts differ as published, all else agrees."""
    is_moe = overrides == MOE
    batches = (token_batch(3, 16), token_batch(1, 9))
    with megatron_model(PLAIN, *overrides) as model:
        # A final norm whose output cannot be mistaken for its input.
        with torch.no_grad():
            model.decoder.final_layernorm.weight.mul_(3.0)
        layers = collect(model, *batches)
        seen, final = record(model, *batches)
    for index, (layer, places) in enumerate(zip(layers, seen, strict=True)):
        whole = places["out"] if is_moe else places["mlp"]
        expected = {
            "ref_out_var": variance(final if index == LAST else places["out"]),
            "ref_mlp_var": variance(whole),
            "ref_attn_norm": mean_norm(places["attn"]),
            "ref_mlp_norm": mean_norm(whole),
            "out_var": variance(places["out"]),
            "mlp_var": variance(places["mlp"]),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(layer[name], value, rtol=1e-5, err_msg=f"layer {index}: {name}")
        assert (layer["ref_out_var"] == pytest.approx(layer["out_var"], rel=1e-3)) == (index != LAST)
        assert (layer["ref_mlp_var"] == pytest.approx(layer["mlp_var"], rel=1e-3)) == (not is_moe)
        assert (layer["ref_mlp_var"] == pytest.approx(layer["out_var"], rel=1e-5)) == is_moe


def test_frobenius_norms_depend_on_the_micro_batch_and_our_rms_does_not() -> None:
    tokens = token_batch(4, 16)
    with megatron_model(PLAIN) as model:
        whole, split = collect(model, tokens), collect(model, *tokens.split(1))
    for one, four in zip(whole, split, strict=True):
        for branch in ("attn", "mlp"):
            assert four[f"{branch}_rms"] == pytest.approx(one[f"{branch}_rms"], rel=1e-6)
            assert one[f"ref_{branch}_norm"] == pytest.approx(
                one[f"{branch}_rms"] * math.sqrt(tokens.numel() * CHANNELS), rel=1e-5
            )
            assert four[f"ref_{branch}_norm"] == pytest.approx(one[f"ref_{branch}_norm"] / 2, rel=0.1)


def test_a_recomputed_forward_counts_once() -> None:
    def layers(*overrides: str) -> list[dict[str, Any]]:
        with megatron_model(PLAIN, *overrides) as model:
            return collect(model, token_batch(2, 16), token_batch(1, 16))

    for got, expected in zip(layers(*MOE, *RECOMPUTE), layers(*MOE), strict=True):
        for name in ReferenceGroup.names:
            assert got[name] == pytest.approx(expected[name], rel=1e-6)


def test_hooks_leave_nothing_behind() -> None:
    with megatron_model(PLAIN) as model:
        before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        collect(model, token_batch(1, 16))
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == before
