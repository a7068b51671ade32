"""Neurons that go while those that stay answer for them, so that of two that do the same one goes and nothing is lost.

With the inner channels N [tokens, inner] and the matrix W [out, inner] behind them, the kept columns V_K are those that
lessen ‖N_K·V_Kᵀ − N·Wᵀ‖² + δ‖V_K − W_K‖², and neurons go one after the other, each time the one whose going adds least
to that. Removing neuron j costs ‖w_j‖² / [(G + δ)⁻¹]_jj with the present W and inverse, G = Nᵀ·N, less the pull δ‖w_j‖²
on a neuron that is gone; one step of elimination then gives the next W and inverse.

Source: the elimination is Optimal Brain Surgeon's (Hassibi and Stork, NIPS 1992), a column of W in place of a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecod_megatron.errors import ConversionError


def merge_neurons(weight: Tensor, gram: Tensor, width: int, damping: float) -> tuple[Tensor, Tensor]:
    """Which neurons stay, and the matrix behind them.

    Costs inner² multiplications for each neuron that goes.

    Args:
        weight: W, `[out, inner]`.
        gram: Σ n·nᵀ over the inputs, `[inner, inner]`.
        width: neurons that stay.
        damping: δ, as a share of the mean of the diagonal of `gram`: how much values that stay are held where they are.

    Returns:
        Neurons that stay, int64 `[width]`, in order, and V_K, float64 `[out, width]`.

    Raises:
        ConversionError: damping that rounding of `gram` outweighs.
    """
    columns = weight.to(torch.float64, copy=True)
    inner = columns.shape[1]
    pull = damping * float(gram.double().diagonal().mean()) or 1.0  # no input ever came: weights alone decide
    damped = gram.double() + pull * torch.eye(inner, dtype=torch.float64, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise ConversionError(f"damping={damping}: too little for sums of products in fp32; raise it, say tenfold")
    inverse = torch.cholesky_inverse(factor)
    pulled = pull * columns.square().sum(0)
    gone = torch.zeros(inner, dtype=torch.bool, device=gram.device)
    for _ in range(inner - width):
        costs = columns.square().sum(0) / inverse.diagonal() - pulled
        neuron = int(costs.masked_fill(gone, torch.inf).argmin())
        answer = inverse[neuron] / inverse[neuron, neuron]
        columns.addr_(columns[:, neuron].clone(), answer, alpha=-1)
        inverse.addr_(inverse[:, neuron].clone(), answer, alpha=-1)
        gone[neuron] = True
    stay = (~gone).nonzero().flatten()
    return stay, columns[:, stay]
