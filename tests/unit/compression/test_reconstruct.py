"""SparseGPT's weight update, against one that inverts the remaining Hessian anew for every column."""

from __future__ import annotations

import pytest
import torch

from sparsecod_megatron.compression import reconstruct as module
from sparsecod_megatron.compression.reconstruct import reconstruct


def column_by_column(weight: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Each dropped weight moves the weights right of it by -w · inv[:, 0] / inv[0, 0], inv of their own Hessian."""
    weight = weight.double().clone()
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:].double())
        for row in range(weight.shape[0]):
            if not mask[row, column]:
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[:, 0]
    return weight * mask


@pytest.mark.parametrize("block_size", [3, 128])
def test_matches_the_update_by_definition(monkeypatch: pytest.MonkeyPatch, block_size: int) -> None:
    monkeypatch.setattr(module, "BLOCK_SIZE", block_size)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=generator)
    inputs = torch.randn(40, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    hessian = inputs.T @ inputs
    mask = torch.rand(5, 12, generator=generator) < 0.5
    updated = reconstruct(weight, mask, hessian, damping=0.1)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(12)
    assert torch.allclose(updated.double(), column_by_column(weight, mask, damped), atol=1e-4)
    errors = [float((inputs @ (candidate - weight).T).norm()) for candidate in (updated, weight * mask)]
    assert errors[0] < 0.9 * errors[1]
