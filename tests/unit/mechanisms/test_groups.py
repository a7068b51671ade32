"""Neurons and head groups: which weights they are, and what the structured methods do to them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms.weights.wgsef import kept_shares
from tests.helpers.training import small_trainer, trainer_batches

select_backend()
STEPS = ("train.train_steps=8", "schedule.lr_decay_style=constant")


def neuron(model: Any, layer: int, index: int) -> list[Tensor]:
    """Its weights, by what a GPTModel of the small size computes with."""
    mlp = model.decoder.layers[layer].mlp
    width = mlp.linear_fc2.weight.shape[1]
    first, second = mlp.linear_fc1.weight, mlp.linear_fc2.weight
    return [first[index], first[index + width], second[:, index]]


def head(model: Any, layer: int, index: int) -> list[Tensor]:
    """Two queries, a key and a value of 8 channels, and the 16 channels that the projection reads."""
    attention = model.decoder.layers[layer].self_attention
    rows, columns = slice(32 * index, 32 * index + 32), slice(16 * index, 16 * index + 16)
    return [attention.linear_qkv.weight[rows], attention.linear_proj.weight[:, columns]]


@pytest.mark.parametrize(("pattern", "weights", "count"), [("neuron", neuron, 48), ("head", head, 2)])
def test_norms_are_of_the_coupled_weights(pattern: str, weights: Any, count: int) -> None:
    with small_trainer(*STEPS, f"mechanisms.wgsef.pattern={pattern}") as trainer:
        (plugin,), model = trainer.plugins, trainer.models[0].module
        norms = plugin.groups.norms()
        assert len(norms) == 3 * count == plugin.groups.number
        for layer in range(3):
            for index in range(count):
                expected = torch.cat([part.flatten() for part in weights(model, layer, index)])
                torch.testing.assert_close(norms[layer * count + index], expected.norm(), rtol=1e-5, atol=0)
                assert plugin.groups.sizes[layer * count + index] == expected.numel()


@pytest.mark.parametrize("pattern", ["neuron", "head"])
@pytest.mark.parametrize("span", [(0, None), (64, 192), (5, 69), (70, 90), (37, None), (64, 101)])
def test_slices_begin_and_end_anywhere(pattern: str, span: tuple[int, int | None]) -> None:
    """Sums, values and views of a slice that cuts rows, against the group of each weight by its place."""
    from sparsecod_megatron.mechanisms.weights.engine.groups import Groups

    with small_trainer(*STEPS, f"mechanisms.wgsef.pattern={pattern}") as trainer:
        places, model = trainer.plugins[0].places, trainer.config.model
        part = slice(*span)
        places.pieces = [
            dataclasses.replace(piece, span=part.indices(len(piece.master))[:2], master=piece.master[part])
            for piece in places.pieces
        ]
        groups = Groups(places, model, pattern)
        ids = [groups.whole_ids(piece.index)[part].long() for piece in places.pieces]
        expected = torch.zeros(groups.number)
        for piece, each in zip(places.pieces, ids, strict=True):
            expected.index_add_(0, each, piece.master)
        torch.testing.assert_close(groups.sums(piece.master for piece in places.pieces), expected)
        numbers = torch.arange(groups.number)
        assert all(map(torch.equal, groups.spread(numbers), ids))
        for piece, each in zip(places.pieces, ids, strict=True):
            for rectangle in groups.rectangles[piece]:
                assert torch.equal(rectangle.line(each), rectangle.spread(numbers))


@pytest.mark.parametrize(("pattern", "weights", "count"), [("neuron", neuron, 48), ("head", head, 2)])
def test_random_groups_are_drawn_by_their_own_seed(pattern: str, weights: Any, count: int) -> None:
    from sparsecod_megatron.train.step import train_step

    def dead(mask_seed: int, seed: int) -> list[tuple[int, int]]:
        settings = f"mechanisms.random_groups={{pattern: {pattern}, mask_seed: {mask_seed}}}"
        with small_trainer(*STEPS, settings, f"train.seed={seed}") as trainer:
            data, model = trainer_batches(trainer), trainer.models[0].module
            found = []
            for _ in range(2):  # before any step, and after one with weight decay and clipping
                places = [(layer, index) for layer in range(3) for index in range(count)]
                sums = {place: sum(float(part.abs().sum()) for part in weights(model, *place)) for place in places}
                found.append([place for place in places if sums[place] == 0])
                train_step(trainer, data)
            assert found[0] == found[1]
            assert [sum(layer == number for layer, _ in found[0]) for number in range(3)] == [count // 2] * 3
            return found[0]

    first = dead(1, seed=1)
    assert first == dead(1, seed=2)
    assert any(first != dead(other, seed=1) for other in (2, 3, 4))


def test_every_expert_has_neurons_of_its_own() -> None:
    experts = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=24")
    with small_trainer(*STEPS, *experts, "mechanisms.wgsef={}") as trainer:
        (plugin,), model = trainer.plugins, trainer.models[0].module
        norms = plugin.groups.norms().view(3, 4, 24)
        expert = model.decoder.layers[1].mlp.experts.local_experts[2]
        parts = [expert.linear_fc1.weight[5], expert.linear_fc1.weight[29], expert.linear_fc2.weight[:, 5]]
        torch.testing.assert_close(norms[1, 2, 5], torch.cat(parts).norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("k", "weight"), [(1, 0.5), (3, 0.1), (3, 2.0), (8, 0.7)])
def test_the_envelope_is_minimised(k: int, weight: float) -> None:
    """½ ‖x − z‖² + λ/2 min_θ Σ x² / θ, against many other θ and x; with all groups allowed it is ridge regression."""
    generator = torch.Generator().manual_seed(k)
    z = torch.rand(8, generator=generator, dtype=torch.float64) * 3
    kept = kept_shares(z, [8], [k], weight)
    theta = kept * weight / (1 - kept)

    def value(x: Tensor, theta: Tensor) -> float:
        live = theta > 1e-12
        assert not bool((x[~live].abs() > 1e-9).any())
        return float((x - z).square().sum() / 2 + weight / 2 * (x[live].square() / theta[live]).sum())

    best = value(kept * z, theta)
    assert theta.sum().item() == pytest.approx(k, rel=1e-6) and bool((theta <= 1 + 1e-9).all())
    if k == 8:
        torch.testing.assert_close(kept, torch.full_like(z, 1 / (1 + weight)))
    for _ in range(200):
        other = (theta + 0.3 * torch.randn(8, generator=generator, dtype=torch.float64)).clamp(1e-6, 1)
        other = other * min(1.0, k / other.sum().item())
        x = z * other / (other + weight)
        assert value(x, other) >= best - 1e-9


def test_blocks_of_other_sizes_do_not_touch_each_other() -> None:
    z = torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = [kept_shares(part, [len(part)], [k], 0.3) for part, k in zip(z.split([5, 1, 3]), (2, 1, 2), strict=True)]
    torch.testing.assert_close(kept_shares(z, [5, 1, 3], [2, 1, 2], 0.3), torch.cat(alone))


def lassoed(*settings: str, steps: int, is_silent: bool = False) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Norms of groups after each step, and (weights, marks) of each piece in the end.

    Args:
        settings: of mask_sparsity.
        steps: to take.
        is_silent: give marked weights no gradient.
    """
    from sparsecod_megatron.train.step import train_step

    overrides = (
        f"mechanisms.mask_sparsity.{setting}" for setting in ("density=0.25", "start=0", "freeze=1", *settings)
    )
    with small_trainer(*STEPS, "optimizer.weight_decay=0", "optimizer.clip_grad=0", *overrides) as trainer:
        (plugin,), data = trainer.plugins, trainer_batches(trainer)
        if is_silent:
            plugin.change_gradient = lambda piece, marks, context: piece.gradient.mul_(~marks)
        norms = [plugin.groups.norms()]
        for _ in range(steps):
            train_step(trainer, data)
            norms.append(plugin.groups.norms())
        return norms, [(piece.master.clone(), piece.marked.clone()) for piece in plugin.places.pieces]


