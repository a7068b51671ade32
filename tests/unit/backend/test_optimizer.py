"""FusedAdam against torch's AdamW, and the state layout that makes a resume right."""

from __future__ import annotations

import pytest
import torch

from sparsecod_megatron.backend import select_backend

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is for machines without CUDA")
select_backend()

from sparsecod_megatron.backend.adamw import FusedAdam  # noqa: E402
from sparsecod_megatron.backend.cpu.optimizer import clip_grad_by_total_norm  # noqa: E402

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


def parameters() -> list[torch.nn.Parameter]:
    """Two parameters, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,))]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    for index, param in enumerate(params):
        param.grad = torch.sin(torch.arange(param.numel()) * (step + 1.0) + index).view_as(param)


@pytest.mark.parametrize("decoupled", [True, False])
def test_equals_torch(decoupled: bool) -> None:
    ours, theirs = parameters(), parameters()
    fused = FusedAdam(ours, adam_w_mode=decoupled, **SETTINGS)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **SETTINGS)
    for step in range(10):
        for params, optimizer in ((ours, fused), (theirs, reference)):
            set_gradients(params, step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_state_layout_is_transformer_engines() -> None:
    params = parameters()
    optimizer = FusedAdam(params, **SETTINGS)
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
    assert set(optimizer.state[params[0]]) == {"exp_avg", "exp_avg_sq"}


def test_resumes_bitwise_from_its_state_dict() -> None:
    whole, half = parameters(), parameters()
    straight, stopped = FusedAdam(whole, **SETTINGS), FusedAdam(half, **SETTINGS)
    for step in range(5):
        set_gradients(half, step)
        stopped.step()
    resumed = FusedAdam(half, **SETTINGS)
    resumed.load_state_dict(stopped.state_dict())
    for step in range(10):
        set_gradients(whole, step)
        straight.step()
        if step >= 5:
            set_gradients(half, step)
            resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, half, strict=True))


def test_parameters_without_gradient_stay() -> None:
    params = parameters()
    before = params[1].detach().clone()
    params[0].grad = torch.ones_like(params[0])
    FusedAdam(params, **SETTINGS).step()
    assert torch.equal(params[1], before)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clip_equals_torch(max_norm: float) -> None:
    ours, theirs = parameters(), parameters()
    for params in (ours, theirs):
        set_gradients(params, 3)
    total = torch.nn.utils.clip_grad_norm_(theirs, max_norm).item()
    clip_grad_by_total_norm(ours, max_norm, total)
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs], rtol=1e-5, atol=1e-7)
