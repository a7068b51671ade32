"""The first lines of an atlas: which kinds of sparsity mitigate the curse of depth here, decided by the table alone.

A setting mitigates it where the last layer's variance is separably lower than the control's and its blocks are
separably more useful. Settings count that were compared at equal tokens; a mechanism is named with how many of its
settings did so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sparsecod_megatron.studies.atlas_cells import (
    EQUALITIES,
    HIGHER,
    LOWER,
    USEFULNESS,
    VARIANCE,
    AtlasRow,
)
from sparsecod_megatron.studies.table import amount

MITIGATES, DAMPS_LESS_USEFUL, DAMPS, USEFUL, NEITHER = (
    "mitigates",
    "damps, less useful",
    "damps alone",
    "useful alone",
    "neither",
)
"""What a setting does; `answer` says it in words."""
_EQUAL_TOKENS = next(iter(EQUALITIES))


def effect(row: AtlasRow, *, is_corrected: bool = False) -> str:
    """What a row says of variance and usefulness: one of the five words; empty where it does not count.

    Args:
        row: of the atlas.
        is_corrected: by the verdicts after Holm's correction.
    """
    variance, useful = row.entries[VARIANCE], row.entries[USEFULNESS]
    if row.entries[_EQUAL_TOKENS].reason or variance.difference is None or useful.difference is None:
        return ""
    of_variance = variance.verdict_holm if is_corrected else variance.verdict
    of_use = useful.verdict_holm if is_corrected else useful.verdict
    if of_variance != LOWER:
        return USEFUL if of_use == HIGHER else NEITHER
    return MITIGATES if of_use == HIGHER else DAMPS_LESS_USEFUL if of_use == LOWER else DAMPS


def answer(rows: Sequence[AtlasRow]) -> list[str]:
    """Paragraphs; the first is of sparsity, the second of remedies, the last says what was counted."""
    counted = [row for row in rows if effect(row)]
    sparse, others = ([row for row in counted if row.is_remedy == wanted] for wanted in (False, True))
    found = [
        f"**Which kinds of sparsity mitigate the curse of depth at this scale ({_scale(counted)})? "
        f"{_list(sparse, MITIGATES)}.** Which do not: only the variance falls, usefulness cannot be told apart, with "
        f"{_list(sparse, DAMPS)}. The variance falls and blocks become *less* useful with "
        f"{_list(sparse, DAMPS_LESS_USEFUL)}. Blocks become more useful without less variance with "
        f"{_list(sparse, USEFUL)}. Neither with {_list(sparse, NEITHER)}."
    ]
    if others:
        found.append(
            f"What is not sparsity, beside it: both with {_list(others, MITIGATES)}; only the variance falls with "
            f"{_list(others, DAMPS)}; it falls and blocks become less useful with {_list(others, DAMPS_LESS_USEFUL)}; "
            f"only more useful with {_list(others, USEFUL)}; neither with {_list(others, NEITHER)}."
        )
    mitigating = [row for row in counted if effect(row) == MITIGATES]
    better = sum(row.entries[_EQUAL_TOKENS].verdict == LOWER for row in mitigating)
    corrected = [row.name for row in counted if effect(row, is_corrected=True) == MITIGATES]
    found.append(
        f"A setting mitigates where, against its own study's control, seed by seed, the last layer's variance is "
        f"separably lower and the mean logarithm of usefulness separably higher; {better} of these {len(mitigating)} "
        f"also have a separably lower perplexity. After Holm's correction of each metric for all rows that were tested "
        f"by it, {', '.join(corrected) or 'none'} is left of them. {len(counted)} of {len(rows)} rows count here; the "
        f"others have unequal tokens or no control."
    )
    return found


def _scale(rows: Iterable[AtlasRow]) -> str:
    """Parameters and tokens of what is compared, as ranges."""
    rows = list(rows)
    if not rows:
        return "nothing was compared"
    parameters = [value for row in rows if (value := row.kept.mean(row.place, "parameters_total")) is not None]
    tokens = [value for row in rows if (value := row.tokens[0]) is not None]
    return f"{_range(parameters)} parameters, {_range(tokens)} tokens"


def _range(values: Sequence[float]) -> str:
    if not values:
        return "unknown"
    low, high = amount(min(values)), amount(max(values))
    return low if low == high else f"{low} to {high}"


def _list(rows: Sequence[AtlasRow], wanted: str) -> str:
    """Mechanisms of which settings have this effect, each with how many of them."""
    groups: dict[tuple[str, str], list[AtlasRow]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.mechanism), []).append(row)
    found = []
    for (kind, mechanism), of_mechanism in groups.items():
        number = sum(effect(row) == wanted for row in of_mechanism)
        if number:
            name = mechanism if kind == mechanism or kind in mechanism else f"{mechanism} [{kind}]"
            found.append(f"{name} ({number} of {len(of_mechanism)})")
    return ", ".join(found) or "none"
