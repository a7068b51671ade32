"""Pruned weights for the duration of a few passes, and the loss they cost.

A matrix is replaced by its pruned copy when its module is entered and put back when the module is left, so at most one
module's copy exists and the original tensors are never written to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.sparsity.cuts import Cut, Cuts
from sparsecod_megatron.hf.calls import sequence_losses
from sparsecod_megatron.hf.matrices import Matrix


@contextmanager
def pruned(matrices: Sequence[Matrix], cut: Cut) -> Iterator[None]:
    """Every pass sees the weights that go as zero.

    Args:
        matrices: what to prune.
        cut: which weights of each go.
    """
    originals = {id(matrix.weight): (matrix.weight, matrix.weight.data) for matrix in matrices}
    by_module: dict[nn.Module, list[tuple[int, Tensor]]] = {}
    for index, matrix in enumerate(matrices):
        by_module.setdefault(matrix.module, []).append((index, matrix.weight))

    def enter(module: nn.Module, _args: tuple[Any, ...]) -> None:
        for index, weight in by_module[module]:
            weight.data = weight.data.masked_fill(cut(index, weight.data), 0)

    def leave(module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        for _, weight in by_module[module]:
            weight.data = originals[id(weight)][1]

    handles = [module.register_forward_pre_hook(enter) for module in by_module]
    handles += [module.register_forward_hook(leave) for module in by_module]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, data in originals.values():
            weight.data = data


class PruningCurve:
    """Losses of the pruned model by sparsity, each sparsity evaluated once.

    Args:
        context: the model and the sample.
        matrices: what to prune.
        cuts: by what.
    """

    def __init__(self, context: Context, matrices: Sequence[Matrix], cuts: Cuts) -> None:
        self._context = context
        self._matrices = matrices
        self._cuts = cuts
        self._losses: dict[float, Tensor] = {}

    @property
    def sparsities(self) -> list[float]:
        """Sparsities evaluated so far, ascending."""
        return sorted(self._losses)

    def evaluate(self, sparsities: Sequence[float]) -> None:
        """Evaluate several sparsities; what they cut is found together."""
        wanted = [s for s in sparsities if s not in self._losses]
        for sparsity, cut in zip(wanted, self._cuts.shares(wanted), strict=True):
            self._losses[sparsity] = self._run(f"pruned to {sparsity:.1%}", cut)

    def losses(self, sparsity: float) -> Tensor:
        """Mean loss of each sequence `[sequences]` in nats, at a sparsity in [0, 1]."""
        self.evaluate([sparsity])
        return self._losses[sparsity]

    def pattern_losses(self, kept: int, of: int) -> Tensor:
        """Mean loss of each sequence `[sequences]` in nats, with `kept` of every `of` neighbours."""
        return self._run(f"pruned to {kept}:{of}", self._cuts.pattern(kept, of))

    @torch.no_grad()
    def _run(self, title: str, cut: Cut) -> Tensor:
        model, device = self._context.model, self._context.device
        with pruned(self._matrices, cut):
            losses = [
                sequence_losses(model(input_ids=tokens.to(device), use_cache=False).logits, labels.to(device))
                for tokens, labels in self._context.batches("all", title=title)
            ]
        return torch.cat(self._context.processes.gather(losses))
