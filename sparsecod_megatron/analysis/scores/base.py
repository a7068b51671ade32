"""What a score is, and what it hands back: numbers, tables, figures and per-sequence values, all plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from sparsecod_megatron.analysis.scores.context import Context

Number = float | None
"""None where a quantity is not defined; never NaN, which JSON cannot hold."""


class Score(Protocol):
    """One score of a model."""

    @property
    def name(self) -> str:
        """As given to `--scores` and used for file names."""
        ...

    def run(self, context: Context) -> Result:
        """Compute it.

        Raises:
            ConfigError: the sample is too small for it.
            ConversionError: the model's architecture does not let it be computed.
        """
        ...


@dataclass(frozen=True)
class HeatMap:
    """A matrix drawn as colours.

    Attributes:
        name: file name without suffix.
        values: [rows, columns]; None is left blank.
        diverging: colours that part at zero, for signed values.
        row_label: what a row is; `column_label` likewise.
    """

    name: str
    title: str
    values: Sequence[Sequence[Number]]
    row_label: str
    column_label: str
    diverging: bool = False

    kind: ClassVar = "heat_map"


@dataclass(frozen=True)
class Bars:
    """One bar per layer (or other item), with its interval where there is one.

    Attributes:
        name: file name without suffix.
        values: [items].
        low: [items] lower ends of the intervals, or empty; `high` likewise.
        line: a horizontal line to compare with, such as a threshold.
    """

    name: str
    title: str
    values: Sequence[Number]
    y_label: str
    x_label: str = "layer"
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    line: float | None = None

    kind: ClassVar = "bars"


@dataclass(frozen=True)
class Lines:
    """Curves over one axis.

    Attributes:
        name: file name without suffix.
        x: [points].
        series: label → [points].
        line: a horizontal line to compare with, such as a threshold.
    """

    name: str
    title: str
    x: Sequence[float]
    series: dict[str, Sequence[Number]]
    x_label: str
    y_label: str
    line: float | None = None

    kind: ClassVar = "lines"


Figure = HeatMap | Bars | Lines


@dataclass(frozen=True)
class Result:
    """What a score found; every value is one that JSON holds.

    Attributes:
        values: global numbers by name; one with an interval is `{"value": …, "low": …, "high": …}`
            (`intervals.Interval.as_dict`). Names that begin with `ref_` are the reference's own numbers.
        tables: file name without suffix → rows, each a dict with the same keys; the first one bears the score's name.
        per_sequence: name → one number for each scored sequence, in the sample's order. What two models share here is
            compared pair by pair.
        figures: what to draw.
        warnings: one sentence each on what the sample cannot tell.
        num_sequences: sequences the numbers come from.
        num_tokens: tokens they come from.
    """

    values: dict[str, Any]
    tables: dict[str, list[dict[str, Any]]]
    per_sequence: dict[str, list[Number]] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    warnings: tuple[str, ...] = ()
    num_sequences: int = 0
    num_tokens: int = 0
