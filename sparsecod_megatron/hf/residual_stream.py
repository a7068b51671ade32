"""Many sequences taken through a model one block at a time, so that a block is in memory once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sparsecod_megatron.hf.calls import Call, Replay, Trace, same_calls
from sparsecod_megatron.hf.residency import Residency


class ResidualStream:
    """The residual stream of sequences before one block.

    Args:
        replay: runs the model's blocks.
        residency: where that model's weights are.
        batches: token ids of each micro-batch, int64 [B, T].

    Attributes:
        hidden: of each micro-batch, [B, T, d] on the CPU; `h_0` at first.

    Raises:
        ConversionError: a model whose blocks cannot be run by themselves.
    """

    def __init__(self, replay: Replay, residency: Residency, batches: Sequence[Tensor]) -> None:
        self._replay, self._residency = replay, residency
        self._traces: list[Trace] = []
        self.hidden: list[Tensor] = []
        whole = [replay.trace(batch, batch) for batch in batches[:1]]
        skims = all(same_calls(replay.skim(trace.tokens, trace).calls, trace.calls) for trace in whole)
        known: dict[torch.Size, list[Call]] = {}
        for batch in batches:
            trace = replay.skim(batch, whole[0]) if skims else replay.trace(batch, batch)
            calls = known.setdefault(batch.shape, trace.calls)
            kept = calls if same_calls(calls, trace.calls) else trace.calls
            self._traces.append(Trace(trace.tokens, trace.labels, [], kept))
            self.hidden.append(trace.hidden[0].cpu())

    def run(self, layer: int, around: Callable[[], AbstractContextManager[object]] = nullcontext) -> list[Tensor]:
        """Block `layer` as it is now on the stream.

        Args:
            layer: 0-based index.
            around: makes what is entered while a micro-batch passes through the block.

        Returns:
            What comes after the block, [B, T, d] on the CPU for each micro-batch.
        """
        outputs = []
        with self._residency.holding(f"{self._replay.layers.name}.{layer}"):
            for trace, hidden in zip(self._traces, self.hidden, strict=True):
                given = hidden.to(self._replay.model.device)
                with around():
                    outputs.append(self._replay.run_block(trace, layer, given).cpu())
        return outputs

    def logits(self) -> Iterator[Tensor]:
        """What the model predicts if the stream is the last block's output, [B, T, V] for each micro-batch."""
        for trace, hidden in zip(self._traces, self.hidden, strict=True):
            yield self._replay.logits(trace, hidden.to(self._replay.model.device))
