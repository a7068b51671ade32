"""What queries keep, and what that costs, against naive loops, planted rows and the dense model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from sparsecod_megatron.analysis.scores.registry import find_scores
from sparsecod_megatron.analysis.sparsity.attention import attending
from sparsecod_megatron.analysis.sparsity.selection import PATTERNS, Order, Rows
from sparsecod_megatron.analysis.sparsity.sparse_attention_score import SparseAttentionScore
from sparsecod_megatron.analysis.sparsity.sparse_rows import COSTS, SparseAttention
from sparsecod_megatron.errors import ConfigError, ConversionError
from sparsecod_megatron.hf.calls import sequence_losses
from tests.helpers.decoders import tiny_decoder
from tests.unit.analysis.sparsity.planted_rows import attend, planted, random_call
from tests.unit.analysis.sparsity.tiny import VOCAB, sample, tiny_model

BUDGETS = (1.0, 0.5, 0.25, 0.1, 0.05)
LONG = {"max_position_embeddings": 256}


def naive_kept(pattern: str, alpha: np.ndarray, query: int, visible: list[int], budget: float) -> list[int]:
    """Keys that one query keeps; alpha [queries, keys] of one head."""
    probe = range(max(0, query - 63), query + 1)
    column = alpha[probe].sum(0)

    def priority(key: int) -> float:
        if pattern == "oracle":
            return float(alpha[query, key])
        if pattern == "vertical_slash":
            diagonal = alpha.diagonal(key - query)  # from row query − key on
            return max(float(column[key]), float(diagonal[max(0, key - 63) : key + 1].sum()))
        if pattern == "window_sink":
            return 2.0 if key == query else 1.0 if key < 4 else key - query
        own = key // 64 == query // 64
        return math.inf if own else float(column[64 * (key // 64) : 64 * (key // 64) + 64].sum())

    ranked = sorted(visible, key=lambda key: (-priority(key), key))
    kept = ranked[: math.ceil(budget * len(visible) - 1e-9)]
    if pattern == "block_64":  # the blocks of the first keys, whole
        kept = [key for key in visible if key // 64 in {first // 64 for first in kept}]
    return sorted(kept)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_costs_are_those_of_naive_loops(pattern: str) -> None:
    tokens, budget, module, sinks = 150, 0.1, nn.Identity(), pattern != "oracle"
    window = 140 if sinks else None
    arguments = random_call(tokens=tokens, window=window, sinks=sinks)
    query, key, value = (arguments[name].double().numpy() for name in ("query", "key", "value"))
    attention = SparseAttention([module], max_scores=7 * 4 * tokens)  # seven queries at a time
    with attention.keeping((0,), PATTERNS[pattern], budget):
        output = attend(attention, module, arguments).numpy()
        costs = attention.costs(0).numpy()
    for sequence, expected in enumerate(costs):
        sums = dict.fromkeys(COSTS, 0.0)
        for head in range(4):
            logits = 4 * np.tanh(query[sequence, head] @ key[sequence, head // 2].T / math.sqrt(8) / 4)
            sink = np.exp(float(arguments["s_aux"][head])) if sinks else 0.0
            seen = [list(range(max(0, row - (window or tokens) + 1), row + 1)) for row in range(tokens)]
            alpha = np.zeros((tokens, tokens))
            for row, keys in enumerate(seen):
                alpha[row, keys] = np.exp(logits[row, keys]) / (np.exp(logits[row, keys]).sum() + sink)
            for row, keys in enumerate(seen):
                kept = naive_kept(pattern, alpha, row, keys, budget)
                weights = np.exp(logits[row, kept]) / (np.exp(logits[row, kept]).sum() + sink)
                whole, sparse = alpha[row] @ value[sequence, head // 2], weights @ value[sequence, head // 2][kept]
                np.testing.assert_allclose(output[sequence, row, head], sparse, rtol=1e-4, atol=1e-5)
                row_sums = alpha[row, kept].sum() / alpha[row].sum(), 1, np.linalg.norm(sparse - whole)
                for name, term in zip(COSTS, (*row_sums, np.linalg.norm(whole), len(kept), len(keys)), strict=True):
                    sums[name] += float(term)
        np.testing.assert_allclose(expected, list(sums.values()), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_larger_budget_keeps_what_a_smaller_one_keeps_and_one_keeps_all(pattern: str) -> None:
    kept: list[Tensor] = []

    def noted(rows: Rows) -> Order:
        order = PATTERNS[pattern](rows)
        kept[:] = [order.kept(budget) for budget in BUDGETS]
        assert torch.equal(kept[0], rows.visible.expand_as(kept[0]))
        return order

    module = nn.Identity()
    attention = SparseAttention([module])
    recalls = []
    for budget in BUDGETS:
        with attention.keeping((0,), noted, budget):
            output = attend(attention, module, random_call(tokens=150))
            recalls.append(attention.costs(0)[:, COSTS.index("recall")].sum())
        if budget == 1:
            assert torch.equal(output, attend(attention, module, random_call(tokens=150)))
    assert all((small <= large).all() for large, small in zip(kept, kept[1:], strict=False))
    assert recalls == sorted(recalls, reverse=True) and recalls[-1] < recalls[0]


def sparse_logits(model: PreTrainedModel, tokens: Tensor, pattern: Any, budget: float) -> Tensor:
    """With all blocks sparse."""
    attention = SparseAttention(model.model.layers)
    with torch.no_grad(), attending(model, attention, ""), attention.keeping(range(8), pattern, budget):
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_budget_one_is_the_models_own_eager_attention_bit_for_bit(family: str) -> None:
    model = tiny_model(family, **LONG)
    tokens = torch.randint(3, VOCAB, (1, 100), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    own = model(input_ids=tokens, use_cache=False).logits
    for pattern in PATTERNS.values():
        assert torch.equal(sparse_logits(model, tokens, pattern, 1.0), own)
        assert not torch.equal(sparse_logits(model, tokens, pattern, 0.05), own)


def last_queries(rows: Rows) -> Order:
    """Columns by the mass of the last queries, as published methods probe a prompt."""
    call, keys = rows.call, rows.call.spread_over_heads(rows.call.key)
    probe = slice(call.query.shape[2] - 16, call.query.shape[2])
    mass = call.softmax(call.scores(probe, keys)).sum(2, keepdim=True).expand_as(rows.weights)
    order = mass.masked_fill(~rows.visible, -1).argsort(-1, descending=True).argsort(-1)
    return Order(order, rows.visible, blocks=False)


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), last_queries], ids=[*PATTERNS, "last-queries"])
def test_later_tokens_change_no_earlier_output_unless_late_queries_choose(pattern: Any) -> None:
    model = tiny_model("gemma2", **LONG, sliding_window=90)
    tokens = torch.randint(3, VOCAB, (1, 160), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 100:] = (tokens[:, 100:] + 7) % VOCAB
    before, after = (sparse_logits(model, text, pattern, 0.1) for text in (tokens, changed))
    assert not torch.equal(before[:, 100:], after[:, 100:])
    assert torch.equal(before[:, :100], after[:, :100]) == (pattern is not last_queries)


def _columns(tokens: int) -> Tensor:
    return torch.isin(torch.arange(tokens), torch.tensor([0, 40])).expand(tokens, tokens)


def _slashes(tokens: int) -> Tensor:
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return torch.isin(distance, torch.tensor([0, 17]))


def _block(tokens: int) -> Tensor:
    """All queries read block 1 as soon as it is over."""
    own = torch.arange(tokens)[:, None] // 64 == torch.arange(tokens) // 64
    second = (torch.arange(tokens) // 64 == 1).expand(tokens, tokens)
    return torch.where((torch.arange(tokens) >= 128)[:, None], second, own)


def _near_and_first(tokens: int) -> Tensor:
    """The own key, four sinks as soon as 6 % of the keys are five, and three neighbours as soon as they are eight."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    return (query == key) | ((key < 4) & (query >= 84)) | ((query - key < 4) & (query >= 134))


