"""Integrated gradients over layers: how much of an answer's log-likelihood each block's branch accounts for.

Skipping a block asks what is lost without it while all others work as trained; these numbers add up instead. Every
branch is scaled by α_l, h_{l+1} = h_l + α_l (block_l(h_l) − h_l), and all α go from 0, where the embeddings meet the
head, to 1, the model. Layer l's share of F(1) − F(0) is ∫ ∂F/∂α_l along that line, and all shares add up to it
(completeness), which is checked on every sample.

Source: M. Sundararajan, A. Taly and Q. Yan, "Axiomatic Attribution for Deep Networks", arXiv 1703.01365. R. Csordás et
al. (arXiv 2505.13898) move one layer's output from its mean to its value; such numbers do not add up over layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparsecod_megatron.analysis.intervals import Array, mean_interval
from sparsecod_megatron.analysis.scores.answer_tables import ALL, single_levels
from sparsecod_megatron.analysis.scores.base import Bars, Lines, Number, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.scores.line_integral import MAX_SPLITS, integrate
from sparsecod_megatron.analysis.tasks.items import Items
from sparsecod_megatron.hf.calls import Replay, Trace

INCOMPLETE = 0.01
"""Share of Σ |attribution| that the integral may miss before a warning says so."""


class IntegratedGradients:
    """Attribution of every block, in nats per answered item.

    Args:
        max_splits: how often the integral of an item may be refined (`integrate`).
    """

    name = "integrated_gradients"

    def __init__(self, *, max_splits: int = MAX_SPLITS) -> None:
        self._max_splits = max_splits

    def run(self, context: Context) -> Result:
        """Compute it for every block and difficulty.

        Raises:
            ConfigError: no task was given.
        """
        items = context.items_for(self.name)
        given = context.of_items(items)
        levels, labels = given.own_rows(items.level), given.own_rows(items.labels)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for trace, rows in given.traces_with_rows("all", title=self.name):
                asked = _Asked(given.replay, trace, labels[rows], levels[rows])
                ends = asked.ends()
                shares = integrate(asked.gradients, asked.values, ends=ends, max_splits=self._max_splits)
                yield shares.cpu(), ends.cpu()

        shares, ends = (column.numpy() for column in given.collect("all", batches()))
        return _result(shares, ends, items, seed=context.seed)


class _Asked:
    """The log-likelihood of a micro-batch's answers, by the scales of its blocks."""

    def __init__(self, replay: Replay, trace: Trace, labels: Tensor, level: Tensor) -> None:
        self._replay, self._trace = replay, trace
        device = trace.tokens.device
        self._asked, self._labels = (level >= 0).to(device), labels.to(device)
        self._num_layers = len(trace.calls)

    def _likelihood(self, scales: Tensor) -> Tensor:
        """[B] nats, of scales [L, B]."""
        replay, trace, hidden = self._replay, self._trace, self._trace.hidden[0]

        def scaled(before: Tensor, scale: Tensor, layer: int) -> Tensor:
            return before + scale[:, None, None].to(before.dtype) * (replay.run_block(trace, layer, before) - before)

        for layer in range(self._num_layers):  # a block's activations are made again when its gradient is due
            hidden = checkpoint(scaled, hidden, scales[layer], layer, use_reentrant=False)
        rows, wanted = self._asked.nonzero()[:, 0], self._labels[self._asked]
        chosen = replay.logits(trace, hidden)[self._asked].double().log_softmax(dim=-1).gather(-1, wanted[:, None])
        return chosen.new_zeros(len(self._asked)).index_add(0, rows, chosen[:, 0])

    def gradients(self, places: Tensor) -> Tensor:
        """[B, L] float64, with all scales of an item at its place [B]."""
        scales = places.expand(self._num_layers, -1).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self._likelihood(scales).sum(), scales)
        return gradient.T

    @torch.no_grad()
    def values(self, places: Tensor) -> Tensor:
        """[B] log-likelihoods, float64, with all scales of an item at its place [B]."""
        return self._likelihood(places.expand(self._num_layers, -1))

    def ends(self) -> Tensor:
        """[B, 2] log-likelihoods with every scale 0, and 1."""
        line = torch.tensor([0.0, 1.0], dtype=torch.float64, device=self._asked.device)
        return torch.stack([self.values(place.expand(len(self._asked))) for place in line], dim=1)


def _result(shares: Array, ends: Array, items: Items, *, seed: int) -> Result:
    """Tables and figures of attributions [N, L] and ends [N, 2]."""
    gain, num_layers = ends[:, 1] - ends[:, 0], shares.shape[1]
    has = np.stack([(items.level.numpy() == level).any(axis=1) for level in range(len(items.difficulties))], axis=1)
    groups = {ALL: np.full(len(shares), True)}
    if single_levels(has.astype(np.float64)) is not None and has.shape[1] > 1:
        groups |= {str(name): has[:, level] for level, name in enumerate(items.difficulties)}
    found = {label: mean_interval(shares[members], seed=seed) for label, members in groups.items()}
    rows = [
        {"layer": layer, "difficulty": label, **estimate.at(layer).as_dict()}
        for label, estimate in found.items()
        for layer in range(num_layers)
    ]
    late = shares[:, num_layers // 2 :].sum(axis=1)
    gap = shares.sum(axis=1) - gain
    missed = float(np.abs(gap).sum() / np.abs(shares).sum()) if shares.any() else 0.0
    values = {
        "integrated_gradients": mean_interval(shares.mean(axis=1), seed=seed).at().as_dict(),
        "integrated_gradients_second_half": mean_interval(late, seed=seed).at().as_dict(),
        "log_likelihood_gain": mean_interval(gain, seed=seed).at().as_dict(),
        "completeness_error": missed,
    }
    curves: dict[str, Sequence[Number]] = {
        label: [estimate.at(layer).value for layer in range(num_layers)] for label, estimate in found.items()
    }
    title, unit = "What each block's branch adds to the answer's log-likelihood", "nats per item"
    whole = [found[ALL].at(layer) for layer in range(num_layers)]
    return Result(
        values=values,
        tables={IntegratedGradients.name: rows},
        per_sequence={
            "integrated_gradients_second_half": late.tolist(),
            "log_likelihood_gain": gain.tolist(),
        },
        figures=(
            Bars(
                "integrated_gradients",
                title,
                curves[ALL],
                unit,
                low=[interval.low for interval in whole],
                high=[interval.high for interval in whole],
                line=0.0,
            ),
            *(
                [Lines("integrated_gradients_difficulty", title, [*range(num_layers)], curves, "layer", unit, 0.0)]
                if len(groups) > 1
                else []
            ),
        ),
        warnings=(
            (f"the integral misses {missed:.1%} of what the blocks add; attributions are good to that share",)
            if missed > INCOMPLETE
            else ()
        ),
        num_sequences=len(items),
        num_tokens=int((items.level >= 0).sum()),
    )
