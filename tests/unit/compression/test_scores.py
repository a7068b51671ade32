"""Scores and swaps of a mask, against brute force over masks and autograd, and what must not change them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.compression import parts
from sparsecod_megatron.compression.patterns import parse_pattern
from sparsecod_megatron.compression.reconstruct import conjugate_gradients
from sparsecod_megatron.compression.scores import SCORES, Evidence, gradient_norms
from sparsecod_megatron.compression.statistics import InputStatistics, pooled
from sparsecod_megatron.compression.swaps import swap
from sparsecod_megatron.parallel.processes import Processes
from tests.unit.compression.models import sequences, tiny


def statistics_of(inputs: Tensor) -> InputStatistics:
    found = InputStatistics.empty(inputs.shape[-1], gram=True, device=inputs.device)
    found.add(inputs)
    return found


def evidence(weight: Tensor, inputs: Tensor, gradients: Tensor | None = None, **changes: object) -> Evidence:
    settings = {"damping": 0.01, "alpha": 1.0, "compat": False, "seed": 0} | changes
    return Evidence("m", weight, statistics_of(inputs), gradients, num_sequences=4, **settings)  # type: ignore[arg-type]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs whose channels have no products with each other, and norms that differ."""
    return torch.linalg.qr(random(rows, columns, seed=seed)).Q * (random(columns, seed=seed + 1).abs() + 0.2)


@pytest.mark.parametrize("score", ["wanda", "obs"])
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_independent_inputs_make_the_best_of_all_masks(score: str, pattern: str) -> None:
    """Brute force over the masks of 8 columns: with orthogonal channels no other mask has a smaller output error."""
    for seed in range(10):
        weight, inputs = random(1, 8, seed=seed), orthogonal(32, 8, seed=100 + seed)
        kept = parse_pattern(pattern, "row" if pattern == "0.5" else None).keep(
            SCORES[score](evidence(weight, inputs, damping=1e-9))
        )
        best, best_error = None, float("inf")
        for columns in itertools.combinations(range(8), 4):
            mask = torch.zeros(1, 8, dtype=torch.bool)
            mask[0, list(columns)] = True
            if pattern == "2:4" and int(mask[0, :4].sum()) != 2:
                continue
            error = float((inputs @ (weight * mask - weight).T).norm())
            if error < best_error:
                best, best_error = mask, error
        assert best is not None and torch.equal(kept, best)


@pytest.mark.parametrize("score", ["wanda", "obs", "magnitude"])
def test_a_scale_moved_from_weights_to_inputs_changes_magnitude_alone(score: str) -> None:
    weight, inputs = random(6, 16), random(200, 16, seed=1)
    scale = random(16, seed=2).exp()
    pattern = parse_pattern("0.5", "row")
    first = pattern.keep(SCORES[score](evidence(weight, inputs, damping=1e-7)))
    second = pattern.keep(SCORES[score](evidence(weight / scale, inputs * scale, damping=1e-7)))
    assert torch.equal(first, second) == (score != "magnitude")


