"""Fused CPU operations against the formulas they fuse, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sparsecod_megatron.backend import select_backend

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is for machines without CUDA")
select_backend()

from sparsecod_megatron.backend.cpu import speed  # noqa: E402


def gradients(function, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[no-untyped-def]
    """Output and gradients of a weighted sum of it."""
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    output = function(*inputs)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return (output.detach(), *torch.autograd.grad((output * weights).sum(), inputs))


def assert_same(ours, theirs, *inputs: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    """Equal output and gradients."""
    for got, expected in zip(gradients(ours, *inputs), gradients(theirs, *inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@given(tokens=st.integers(1, 9), half=st.integers(1, 17), scale=st.floats(0.01, 30))
def test_swiglu(tokens: int, half: int, scale: float) -> None:
    x = scale * torch.randn(tokens, 2, 2 * half)

    def formula(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    assert_same(lambda gate_up: speed.swiglu(gate_up, None), formula, x)


def test_weighted_swiglu() -> None:
    x, weights = torch.randn(6, 10), torch.rand(6, 1)

    def formula(gate_up: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up * probability

    assert_same(lambda gate_up, probability: speed.weighted_swiglu(gate_up, None, probability), formula, x, weights)


@pytest.mark.parametrize("heads", [1, 3])
def test_rotary_equals_transformers(heads: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = torch.randn(7, 2, heads, 8)
    angles = torch.arange(7)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    freqs = torch.cat((angles, angles), -1)[:, None, None, :]

    def formula(t: torch.Tensor) -> torch.Tensor:
        states = t.permute(1, 2, 0, 3)
        cos, sin = (value[:, 0, 0][None] for value in (freqs.cos(), freqs.sin()))
        return apply_rotary_pos_emb(states, states, cos, sin)[0].permute(2, 0, 1, 3)

    assert_same(lambda t: speed.apply_rotary(t, freqs), formula, x)
    still = torch.randn(7, 2, heads, 4)
    partly = speed.apply_rotary(torch.cat((x, still), -1), freqs)
    assert torch.equal(partly, torch.cat((speed.apply_rotary(x, freqs), still), -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_accumulates_in_fp32(dtype: torch.dtype) -> None:
    x, grad = torch.randn(12, 5, dtype=dtype), torch.randn(12, 3, dtype=dtype)
    main_grad = torch.ones(3, 5)
    speed.accumulate_weight_gradient(x, grad, main_grad)
    expected = 1 + (grad.t() @ x).float()
    torch.testing.assert_close(main_grad, expected)
