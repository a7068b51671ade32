"""Integrated gradients over layers and the tokens that need a block: two ways to compute, and known models."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sparsecod_megatron.analysis.scores.context import Context, make_context
from sparsecod_megatron.analysis.scores.integrated_gradients import IntegratedGradients
from sparsecod_megatron.analysis.scores.line_integral import integrate
from sparsecod_megatron.analysis.scores.registry import find_scores
from sparsecod_megatron.analysis.scores.token_skip import TokenSkip
from sparsecod_megatron.analysis.tasks.items import Answered, Items, items_of
from sparsecod_megatron.errors import ConfigError
from tests.helpers.questions import random_items
from tests.unit.analysis.scores.families import VOCAB_SIZE, context, tiny
from tests.unit.analysis.scores.naive import edited
from tests.unit.analysis.scores.test_answers import HALF, planted
from tests.unit.analysis.scores.test_known_truth import silenced


@torch.no_grad()
def likelihood(model: PreTrainedModel, items: Items, scales: list[float]) -> np.ndarray:
    """[N] of the answers, with every block's branch scaled by a hook."""
    with contextlib.ExitStack() as stack:
        for block, scale in zip(model.model.layers, scales, strict=True):
            stack.enter_context(
                edited(block, lambda before, after, scale=scale: before + scale * (after - before))  # type: ignore[misc]
            )
        logits = model(input_ids=items.tokens, use_cache=False).logits.double()
    each = -F.cross_entropy(logits.transpose(1, 2), items.labels, reduction="none")
    return torch.where(items.level >= 0, each, 0).sum(dim=1).numpy()


def naive_attributions(model: PreTrainedModel, items: Items, *, points: int = 30, step: float = 2e-3) -> np.ndarray:
    """[N, L] by the midpoint rule over central differences."""
    total = np.zeros((len(items), 3))
    for point in (np.arange(points) + 0.5) / points:
        for layer in range(3):
            low, high = ([point + (sign * step if layer == other else 0) for other in range(3)] for sign in (-1, 1))
            difference = likelihood(model, items, high) - likelihood(model, items, low)
            total[:, layer] += difference / (2 * step) / points
    return total


def test_attributions_are_those_of_finite_differences_and_complete() -> None:
    model, items = tiny("llama").double(), random_items(VOCAB_SIZE)
    result = IntegratedGradients().run(context(model, items=items))
    expected = naive_attributions(model, items)
    rows = result.tables["integrated_gradients"]
    for label, members in (("all", slice(None)), ("1", slice(0, None, 2)), ("2", slice(1, None, 2))):
        found = [row["value"] for row in rows if row["difficulty"] == label]
        assert found == pytest.approx(expected[members].mean(axis=0), rel=0.02, abs=0.02)
    gain = likelihood(model, items, [1.0] * 3) - likelihood(model, items, [0.0] * 3)
    assert result.per_sequence["log_likelihood_gain"] == pytest.approx(gain, abs=1e-4)
    whole = sum(row["value"] for row in rows if row["difficulty"] == "all")
    assert whole == pytest.approx(gain.mean(), rel=5e-3) and result.values["completeness_error"] < 1e-3
    assert not result.warnings


def test_what_turns_fast_is_refined_or_warned_of() -> None:
    """With a head that is far too sure of itself, an answer changes within a small part of the line."""
    model, items = tiny("llama").double(), random_items(VOCAB_SIZE)
    with torch.no_grad():
        model.lm_head.weight *= 100
    coarse, fine = (IntegratedGradients(max_splits=splits).run(context(model, items=items)) for splits in (0, 24))
    assert "the integral misses" in coarse.warnings[0] and coarse.values["completeness_error"] > 0.01
    assert not fine.warnings and fine.values["completeness_error"] < 2e-3


def test_every_item_has_panels_of_its_own() -> None:
    """Steps at places of their own, of which layer l has the share weight_l: seen, and alone as in a batch."""
    places = torch.tensor([0.03, 0.4, 0.77], dtype=torch.float64)
    weights, sharpness = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64), 200.0

    def step(at: Tensor, place: Tensor) -> Tensor:
        return torch.sigmoid(sharpness * (at - place))

    def integral(place: Tensor, splits: int) -> Tensor:
        def gradient(at: Tensor) -> Tensor:
            height = step(at, place)
            return (sharpness * height * (1 - height))[:, None] * weights / weights.sum()

        ends = torch.stack([step(torch.full_like(place, end), place) for end in (0.0, 1.0)], dim=1)
        return integrate(gradient, lambda at: step(at, place), ends=ends, max_splits=splits)

    expected = (step(torch.ones_like(places), places) - step(torch.zeros_like(places), places))[:, None]
    found = integral(places, 24)
    assert torch.allclose(found, expected * weights / 4, rtol=2e-3)
    assert not torch.allclose(integral(places, 0), expected * weights / 4, rtol=0.05)
    alone = torch.cat([integral(place[None], 24) for place in places])
    assert torch.equal(found, alone)


