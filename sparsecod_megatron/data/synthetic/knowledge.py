"""How many bits of the facts in a task a model knows, from its loss on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """One part of every record, all tokens of which are answers of one class.

    Attributes:
        tokens: that it takes in a record.
        prior: nats of the part where each of its values is equally likely: its loss if nothing is known.
        least: nats below which its loss cannot fall, because the sample does not say which record comes.
    """

    tokens: int
    prior: float
    least: float = 0.0


@dataclass(frozen=True)
class Knowledge:
    """`records` facts of one form.

    Attributes:
        records: their number N.
        pieces: by class of answers.

    Source: Allen-Zhu and Li (arXiv 2404.05405), section 4, written from memory: a model with losses p₁ of a name and p₂
    of a person's values, in nats, knows N log₂(N₀/e^p₁) + N log₂(S₀/e^p₂) bits, at most N log₂(N₀/N) + N log₂ S₀.
    """

    records: int
    pieces: Mapping[str, Piece]

    def bits(self, losses: Mapping[str, float]) -> float:
        """Bits known; 0 for a model that finds all values equally likely, below 0 for one that is worse.

        Args:
            losses: mean cross entropy of a token, in nats, by class.
        """
        known = sum(piece.prior - piece.tokens * losses[name] for name, piece in self.pieces.items())
        return self.records * known / math.log(2)

    def most_bits(self) -> float:
        """Bits that a table of all records knows."""
        return self.records * sum(piece.prior - piece.least for piece in self.pieces.values()) / math.log(2)
