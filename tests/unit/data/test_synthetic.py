"""Synthetic tasks: solvable from what they show, at chance for a constant, the same however they are read."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from sparsecod_megatron.config import load_config
from sparsecod_megatron.data.batches import BatchIterator
from sparsecod_megatron.data.fingerprint import check_fingerprint, fingerprint_of
from sparsecod_megatron.data.synthetic.biographies import Biographies
from sparsecod_megatron.data.synthetic.dataset import SyntheticDataset, task_tokenizer
from sparsecod_megatron.data.synthetic.memorization import Memorization
from sparsecod_megatron.data.synthetic.registry import TASKS, task_of
from sparsecod_megatron.data.synthetic.task import Sample, Task, task_vocabulary_size
from sparsecod_megatron.errors import ConfigError, DataError
from sparsecod_megatron.planning.vocabulary import with_vocabulary

SMALL_PEOPLE: dict[str, Any] = {
    "num_people": 12,
    "name_choices": [3, 4, 5],
    "value_choices": [3, 4, 5, 2, 6, 3, 4, 5],
    "num_templates": 3,
}
TASK_SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "recall": (32, {}),
    "fuzzy_recall": (64, {"vocab_size": 9, "motif_size": 2}),
    "noisy_recall": (32, {"noise": 0.5}),
    "selective_copying": (40, {"num_tokens_to_copy": 6}),
    "memorization": (32, {"vocab_size": 32}),
    "biographies": (96, SMALL_PEOPLE),
}


def config_of(name: str, **settings: Any) -> Any:
    length, own = TASK_SETTINGS[name]
    overrides = [f"data.synthetic.{key}={value}" for key, value in (own | settings).items()]
    return load_config(None, [f"data.seq_length={length}", f"data.synthetic.task={name}", *overrides])


def samples_of(name: str, *, held_out: bool = False, count: int = 60, **settings: Any) -> tuple[Task, list[Sample]]:
    config = config_of(name, **settings)
    task = task_of(config.data)
    assert task is not None
    length = config.data.seq_length
    data = SyntheticDataset(task, seq_length=length, seed=5, length=count, held_out=held_out)
    return task, [data.sample(index) for index in range(count)]


def said_before(words: list[str], place: int) -> str | None:
    """What followed the last run of keys that ends at `place` when it came before, as many values on as now."""
    begin = place
    while words[begin].startswith("v"):
        begin -= 1
    offset, end = place - begin, begin + 1
    while begin >= 0 and words[begin].startswith("k"):
        begin -= 1
    key = words[begin + 1 : end]
    for start in range(len(words[: begin + 1])):
        stop = start + len(key)
        before = words[start - 1] if start else "pad"
        if words[start:stop] == key and not before.startswith("k") and words[stop].startswith("v"):
            return words[stop + offset]
    return None


def oracle(name: str, task: Task, sample: Sample) -> list[str]:
    """The answers, from the words alone or, where these do not say them, from the task's facts."""
    words = [task.vocabulary()[token] for token in sample.tokens]
    places = np.flatnonzero(sample.is_answer).tolist()
    if name == "selective_copying":
        return [word for word in words if word.startswith("t")]
    if isinstance(task, Memorization):
        return [task.vocabulary()[task.facts[int(words[place - 1][1:])]] for place in places]
    return [said_before(words, place) or "" for place in places]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("name", [name for name in TASKS if name != "biographies"])
def test_oracle_is_always_right_and_a_constant_at_chance(name: str, held_out: bool) -> None:
    task, samples = samples_of(name, held_out=held_out, count=200)
    answers: list[str] = []
    for sample in samples:
        truth = [task.vocabulary()[label] for label in sample.labels[sample.is_answer]]
        assert truth == oracle(name, task, sample)
        answers += truth
    values = [word for word in task.vocabulary() if word[0] == ("t" if name == "selective_copying" else "v")]
    assert len(answers) > 500 and set(answers) <= set(values)
    if name != "memorization":  # where a value is as frequent as keys have it
        shares = [answers.count(value) / len(answers) for value in values]
        np.testing.assert_allclose(shares, 1 / len(values), atol=0.05)