def test_statistics_do_not_depend_on_order_or_pieces() -> None:
    inputs = random(3, 40, 2, 8)  # four axes
    whole, parts = statistics_of(inputs), InputStatistics.empty(8, gram=True, device=inputs.device)
    for part in inputs.flatten(0, -2)[torch.randperm(240)].split(7):
        parts.add(part)
    rows = inputs.flatten(0, -2).double()
    assert whole.count == parts.count == 240
    for found in (whole, parts, pooled([statistics_of(inputs[:1]), statistics_of(inputs[1:])])):
        assert torch.allclose(found.mean, rows.mean(0)) and torch.allclose(found.variance, rows.var(0, correction=0))
        assert torch.allclose(found.norms.double(), rows.norm(dim=0), rtol=1e-6)
        assert found.gram is not None and torch.allclose(found.gram.double(), rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert pooled([whole, whole]).count == 240, "shared statistics count once"


def test_inputs_that_never_fire_leave_the_choice_to_magnitude() -> None:
    inputs = random(64, 8)
    inputs[:, 4:] = 0
    weight = random(5, 8, seed=3)
    score = SCORES["wanda"](evidence(weight, inputs))
    assert torch.equal(score[:, 4:].argsort(1), weight[:, 4:].abs().argsort(1))
    silent = SCORES["wanda"](evidence(weight, torch.zeros(3, 8)))
    assert torch.equal(silent, weight.abs())


def test_gblm_adds_the_losses_gradients_whatever_the_losss_scale() -> None:
    weight, inputs, gradients = random(4, 8), random(50, 8, seed=1), random(4, 8, seed=2).abs()
    plain = SCORES["gblm"](evidence(weight, inputs, gradients))
    assert torch.allclose(plain, SCORES["gblm"](evidence(weight, inputs * 3, gradients * 1e4)), rtol=1e-4)
    compat = SCORES["gblm"](evidence(weight, inputs, gradients, compat=True, alpha=100.0))
    expected = weight.abs() * inputs.norm(dim=0) / 2 + 100 * weight.abs() * gradients  # √4 sequences
    assert torch.allclose(compat, expected, rtol=1e-5)


def test_gradients_are_summed_squares_over_sequences() -> None:
    model, tokens = tiny("llama"), sequences(3)
    name = "model.layers.1.mlp.up_proj.weight"
    found = gradient_norms(model, tokens, {name: model.get_parameter(name)}, Processes())[name]
    expected = torch.zeros_like(found)
    for sequence in tokens:
        model.zero_grad()
        model(sequence[None], labels=sequence[None]).loss.backward()
        expected += model.get_parameter(name).grad.square()
    assert torch.allclose(found, expected.sqrt(), rtol=1e-3, atol=1e-9)


def test_random_masks_follow_the_seed_and_the_name() -> None:
    weight, inputs = random(4, 8), random(9, 8)
    scores = [SCORES["random"](evidence(weight, inputs, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


# ---------------------------------------------------------------- swaps


def error_of(weight: Tensor, mask: Tensor, statistics: InputStatistics) -> Tensor:
    """Mean change of every output, float64 `[out]`."""
    return ((weight * ~mask).double() * statistics.mean).sum(1)


@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2:4"])
@pytest.mark.parametrize("cycles", [None, 50])
def test_swaps_keep_every_count_and_lessen_every_rows_error(pattern: str, cycles: int | None) -> None:
    """Also with more cycles than a row has candidates."""
    chosen = parse_pattern(pattern, None if ":" in pattern else "row")
    for seed in range(5):
        weight, inputs = random(20, 32, seed=seed), random(100, 32, seed=50 + seed) + random(32, seed=90)
        statistics = statistics_of(inputs)
        before = chosen.keep(weight.abs() * statistics.norms)
        after = swap(weight, before, statistics, chosen, cycles)
        size = chosen.of or 32
        assert torch.equal(before.unflatten(1, (-1, size)).sum(-1), after.unflatten(1, (-1, size)).sum(-1))
        old, new = (error_of(weight, mask, statistics) for mask in (before, after))
        assert bool((new.abs() <= old.abs() + 1e-5).all()) and bool((new * old >= -1e-5).all())
        assert float(new.abs().sum()) < 0.9 * float(old.abs().sum())


def test_the_swap_of_a_toy_is_the_one_that_is_known() -> None:
    """Four columns of mean 1; two are pruned."""
    inputs = torch.ones(10, 4) + torch.tensor([1.0, -1.0]).repeat(5)[:, None]  # mean 1, variance 1
    weight = torch.tensor([[1.0, 0.9, 0.3, -0.25]])
    mask = torch.tensor([[True, False, False, True]])  # error 1.2
    # 0.9 comes back, and of the kept ones -0.25 alone moves the error down: 1.2 - 0.9 - 0.25 = 0.05.
    after = swap(weight, mask, statistics_of(inputs), parse_pattern("0.5", "row"), 1)
    assert after.tolist() == [[True, True, False, False]]
    # … and where the error would change its sign nothing moves.
    weight = torch.tensor([[1.0, 0.9, 0.3, -0.5]])
    assert torch.equal(swap(weight, mask, statistics_of(inputs), parse_pattern("0.5", "row"), 1), mask)


def test_inputs_of_zero_mean_swap_nothing() -> None:
    half = random(50, 16)
    weight = random(8, 16, seed=1)
    mask = parse_pattern("0.5", "row").keep(weight.abs())
    assert torch.equal(
        swap(weight, mask, statistics_of(torch.cat([half, -half])), parse_pattern("0.5", "row"), 9), mask
    )


PARTED = (("0.5", "row"), ("2:4", None), ("group:4:0.5", "row"))


def test_a_few_rows_at_a_time_are_as_good_as_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks, ties among them included, swaps and conjugate gradients do not depend on where a matrix is cut."""
    weight, inputs = (random(37, 24, seed=3) * 4).round(), random(64, 24, seed=4)
    statistics, found = statistics_of(inputs), []
    for part in (parts.MAX_ELEMENTS, 3 * 24):
        monkeypatch.setattr(parts, "MAX_ELEMENTS", part)
        monkeypatch.setattr(parts, "MIN_ROWS", 3)
        monkeypatch.setattr(parts, "STEP", 1)
        assert len(list(parts.row_parts(weight))) == (1 if part > 37 * 24 else 13)
        shares = [parse_pattern(pattern, per) for pattern, per in PARTED]
        masks = [pattern.keep(weight.abs()) for pattern in shares]
        masks += [
            swap(weight, mask, statistics, pattern, 3) for mask, pattern in zip(masks[:2], shares[:2], strict=True)
        ]
        healed = conjugate_gradients(weight, statistics.hessian, masks[0], weight, damping=0.01, steps=20)
        found.append((masks, healed))
    assert all(map(torch.equal, found[0][0], found[1][0])) and not torch.equal(found[0][0][0], found[0][0][3])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)