def test_marked_norms_fall_in_a_straight_line() -> None:
    """By η s a step where there is no gradient, to exactly zero; what is not marked takes AdamW's step bit for bit."""
    norms, pieces = lassoed("strength=5", steps=4, is_silent=True)
    marked = torch.stack(norms[1:])[:, norms[1] < norms[0] - 0.049]
    assert marked.shape[1] == 3 * 36 and int((norms[-1] == 0).sum()) > 0
    start = norms[0][norms[1] < norms[0] - 0.049]
    for step, values in enumerate(marked, start=1):
        torch.testing.assert_close(values, (start - 0.05 * step).clamp(min=0), rtol=1e-4, atol=1e-6)
    (_, ours), (_, plain) = lassoed("strength=5", steps=1), lassoed("strength=0", steps=1)
    for (weight, mask), (dense, same) in zip(ours, plain, strict=True):
        assert torch.equal(mask, same) and torch.equal(weight[~mask], dense[~mask])
        assert not bool((weight[mask] == dense[mask]).all())
    assert pieces


def salient(*settings: str) -> tuple[str, ...]:
    """Overrides of efficient_llm."""
    return tuple(f"mechanisms.efficient_llm.{setting}" for setting in ("density=0.75", "memory=0", *settings))


def test_planted_neurons_die_first() -> None:
    """Those whose output column is zero change no loss."""
    from sparsecod_megatron.train.step import train_step

    with small_trainer(*STEPS, *salient("start=0", "end=0")) as trainer:
        model, data = trainer.models[0].module, trainer_batches(trainer)
        planted = [(0, 3), (0, 40), (1, 7), (2, 47)]
        with torch.no_grad():
            for layer, index in planted:
                model.decoder.layers[layer].mlp.linear_fc2.weight[:, index] = 0
        trainer.optimizer.reload_model_params()
        train_step(trainer, data)
        places = [(layer, index) for layer in range(3) for index in range(48)]
        dead = [place for place in places if not any(bool(part.any()) for part in neuron(model, *place))]
        assert len(dead) == 36 and set(planted) < set(dead)


