"""What Muon's Newton-Schulz iteration does, told by singular values: no product of matrices in between, in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SIMPLE = ((3.4445, -4.7750, 2.0315),)
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonalized(x: Tensor, coefficients: Sequence[tuple[float, float, float]] = QUINTIC) -> Tensor:
    """The same singular vectors as `x` [out, in], each singular value through the polynomials in turn."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm()
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v