def test_biographies_tell_each_person_equally_often_and_truly() -> None:
    """Names decide values, whatever the template; an epoch is a permutation of the people."""
    task, samples = samples_of("biographies", count=24)
    words = task.vocabulary()
    told: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for sample in samples:
        text = [words[token] for token in (*sample.tokens, sample.labels[-1])]
        scored = {index + 1 for index in np.flatnonzero(sample.is_answer)}
        for start in (index for index, word in enumerate(text[:-1]) if word == "<|endoftext|>"):
            if text[start + 1] == "<|endoftext|>":
                continue
            following = text[start + 1 :]
            end = following.index("<|endoftext|>") if "<|endoftext|>" in following else len(following)
            kept = [word for word in following[:end] if not word.startswith("word")]
            told.setdefault(tuple(kept[:3]), []).append(tuple(kept[3:]))
            places = {start + 1 + place for place, word in enumerate(following[:end]) if not word.startswith("word")}
            assert places <= scored
    assert len(told) == 12 and all(len(tuples) == 4 for tuples in told.values())  # 24 samples of 2 biographies
    assert all(len(set(tuples)) == 1 and len(tuples[0]) == 8 for tuples in told.values())
    assert [re.sub(r"\d", "", word) for word in next(iter(told.values()))[0]][:4] == ["month", "day", "year", "pronoun"]


def test_a_table_knows_the_maximum_and_a_uniform_guess_nothing() -> None:
    """Bits by the definition, written again: of names, log₂ of the choices over the people; parts add up."""
    task = Biographies(**SMALL_PEOPLE)
    knowledge, people = task.knowledge(), 12
    names, values = math.log(3 * 4 * 5), math.log(3 * 4 * 5 * 2 * 6 * 3 * 4 * 5)
    most = people * math.log2(60 / 12) + people * math.log2(43200)
    assert knowledge.most_bits() == pytest.approx(most, rel=1e-12)
    assert knowledge.bits({"name": math.log(people) / 3, "value": 0.0}) == pytest.approx(most, rel=1e-12)
    assert knowledge.bits({"name": names / 3, "value": values / 8}) == pytest.approx(0, abs=1e-9)
    unknown_employer = math.log(5) / 8
    partial = knowledge.bits({"name": math.log(people) / 3, "value": unknown_employer})
    assert partial == pytest.approx(most - people * math.log2(5), rel=1e-12)
    table = Memorization(vocab_size=32).knowledge()
    assert table.bits({"answer": 0.0}) == table.most_bits() == pytest.approx(15 * 4)  # 15 keys, 16 values
    assert table.bits({"answer": math.log(16)}) == pytest.approx(0, abs=1e-9)
    published = Biographies().knowledge().pieces
    assert published["value"].prior / math.log(2) == pytest.approx(47.6, abs=0.05)
    assert published["name"].prior == pytest.approx(math.log(1.6e8))