def test_salient_neurons_matter() -> None:
    """Without the less salient half of a layer's neurons the loss changes less than without the other half."""
    from sparsecod_megatron.train.passes import forward_backward

    with small_trainer(*STEPS, *salient("start=0.9", "end=1"), "model.init_method_std=0.2") as trainer:
        (plugin,), model = trainer.plugins, trainer.models[0].module
        batches, context = [next(trainer_batches(trainer)[0]) for _ in range(2)], trainer.context(1)

        def loss(*, forward_only: bool = True) -> float:
            trainer.models[0].zero_grad_buffer()
            sums = forward_backward(trainer, [iter(batches)], context, samples=4, forward_only=forward_only)
            return float(sums[0] / sums[1])

        whole = loss(forward_only=False)
        plugin.on_gradients(context)
        order = plugin.saliency.view(3, 48)[1].argsort()
        changes = []
        with torch.no_grad():
            for half in (order[:24], order[24:]):
                weight = model.decoder.layers[1].mlp.linear_fc2.weight
                kept = weight.clone()
                weight[:, half] = 0
                changes.append(abs(loss() - whole))
                weight.copy_(kept)
        assert changes[0] < 0.5 * changes[1]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mechanisms.wgsef.kinds=[qkv]"], "mechanisms.wgsef.kinds: qkv, but mechanisms.wgsef.pattern decides"),
        (["mechanisms.wgsef={pattern: head, density: 0.1}"], "0.1 leaves none of 2 heads alive; raise it"),
        (["mechanisms.mask_sparsity.start=0.75"], "start: 0.75 is not below mechanisms.mask_sparsity.freeze=0.75"),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused, small_trainer(*overrides):
        pass
    assert words in str(refused.value) and "\n" not in str(refused.value)
