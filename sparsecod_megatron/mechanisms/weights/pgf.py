"""Progressive gradient flow: n:m sparsity that comes by a fading factor (MdGf) or by ever harsher patterns (SdGf).

MdGf computes with W ⊙ (m + (1 − m) β), β falling to 0 between a dense and a binary phase; the chain rule then restricts
the gradient of masked weights by β, as the paper argues (`gradient: chain`). Its code leaves the gradient whole
(`gradient: ste`). SdGf changes the pattern at equal intervals: (m − 1):m, m/2:m, m/4:m, … down to n:m.

Source: Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers (arXiv
2402.04744).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.fields import above, choice
from sparsecod_megatron.mechanisms.weights.engine import masking
from sparsecod_megatron.mechanisms.weights.engine.patterns import parsed_pattern
from sparsecod_megatron.mechanisms.weights.engine.places import Piece
from sparsecod_megatron.mechanisms.weights.engine.window import MaskedWindow
from sparsecod_megatron.mechanisms.weights.ste import Ste
from sparsecod_megatron.seams.plugin import StepContext, StepParts


@dataclass
class Pgf(Ste):
    """Settings of the mechanism."""

    name: ClassVar[str] = "pgf"

    flow: str = choice("mdgf", "sdgf")
    """`mdgf`: masked weights fade. `sdgf`: patterns get harsher."""
    fade: str = choice("linear", "exponential")
    """How β falls in `mdgf`: 1 − u, or exp(−rate · u), u from 0 to 1 between the phases."""
    rate: float = above(0, 5.0)
    """How fast `exponential` falls."""
    gradient: str = choice("chain", "ste")
    """`chain`: of a masked weight β times the gradient. `ste`: the whole."""
    dense_until: float = field(default=0.1, metadata={"minimum": 0, "below": 1})
    """Share of the steps without masks."""
    binary_from: float = field(default=0.9, metadata={"above": 0, "maximum": 1})
    """Share of the steps from which on the mask is n:m and nothing fades any more."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """And phases in a wrong order."""
        yield from super().problems(config)
        if self.dense_until >= self.binary_from:
            until, last = self.key("dense_until"), self.key("binary_from")
            yield f"{until}: {self.dense_until} is not below {last}={self.binary_from}; lower it"

    def stages(self) -> list[int]:
        """n of each pattern in turn, m being the same: m − 1, then m halved until n is reached."""
        found = parsed_pattern(self.pattern)
        assert found is not None, self.pattern
        n, m = found
        halves = [m >> power for power in range(1, m.bit_length())]
        return [*dict.fromkeys([m - 1, *(half for half in halves if n < half < m - 1), n])]

    def way(self, context: StepContext) -> float:
        """How far the run is from the dense phase to the binary one: below 0, 0 to 1, 1."""
        past = (context.step - 1) / context.last_step - self.dense_until
        return min(past / (self.binary_from - self.dense_until), 1.0) if past >= 0 else -1.0

    def n_and_m(self, context: StepContext) -> tuple[int, int]:
        """Dense at first; with `sdgf` by stages."""
        n, m = super().n_and_m(context)
        way = self.way(context)
        if way < 0:
            return m, m
        if self.flow == "mdgf" or way >= 1:
            return n, m
        stages = self.stages()
        return stages[min(math.floor(way * len(stages)), len(stages) - 1)], m

    def dead_factor(self, context: StepContext) -> float:
        """β."""
        way = self.way(context)
        if self.flow == "sdgf" or way >= 1:
            return 0.0
        return 1 - max(way, 0.0) if self.fade == "linear" else math.exp(-self.rate * max(way, 0.0))

    def plugin(self, parts: StepParts) -> MaskedWindow:
        """Puts the masks on."""
        return FadingWindow(self, parts)


class FadingWindow(MaskedWindow):
    """With β in the gradient.

    Args:
        settings: of the run.
        parts: what it acts on.
    """

    settings: Pgf

    def change_gradient(self, piece: Piece, dead: Tensor, context: StepContext) -> None:
        """g ⊙ (m + (1 − m) β)."""
        if self.settings.gradient == "chain":
            masking.scale_(piece.gradient, dead, self.settings.dead_factor(context))
