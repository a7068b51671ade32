"""Numbers of single blocks as a study names them: `SCORE/VALUE/BLOCK`, of the scores that ask what a block is for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparsecod_megatron.analysis.scores.answer_tables import ALL, METRICS

Row = Mapping[str, Any]
Ends = dict[str, Any]


def block_metrics(tables: Mapping[str, Sequence[Row]]) -> Iterator[tuple[str, Ends]]:
    """Name of every number of a block, with the ends of its interval; of all difficulties and tokens together.

    Args:
        tables: of one score, as `scores.json` has them; those of other scores have no such numbers.
    """
    for row in tables.get("answers", ()):
        if row["difficulty"] == ALL and row["layer"] is not None:
            for name in METRICS:
                place = f"answers/{row['intervention']}_{name}/{row['layer']}"
                yield place, _ends(row, name, f"{name}_low", f"{name}_high")
    for row in tables.get("integrated_gradients", ()):
        if row["difficulty"] == ALL:
            yield f"integrated_gradients/integrated_gradients/{row['layer']}", _ends(row, "value", "low", "high")
    for row in tables.get("token_skip", ()):
        if row["tokens_of"] == ALL:
            yield f"token_skip/needs/{row['layer']}", _ends(row, "needs", "low", "high")
            ends = _ends(row, "better_without", "better_low", "better_high")
            yield f"token_skip/better_without/{row['layer']}", ends


def _ends(row: Row, *keys: str) -> Ends:
    return dict(zip(("value", "low", "high"), (row[key] for key in keys), strict=True))


def by_block(metrics: Mapping[str, float], name: str) -> list[float]:
    """`SCORE/VALUE` of every block, from a cell's metrics; nothing where it was not measured."""
    found: list[float] = []
    while (place := f"{name}/{len(found)}") in metrics:
        found.append(metrics[place])
    return found
