"""Fuzzy recall: in-context recall whose keys and values are several tokens long, each of its own length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.data.synthetic.recall import key_value_words, keys_and_values
from sparsecod_megatron.data.synthetic.task import Draw, Sample, Task


@dataclass
class FuzzyRecall(Task):
    """MAD's fuzzy in-context recall. Held-out samples have keys of the greatest length only, as theirs.

    Source: as `Recall`. Deviation: the pair asked for at the end is any that came before; theirs is put at a
    place drawn for it.
    """

    vocab_size: int = at_least(5, 16)
    """Keys, values, and one id that fills up the beginning."""
    motif_size: int = at_least(1, 3)
    """Longest key and value, in tokens that differ from each other."""

    def vocabulary(self) -> list[str]:
        """Keys, values, filling."""
        return [*key_value_words(*self._sizes()), "pad"]

    def problems(self, seq_length: int) -> Iterator[str]:
        """Room for keys of that length, and for a pair and its question."""
        keys, _ = self._sizes()
        if self.motif_size > keys:
            yield (
                f"data.synthetic.motif_size: {self.motif_size} is above the {keys} keys of vocab_size="
                f"{self.vocab_size}; lower it"
            )
        if seq_length < 4 * self.motif_size:
            least = 4 * self.motif_size
            yield f"data.seq_length: {seq_length} holds no pair and its question; use at least {least}"

    def make(self, draw: Draw, seq_length: int) -> Sample:
        """Pairs as long as there is room, then one that came before."""
        generator, (keys, values) = draw.generator(), self._sizes()
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        tokens: list[int] = []
        answers: list[bool] = []

        def add(key: tuple[int, ...], value: tuple[int, ...], *, again: bool) -> None:
            tokens.extend(key + value)
            answers.extend([False] * len(key) + [again] * len(value))

        while True:
            size = self.motif_size if draw.held_out else int(generator.integers(1, self.motif_size + 1))
            key = tuple(generator.permutation(keys)[:size].tolist())
            size = int(generator.integers(1, self.motif_size + 1))
            value = tuple((keys + generator.permutation(values)[:size]).tolist())
            again, value = key in known, known.get(key, value)
            if len(tokens) + len(key) + len(value) > seq_length - 2 * self.motif_size:
                break
            known[key] = value
            add(key, value, again=again)
        key = list(known)[int(generator.integers(len(known)))]
        add(key, known[key], again=True)
        missing = seq_length - len(tokens)
        filled = np.array([keys + values] * missing + tokens)
        is_answer = np.array([False] * missing + answers)
        return Sample(filled, np.append(filled[1:], filled[-1]), np.append(is_answer[1:], False))

    def _sizes(self) -> tuple[int, int]:
        """Numbers of key tokens and of value tokens."""
        return keys_and_values(self.vocab_size - 1)
