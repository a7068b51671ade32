"""Which tokens need which block: the share of tokens whose loss rises when the block is skipped, by kind of token.

A mean over tokens hides that one block serves few tokens much and another all a little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecod_megatron.analysis.intervals import Array, ratio_of_sums
from sparsecod_megatron.analysis.scores.base import Lines, Number, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.hf.calls import Replay, Trace, token_losses

EPSILON = 0.1
"""Nats by which a token's loss has to rise or fall to count."""
ALL, FREQUENT, RARE, ANSWERS = "all", "frequent", "rare", "answers"
Members = Callable[[Tensor, slice], Tensor]
"""From labels [B, T] and the rows that they are to how far each belongs to each class, float64 [B, T, classes]."""


class TokenSkip:
    """Shares of tokens that need a block, and that are better without it.

    Args:
        epsilon: nats.
    """

    name = "token_skip"

    def __init__(self, *, epsilon: float = EPSILON) -> None:
        self._epsilon = epsilon

    def run(self, context: Context) -> Result:
        """Compute both for every block and class of tokens; with a task, for its answers too."""
        text, classes = context.own("all")[:, 1:], label_classes(context)
        parts = [Part([*classes], _shares(context, text, partial(_members, classes), self._epsilon))]
        if context.items is not None:
            given, level = context.of_items(context.items), context.items.level
            labels = given.own_rows(context.items.labels)
            asked = given.own_rows(level >= 0)[..., None].double()
            parts.append(Part([ANSWERS], _shares(given, labels, lambda _labels, rows: asked[rows], self._epsilon)))
        return _result(parts, self._epsilon, context)


class Part(NamedTuple):
    """Classes of tokens that were seen in one sample.

    Attributes:
        classes: names.
        sums: tokens, then of each block those that need it and those that are better without it, [N, 1 + 2 L, classes].
    """

    classes: list[str]
    sums: Array


def _shares(given: Context, labels: Tensor, members: Members, epsilon: float) -> Array:
    """`Part.sums` of a context's windows, whose labels [own windows, T] these are. Collective over the processes."""
    found = (
        (_changes(given.replay, trace, labels[rows], members(labels[rows], rows), epsilon),)
        for trace, rows in given.traces_with_rows("all", title=TokenSkip.name)
    )
    (sums,) = given.collect("all", found)
    return sums.numpy()


def _members(classes: dict[str, Tensor], labels: Tensor, _rows: slice) -> Tensor:
    return torch.stack([each[labels] for each in classes.values()], dim=-1).double()


def label_classes(context: Context) -> dict[str, Tensor]:
    """Class → bool [V], whether a label of that id belongs to it.

    The most frequent ids that make up half of the sample's labels are frequent, all others rare; further classes are
    the context's (`token_classes`).
    """
    labels = context.windows[:, 1:].flatten()
    size = max(int(labels.max()) + 1, *(len(members) for members in context.token_classes.values()), 1)
    counts = torch.bincount(labels, minlength=size)
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    frequent = torch.zeros(size, dtype=torch.bool)
    frequent[order[2 * before < len(labels)]] = True
    found = {ALL: torch.ones(size, dtype=torch.bool), FREQUENT: frequent, RARE: ~frequent}
    return found | {name: F.pad(each, (0, size - len(each))) for name, each in context.token_classes.items()}


@torch.no_grad()
def _changes(replay: Replay, trace: Trace, labels: Tensor, members: Tensor, epsilon: float) -> Tensor:
    """`Part.sums` of a micro-batch whose tokens belong to classes, float64 [B, T, classes]."""
    num_layers, wanted = len(trace.calls), labels.to(trace.tokens.device)
    base = token_losses(replay.logits(trace, trace.hidden[-1]), wanted)
    counted = [torch.ones_like(base)]
    for layer in range(num_layers):
        hidden = replay.after(trace, range(layer + 1, num_layers), trace.hidden[layer])
        change = token_losses(replay.logits(trace, hidden), wanted) - base
        counted += [(change > epsilon).double(), (change < -epsilon).double()]
    return torch.einsum("bkt,btc->bkc", torch.stack(counted, dim=1), members)


def _result(parts: Sequence[Part], epsilon: float, context: Context) -> Result:
    """Tables and figures; the first part's first class is all tokens of the text."""
    rows, values = [], dict[str, Any]()
    for classes, sums in parts:
        blocks = ratio_of_sums(sums[:, 1::2].sum(axis=1), sums[:, 0], seed=context.seed)
        values |= {f"blocks_needed_{label}": blocks.at(place).as_dict() for place, label in enumerate(classes)}
        rows += _rows(classes, sums, context.seed)
    whole = parts[0].sums[..., 0]
    needs, tokens = whole[:, 1::2], whole[:, 0]
    for label, share in ((TokenSkip.name, needs), (f"{TokenSkip.name}_second_half", needs[:, needs.shape[1] // 2 :])):
        values[label] = ratio_of_sums(share.mean(axis=1), tokens, seed=context.seed).at().as_dict()
    seen = {row["tokens_of"]: row["tokens"] for row in rows}
    curves: dict[str, Sequence[Number]] = {
        label: [row["needs"] for row in rows if row["tokens_of"] == label] for label, count in seen.items() if count
    }
    title = f"Tokens whose loss rises by more than {epsilon:g} nats without the block"
    layers = [*range(needs.shape[1])]
    return Result(
        values={**values, "epsilon": epsilon},
        tables={TokenSkip.name: rows},
        per_sequence={
            TokenSkip.name: (needs.mean(axis=1) / tokens).tolist(),
            "blocks_needed_all": (needs.sum(axis=1) / tokens).tolist(),
        },
        figures=(Lines(TokenSkip.name, title, layers, curves, "layer", "share of tokens"),),
        warnings=tuple(f"the sample has no token of class {label}" for label, count in seen.items() if not count),
        num_sequences=context.num_sequences,
        num_tokens=int(tokens.sum()),
    )


def _rows(classes: Sequence[str], sums: Array, seed: int) -> list[dict[str, Any]]:
    shares, rows = ratio_of_sums(sums[:, 1:], sums[:, :1], seed=seed), []
    for layer in range(sums.shape[1] // 2):
        for place, label in enumerate(classes):
            needs, better = shares.at(2 * layer, place), shares.at(2 * layer + 1, place)
            row = {"layer": layer, "tokens_of": label, "tokens": int(sums[:, 0, place].sum())}
            row |= {"needs": needs.value, "low": needs.low, "high": needs.high}
            row |= {"better_without": better.value, "better_low": better.low, "better_high": better.high}
            rows.append(row)
    return rows
