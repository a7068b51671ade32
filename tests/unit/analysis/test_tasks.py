"""Questions with known answers: made, read and turned into tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparsecod_megatron.analysis.tasks.built_in import CYCLE, make_pairs
from sparsecod_megatron.analysis.tasks.items import items_of
from sparsecod_megatron.analysis.tasks.synthetic import synthetic_items
from sparsecod_megatron.analysis.tasks.text import Pair, digit_ids, drawn, read_pairs, tokenised
from sparsecod_megatron.data.synthetic.recall import Recall
from sparsecod_megatron.data.synthetic.selective_copying import SelectiveCopying
from sparsecod_megatron.data.synthetic.task import Draw
from sparsecod_megatron.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, but `=4` and ` 7` are tokens too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("=", "4"), ("Ġ", "7")]
    vocabulary = {"<s>": 0} | {piece: number + 1 for number, piece in enumerate([*alphabet, "=4", "Ġ7"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def test_sums_are_sums_and_all_digits_are_asked_alike() -> None:
    pairs = make_pairs("addition", [1, 3], count=40, seed=0)
    assert [pair.difficulty for pair in pairs].count(3) == 20 and len({pair.prompt for pair in pairs}) == 40
    for pair in pairs:
        lines = (pair.prompt + pair.answer).splitlines()
        assert pair.answer.endswith("\n") and len(lines) == 3, "two examples and the question"
        for line in lines:
            first, second, total = line.replace("=", "+").split("+")
            assert int(first) + int(second) == int(total) and len(first) == len(second) == pair.difficulty


def test_hops_follow_the_facts_and_only_their_number_differs() -> None:
    pairs = make_pairs("hops", None, count=30, seed=0)
    assert {pair.difficulty for pair in pairs} == {1, 2, 3} and len({len(pair.prompt) for pair in pairs}) == 1
    for pair in pairs:
        for line in (pair.prompt + pair.answer).splitlines():
            facts, _, question = line.partition(". From ")
            leads = dict(fact.split(" to ") for fact in facts.split(", "))
            place, _, rest = question.partition(", steps ")
            steps, _, answer = rest.partition(": ")
            assert len(leads) == CYCLE and int(steps) == pair.difficulty
            for _ in range(int(steps)):
                place = leads[place]
            assert place == answer


def test_the_same_seed_asks_the_same() -> None:
    asked = [make_pairs("hops", [2], count=3, seed=seed) for seed in (0, 0, 1)]
    assert asked[0] == asked[1] != asked[2]


@pytest.mark.parametrize(
    ("name", "difficulties", "count", "said"),
    [
        ("addition", [0], 5, "--difficulties 0: addition has 1 to 9"),
        ("hops", [8], 5, "--difficulties 8: hops has 1 to 7"),
        ("hops", None, 2, "--samples 2: fewer than the 3 difficulties of hops"),
    ],
)
def test_difficulties_that_are_not_there(name: str, difficulties: list[int] | None, count: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_pairs(name, difficulties, count=count, seed=0)


def test_an_answer_begins_where_tokens_depart_from_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    """A token that holds the prompt's last character and the answer's first is the answer's."""
    pairs = [Pair("1+2=", "3\n", 1), Pair("2+2=", "4\n", 1), Pair("5+2 =", " 7", 2)]
    plain, merged, spaced = tokenised(pairs, tokenizer, leading=0, name="sums")
    assert [tokenizer.decode(each.ids[each.start :]) for each in (plain, merged, spaced)] == ["3\n", "=4\n", " 7"]
    assert (plain.ids[0], plain.start, merged.start) == (0, 5, 4)
    items = items_of("sums", [plain, merged, spaced], vocab_size=300)
    assert items.lengths.tolist() == [6, 5, 6] and items.difficulties == (1, 2)
    for row, each in enumerate((plain, merged, spaced)):
        asked = items.level[row] >= 0
        assert items.labels[row][asked].tolist() == each.ids[each.start :]
        assert items.tokens[row][: items.lengths[row]].tolist() == each.ids[:-1]
        assert items.is_told[row].nonzero()[:, 0].tolist() == [*range(1, each.start - 1)]
    with pytest.raises(DataError, match=r"question 1 \('=', '4'\) leaves the model nothing to read"):
        tokenised([Pair("=", "4", 1)], tokenizer, leading=None, name="sums")


def test_digits_are_told_by_their_text(tokenizer: PreTrainedTokenizerFast) -> None:
    found = {tokenizer.decode([number]) for number in digit_ids(tokenizer).nonzero()[:, 0].tolist()}
    assert found == {*"0123456789", " 7"}


def test_files_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    good = {"prompt": "a", "answer": "b", "difficulty": 2, "source": "what else is there is left alone"}
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(good)}\n")
    assert read_pairs(path) == [Pair("a", "b", 2)] * 2
    for line, said in (
        ("{", "q.jsonl:1: not JSON"),
        ("[1]", "q.jsonl:1: prompt is null, not a text"),
        (json.dumps(good | {"answer": ""}), 'q.jsonl:1: answer is "", not a text'),
        (json.dumps(good | {"difficulty": True}), "difficulty is true, not a whole number"),
        ("", "holds no question"),
    ):
        path.write_text(line)
        with pytest.raises(DataError, match=said):
            read_pairs(path)
    with pytest.raises(DataError, match="absent.jsonl: cannot be read as text"):
        read_pairs(tmp_path / "absent.jsonl")
    many = [Pair(str(number), "x", 1) for number in range(9)]
    assert drawn(many, 9, seed=0) == many and len({*drawn(many, 4, seed=0)}) == 4


def test_recall_is_as_hard_as_its_key_is_far() -> None:
    items = synthetic_items(Recall(vocab_size=8), seq_length=24, count=20, seed=0)
    assert items.difficulties == (0, 1, 2, 3)
    for row in range(20):
        keys = items.tokens[row, ::2].tolist()
        for place in (items.level[row] >= 0).nonzero()[:, 0].tolist():
            back = 1 + keys[: place // 2][::-1].index(keys[place // 2])
            assert items.difficulties[items.level[row, place]] == int(np.log2(back))
            assert items.labels[row, place] == items.tokens[row, place + 1]
    copying = SelectiveCopying(num_tokens_to_copy=3)
    whole = synthetic_items(copying, seq_length=12, count=2, seed=0)
    assert whole.difficulties == (0,) and (whole.level >= 0).sum(dim=1).tolist() == [3, 3]
    assert whole.tokens[1].tolist() == copying.make(Draw(0, 1, held_out=True), 12).tokens.tolist()