@pytest.mark.parametrize("name", TASKS)
def test_samples_depend_on_seed_and_number_alone(name: str) -> None:
    config = config_of(name)
    task, length = task_of(config.data), config.data.seq_length
    assert task is not None

    def read(size: int, micro: int, consumed: int, **other: Any) -> np.ndarray:
        settings = {"seed": 3, "held_out": False} | other
        data = SyntheticDataset(task, seq_length=length, length=24, **settings)
        read = np.zeros((24, 3, length))
        for rank in range(size):
            batches = BatchIterator(
                data,
                micro_batch_size=micro,
                global_batch_size=lambda _: 8,
                data_parallel_rank=rank,
                data_parallel_size=size,
                consumed_samples=consumed,
            )
            for step, batch in enumerate(batches):
                begin, place = divmod(step, 8 // (micro * size))
                first = consumed + 8 * begin + place * micro * size + rank * micro
                rows = [batch[key].numpy() for key in ("tokens", "labels", "loss_mask")]
                read[first : first + micro] = np.stack(rows, axis=1)
        return read

    whole = read(1, 8, 0)
    assert (read(2, 1, 0) == whole).all() and (read(4, 2, 0) == whole).all()
    assert (read(2, 2, 16)[16:] == whole[16:]).all()  # resumed
    assert whole[:, 2].sum(axis=1).all()  # no sample without an answer
    for other in ({"seed": 4}, {"held_out": True}):
        assert not (read(1, 8, 0, **other)[:, 0] == whole[:, 0]).all(axis=1).any()


def test_a_fixed_number_of_samples_is_shuffled_every_epoch() -> None:
    task, samples = samples_of("recall", num_samples=10, count=30)
    epochs = [[sample.tokens.tobytes() for sample in samples[start : start + 10]] for start in (0, 10, 20)]
    assert len(set(epochs[0])) == 10 and set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("name", TASKS)
def test_tokenizer_writes_and_reads_every_word(name: str) -> None:
    task, (sample, *_) = samples_of(name, count=1)
    tokenizer = task_tokenizer(task)
    assert len(set(task.vocabulary())) == len(task.vocabulary())
    assert len(tokenizer) == task_vocabulary_size(task) > max(sample.tokens.max(), sample.labels.max())
    assert tokenizer.encode(tokenizer.decode(sample.tokens)) == sample.tokens.tolist()


def test_fingerprint_notices_settings_and_samples() -> None:
    saved = fingerprint_of(config_of("recall").data, seed=1)
    check_fingerprint(saved, fingerprint_of(config_of("recall").data, seed=1), allow_changed=False)
    with pytest.raises(DataError, match="changed since the checkpoint"):
        check_fingerprint(saved, fingerprint_of(config_of("recall", vocab_size=18).data, seed=1), allow_changed=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.synthetic.task=recal"], "data.synthetic.task: 'recal' is not a task; did you mean 'recall'?"),
        (["data.synthetic.vocab_size=8"], "data.synthetic.task: not set; choose one of recall"),
        (["data.synthetic.task=recall", "data.synthetic.noise=0.1"], "noise: recall has no such setting; it has"),
        (["data.synthetic.task=recall", "data.synthetic.vocab_size=7"], "7 is odd"),
        (["data.synthetic.task=recall", "data.synthetic.vocab_size=2"], "data.synthetic.vocab_size: 2 is below 4"),
        (["data.synthetic.task=recall", "data.synthetic.vocab_size=many"], "data.synthetic: vocab_size"),
        (["data.synthetic.task=noisy_recall", "data.synthetic.noise_vocab_size=30"], "leaves 2 of vocab_size=32"),
        (["data.synthetic.task=fuzzy_recall", "data.synthetic.motif_size=9"], "9 is above the 7 keys"),
        (["data.synthetic.task=selective_copying", "data.seq_length=32"], "16 takes 33 tokens"),
        (["data.synthetic.task=biographies", "data.synthetic.name_choices=[2,2,2]"], "above the 8 names"),
        (["data.synthetic.task=biographies", "data.synthetic.value_choices=[2]"], "[2] is not 8 numbers"),
        (["data.synthetic.task=recall", "data.prefix=here"], "data.prefix: here, but data.synthetic makes the samples"),
        (["data.synthetic.task=recall", "data.reset_position_ids=true"], "data.reset_"),
        (["data.synthetic.task=recall", "evaluation.interval=5", "evaluation.tasks=[piqa]"], "evaluation.interval: 5"),
    ],
)
def test_refused(changes: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        task_of(load_config(None, changes).data)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_plan_has_the_vocabulary_of_the_task() -> None:
    completed, note = with_vocabulary(config_of("memorization", vocab_size=200))
    assert completed.model.vocab_size == 256 and note is not None and "data.synthetic.task=memorization" in note
    with pytest.raises(ConfigError, match=r"'memorize' is not a task; did you mean 'memorization'"):
        with_vocabulary(load_config(None, ["data.synthetic.task=memorize"]))
