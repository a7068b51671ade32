"""What the sums of `answers` say: changes with paired intervals, by block and difficulty, as tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsecod_megatron.analysis.intervals import Array, Estimate, Strata, bootstrap, ratio_of_sums, wilson
from sparsecod_megatron.analysis.scores.base import Lines, Number, Result
from sparsecod_megatron.analysis.tasks.items import Items

if TYPE_CHECKING:
    from sparsecod_megatron.analysis.scores.answers import Intervention

METRICS = {"accuracy": (3, 2), "exact_match": (1, 0), "log_likelihood": (4, 0)}
"""Number → which of an item's sums is divided by which, both summed over items."""
ALL = "all"
USEFUL = 0.1
"""Share of the intact accuracy that a useful block is worth, as `usefulness` asks for a tenth of the loss."""
KINDS = {"skip": "is skipped", "swap": "and the next are swapped", "erase": "reads means in place of the context"}
"""Intervention → how a figure's title says it."""


def answers_result(sums: Array, changes: Sequence[Intervention], items: Items, num_layers: int, *, seed: int) -> Result:
    """Everything that `answers` reports.

    Args:
        sums: float64 [N, 1 + I, D, 5], as `answers.collect_sums` gives them.
        changes: the I interventions.
        items: the task.
        num_layers: of the model.
        seed: of the bootstrap over items.
    """
    whole = np.concatenate((sums.sum(axis=2, keepdims=True), sums), axis=2)  # all difficulties together, then each
    strata = single_levels(sums[:, 0, :, 0])
    labels = [ALL, *map(str, items.difficulties)]
    numbers = {
        name: ratio_of_sums(
            np.concatenate((whole[:, :1, :, above], whole[:, 1:, :, above] - whole[:, :1, :, above]), axis=1),
            whole[:, :1, :, below],
            seed=seed,
            strata=strata,
        )
        for name, (above, below) in METRICS.items()
    }
    rows = [
        _row(numbers, labels[level], int(whole[:, 0, level, 0].sum()), place, level, change)
        for place, change in enumerate((None, *changes))
        for level in range(len(labels))
    ]
    kinds = {kind: [place for place, change in enumerate(changes) if change.kind == kind] for kind in KINDS}
    values: dict[str, Any] = {name: numbers[name].at(0, 0).as_dict() for name in METRICS}
    values["useful_share"] = _useful_share(numbers["accuracy"], kinds["skip"])
    values |= _means(whole, changes, kinds, num_layers, seed, strata)
    return Result(
        values=values,
        tables={"answers": rows},
        per_sequence=_per_item(whole, kinds),
        figures=tuple(_figures(rows, kinds, labels)),
        warnings=tuple(_warnings(numbers["exact_match"])),
        num_sequences=len(items),
        num_tokens=int(whole[:, 0, 0, 2].sum()),
    )


def single_levels(answers: Array) -> Strata:
    """The difficulty that each item has, so that resamples keep their numbers.

    None where items have several, or a difficulty has a single item.

    Args:
        answers: [N, D] of each item, by difficulty.
    """
    has = answers > 0
    if (has.sum(axis=1) > 1).any() or (has.sum(axis=0) < 2).any():
        return None
    return has.argmax(axis=1)


def _row(
    numbers: dict[str, Estimate], difficulty: str, answers: int, place: int, level: int, change: Intervention | None
) -> dict[str, Any]:
    """A line of the table: the intact model's numbers, or what a change makes of them."""
    kind, layer = change or (None, None)
    row: dict[str, Any] = {"intervention": kind or "none", "layer": layer, "difficulty": difficulty, "answers": answers}
    for name, estimate in numbers.items():
        value, low, high = estimate.at(place, level)
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return row


def _means(
    whole: Array,
    changes: Sequence[Intervention],
    kinds: dict[str, list[int]],
    num_layers: int,
    seed: int,
    strata: Strata,
) -> dict[str, Any]:
    """Means of changes over all blocks and over the later half, and how the hardest questions differ in the latter."""
    found: dict[str, Any] = {}
    for kind, places in kinds.items():
        late = [place for place in places if changes[place].layer >= num_layers // 2]
        for name, (above, below) in METRICS.items():
            base = whole[:, :1, :, above]
            for label, chosen in ((f"{kind}_{name}", places), (f"{kind}_{name}_second_half", late)):
                if not chosen:
                    continue
                change = (whole[..., above][:, [1 + place for place in chosen]] - base).mean(axis=1)
                mean = ratio_of_sums(change[:, 0], whole[:, 0, 0, below], seed=seed, strata=strata)
                found[label] = mean.at().as_dict()
                if label.endswith("_second_half") and whole.shape[2] > 2:
                    found[f"{label}_harder"] = _harder(change, whole[:, 0, :, below], seed, strata)
    return found


def _useful_share(accuracy: Estimate, skips: Sequence[int]) -> dict[str, Number]:
    """Share of the blocks without which accuracy falls by more than `USEFUL` of itself, with Wilson's interval."""
    intact = accuracy.value[0, 0]
    if not intact > 0:
        return {"value": None, "low": None, "high": None}
    fallen = [-accuracy.value[1 + place, 0] > USEFUL * intact for place in skips]
    return wilson(sum(map(int, fallen)), len(fallen)).as_dict()


def _harder(change: Array, base: Array, seed: int, strata: Strata) -> dict[str, Number]:
    """The change at the largest difficulty minus that at the smallest, [N, 1 + D] each, with its interval."""

    def statistic(weights: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = (weights @ change) / (weights @ base)
        return shares[:, -1] - shares[:, 1]

    return bootstrap(statistic, len(change), seed=seed, strata=strata).at().as_dict()


def _per_item(whole: Array, kinds: dict[str, list[int]]) -> dict[str, list[Number]]:
    """Each item's numbers, for two models to be compared on; every item has an answer."""
    found: dict[str, list[Number]] = {}
    for name, (above, below) in METRICS.items():
        shares = whole[:, :, 0, above] / whole[:, :, 0, below]
        found[name] = shares[:, 0].tolist()
        for kind, places in kinds.items():
            if places:
                changed = shares[:, [1 + place for place in places]] - shares[:, :1]
                found[f"{kind}_{name}"] = changed.mean(axis=1).tolist()
    return found


def _figures(rows: list[dict[str, Any]], kinds: dict[str, list[int]], labels: list[str]) -> list[Lines]:
    """Change of exact match and of log-likelihood by block, a curve for each difficulty."""
    figures = []
    for kind, places in kinds.items():
        for name in ("exact_match", "log_likelihood") if len(places) else ():
            series: dict[str, Sequence[Number]] = {
                label: [row[name] for row in rows if row["intervention"] == kind and row["difficulty"] == label]
                for label in (labels if len(labels) > 2 else labels[:1])
            }
            what = name.replace("_", " ")
            title = f"Change of {what} when block l {KINDS[kind]}"
            figures.append(
                Lines(f"answers_{kind}_{name}", title, [*range(len(places))], series, "layer", what, line=0.0)
            )
    return figures


def _warnings(exact: Estimate) -> list[str]:
    """What exact match cannot tell."""
    intact = exact.at(0, 0)
    if intact.value == 0:
        return ["the intact model says no answer word for word, so exact match cannot fall; log_likelihood tells more"]
    undecided = sum(exact.at(place, 0).contains(0.0) for place in range(1, len(exact.value)))
    if not undecided:
        return []
    total = len(exact.value) - 1
    return [
        f"{undecided} of {total} interventions change exact match by less than this sample can tell; raise --samples"
    ]
