"""Answers without a block, with neighbours swapped, and cut off from the context: two ways to compute, known models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparsecod_megatron.analysis.intervals import ratio_of_sums
from sparsecod_megatron.analysis.scores.answer_tables import answers_result
from sparsecod_megatron.analysis.scores.answers import SUMS, Answers, Intervention, answer_sums, collect_sums
from sparsecod_megatron.analysis.scores.context import make_context
from sparsecod_megatron.analysis.tasks.items import Answered, items_of
from sparsecod_megatron.errors import ConfigError, DataError
from sparsecod_megatron.hf.blocks import find_layers
from tests.unit.analysis.scores.families import VOCAB_SIZE, context, tiny
from tests.unit.analysis.scores.naive import edited

HALF = 8
"""Symbols of the planted models; each has an answer of its own."""


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def half_known(model: PreTrainedModel, count: int = 8) -> list[Answered]:
    """Random questions; to every other one of either difficulty the answer is what the model itself says."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for number in range(count):
        size, length = (int(torch.randint(low, low + 3, (1,), generator=generator)) for low in (3, 1))
        ids = torch.randint(1, VOCAB_SIZE, (size + length,), generator=generator).tolist()
        if number % 4 < 2:
            ids[size:] = greedy(model, ids[:size], length)
        found.append(Answered(ids, size, 3 if number % 2 else 1))
    return found


@contextlib.contextmanager
def changed(
    blocks: nn.ModuleList, kind: str, layer: int, means: list[Tensor], asked_from: dict[str, int]
) -> Iterator[None]:
    """The intervention by hooks and by swapping modules; `asked_from["place"]` is where the answer is first asked."""
    if kind == "skip":
        with edited(blocks[layer], lambda before, _after: before):
            yield
    elif kind == "swap":
        blocks[layer], blocks[layer + 1] = blocks[layer + 1], blocks[layer]
        yield
        blocks[layer], blocks[layer + 1] = blocks[layer + 1], blocks[layer]
    else:

        def erase(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0].clone()
            hidden[:, 1 : asked_from["place"]] = means[layer]
            return (hidden, *args[1:])

        handle = blocks[layer].register_forward_pre_hook(erase)
        yield
        handle.remove()


@torch.no_grad()
def naive_means(model: PreTrainedModel, blocks: nn.ModuleList, answered: list[Answered]) -> list[Tensor]:
    kept: list[list[Tensor]] = [[] for _ in blocks]
    for ids, start, _ in answered:
        hooks = [
            block.register_forward_pre_hook(lambda _m, args, seen=seen, stop=start - 1: seen.append(args[0][0, 1:stop]))
            for block, seen in zip(blocks, kept, strict=True)
        ]
        model(input_ids=torch.tensor([ids[:-1]]), use_cache=False)
        for hook in hooks:
            hook.remove()
    return [torch.cat(seen).mean(dim=0) for seen in kept]