@pytest.mark.parametrize("score", [IntegratedGradients(max_splits=2), TokenSkip()])
def test_any_batch_gives_the_same(score: IntegratedGradients | TokenSkip) -> None:
    found = [
        score.run(context(tiny("llama"), items=random_items(VOCAB_SIZE), memory_gib=memory)) for memory in (2.0, 1e-9)
    ]
    for one, other in zip(found[0].tables[score.name], found[1].tables[score.name], strict=True):
        assert other == pytest.approx(one, abs=1e-4)


def asked(model: PreTrainedModel) -> Context:
    questions = [Answered([16, symbol, 17, HALF + symbol], 3, 1) for symbol in range(1, HALF)]
    items, tokens = items_of("planted", questions, vocab_size=20), torch.arange(20).repeat(10)
    return make_context(model, tokens, num_samples=4, seq_length=6, seed=0, items=items)


def test_only_blocks_that_write_account_for_an_answer() -> None:
    """A silent block has exactly nothing; copying and answering share all that is gained."""
    given = asked(planted({1: "copy", 2: "answer"}, num_layers=4))
    result = IntegratedGradients().run(given)
    silent, copies, answers, last = (row["value"] for row in result.tables["integrated_gradients"])
    assert silent == last == 0 and copies > 0.1 and answers > 0.1
    assert copies + answers == pytest.approx(result.values["log_likelihood_gain"]["value"], rel=5e-3)
    needs = {
        row["layer"]: row["needs"]
        for row in TokenSkip().run(given).tables["token_skip"]
        if row["tokens_of"] == "answers"
    }
    assert needs == {0: 0, 1: 1, 2: 1, 3: 0}


def naive_shares(model: PreTrainedModel, windows: Tensor, epsilon: float, members: Tensor) -> list[tuple[float, float]]:
    """(needs, better without) of each block among the labels that `members` [V] has."""

    @torch.no_grad()
    def losses() -> Tensor:
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")

    chosen, base, found = members[windows[:, 1:].flatten()], losses(), []
    for block in model.model.layers:
        with edited(block, lambda before, _after: before):
            change = (losses() - base)[chosen]
        found.append((float((change > epsilon).double().mean()), float((change < -epsilon).double().mean())))
    return found


def test_tokens_that_need_a_block_by_hooks() -> None:
    model = silenced(tiny("llama"), 1)
    digits = torch.arange(VOCAB_SIZE) % 7 == 0
    stream = torch.cat(
        (torch.full((50,), 21), torch.randint(VOCAB_SIZE, (60,), generator=torch.Generator().manual_seed(0)))
    )
    given = make_context(
        model,
        stream,
        num_samples=8,
        seq_length=10,
        seed=0,
        token_classes={"digits": digits, "none": torch.zeros(3) > 0},
    )
    result = TokenSkip(epsilon=0.05).run(given)
    labels = given.windows[:, 1:].flatten().tolist()
    counts = sorted({token: labels.count(token) for token in labels}.items(), key=lambda item: (-item[1], item[0]))
    frequent, covered = torch.zeros(VOCAB_SIZE, dtype=torch.bool), 0
    for token, count in counts:
        if 2 * covered < len(labels):
            frequent[token], covered = True, covered + count
    for name, members in (("all", digits | True), ("digits", digits), ("frequent", frequent), ("rare", ~frequent)):
        rows = [row for row in result.tables["token_skip"] if row["tokens_of"] == name]
        expected = naive_shares(model, given.windows, 0.05, members)
        assert [(row["needs"], row["better_without"]) for row in rows] == [pytest.approx(pair) for pair in expected]
        assert rows[1]["needs"] == rows[1]["better_without"] == 0, "the silent block"
        assert rows[0]["tokens"] == sum(bool(members[label]) for label in labels)
        assert result.values[f"blocks_needed_{name}"]["value"] == pytest.approx(sum(pair[0] for pair in expected))
    assert result.warnings == ("the sample has no token of class none",)
    assert 0.2 < result.values["token_skip"]["low"] < result.values["token_skip"]["high"] < 1


def test_epsilon_is_token_skips_alone() -> None:
    for names, epsilon in ((["skip"], 0.1), (["token_skip"], -0.1), (["token_skip"], float("nan"))):
        with pytest.raises(ConfigError, match="--skip-epsilon .*: nats, at least 0, for --scores token_skip alone"):
            find_scores(names, skip_epsilon=epsilon)
    (score,) = find_scores(["token_skip"], skip_epsilon=0.0)
    assert score.run(context(tiny("llama"))).values["epsilon"] == 0


def test_answers_are_needed() -> None:
    with pytest.raises(ConfigError, match="--scores integrated_gradients: asks for answers"):
        IntegratedGradients().run(context(tiny("llama")))
    assert {row["tokens_of"] for row in TokenSkip().run(context(tiny("llama"))).tables["token_skip"]} == {
        "all",
        "frequent",
        "rare",
    }
