"""One micro-batch through the model: this rank's part of the sequence in, (Σ loss, Σ tokens) out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from sparsecod_megatron.model.attention import zigzag_positions
from sparsecod_megatron.model.tokens import token_context

Batch = dict[str, Tensor]
ForwardStep: TypeAlias = Callable[[Iterator[Batch], torch.nn.Module], tuple[Tensor, Callable[..., Any]]]
"""What Megatron-Core's schedules call for each micro-batch; gives a model's output, and what makes the loss of it."""
AnswerReport: TypeAlias = Callable[[Batch, Tensor], Tensor]
"""From a micro-batch and its logits, [B, S / CP, V / TP], to sums."""


def shard_sequence(batch: Batch, cp_group: torch.distributed.ProcessGroup) -> Batch:
    """This context-parallel rank's tokens, [B, S] → [B, S / CP], in Megatron's zig-zag order. Local."""
    if cp_group.size() == 1:
        return batch
    tokens = batch["tokens"]
    positions = zigzag_positions(tokens.shape[1], cp_group.size(), device=tokens.device)[cp_group.rank()]
    return {name: tensor.index_select(1, positions) for name, tensor in batch.items()}


def pack_documents(batch: Batch) -> tuple[Batch, PackedSeqParams]:
    """One sequence of all documents of a micro-batch, [B, S] → [1, B · S], and where each begins. Local.

    Args:
        batch: its `position_ids` start at 0 in every document, and in every sample.

    Returns:
        The batch, and the boundaries in Megatron's `thd` format: no attention across them, rotation from 0 in each.
    """
    samples, length = batch["tokens"].shape
    packed = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
    starts = (packed["position_ids"][0] == 0).nonzero().squeeze(1)
    boundaries = torch.cat((starts, starts.new_tensor([samples * length]))).to(torch.int32)
    return packed, PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        # A bound is enough, and known without asking the device.
        max_seqlen_q=length,
        max_seqlen_kv=length,
    )


def make_forward_step(
    cp_group: torch.distributed.ProcessGroup,
    device: torch.device,
    *,
    mask_documents: bool = False,
    token_halo: int | None = None,
    answers: float | None = None,
    report: AnswerReport | None = None,
) -> ForwardStep:
    """The function that Megatron-Core's schedules call for each micro-batch.

    Args:
        cp_group: ranks that share a sequence.
        device: where the model is.
        mask_documents: keep attention within documents.
        token_halo: tokens before its own whose ids some layer needs; None: layers get no ids.
        answers: places of a sequence that count, on average over a task's samples; None: the places of each
            micro-batch that count.
        report: reported of the logits, in place of the loss, which is then 0.
    """

    def forward_step(data: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(data).items()}
        packing: PackedSeqParams | None = None
        if mask_documents:  # which context parallelism would cut
            batch, packing = pack_documents(batch)
        extra: dict[str, Tensor] | None = None
        if token_halo is not None:
            extra = {"context": token_context(batch["tokens"], batch["position_ids"], token_halo, cp_group)}
        batch = shard_sequence(batch, cp_group)
        losses = model(
            batch["tokens"],
            batch["position_ids"],
            None,
            labels=batch["labels"] if report is None else None,
            packed_seq_params=packing,
            extra_block_kwargs=extra,
        )
        if report is not None:
            return losses, partial(_only_report, partial(report, batch))
        divisor = None if answers is None else answers * len(batch["tokens"]) / cp_group.size()
        return losses, partial(sum_of_losses, batch["loss_mask"], divisor=divisor)

    return forward_step


def _only_report(report: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What a schedule takes for the loss, where only the report matters."""
    return logits.new_zeros(()), torch.ones((), dtype=torch.int), {"loss": report(logits)}


def sum_of_losses(
    loss_mask: Tensor, losses: Tensor, *, divisor: float | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sums, not means: Megatron divides the gradient by this micro-batch's tokens, we the report by the global batch's.

    Args:
        loss_mask: 1 where a token counts, [B, S / CP].
        losses: cross entropy of each token in nats, [B, S / CP].
        divisor: of this rank's sum, in place of its count. Where micro-batches, or the ranks that share a sequence,
            have unequal counts, means of means would depend on the layout; a constant does not.

    Returns:
        Σ loss for the backward pass, Σ tokens (int), and both again as one pair for the report.
    """
    mask = loss_mask.view(-1)
    total = torch.sum(losses.float().view(-1) * mask)
    tokens = mask.sum()
    report = torch.stack((total.detach().double(), tokens.double()))
    if divisor is not None:
        return total / divisor, torch.ones((), dtype=torch.int), {"loss": report}
    return total, tokens.to(torch.int), {"loss": report}
