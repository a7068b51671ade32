"""Selective copying: tokens among blanks, to be said again in their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.data.synthetic.task import Draw, Sample, Task


@dataclass
class SelectiveCopying(Task):
    """MAD's selective copying. A constant answer is right one time in `vocab_size − 2`.

    Source: as `Recall`. Deviation: blanks may stand anywhere, and where they stand follows the seed; theirs never come
    after the last token to copy, and are drawn from NumPy's global generator.
    """

    vocab_size: int = at_least(3, 16)
    """Tokens to copy, a blank, and the sign to begin."""
    num_tokens_to_copy: int = at_least(1, 16)

    def vocabulary(self) -> list[str]:
        """Tokens, blank, sign."""
        return [*(f"t{number}" for number in range(self.vocab_size - 2)), "blank", "copy"]

    def problems(self, seq_length: int) -> Iterator[str]:
        """Room for the tokens, the sign and the answers."""
        needed = 2 * self.num_tokens_to_copy + 1
        if seq_length < needed:
            yield (
                f"data.synthetic.num_tokens_to_copy: {self.num_tokens_to_copy} takes {needed} tokens, above "
                f"data.seq_length={seq_length}; lower it"
            )

    def make(self, draw: Draw, seq_length: int) -> Sample:
        """Tokens among blanks, the sign, and a blank for every answer, where the answer is said."""
        generator, count = draw.generator(), self.num_tokens_to_copy
        room = seq_length - count - 1
        copied = generator.integers(self.vocab_size - 2, size=count)
        tokens = np.full(seq_length, self.vocab_size - 2)
        tokens[np.sort(generator.choice(room, size=count, replace=False))] = copied
        tokens[room] = self.vocab_size - 1
        labels, is_answer = tokens.copy(), np.zeros(seq_length, dtype=bool)
        labels[room + 1 :], is_answer[room + 1 :] = copied, True
        return Sample(tokens, labels, is_answer)
