"""Memorisation: one table of keys and values for the whole run, which only weights can hold."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparsecod_megatron.config.fields import at_least, between
from sparsecod_megatron.data.synthetic.knowledge import Knowledge, Piece
from sparsecod_megatron.data.synthetic.recall import key_value_words, keys_and_values
from sparsecod_megatron.data.synthetic.task import Draw, Sample, Task, even_problem


@dataclass
class Memorization(Task):
    """MAD's memorisation. Held-out samples ask for the same table, for that is what there is to know.

    Source: as `Recall`. Deviation: every key's value is drawn by itself; theirs are a permutation, whose last value
    follows from the others, so that the bits of a table would not be keys · log₂ values.
    """

    vocab_size: int = at_least(4, 256)
    """Keys, values, and the sign after a key, where its value is to be said."""
    facts_seed: int = between(0, 2**31, 0)
    """Seed of the table; `train.seed` decides only which keys come when."""

    def vocabulary(self) -> list[str]:
        """Keys, values, sign."""
        return [*key_value_words(*self._sizes()), "insert"]

    def problems(self, seq_length: int) -> Iterator[str]:
        """Pairs."""
        yield from even_problem(seq_length, "data.seq_length", "a sample consists of pairs")

    @functools.cached_property
    def facts(self) -> np.ndarray:
        """Value of each key, as an id, `[keys]`."""
        keys, values = self._sizes()
        return keys + np.random.default_rng(self.facts_seed).integers(values, size=keys)

    def make(self, draw: Draw, seq_length: int) -> Sample:
        """Keys, each with the sign after it, where the answer is said."""
        keys, values = self._sizes()
        asked = draw.generator().integers(keys, size=seq_length // 2)
        tokens = np.full(seq_length, keys + values)
        tokens[::2] = asked
        labels, is_answer = tokens.copy(), np.zeros(seq_length, dtype=bool)
        labels[1::2], is_answer[1::2] = self.facts[asked], True
        return Sample(tokens, labels, is_answer)

    def knowledge(self) -> Knowledge:
        """keys · log₂ values bits."""
        keys, values = self._sizes()
        return Knowledge(keys, {"answer": Piece(tokens=1, prior=math.log(values))})

    def _sizes(self) -> tuple[int, int]:
        """Numbers of keys and values."""
        return keys_and_values(self.vocab_size - 1)
