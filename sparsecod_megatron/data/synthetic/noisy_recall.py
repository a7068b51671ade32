"""Noisy recall: in-context recall among pairs that mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparsecod_megatron.config.fields import at_least, from_to_below
from sparsecod_megatron.data.synthetic.recall import key_value_pairs, key_value_words, pair_problems, pairs_back
from sparsecod_megatron.data.synthetic.task import Draw, Sample, Task, even_problem


@dataclass
class NoisyRecall(Task):
    """MAD's noisy in-context recall.

    Source: as `Recall`. Deviation: the pair that is never noise is drawn among those that may be noise; theirs may be
    the last one, which never is, and a sample then has no key to ask for.
    """

    vocab_size: int = at_least(4, 32)
    """Keys, values and noise; keys and values are half each of what noise leaves."""
    noise_vocab_size: int = at_least(1, 16)
    """Ids of noise."""
    noise: float = from_to_below(0, 1, 0.2)
    """Share of pairs that are noise."""

    def vocabulary(self) -> list[str]:
        """Keys, values, noise."""
        half = self._half()
        return [*key_value_words(half, half), *(f"n{number}" for number in range(self.noise_vocab_size))]

    def problems(self, seq_length: int) -> Iterator[str]:
        """Halves and pairs."""
        left = self.vocab_size - self.noise_vocab_size
        if left < 4:
            yield (
                f"data.synthetic.noise_vocab_size: {self.noise_vocab_size} leaves {left} of vocab_size="
                f"{self.vocab_size} for keys and values; lower it"
            )
        yield from even_problem(left, "data.synthetic.vocab_size: without noise", "half of it are keys")
        yield from pair_problems(seq_length)

    def make(self, draw: Draw, seq_length: int) -> Sample:
        """`seq_length / 2` pairs, the last of a key that came before."""
        half = self._half()
        noise_ids = range(2 * half, 2 * half + self.noise_vocab_size)
        return key_value_pairs(draw.generator(), half, seq_length, noise=self.noise, noise_ids=noise_ids)

    def difficulty(self, sample: Sample) -> np.ndarray:
        """How far back the key stood, in powers of two pairs, noise among them."""
        return pairs_back(sample.tokens)

    def _half(self) -> int:
        return (self.vocab_size - self.noise_vocab_size) // 2
