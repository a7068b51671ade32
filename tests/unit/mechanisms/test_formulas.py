"""What each mechanism computes, against independent computations and planted truth."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.mechanisms.activations.topk_activation import keep_largest
from sparsecod_megatron.mechanisms.weights.distribution import erk, uniform
from tests.helpers.megatron import SMALL, megatron_model, run_forward
from tests.helpers.reference_gpt import assert_same_gradients, forward
from tests.helpers.training import collected_steps, small_trainer, trainer_batches

select_backend()


def test_headwise_gate() -> None:
    """Logits and every gradient of an independent plain-PyTorch model on the same weights."""
    # Gradients in `.grad`, which the fused accumulation keeps in the data-parallel wrapper's buffer.
    plain = "megatron.gradient_accumulation_fusion=false"
    overrides = ("mechanisms.headwise_gate={}", "model.qk_norm=true", "model.init_method_std=0.2", plain)
    config = load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(3))
    with megatron_model(*overrides) as model:
        weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
        ours, (theirs, _) = run_forward(model, tokens), forward(config.model, weights, tokens)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert_same_gradients(model, weights, ours, theirs)


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 11), units=st.integers(12, 14), seed=st.integers(0, 9))
def test_the_largest_of_each_token(k: int, units: int, seed: int) -> None:
    """By a sort of each token, some of whose units tie or are zero."""
    x = torch.randn(3, 2, units, generator=torch.Generator().manual_seed(seed)).round(decimals=1).requires_grad_()
    kept, smallest_kept = keep_largest(x, k)
    assert smallest_kept.shape == (3, 2, 1)
    for token, result in zip(x.detach().flatten(end_dim=1), kept.detach().flatten(end_dim=1), strict=True):
        smallest = sorted(map(abs, token.tolist()), reverse=True)[k - 1]
        expected = [value if abs(value) >= smallest else 0.0 for value in token.tolist()]
        assert result.tolist() == pytest.approx(expected)
    kept.sum().backward()
    assert x.grad is not None
    assert bool(((x.grad == 1) | (kept == 0)).all()) and bool(((x.grad == 0) | (x.detach() == kept.detach())).all())


def test_a_token_keeps_its_planted_units() -> None:
    """One-hot keys: unit u answers to channel u alone, and tokens have three channels."""
    with megatron_model("mechanisms.topk_activation.k=3", "model.activation=relu") as model:
        projection = model.decoder.layers[1].mlp.linear_fc2
        planted = torch.zeros(4, 1, 48) + 1e-3
        chosen = torch.tensor([[0, 7, 40], [1, 2, 3], [45, 46, 47], [10, 20, 30]])
        planted.squeeze(1).scatter_(1, chosen, torch.tensor([2.0, 1.0, 0.5]).expand(4, 3))
        expected = torch.where(planted > 0.1, planted, 0) @ projection.weight.T
        torch.testing.assert_close(projection(planted)[0], expected, rtol=1e-5, atol=1e-6)


def test_active_units_are_counted_once_under_recompute() -> None:
    """Without ties exactly k of the width, in each layer and whatever is recomputed."""
    full = ("recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1")
    topk = ("mechanisms.topk_activation.k_per_layer=[3,6,48]", "model.activation=gelu")
    for recompute in ((), tuple(f"megatron.{field}" for field in full)):
        with small_trainer(*topk, *recompute) as trainer:
            group = trainer.config.mechanisms["topk_activation"].statistics(
                [model.module for model in trainer.models], None
            )
            (layers,) = collected_steps(trainer, [group], steps=1)
        assert layers[0] == pytest.approx({"active_units": 3 / 48, "topk_ties": 0})
        assert layers[1] == pytest.approx({"active_units": 6 / 48, "topk_ties": 0})
        assert layers[2] == {}  # all are kept: nothing acts there


def test_ties_are_kept_and_counted() -> None:
    """Planted: one token ties twice more with its second unit, one has a single unit at all, one has no ties."""
    from sparsecod_megatron.metrics.accumulator import LayerAccumulator

    topk = ("mechanisms.topk_activation.k=2", "model.activation=relu", "precision.dtype=bf16")
    with megatron_model(*topk) as model:
        group = (
            load_config(None, [*SMALL, *topk], mechanisms=MECHANISMS)
            .mechanisms["topk_activation"]
            .statistics([model], None)
        )
        planted = torch.zeros(3, 1, 48, dtype=torch.bfloat16)
        planted[0, 0, :5] = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0])
        planted[1, 0, 7] = 1.0
        planted[2, 0, 40:44] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        sums = LayerAccumulator(num_layers=3, names=group.names, device=torch.device("cpu"))
        with group.collecting(sums):
            model.decoder.layers[1].mlp.linear_fc2(planted)
        layers = [group.statistics(means) for means in sums.reduce()]
    assert layers == [{}, pytest.approx({"active_units": (4 + 1 + 2) / 144, "topk_ties": 2 / 3}), {}]


def test_uniform_and_erk() -> None:
    """ε in closed form for two shapes; a shape that saturates is dense, and the others share what is left."""
    shapes = [((8, 8), 2), ((8, 32), 1)]
    assert uniform(shapes, 0.25) == {(8, 8): 0.25, (8, 32): 0.25}
    scale = 0.25 * (2 * 64 + 256) / (2 * 16 + 40)
    assert erk(shapes, 0.25) == pytest.approx({(8, 8): scale * 16 / 64, (8, 32): scale * 40 / 256})
    skewed = [((2, 2), 1), ((100, 100), 1)]
    found = erk(skewed, 0.5)
    assert found[2, 2] == 1.0 and found[100, 100] == pytest.approx((0.5 * 10_004 - 4) / 10_000)


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_dead_weights_stay_exactly_zero(distribution: str) -> None:
    """Exact counts in every matrix, and no weight, master or moment that moves, weight decay included."""
    from sparsecod_megatron.parallel.owned_slices import held_slices, working_parts
    from sparsecod_megatron.train.step import train_step

    sparse = ("mechanisms.sparse_weights.density=0.3", f"mechanisms.sparse_weights.distribution={distribution}")
    with small_trainer(*sparse, "model.num_moe_experts=4", "optimizer.weight_decay=0.5") as trainer:
        mechanism, table = trainer.config.mechanisms["sparse_weights"], ParameterTable.of(trainer.config)
        matrices = zip(mechanism.matrices(table), mechanism.final_counts(table), strict=True)
        counts = {matrix.row.shape: count for matrix, count in matrices}
        dead = {name: weight == 0 for name, weight in trainer.models[0].named_parameters()}
        total = live = 0
        for name, mask in dead.items():
            has_mask = "linear_" in name and "layer_norm" not in name
            alive = mask.numel() - int(mask.sum())
            assert alive == (counts[tuple(mask.shape)] if has_mask else mask.numel()), name
            total, live = total + has_mask * mask.numel(), live + has_mask * alive
        assert live == pytest.approx(0.3 * total, abs=len(dead))
        data = trainer_batches(trainer)
        for _ in range(3):
            train_step(trainer, data)
        names = {weight: name for name, weight in trainer.models[0].named_parameters()}
        for part in working_parts(trainer.optimizer):
            for weight, master, span in held_slices(part, trainer.groups):
                mask = dead[names[weight]].view(-1)[slice(*span)]
                state = part.optimizer.state[master]
                for tensor in (weight.view(-1)[slice(*span)], master, state["exp_avg"], state["exp_avg_sq"]):
                    assert not tensor.view(-1)[mask].any(), names[weight]
                assert bool(master.view(-1)[~mask].any())


def test_masks_belong_to_names_and_seeds() -> None:
    masks = []
    for seed in (1, 1, 2):
        with small_trainer("mechanisms.sparse_weights.density=0.5", f"train.seed={seed}") as trainer:
            masks.append([weight == 0 for weight in trainer.models[0].parameters() if weight.dim() == 2])
    assert all(map(torch.equal, masks[0], masks[1]))
    different = [bool((ours != theirs).any()) for ours, theirs in zip(masks[0], masks[2], strict=True)]
    assert sum(different) == 3 * 4  # layers × matrices; embedding and output layer have none
    same = masks[0][1].numel() == masks[0][5].numel() and torch.equal(masks[0][1], masks[0][5])
    assert not same and math.isclose(masks[0][1].float().mean(), 0.5)
