"""In-context recall: pairs of keys and values, new in every sample; a key seen before is a question."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.data.synthetic.task import Draw, Sample, Task, even_problem


@dataclass
class Recall(Task):
    """MAD's in-context recall. A model without memory of the sample is right one time in `vocab_size / 2`.

    Source: Poli et al. (arXiv 2403.17844); athms/mad-lab mad/data/instances.py @0f49a45, `multi_query`. Deviation:
    theirs trains on all tokens and tests on answers; here both are on answers.
    """

    vocab_size: int = at_least(4, 16)
    """Keys and values, half each."""

    def vocabulary(self) -> list[str]:
        """Keys, then values."""
        half = self.vocab_size // 2
        return key_value_words(half, half)

    def problems(self, seq_length: int) -> Iterator[str]:
        """Halves and pairs."""
        yield from even_problem(self.vocab_size, "data.synthetic.vocab_size", "half of it are keys")
        yield from pair_problems(seq_length)

    def make(self, draw: Draw, seq_length: int) -> Sample:
        """`seq_length / 2` pairs, the last of a key that came before."""
        return key_value_pairs(draw.generator(), self.vocab_size // 2, seq_length)

    def difficulty(self, sample: Sample) -> np.ndarray:
        """How far back the key stood, in powers of two pairs."""
        return pairs_back(sample.tokens)


def key_value_words(keys: int, values: int) -> list[str]:
    """How keys and values are written, in the order of their ids."""
    return [*(f"k{number}" for number in range(keys)), *(f"v{number}" for number in range(values))]


def keys_and_values(count: int) -> tuple[int, int]:
    """Numbers of keys and of values among `count` ids; an odd one is a value."""
    return count // 2, count - count // 2


def pair_problems(seq_length: int) -> Iterator[str]:
    """The problem, if there is one, of a sequence that two pairs or more are to fill."""
    yield from even_problem(seq_length, "data.seq_length", "a sample consists of pairs")
    if seq_length < 4:
        yield f"data.seq_length: {seq_length} holds no pair and its question; use at least 4"


def key_value_pairs(
    generator: np.random.Generator, half: int, seq_length: int, *, noise: float = 0.0, noise_ids: range = range(0)
) -> Sample:
    """Keys 0 … half − 1 with values half … 2 half − 1, and pairs of noise among them.

    Args:
        generator: the sample's.
        half: number of keys, and of values.
        seq_length: even.
        noise: share of pairs, the last left out, that are two tokens of `noise_ids`; one at least is none.
        noise_ids: ids of noise.
    """
    count = seq_length // 2
    keys, values = generator.integers(half, size=count), half + generator.integers(half, size=half)
    is_noise = generator.random(count) < noise
    is_noise[generator.integers(count - 1)] = False
    is_noise[-1] = False
    presented, first = np.unique(np.where(is_noise, -1, keys)[:-1], return_index=True)
    presented, first = presented[presented >= 0], first[presented >= 0]
    keys[-1] = generator.choice(presented)
    pairs = np.stack((keys, values[keys]), axis=1)
    pairs[is_noise] = generator.choice(np.asarray(noise_ids), size=(int(is_noise.sum()), 2)) if is_noise.any() else 0
    tokens = pairs.reshape(-1)
    is_answer = np.zeros(seq_length, dtype=bool)
    is_answer[::2] = ~is_noise
    is_answer[2 * first] = False
    return Sample(tokens, np.append(tokens[1:], tokens[-1]), is_answer)


def pairs_back(tokens: np.ndarray) -> np.ndarray:
    """⌊log₂ of the pairs⌋ since a key was last presented, at its place, int64 `[S]`; 0 where it was not."""
    found, last = np.zeros(len(tokens), dtype=np.int64), dict[int, int]()
    for number, key in enumerate(tokens[::2].tolist()):
        if key in last:
            found[2 * number] = (number - last[key]).bit_length() - 1
        last[key] = number
    return found