@torch.no_grad()
def naive(model: PreTrainedModel, blocks: nn.ModuleList, answered: list[Answered]) -> dict[tuple[str, int], np.ndarray]:
    """(kind, layer) → [N, 3]: exact match by decoding, right tokens, log-likelihood; one item at a time, unpadded."""
    means, asked_from = naive_means(model, blocks, answered), {"place": 0}

    def measured() -> np.ndarray:
        rows = []
        for ids, start, _ in answered:
            asked_from["place"] = start - 1
            logits = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0, start - 1 :].double()
            wanted = torch.tensor(ids[start:])
            likelihood = -float(F.cross_entropy(logits, wanted, reduction="sum"))
            right = int((logits.argmax(dim=-1) == wanted).sum())
            rows.append([float(greedy(model, ids[:start], len(wanted)) == ids[start:]), right, likelihood])
        return np.array(rows)

    found = {("none", -1): measured()}
    for kind, count in (("skip", len(blocks)), ("swap", len(blocks) - 1), ("erase", len(blocks))):
        for layer in range(count):
            with changed(blocks, kind, layer, means, asked_from):
                found[kind, layer] = measured()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_by_hooks_and_greedy_decoding(family: str) -> None:
    model = tiny(family)
    answered = half_known(model)
    expected = naive(model, find_layers(model).blocks, answered)
    given = context(model, items=items_of("known", answered, vocab_size=VOCAB_SIZE))
    result = Answers().run(given)
    tokens, difficulty = (
        np.array([len(each.ids) - each.start for each in answered]),
        [each.difficulty for each in answered],
    )
    of_level = np.array(difficulty) // 2
    base, seen = expected["none", -1], set[tuple[str, int]]()
    assert base[:, 0].sum() == 4, "the model's own answers are right, and no others"
    for row in result.tables["answers"]:
        key = (row["intervention"], -1 if row["layer"] is None else row["layer"])
        seen.add(key)
        chosen = np.array([row["difficulty"] in ("all", str(each)) for each in difficulty])
        change = expected[key] - (0 if key[0] == "none" else base)
        assert row["answers"] == chosen.sum()
        assert row["exact_match"] == pytest.approx(change[chosen, 0].mean(), abs=1e-9)
        assert row["accuracy"] == pytest.approx(change[chosen, 1].sum() / tokens[chosen].sum(), abs=1e-9)
        assert row["log_likelihood"] == pytest.approx(change[chosen, 2].mean(), abs=1e-4)
        if row["difficulty"] == "all":
            interval = ratio_of_sums(change[:, 2], np.ones(len(change)), seed=given.seed, strata=of_level).at()
            found = (row["log_likelihood_low"], row["log_likelihood_high"])
            assert found == pytest.approx((interval.low, interval.high), abs=1e-4)
    assert seen == expected.keys()
    skips = np.stack([expected["skip", layer] - base for layer in range(3)])
    assert result.values["skip_exact_match"]["value"] == pytest.approx(skips[..., 0].mean())
    late = skips[1:, :, 2].mean(axis=0)
    assert result.values["skip_log_likelihood_second_half"]["value"] == pytest.approx(late.mean(), abs=1e-4)
    hard = np.array(difficulty) == 3
    harder = result.values["skip_log_likelihood_second_half_harder"]
    assert harder["value"] == pytest.approx(late[hard].mean() - late[~hard].mean(), abs=1e-4)
    assert harder["low"] < harder["value"] < harder["high"]
    assert result.per_sequence["exact_match"] == base[:, 0].tolist()


def test_any_batch_gives_the_same_and_padding_says_nothing() -> None:
    model = tiny("llama")
    items = items_of("known", half_known(model), vocab_size=VOCAB_SIZE)
    whole = collect_sums(context(model, items=items), items)
    single = collect_sums(context(model, items=items, memory_gib=1e-9), items)
    assert torch.allclose(whole, single, atol=1e-5)
    items.tokens[items.tokens == 0] = 5  # what stands behind an item
    assert torch.allclose(collect_sums(context(model, items=items), items), whole, atol=1e-5)


def planted(kinds: dict[int, str], *, num_layers: int) -> PreTrainedModel:
    """A Llama of which only the named layers write: attention that copies symbols, an MLP that answers them.

    A symbol a, and what is known of the context, live in channels of their own; the answer to a is the id HALF + a. Ids
    2 · HALF and 2 · HALF + 1 open and ask.
    """
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=HALF,
        num_hidden_layers=num_layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=20,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    own, known, said = (range(start, start + HALF) for start in (0, HALF, 2 * HALF))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.zero_()
        for token in range(20):
            model.model.embed_tokens.weight[token, token if token < HALF else 24 + token] = 1.0
        for symbol in range(HALF):
            model.lm_head.weight[HALF + symbol, said[symbol]] = 1.0
        for layer, kind in kinds.items():
            block = model.model.layers[layer]
            for symbol in range(HALF):
                if kind == "copy":  # flat attention: every place gets the mean of all before it
                    block.self_attn.v_proj.weight[symbol, own[symbol]] = 1.0
                    block.self_attn.o_proj.weight[known[symbol], symbol] = 1.0
                else:
                    block.mlp.gate_proj.weight[symbol, known[symbol]] = 1.0
                    block.mlp.up_proj.weight[symbol, known[symbol]] = 1.0
                    block.mlp.down_proj.weight[said[symbol], symbol] = 1.0
    return model


