"""Many sequences taken through a model one block at a time, so that a block is in memory once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sparsecod_megatron.hf.calls import Call, Replay, Trace, same_calls
from sparsecod_megatron.hf.residency import Residency

_Around = Callable[[], AbstractContextManager[object]]
_See = Callable[[Tensor, Tensor], None]


class ResidualStream:
    """The residual stream of sequences before one block: `h_0` at first, [B, T, d] of each micro-batch.

    It lies where the model's residency keeps such things.

    Args:
        replay: runs the model's blocks.
        residency: where that model's weights are.
        batches: token ids of each micro-batch, int64 [B, T].

    Raises:
        ConversionError: a model whose blocks cannot be run by themselves.
    """

    def __init__(self, replay: Replay, residency: Residency, batches: Sequence[Tensor]) -> None:
        self._replay, self._residency = replay, residency
        self._traces: list[Trace] = []
        self._hidden = residency.shelf()
        whole = [replay.trace(batch, batch, only_first=True) for batch in batches[:1]]
        skims = all(same_calls(replay.skim(trace.tokens, trace).calls, trace.calls) for trace in whole)
        known: dict[torch.Size, list[Call]] = {}
        for batch in batches:
            trace = replay.skim(batch, whole[0]) if skims else replay.trace(batch, batch, only_first=True)
            calls = known.setdefault(batch.shape, trace.calls)
            kept = calls if same_calls(calls, trace.calls) else trace.calls
            self._traces.append(Trace(trace.tokens, trace.labels, [], kept))
            self._hidden.append(trace.hidden[0].cpu())

    def run(self, layer: int, around: _Around = nullcontext) -> None:
        """Take the stream through block `layer` as it is now, and leave the stream where it was.

        Args:
            layer: 0-based index.
            around: makes what is entered while a micro-batch passes through the block.
        """
        for _ in self._passes(layer, around):
            pass

    def advance(self, layer: int, around: _Around = nullcontext, see: _See | None = None) -> None:
        """Take the stream through block `layer` as it is now, to stand before the next one.

        Args:
            layer: 0-based index.
            around: as for `run`.
            see: is shown the stream before and after the block, [B, T, d] of each micro-batch, on the CPU.
        """
        for place, (before, output) in enumerate(self._passes(layer, around)):
            after = output.cpu()
            if see is not None:
                see(before, after)
            self._hidden[place] = after

    def _passes(self, layer: int, around: _Around) -> Iterator[tuple[Tensor, Tensor]]:
        """The stream before the block, on the CPU, and the block's output of each micro-batch."""
        with self._residency.holding(f"{self._replay.layers.name}.{layer}"):
            for place, trace in enumerate(self._traces):
                before = self._hidden[place]
                with around():
                    output = self._replay.run_block(trace, layer, before.to(self._replay.model.device))
                yield before, output

    def logits(self) -> Iterator[Tensor]:
        """What the model predicts if the stream is the last block's output, [B, T, V] for each micro-batch."""
        for place, trace in enumerate(self._traces):
            with torch.no_grad():
                logits = self._replay.logits(trace, self._hidden[place].to(self._replay.model.device))
            yield logits