@pytest.mark.parametrize(
    ("pattern", "rows", "budget", "other"),
    [
        ("vertical_slash", _columns, 0.05, "window_sink"),
        ("vertical_slash", _slashes, 0.2, "window_sink"),
        ("block_64", _block, 0.5, "window_sink"),
        ("oracle", _slashes, 0.12, "window_sink"),
        ("window_sink", _near_and_first, 0.06, "block_64"),
    ],
    ids=["columns", "diagonals", "blocks", "oracle", "window"],
)
def test_planted_patterns_are_kept_whole(pattern: str, rows: Any, budget: float, other: str) -> None:
    tokens, module = 256, nn.Identity()
    weights = rows(tokens).float()[None].repeat(2, 1, 1).tril()
    attention = SparseAttention([module])
    found = {}
    for name in (pattern, other):
        with attention.keeping((0,), PATTERNS[name], budget):
            attend(attention, module, planted(weights))
            found[name] = dict(zip(COSTS, attention.costs(0)[0].tolist(), strict=True))
    assert found[pattern]["recall"] == pytest.approx(found[pattern]["rows"], rel=1e-6)
    assert found[pattern]["error"] < 1e-5 * found[pattern]["size"]
    assert found[other]["recall"] < 0.999 * found[other]["rows"]


def test_the_loss_of_one_block_and_of_all_against_a_model_of_naive_attention() -> None:
    model = tiny_model("llama")
    context = sample(model, num_samples=5)
    result = SparseAttentionScore(budgets=(0.25,)).run(context)
    tokens, labels = context.windows[:, :-1], context.windows[:, 1:]
    chosen: set[int] = set()

    def naive(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any) -> Any:
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        scores = query @ key.mT * scaling + mask
        if module.layer_idx in chosen:
            for row in range(scores.shape[2]):
                largest = scores[:, :, row].topk(math.ceil(0.25 * (row + 1)), -1).values[..., -1:]
                scores[:, :, row] = scores[:, :, row].masked_fill(scores[:, :, row] < largest, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("naive_sparse", naive)
    AttentionMaskInterface.register("naive_sparse", eager_mask)
    model.set_attn_implementation("naive_sparse")
    losses = {}
    for layers in ((), (0,), (1,), (0, 1)):
        chosen = set(layers)
        losses[layers] = sequence_losses(model(input_ids=tokens).logits, labels)
    rows = [row for row in result.tables["sparse_attention_by_layer"] if row["pattern"] == "oracle"]
    for row in rows:
        expected = float((losses[row["layer"],] - losses[()]).mean())
        assert row["loss_increase"] == pytest.approx(expected, abs=1e-5) and abs(expected) > 1e-4
    assert result.per_sequence["loss_oracle_0.25"] == pytest.approx((losses[0, 1] - losses[()]).tolist(), abs=1e-5)
    value = result.values["loss_oracle_0.25"]
    assert value["low"] < value["value"] < value["high"]
    assert value["value"] == pytest.approx(float((losses[0, 1] - losses[()]).mean()), abs=1e-5)
    assert result.values["passes"] == 2 + 4 * (1 + 1.5)


def test_both_attentions_of_a_block_count_and_others_are_refused() -> None:
    context = sample(tiny_decoder("longcat_flash"), num_samples=2)
    result = SparseAttentionScore(budgets=(0.5,)).run(context)
    heads = 2 * context.model.config.num_attention_heads
    assert max(row["head"] for row in result.tables["sparse_attention_index"]) == heads - 1
    with pytest.raises(ConversionError, match="BloomForCausalLM.*leave sparse_attention out of --scores"):
        SparseAttentionScore().run(sample(tiny_decoder("bloom")))


@pytest.mark.parametrize(
    ("names", "budgets", "words"),
    [
        (["skip"], ["0.5"], "only sparse_attention"),
        (["sparse_attention"], ["0"], "--budgets 0: not a share"),
        (["sparse_attention"], ["half"], "--budgets half: not a share"),
        (["sparse_attention"], ["1"], "1 keeps all keys"),
    ],
)
def test_budgets_are_refused_in_one_line(names: list[str], budgets: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        find_scores(names, budgets=budgets)
    assert "\n" not in str(refused.value)
