"""Linear layers by oneDNN: the same numbers, gradients left alone, small and half-precision products left to torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from sparsecod_megatron.analysis.products import _OneDnnLinears

ONE_DNN = "mkldnn::_linear_pointwise"
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def products(*operands: torch.Tensor | None) -> tuple[torch.Tensor, set[str]]:
    """`F.linear` of the operands in the mode, and the names of the operations that ran."""
    with _OneDnnLinears(), profile() as record:
        result = F.linear(*operands)  # type: ignore[arg-type]
    return result, {event.key for event in record.key_averages()}


@pytest.mark.parametrize("with_bias", [False, True])
def test_large_products_are_onednns_and_exact_to_rounding(with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 80, 96)[:, ::2], torch.randn(200, 96), torch.randn(200) if with_bias else None
    found, operations = products(x, weight, bias)
    assert ONE_DNN in operations
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_flow() -> None:
    x, weight = torch.randn(128, 96, requires_grad=True), torch.randn(200, 96)
    found, operations = products(x, weight)
    assert ONE_DNN not in operations
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient, weight.sum(dim=0).expand(128, 96), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "dtype"), [(2, torch.float32), (128, torch.float64)])
def test_what_onednn_would_not_help_is_torchs(rows: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, 96, dtype=dtype), torch.randn(200, 96, dtype=dtype)
    found, operations = products(x, weight)
    assert ONE_DNN not in operations
    assert torch.equal(found, F.linear(x, weight))
