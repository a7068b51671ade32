"""What pruning must know of a matrix's inputs: how many there were, their sums, their squares, and their products.

Layers that are given the same tensor share one `InputStatistics`: queries, keys and values one, gate and up another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsecod_megatron.parallel.processes import Processes

MAX_ROWS = 16_384
"""Inputs of one product; more would only need a larger float copy."""
SILENT_SHARE = 1e-6
"""What an input that never fired counts for, as a share of the mean: too little to matter beside the others, and enough
for magnitude to decide among its weights."""


@dataclass
class InputStatistics:
    """Sums over the inputs `x` of a layer, `[in]`.

    Attributes:
        count: n, number of inputs.
        sums: Σ x, float64 `[in]`.
        squares: Σ x², float64 `[in]`.
        gram: Σ x·xᵀ, float32 `[in, in]`, or None where nobody asks for it.
    """

    count: int
    sums: Tensor
    squares: Tensor
    gram: Tensor | None = field(repr=False)

    @classmethod
    def empty(cls, width: int, *, gram: bool, device: torch.device) -> InputStatistics:
        """Statistics before any input.

        Args:
            width: channels of an input.
            gram: whether Σ x·xᵀ is to be collected.
            device: where.
        """
        sums = torch.zeros(2, width, dtype=torch.float64, device=device)
        return cls(0, sums[0], sums[1], torch.zeros(width, width, device=device) if gram else None)

    def add(self, inputs: Tensor) -> None:
        """Count inputs, `[..., in]` of any floating-point type."""
        for rows in inputs.flatten(0, -2).split(MAX_ROWS):
            self.count += len(rows)
            self.sums += rows.sum(0, dtype=torch.float64)
            self.squares += rows.double().square_().sum(0)
            if self.gram is not None:
                values = rows.float()
                self.gram.addmm_(values.T, values)

    def total(self, processes: Processes) -> InputStatistics:
        """The sum over processes. Collective over all processes."""
        if processes.size == 1:
            return self
        count = processes.total(torch.tensor(self.count))
        gram = None if self.gram is None else processes.total(self.gram)
        return InputStatistics(int(count), processes.total(self.sums), processes.total(self.squares), gram)

    @property
    def mean(self) -> Tensor:
        """Mean input, float64 `[in]`."""
        return self.sums / max(1, self.count)

    @property
    def variance(self) -> Tensor:
        """Population variance of each channel, float64 `[in]`."""
        return (self.squares / max(1, self.count) - self.mean.square()).clamp_min(0)

    @property
    def norms(self) -> Tensor:
        """‖X_j‖ = √Σ x_j² of each channel, float32 `[in]`; that of a silent channel is tiny instead of zero."""
        return _without_zeros(self.squares).sqrt().float()

    @property
    def hessian(self) -> Tensor:
        """Σ x·xᵀ, float32 `[in, in]`, over the mean of its diagonal; silent channels are given a tiny diagonal.

        New each time, and column by column in memory, so that it can be factorised where it is.
        """
        assert self.gram is not None, "a rule that uses products of inputs did not ask for them"
        hessian = torch.empty_like(self.gram).mT.copy_(self.gram)
        hessian.diagonal().copy_(_without_zeros(hessian.diagonal()))
        return hessian.div_(hessian.diagonal().mean())


def pooled(statistics: Sequence[InputStatistics]) -> InputStatistics:
    """Statistics of all inputs together, each object counted once."""
    distinct = list({id(entry): entry for entry in statistics}.values())
    grams = [entry.gram for entry in distinct if entry.gram is not None]
    total: Tensor | None = None
    for gram in grams:
        total = gram.clone() if total is None else total.add_(gram)
    return InputStatistics(
        sum(entry.count for entry in distinct),
        torch.stack([entry.sums for entry in distinct]).sum(0),
        torch.stack([entry.squares for entry in distinct]).sum(0),
        total,
    )


def _without_zeros(squares: Tensor) -> Tensor:
    mean = squares.mean()
    return torch.where(squares > 0, squares, SILENT_SHARE * mean if mean > 0 else torch.ones_like(mean))