def exact_changes(model: PreTrainedModel) -> dict[str, list[float]]:
    """Change of exact match by intervention and block; the share of useful blocks is checked on the way."""
    questions = [Answered([16, symbol, 17, HALF + symbol], 3, 1) for symbol in range(1, HALF)]
    items = items_of("planted", questions, vocab_size=20)
    result = Answers().run(make_context(model, None, num_samples=7, seq_length=4, seed=0, items=items))
    assert result.values["exact_match"]["value"] == 1
    found: dict[str, list[float]] = {"skip": [], "swap": [], "erase": []}
    for row in result.tables["answers"]:
        if row["layer"] is not None and row["difficulty"] == "all":
            assert row["exact_match"] == row["accuracy"]
            found[row["intervention"]].append(row["exact_match"])
    assert result.values["useful_share"]["value"] == found["skip"].count(-1) / len(found["skip"])
    return found


def test_the_one_layer_that_answers_is_found_alone() -> None:
    """Copy and answer in one block: without it nothing is right, no other block matters, whatever the order."""
    model = planted({2: "copy"}, num_layers=4)
    block = model.model.layers[2]
    answering = planted({2: "answer"}, num_layers=4).model.layers[2]
    block.mlp.load_state_dict(answering.mlp.state_dict())
    erased = -6 / 7  # the mean of all symbols says all answers alike, and the lowest counts
    changes = exact_changes(model)
    assert changes == {"skip": [0, 0, -1, 0], "swap": [0, 0, 0], "erase": pytest.approx([erased] * 3 + [0], abs=1e-9)}


def test_copying_before_answering_is_found_in_its_order() -> None:
    changes = exact_changes(planted({1: "copy", 2: "answer"}, num_layers=4))
    assert (changes["skip"], changes["swap"]) == ([0, -1, -1, 0], [0, -1, 0])
    assert changes["erase"] == pytest.approx([-6 / 7, -6 / 7, 0, 0], abs=1e-9)


def test_no_block_is_useful_for_answers_that_are_all_wrong() -> None:
    """And one that costs a tenth of the accuracy is not yet."""
    model = planted({}, num_layers=2)
    wrong = items_of("wrong", [Answered([16, symbol, 17, HALF + symbol], 3, 1) for symbol in (1, 2)], vocab_size=20)
    result = Answers().run(make_context(model, None, num_samples=2, seq_length=4, seed=0, items=wrong))
    assert result.values["accuracy"]["value"] == 0
    assert result.values["useful_share"] == {"value": None, "low": None, "high": None}
    sums = np.zeros((10, 3, 1, SUMS))
    sums[:, :, 0, [0, 2]] = 1.0
    sums[:, 0, 0, [1, 3]] = 1.0  # right in all, but for what a block takes away
    for block, lost in ((1, 1), (2, 2)):
        sums[lost:, block, 0, [1, 3]] = 1.0
    skips = [Intervention("skip", 0), Intervention("skip", 1)]
    items = items_of("ten", [Answered([1, 2], 1, 1)] * 10, vocab_size=3)
    share = answers_result(sums, skips, items, 2, seed=0).values["useful_share"]
    assert share["value"] == 0.5 and share["low"] == pytest.approx(0.0945, abs=1e-4)


def test_of_equal_logits_the_lowest_is_said() -> None:
    logits = torch.zeros(1, 3, 4)
    sums = answer_sums(logits, torch.tensor([[0, 1, 0]]), torch.tensor([[0, -1, 0]]), 1)
    assert sums[0, 0].tolist() == pytest.approx([2, 2, 2, 2, -2 * np.log(4)])
    sums = answer_sums(logits, torch.tensor([[0, 1, 0]]), torch.tensor([[0, 0, 1]]), 2)
    assert sums[0, :, :4].tolist() == [[1, 0, 2, 1], [0, 0, 1, 1]], "neighbours are one answer, of its first level"


def test_what_cannot_be_asked_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match="--scores answers: asks for answers; give --task"):
        Answers().run(context(model))
    with pytest.raises(DataError, match="token id 67, but the model's vocabulary has 67 entries"):
        items_of("wide", [Answered([1, 67], 1, 1)], vocab_size=VOCAB_SIZE)
    long = items_of("long", [Answered([1] * 70, 1, 1)], vocab_size=VOCAB_SIZE)
    with pytest.raises(ConfigError, match="--task long: 69 tokens: the model takes at most 64"):
        context(model, items=long)
