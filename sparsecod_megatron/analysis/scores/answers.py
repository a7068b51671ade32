"""Answers: what a task's accuracy and answers lose when a block is skipped, swapped, or cut off from the context.

A likelihood over all text can stay where a rare, deep computation is lost. So each intervention is scored by whether
the answer is still right, apart for every difficulty: harder questions need more depth only if later blocks matter more
for them.

Source: skipping and residual erasure by question after R. Csordás, C. D. Manning and C. Potts, "Do Language Models Use
Their Depth Efficiently?" (arXiv 2505.13898). Theirs erases one token at a time and takes the largest change of any;
here all tokens that answers are not read at are erased together, which costs one pass per depth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecod_megatron.analysis.scores.answer_tables import answers_result
from sparsecod_megatron.analysis.scores.base import Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.tasks.items import Items
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.calls import Replay, Trace

SUMS = 5
"""Answers, answers right in every token, tokens, right tokens, log-likelihood in nats."""


class Intervention(NamedTuple):
    """What is done to a model.

    Attributes:
        kind: `skip`, `swap` or `erase`.
        layer: the block; of a swap the lower one of two neighbours, of an erasure the first that reads what is left.
    """

    kind: str
    layer: int


def interventions(num_layers: int) -> list[Intervention]:
    """All of a model, by kind and layer."""
    return [
        *(Intervention("skip", layer) for layer in range(num_layers)),
        *(Intervention("swap", layer) for layer in range(num_layers - 1)),
        *(Intervention("erase", layer) for layer in range(num_layers)),
    ]


class Answers:
    """Accuracy, exact match and log-likelihood of answers: the changed model's minus the intact one's."""

    name = "answers"

    def run(self, context: Context) -> Result:
        """Compute them for every block, and their means over blocks.

        Raises:
            ConfigError: no task was given.
            ConversionError: blocks that pass more than one row for a token.
        """
        items = context.items_for(self.name)
        sums = collect_sums(context, items)
        return answers_result(
            sums.numpy(), interventions(len(context.layers)), items, len(context.layers), seed=context.seed
        )


def collect_sums(context: Context, items: Items) -> Tensor:
    """Sums over each item's answers, of the intact model and of every intervention, float64 [N, 1 + I, D, SUMS].

    Collective over the processes.
    """
    given = context.of_items(items)
    means = told_means(given, items)
    levels, labels, told = (given.own_rows(part) for part in (items.level, items.labels, items.is_told))
    found = (
        (_sums(given.replay, trace, labels[rows], levels[rows], told[rows], means, len(items.difficulties)),)
        for trace, rows in given.traces_with_rows("all", title=Answers.name)
    )
    (sums,) = given.collect("all", found)
    return sums


def told_means(given: Context, items: Items) -> Tensor:
    """Mean input of each block over the tokens that an erasure takes away, float64 [L, d]. Collective.

    Args:
        given: the items' context.
        items: likewise.

    Raises:
        ConversionError: blocks that pass more than one row for a token.
    """
    told = given.own_rows(items.is_told)
    width = given.hidden_size * given.layers.state.columns
    sums = torch.zeros(len(given.layers), width, dtype=torch.float64, device=given.device)
    for trace, rows in given.traces_with_rows("all", title="means"):
        kept = told[rows].to(given.device)
        if (passed := trace.hidden[0].shape[1]) != trace.tokens.shape[1]:
            raise ConversionError(
                f"--scores {Answers.name}: blocks pass {passed} rows for {trace.tokens.shape[1]} tokens; leave it out"
            )
        for layer, hidden in enumerate(trace.hidden[:-1]):
            sums[layer] += hidden[kept].double().sum(dim=0)
    return given.processes.total(sums) / max(1, int(items.is_told.sum()))


@torch.no_grad()
def _sums(
    replay: Replay, trace: Trace, labels: Tensor, level: Tensor, told: Tensor, means: Tensor, count: int
) -> Tensor:
    """`collect_sums` of one micro-batch, [B, 1 + I, D, SUMS]."""
    labels, level, told = (part.to(trace.tokens.device) for part in (labels, level, told))
    layers = range(len(trace.calls))

    def measured(order: list[int], hidden: Tensor) -> Tensor:
        return answer_sums(replay.logits(trace, replay.after(trace, order, hidden)), labels, level, count)

    found = [measured([], trace.hidden[-1])]
    for kind, layer in interventions(len(layers)):
        before, later = trace.hidden[layer], layers[layer + 1 :]
        if kind == "skip":
            found.append(measured([*later], before))
        elif kind == "swap":
            blocks = replay.layers.blocks
            with replay.layers.state.traded(blocks[layer], blocks[layer + 1]):
                found.append(measured([layer + 1, layer, *later[1:]], before))
        else:
            erased = torch.where(told[..., None], means[layer].to(before.dtype), before)
            found.append(measured([layer, *later], erased))
    return torch.stack(found, dim=1).cpu()


def answer_sums(logits: Tensor, labels: Tensor, level: Tensor, count: int) -> Tensor:
    """Sums over the answers of each item.

    A token is right if no id has a higher logit, and no lower id the same one. Greedy decoding says an answer word for
    word exactly if each of its tokens is right with those before it given, so one pass tells both.

    Args:
        logits: [B, T, V].
        labels: [B, T].
        level: [B, T]; −1 where nothing is asked.
        count: D, number of levels.

    Returns:
        float64 [B, D, SUMS].
    """
    asked = level >= 0
    rows, levels, wanted = asked.nonzero()[:, 0], level[asked], labels[asked]
    values = logits[asked].double()
    own = values.gather(-1, wanted[:, None])
    lower = torch.arange(values.shape[-1], device=values.device) < wanted[:, None]
    right = ~((values > own) | ((values == own) & lower)).any(dim=-1)
    likelihood = own[:, 0] - values.logsumexp(dim=-1)
    begins = asked & ~torch.nn.functional.pad(asked, (1, 0))[:, :-1]
    number = begins.flatten().cumsum(0)[asked.flatten()] - 1
    wrong = torch.zeros(int(begins.sum()), device=values.device).index_add_(0, number, (~right).float())
    sums = torch.zeros(len(labels), count, SUMS, dtype=torch.float64, device=values.device)
    of_answers = torch.stack((torch.ones_like(wrong), (wrong == 0).float()), dim=-1).double()
    sums[..., :2].index_put_((begins.nonzero()[:, 0], level[begins]), of_answers, accumulate=True)
    of_tokens = torch.stack((torch.ones_like(likelihood), right.double(), likelihood), dim=-1)
    sums[..., 2:].index_put_((rows, levels), of_tokens, accumulate=True)
    return sums
