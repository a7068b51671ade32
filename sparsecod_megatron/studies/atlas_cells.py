"""The cells of an atlas: each place against its control, judged, or the reason why there is no number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sparsecod_megatron.studies.atlas_results import Kept
from sparsecod_megatron.studies.atlas_schema import ACTIVATIONS, NO_SPARSITY, PARAMETERS, UNMEASURED, WEIGHTS
from sparsecod_megatron.studies.claims import NOT_SEPARABLE, REFUTED, SUPPORTED, Verdict, judge_all
from sparsecod_megatron.studies.intervals import Mean, mean_over_seeds
from sparsecod_megatron.studies.schema import ClaimConfig, Labels

TOLERANCE = 0.01
"""Relative difference up to which tokens, parameters and operations are equal: budgets are whole steps."""
VARIANCE, USEFULNESS = "out_var_last", "usefulness/mean_log_usefulness"
SCORES = (VARIANCE, "causal/causal", USEFULNESS, "jacobian/jacobian_deviation")
PERPLEXITY, LOG_TIME = "perplexity", "log_seconds_per_token"
EQUALITIES = {
    "perplexity_equal_tokens": "equal tokens",
    "perplexity_equal_parameters": "equal parameters",
    "perplexity_equal_operations": "equal effective operations",
}
"""Columns of Δperplexity, and what is equal in each."""
SPARSITY, OPERATIONS, TIME = "sparsity", "operations_per_token", "time_per_token"
COLUMNS = (*EQUALITIES, *SCORES, SPARSITY, OPERATIONS, TIME)
LOWER, HIGHER = "lower", "higher"


@dataclass(frozen=True)
class Entry:
    """One cell of the table.

    Attributes:
        value: of the place itself; a ratio to the control's of operations and time.
        difference: from the control, paired over seeds; None where nothing is compared.
        p_value: of it; None without two seeds.
        p_holm: corrected for all rows that were tested by this metric.
        verdict: `lower`, `higher` or `not separable`; empty where nothing is compared.
        verdict_holm: the same after correction.
        reason: why there is no number; empty where there is one.
        detail: of the reason, such as both counts of tokens; or what the number is of.
    """

    value: Mean | None = None
    difference: Mean | None = None
    p_value: float | None = None
    p_holm: float | None = None
    verdict: str = ""
    verdict_holm: str = ""
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class AtlasRow:
    """One place of a study beside its control.

    Attributes:
        number: from 1, in the order of the table.
        kind, mechanism, setting: in plain words.
        is_remedy: whether the kind is not a sparsity.
        kept: the file that is shown.
        place, control: of the study's grid.
        match: what the study's budget makes equal.
        sparsity: what it is a share of.
        entries: column → cell.
    """

    number: int
    kind: str
    mechanism: str
    setting: str
    is_remedy: bool
    kept: Kept
    place: str
    control: str | None
    match: str
    sparsity: str
    entries: Mapping[str, Entry]

    @property
    def name(self) -> str:
        """Mechanism and setting."""
        return f"{self.mechanism}, {self.setting}" if self.setting else self.mechanism

    @property
    def tokens(self) -> tuple[float | None, float | None]:
        """Those of the place and of its control."""
        return self.kept.tokens(self.place), None if self.control is None else self.kept.tokens(self.control)


def judged(rows: Sequence[AtlasRow]) -> list[AtlasRow]:
    """The rows with their cells, each metric corrected for all rows that could be tested by it."""
    results: dict[Labels, dict[int, dict[str, float]]] = {
        tuple(_found_at(row, place).items()): {seed: _with_time(found) for seed, found in row.kept.cells[place].items()}
        for row in rows
        for place in _places(row)
    }
    verdicts: dict[tuple[str, int], Verdict] = {}
    for metric in (PERPLEXITY, *SCORES, LOG_TIME):
        compared = [row for row in rows if _is_comparable(row, metric)]
        claims = [
            ClaimConfig(str(row.number), metric, higher=_found_at(row, row.place), lower=_found_at(row, row.control))
            for row in compared
        ]
        for row, verdict in zip(compared, judge_all(claims, results), strict=True):
            verdicts[metric, row.number] = verdict
    return [replace(row, entries=_entries(row, verdicts)) for row in rows]


def _places(row: AtlasRow) -> list[str]:
    return [row.place] if row.control is None else [row.place, row.control]


def _found_at(row: AtlasRow, place: str | None) -> dict[str, str]:
    """Axis → label of a place among those of all studies; files keep their seeds apart."""
    return {"row": f"{row.kept.path} {place}"}


def _with_time(metrics: Mapping[str, float]) -> dict[str, float]:
    speed = metrics.get("tokens_per_s")
    return {**metrics, **({LOG_TIME: -math.log(speed)} if speed else {})}


def _is_comparable(row: AtlasRow, metric: str) -> bool:
    """Whether a metric may be compared: perplexities and scores at equal tokens or operations, time always."""
    if row.control is None:
        return False
    return metric == LOG_TIME or not _unequal(row, "tokens") or not _operations_differ(row)


def _unequal(row: AtlasRow, metric: str) -> str:
    """Both numbers where the place's is not the control's; empty where they are equal."""
    assert row.control is not None
    own, other = row.kept.mean(row.place, metric), row.kept.mean(row.control, metric)
    if own is None or other is None:
        return "not recorded"
    return "" if abs(own - other) <= TOLERANCE * other else f"{own:,.0f} against {other:,.0f}"


def _operations_differ(row: AtlasRow) -> str:
    """How effective operations differ; empty where they are equal."""
    if row.match == "effective_compute":
        return ""
    if row.sparsity == WEIGHTS:
        return "dead weights take no part in them, and the study gave both the same tokens"
    return _unequal(row, "train_flops")


def _entries(row: AtlasRow, verdicts: Mapping[tuple[str, int], Verdict]) -> dict[str, Entry]:
    found = {name: _perplexity(row, name, verdicts.get((PERPLEXITY, row.number))) for name in EQUALITIES}
    found |= {metric: _compared(row, metric, verdicts.get((metric, row.number))) for metric in SCORES}
    return found | {
        SPARSITY: _sparsity(row),
        OPERATIONS: _operations(row),
        TIME: _time(row, verdicts.get((LOG_TIME, row.number))),
    }


def _perplexity(row: AtlasRow, column: str, verdict: Verdict | None) -> Entry:
    if row.control is None:
        return Entry(reason="the study has no control")
    tokens, parameters = _unequal(row, "tokens"), _unequal(row, "parameters_total")
    operations = _operations_differ(row)
    if column == "perplexity_equal_operations":
        if operations:
            return Entry(reason="effective operations differ", detail=operations)
    elif tokens:
        return Entry(reason="tokens differ", detail=tokens)
    elif column == "perplexity_equal_parameters" and parameters:
        return Entry(reason="parameters differ", detail=parameters)
    return _compared(row, PERPLEXITY, verdict)


def _compared(row: AtlasRow, metric: str, verdict: Verdict | None) -> Entry:
    value = _mean(row, metric)
    if value is None:
        measured = any(metric in found for cells in row.kept.cells.values() for found in cells.values())
        return Entry(reason="no seed has it" if measured else "the study did not measure it", detail=metric)
    if row.control is None:
        return Entry(value, detail="the study has no control")
    if verdict is None:
        return Entry(value, reason="neither tokens nor operations are equal")
    if verdict.difference is None:
        return Entry(value, reason="no seed has it here and at the control", detail=metric)
    return Entry(value, verdict.difference, verdict.p_value, verdict.p_holm, *_words(verdict))


def _words(verdict: Verdict) -> list[str]:
    """The plain verdict and the corrected one."""
    words = {NOT_SEPARABLE: NOT_SEPARABLE, SUPPORTED: HIGHER, REFUTED: LOWER}
    return [words[verdict.verdict], words[verdict.verdict_holm]]


def _mean(row: AtlasRow, metric: str) -> Mean | None:
    found = [metrics[metric] for metrics in row.kept.cells[row.place].values() if metric in metrics]
    return mean_over_seeds(found) if found else None


def _sparsity(row: AtlasRow) -> Entry:
    if row.sparsity == NO_SPARSITY:
        return Entry(reason="not a sparsity")
    if row.sparsity == UNMEASURED:
        return Entry(reason="studies measure no share of it")
    shares = {
        WEIGHTS: (
            (lambda m: m["live_share_end"], "of the weights that may be zero, at the end"),
            (lambda m: m["parameters_mean_live"] / m["parameters_non_embedding"], "of all but embeddings, on average"),
        ),
        ACTIVATIONS: ((lambda m: m["act_nonzero_end"], "of the MLP's units, at the end"),),
        PARAMETERS: ((lambda m: m["parameters_active"] / m["parameters_total"], "of the parameters, per token"),),
    }[row.sparsity]
    for share, what in shares:
        found = []
        for metrics in row.kept.cells[row.place].values():
            try:
                found.append(1 - share(metrics))
            except KeyError:
                continue
        if found:
            return Entry(mean_over_seeds(found), detail=what)
    return Entry(reason="its results do not record it")


def _operations(row: AtlasRow) -> Entry:
    """Training operations per token over the control's, exact: the same for all seeds."""
    if row.control is None:
        return Entry(reason="the study has no control")
    shares = []
    for place in (row.place, row.control):
        flops, tokens = row.kept.mean(place, "train_flops"), row.kept.tokens(place)
        if flops is None or not tokens:
            return Entry(reason="its results do not record it", detail="train_flops, tokens")
        shares.append(flops / tokens)
    return Entry(Mean(shares[0] / shares[1], None, None, 1))


def _time(row: AtlasRow, verdict: Verdict | None) -> Entry:
    """Seconds per token over the control's: the exponential of the mean difference of logarithms, and of its ends."""
    if row.control is None:
        return Entry(reason="the study has no control")
    if verdict is None or verdict.difference is None:
        return Entry(reason="its results do not record it", detail="tokens_per_s")
    mean = verdict.difference
    low, high = (None if end is None else math.exp(min(end, 700.0)) for end in (mean.low, mean.high))
    ratio = Mean(math.exp(mean.value), low, high, mean.count)
    return Entry(ratio, None, verdict.p_value, verdict.p_holm, *_words(verdict))
