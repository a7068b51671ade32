"""How many answers of a synthetic task are right, and how much the model knows, under any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.data.synthetic.task import Task
from sparsecod_megatron.parallel import all_reduce_sums, reduced
from sparsecod_megatron.train.forward import Batch
from sparsecod_megatron.train.passes import forward_backward
from sparsecod_megatron.train.setup import Trainer
from sparsecod_megatron.train.unchanged import evaluating

_ENTRIES = 3
"""Sums of a class of answers: loss, answers, right ones."""


def score_answers(trainer: Trainer, data: Sequence[Iterator[Batch]], task: Task, *, num_steps: int) -> dict[str, float]:
    """Loss and accuracy over `num_steps` global batches. Collective over all processes.

    Args:
        trainer: this rank's model and layout.
        data: micro-batches of held-out samples, one iterator a model chunk.
        task: what they are of.
        num_steps: global batches.

    Returns:
        `validation_loss`, nats per answer; with several classes of answers also `validation_loss/CLASS`;
        `answer_accuracy`, the share of answers, of the last class, to which the model gives the highest probability;
        of a task with facts `knowledge_bits`, and per parameter `bits_per_parameter` and `most_bits_per_parameter`.
    """
    classes, context = task.classes(), trainer.context(trainer.scheduler.num_steps)
    class_of = torch.from_numpy(class_numbers(task)).to(trainer.backend.device)
    report = partial(answer_sums, class_of=class_of, count=len(classes), tp_group=trainer.groups.tp)
    samples, entries = trainer.config.train.global_batch_size, _ENTRIES * len(classes)
    with evaluating(trainer.models):
        sums = [
            forward_backward(trainer, data, context, samples=samples, forward_only=True, report=report, entries=entries)
            for _ in range(num_steps)
        ]
    total = all_reduce_sums(torch.stack(sums).sum(0)).view(len(classes), _ENTRIES).cpu().numpy()
    return answer_metrics(task, total, parameters=ParameterTable.of(trainer.config).count().total)


def answer_metrics(task: Task, sums: np.ndarray, *, parameters: int) -> dict[str, float]:
    """What `score_answers` returns.

    Args:
        task: whose answers were scored.
        sums: Σ loss in nats, answers, right answers, of each class, `[classes, 3]`, in any common unit.
        parameters: of the whole model, embeddings included.
    """
    losses = dict(zip(task.classes(), (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
    found = {"validation_loss": float(sums[:, 0].sum() / sums[:, 1].sum())}
    if len(losses) > 1:
        found |= {f"validation_loss/{name}": loss for name, loss in losses.items()}
    found["answer_accuracy"] = float(sums[-1, 2] / sums[-1, 1])
    if (knowledge := task.knowledge()) is not None:
        found["knowledge_bits"] = knowledge.bits(losses)
        found["bits_per_parameter"] = found["knowledge_bits"] / parameters
        found["most_bits_per_parameter"] = knowledge.most_bits() / parameters
    return found


def class_numbers(task: Task) -> np.ndarray:
    """Number of the class that each id is an answer of, int64 `[ids]`; −1 for ids that are none."""
    numbers = np.full(len(task.vocabulary()), -1)
    for number, ids in enumerate(task.classes().values()):
        numbers[ids] = number
    return numbers


def answer_sums(batch: Batch, logits: Tensor, *, class_of: Tensor, count: int, tp_group: dist.ProcessGroup) -> Tensor:
    """Σ loss, answers and right ones of a micro-batch, by class. Collective over `tp_group`.

    An answer is right if no id has a higher logit, and no lower id the same: a model that says the same of all ids is
    not right by that.

    Args:
        batch: `labels` and `loss_mask`, [B, S / CP].
        logits: this rank's ids, in their order, [B, S / CP, V / TP].
        class_of: of each id.
        count: number of classes.
        tp_group: ranks that share the vocabulary.

    Returns:
        fp64 `[count · 3]`.
    """
    places = batch["loss_mask"].bool()
    labels, values = batch["labels"][places], logits[places].double()
    first, size = tp_group.rank() * values.shape[-1], values.shape[-1]
    highest, chosen = values.max(-1) if len(values) else (values.new_zeros(0), labels)
    top = reduced(highest.clone(), tp_group, dist.ReduceOp.MAX)
    beyond = size * tp_group.size()
    lowest = reduced(torch.where(highest == top, chosen + first, beyond), tp_group, dist.ReduceOp.MIN)
    mine = (labels >= first) & (labels < first + size)
    own = values.gather(-1, (labels - first).clamp(0, size - 1)[:, None])[:, 0]
    own = reduced(torch.where(mine, own, 0.0), tp_group)
    normaliser = reduced((values - top[:, None]).exp().sum(-1), tp_group)
    losses = top + normaliser.log() - own
    columns = torch.stack((losses, torch.ones_like(losses), (lowest == labels).double()), dim=-1)
    sums = columns.new_zeros(count, _ENTRIES).index_add_(0, class_of[labels], columns)
    return sums.view(-1)
