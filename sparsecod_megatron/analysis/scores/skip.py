"""Skip loss and block influence: what is lost without a block, and how far it turns the residual stream.

Source: block influence of X. Men et al., "ShortGPT", arXiv 2403.03853.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecod_megatron.analysis.intervals import finite, mean_interval, ratio_of_sums
from sparsecod_megatron.analysis.scores.base import Bars, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.hf.calls import Replay, Trace


class Skip:
    """`(L_skip(l) − L)/L` and `1 − cos(h_l, h_{l+1})` of each block."""

    name = "skip"

    def run(self, context: Context) -> Result:
        """Compute both for every block, and their means over blocks."""
        batches = (_skips(context.replay, trace) for trace in context.traces("all", title=self.name))
        base, skipped, influence = (column.numpy() for column in context.collect("all", batches))
        change, seed = skipped - base[:, None], context.seed
        losses = ratio_of_sums(change, base[:, None], seed=seed)
        turns = mean_interval(influence, seed=seed)
        mean_loss = ratio_of_sums(change.mean(axis=1), base, seed=seed)
        late_loss = ratio_of_sums(change[:, change.shape[1] // 2 :].mean(axis=1), base, seed=seed)
        mean_turn = mean_interval(influence.mean(axis=1), seed=seed)
        rows = []
        for layer in range(len(context.layers)):
            loss, turn = losses.at(layer), turns.at(layer)
            row = {"layer": layer, "skip_loss": loss.value, "low": loss.low, "high": loss.high}
            row |= {"block_influence": turn.value, "influence_low": turn.low, "influence_high": turn.high}
            rows.append(row)
        undecided = [row["layer"] for row in rows if losses.at(int(row["layer"] or 0)).contains(0.0)]
        return Result(
            values={
                "skip_loss": mean_loss.at().as_dict(),
                "skip_loss_second_half": late_loss.at().as_dict(),
                "block_influence": mean_turn.at().as_dict(),
                "loss": finite(base.mean()),
            },
            tables={self.name: rows},
            per_sequence={
                "skip_loss": (change.mean(axis=1) / base).tolist(),
                "block_influence": influence.mean(axis=1).tolist(),
            },
            figures=(
                _bars(
                    "skip_loss",
                    "Relative change of the loss without a block",
                    "(loss without − loss) / loss",
                    rows,
                    "low",
                    "high",
                ),
                _bars(
                    "block_influence",
                    "Turn between a block's input and output",
                    "1 − cosine",
                    rows,
                    "influence_low",
                    "influence_high",
                ),
            ),
            warnings=(
                (
                    f"whether the loss rises without block {', '.join(map(str, undecided))} cannot be told from this "
                    "sample; raise --samples",
                )
                if undecided
                else ()
            ),
            num_sequences=context.num_sequences,
            num_tokens=context.num_sequences * context.seq_length,
        )


def _bars(name: str, title: str, y_label: str, rows: list[dict[str, float | None]], low: str, high: str) -> Bars:
    columns = {key: [row[key] for row in rows] for key in (name, low, high)}
    return Bars(name, title, columns[name], y_label, low=columns[low], high=columns[high], line=0.0)


@torch.no_grad()
def _skips(replay: Replay, trace: Trace) -> tuple[Tensor, Tensor, Tensor]:
    """Results of one micro-batch: losses [B], losses without each block [B, L], block influence [B, L]."""
    num_layers = len(trace.calls)
    skipped = [
        replay.losses_after(trace, range(layer + 1, num_layers), trace.hidden[layer]) for layer in range(num_layers)
    ]
    influence = [
        1 - F.cosine_similarity(before.float(), after.float(), dim=-1).double().mean(dim=1).cpu()
        for before, after in pairwise(map(replay.layers.state.view, trace.hidden))
    ]
    return replay.losses(trace), torch.stack(skipped, dim=1), torch.stack(influence, dim=1)
