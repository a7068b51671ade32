"""What a synthetic task is to the rest of the program: settings, a vocabulary, and samples that a number names.

A sample depends on the seed, on whether it is held out and on its number, and on nothing else: so every layout, batch
size and resumed run sees the same ones, and none is ever stored.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.data.synthetic.knowledge import Knowledge

END_OF_TEXT = "<|endoftext|>"
"""The last id of a task's tokenizer, where its own vocabulary does not hold it: HuggingFace's tools ask for one."""


class Draw(NamedTuple):
    """Which sample is asked for.

    Attributes:
        seed: of the order of samples.
        number: of the sample, from 0.
        held_out: whether it is one of validation, which shares no random numbers with those of training.
    """

    seed: int
    number: int
    held_out: bool

    def generator(self) -> np.random.Generator:
        """The sample's own random numbers."""
        return np.random.default_rng([self.seed, int(self.held_out), self.number])


class Sample(NamedTuple):
    """One sequence.

    Attributes:
        tokens: what the model reads, int64 `[S]`.
        labels: what it is to say at each place, int64 `[S]`; of no meaning where `is_answer` is False.
        is_answer: the places that are scored, bool `[S]`.
    """

    tokens: np.ndarray
    labels: np.ndarray
    is_answer: np.ndarray


@dataclass
class Task(ABC):
    """Settings of a task; a subclass is one, and its fields are keys of `data.synthetic`."""

    num_samples: int = at_least(0, 0)
    """Training samples that there are; each epoch shuffles them. 0 makes every sample afresh."""

    @abstractmethod
    def vocabulary(self) -> list[str]:
        """How each id is written, without spaces; all different."""

    @abstractmethod
    def problems(self, seq_length: int) -> Iterator[str]:
        """One line, which begins with the key, for each setting that cannot be with sequences of this length."""

    @abstractmethod
    def make(self, draw: Draw, seq_length: int) -> Sample:
        """The sample of this name."""

    def classes(self) -> dict[str, np.ndarray]:
        """Kinds of answers by name, each with the ids it consists of; accuracy is that of the last."""
        return {"answer": np.arange(len(self.vocabulary()))}

    def difficulty(self, sample: Sample) -> np.ndarray:
        """How hard each place's answer is, whole numbers int64 `[S]`; 0 where a task's answers are alike."""
        return np.zeros(len(sample.tokens), dtype=np.int64)

    def knowledge(self) -> Knowledge | None:
        """What there is to know, where samples tell facts that stay; None where each sample has its own."""
        return None

    def answers_per_sample(self, seq_length: int) -> float:
        """Mean number of scored places, of the first 256 samples of seed 0: the divisor of a sample's loss.

        A constant, so that the gradient of a batch does not depend on how it is cut into micro-batches.
        """
        samples = (self.make(Draw(0, number, held_out=False), seq_length) for number in range(256))
        return float(np.mean([sample.is_answer.sum() for sample in samples]))


def task_vocabulary_size(task: Task) -> int:
    """Rows that an embedding table needs: the task's ids, and the end of text where it has none."""
    return len({*task.vocabulary(), END_OF_TEXT})


@functools.lru_cache(maxsize=8)
def shuffled(length: int, *key: int) -> np.ndarray:
    """The numbers below `length` in the order that a key, such as seed and epoch, names, `[length]`."""
    return np.random.default_rng([*key, length]).permutation(length)


def even_problem(value: int, key: str, what: str) -> Iterator[str]:
    """The problem, if there is one, of a number that pairs have to fill."""
    if value % 2:
        yield f"{key}: {value} is odd, and {what}; use an even number"
