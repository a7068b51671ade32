"""A local lm-eval task made from held-out text: which of four passages truly continues the context?

It needs no download and no labels, so any model can be given a task with a known chance level (25 %) on any machine.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import yaml

from sparsecod_megatron.errors import DataError
from sparsecod_megatron.files import write_text

NUM_CHOICES = 4
MAX_BYTES_PER_WORD = 12
"""Passages of longer words on average are left out: tables of digits and addresses are not prose, and a byte-level
tokenizer may need a token a byte for them, more than a small model's window holds."""


class _Passage(NamedTuple):
    document: int
    context: str
    continuation: str


def write_continuation_task(
    documents: Iterable[str],
    output: Path,
    *,
    name: str = "true_continuation",
    num_questions: int = 100,
    context_words: int = 48,
    continuation_words: int = 16,
    seed: int = 0,
) -> Path:
    """Write `name.jsonl` and `name.yaml`, a multiple-choice task with `acc` and `acc_norm`.

    The text is cut into passages that do not overlap, each a context and its continuation. A question shows one
    context; its candidates are the true continuation and three continuations of other passages, from other documents
    where there are enough. All candidates have the same number of words, so length gives nothing away.

    Args:
        documents: held-out texts.
        output: the task's folder, for lm-eval's `include_path`. The YAML holds the data's absolute path: make the task
            again after moving the folder.
        name: the task's name.
        num_questions: contexts drawn, without repetition.
        context_words: words of a context.
        continuation_words: words of a candidate.
        seed: seed of passages, distractors and their order.

    Returns:
        `output`.

    Raises:
        DataError: the text has too few passages, or too few different ones.
    """
    passages = _passages(documents, context_words, continuation_words)
    needed = max(num_questions, NUM_CHOICES)
    if len(passages) < needed:
        held = f"{len(passages)} passages of {context_words + continuation_words} words"
        raise DataError(
            f"the held-out text has {held}, {num_questions} questions need {needed}; give more text or fewer questions"
        )
    generator = random.Random(seed)
    generator.shuffle(passages)
    questions = [_question(own, passages, generator) for own in passages[:num_questions]]
    data = output / f"{name}.jsonl"
    write_text(data, "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions))
    write_text(
        output / f"{name}.yaml", yaml.safe_dump(_task(name, data.absolute()), sort_keys=False, allow_unicode=True)
    )
    return output


def _passages(documents: Iterable[str], context_words: int, continuation_words: int) -> list[_Passage]:
    """Cut every document into passages of plain words; the rest at its end is dropped. Spacing stays as it is."""
    passages = []
    length = context_words + continuation_words
    for number, document in enumerate(documents):
        words = [match.span() for match in re.finditer(r"\S+", document)]
        for start in range(0, len(words) - length + 1, length):
            border, end = start + context_words, start + length
            context = document[words[start][0] : words[border - 1][1]]
            continuation = document[words[border][0] : words[end - 1][1]]
            if _is_plain(context, context_words) and _is_plain(continuation, continuation_words):
                passages.append(_Passage(number, context, continuation))
    return passages


def _is_plain(text: str, num_words: int) -> bool:
    return len(text.encode()) <= MAX_BYTES_PER_WORD * num_words


def _question(own: _Passage, passages: list[_Passage], generator: random.Random) -> dict[str, object]:
    """One JSONL row: context, choices and the true one's place; `passages` are in random order."""
    start = generator.randrange(len(passages))
    others = passages[start:] + passages[:start]
    foreign = (passage for passage in others if passage.document != own.document)
    same = (passage for passage in others if passage.document == own.document)
    choices = [own.continuation]
    for passage in chain(foreign, same):
        if passage.continuation not in choices:
            choices.append(passage.continuation)
        if len(choices) == NUM_CHOICES:
            break
    else:
        raise DataError(
            f"the held-out text repeats itself: fewer than {NUM_CHOICES} different continuations; give more varied text"
        )
    generator.shuffle(choices)
    return {"context": own.context, "choices": choices, "label": choices.index(own.continuation)}


def _task(name: str, data: Path) -> dict[str, object]:
    """The task in lm-eval's YAML terms; its columns are the JSONL's keys."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
