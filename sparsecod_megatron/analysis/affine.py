"""The affine map that stands in for a block, fitted by least squares from one pass over its inputs and outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecod_megatron.parallel.processes import Processes

RIDGE = 1e-6
"""Added to every channel's variance, as a share of it: enough for channels that repeat each other, and invisible in the
fit of a block that really is affine. Relative to each channel, because a few channels of a residual stream are
thousands of times larger than the rest and a common constant would be theirs."""


class AffineMap(nn.Module):
    """`x ↦ x + x·R + b`.

    Args:
        residual: [d, d], R: row = input channel, column = output channel.
        bias: [d].
    """

    def __init__(self, residual: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("residual", residual)
        self.register_buffer("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., d] → [..., d], in the input's type; computed in the map's."""
        x = hidden.to(self.get_buffer("residual").dtype)
        return (x + x @ self.get_buffer("residual") + self.get_buffer("bias")).to(hidden.dtype)

    def transposed(self) -> AffineMap:
        """The map of the reference, which stores `A` of `X·A = Y` where `nn.Linear` keeps `Aᵀ`: `x ↦ x·Aᵀ + b`."""
        return AffineMap(self.get_buffer("residual").T.contiguous(), self.get_buffer("bias"))


class AffineFit:
    """Sums for one block's fit; their size does not depend on how many tokens were seen.

    Args:
        hidden_size: d.
        device: where the sums are kept.
    """

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        self.num_tokens = 0
        shape = {"dtype": torch.float64, "device": device}
        self._products = torch.zeros(hidden_size, 2 * hidden_size, **shape)  # type: ignore[call-overload]
        self._sums = torch.zeros(2 * hidden_size, **shape)  # type: ignore[call-overload]

    def add(self, before: Tensor, after: Tensor) -> None:
        """Count tokens: the block's input and output, each [..., d]."""
        x = before.flatten(0, -2).double()
        both = torch.cat([x, after.flatten(0, -2).double() - x], dim=-1)
        self._products.addmm_(x.T, both)
        self._sums += both.sum(dim=0)
        self.num_tokens += len(x)

    def reduce(self, processes: Processes) -> None:
        """Count the tokens of all processes. Collective over them."""
        self._products, self._sums = processes.total(self._products), processes.total(self._sums)
        self.num_tokens = int(processes.total(torch.tensor(self.num_tokens)))

    def solve(self) -> AffineMap:
        """The least-squares map, with `RIDGE`; float32."""
        hidden_size = len(self._products)
        mean = self._sums / self.num_tokens
        covariance = self._products / self.num_tokens - torch.outer(mean[:hidden_size], mean)
        variance = covariance[:, :hidden_size].diagonal()
        scale = torch.where(variance > 0, variance, 1.0).rsqrt()  # a constant channel explains nothing
        inputs = scale[:, None] * covariance[:, :hidden_size] * scale
        inputs.diagonal().add_(RIDGE)
        solution = torch.cholesky_solve(scale[:, None] * covariance[:, hidden_size:], _factor(inputs))
        residual = scale[:, None] * solution
        bias = mean[hidden_size:] - mean[:hidden_size] @ residual
        return AffineMap(residual.float(), bias.float())


def _factor(matrix: Tensor) -> Tensor:
    """Cholesky factor of a matrix that is positive definite but for rounding."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    jitter = RIDGE
    while failed.item():
        factor, failed = torch.linalg.cholesky_ex(matrix + jitter * torch.eye(len(matrix)).to(matrix))
        jitter *= 10
    return factor
