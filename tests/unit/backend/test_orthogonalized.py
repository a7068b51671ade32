"""Muon's arithmetic against singular values, and Megatron-Core's Muon on top of it against torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.backend import select_backend
from tests.helpers.newton_schulz import QUINTIC, SIMPLE, orthogonalized

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is for machines without CUDA")
select_backend()

from megatron.core.optimizer import muon  # noqa: E402

from sparsecod_megatron.backend.orthogonalized import get_muon_scale_factor, newton_schulz_tp  # noqa: E402

SHAPES = ((6, 4), (4, 6), (5, 5), (1, 7))


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kind", "coefficients"), [("simple", SIMPLE * 7), ("quintic", QUINTIC * 2)], ids=["simple", "quintic"]
)
def test_newton_schulz(shape: tuple[int, int], kind: str, coefficients: tuple[tuple[float, float, float], ...]) -> None:
    x = matrix(shape)
    ours = newton_schulz_tp(x, len(coefficients), kind, None)
    torch.testing.assert_close(ours.double(), orthogonalized(x, coefficients), rtol=1e-4, atol=1e-5)
    singular = torch.linalg.svdvals(ours)
    assert singular.min() > 0.6 and singular.max() < 1.3


def test_no_gradient_gives_no_update() -> None:
    assert torch.equal(newton_schulz_tp(torch.zeros(3, 4), 5, "quintic", None), torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("mode", "expected"), [("spectral", 8**0.5), ("unit_rms_norm", 0.25**0.5), ("shape_scaling", 1.0)]
)
def test_scale_of_a_wide_matrix(mode: str, expected: float) -> None:
    assert get_muon_scale_factor(2, 8, mode) == pytest.approx(expected)
    tall = {"spectral": 8**0.5, "unit_rms_norm": 2.0, "shape_scaling": 2.0}
    assert get_muon_scale_factor(8, 2, mode) == pytest.approx(tall[mode])


def steps(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], count: int) -> None:
    for step in range(count):
        for index, param in enumerate(params):
            param.grad = matrix(tuple(param.shape), seed=100 * step + index)
        optimizer.step()


def megatron_muon(params: list[torch.nn.Parameter], **settings: Any) -> Any:
    defaults: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "mode": "blockwise", "coefficient_type": "simple"}
    return muon.TensorParallelMuon(params, **{**defaults, **settings})


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("scaling", "ours"),
    [
        ("original", {"scale_mode": "shape_scaling"}),
        ("match_rms_adamw", {"scale_mode": "spectral", "extra_scale_factor": 0.2}),
    ],
)
def test_equals_torch(nesterov: bool, scaling: str, ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps in fp32; torch's Muon orthogonalises in bf16, which a Tensor.bfloat16 that only copies prevents."""
    mine, theirs = ([torch.nn.Parameter(matrix(shape)) for shape in SHAPES] for _ in range(2))
    steps(megatron_muon(mine, use_nesterov=nesterov, fp32_matmul_prec="highest", **ours), mine, 10)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": scaling}
    steps(torch.optim.Muon(theirs, **settings), theirs, 10)
    torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


def test_medium_precision_is_bf16_as_in_torch() -> None:
    mine, theirs = ([torch.nn.Parameter(matrix(shape)) for shape in SHAPES] for _ in range(2))
    steps(megatron_muon(mine, scale_mode="shape_scaling", fp32_matmul_prec="medium"), mine, 3)
    steps(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="original"), theirs, 3)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-3)
    exact = [torch.nn.Parameter(matrix(shape)) for shape in SHAPES]
    steps(megatron_muon(exact, scale_mode="shape_scaling", fp32_matmul_prec="highest"), exact, 3)
    assert not torch.equal(mine[0], exact[0])
    assert torch.get_float32_matmul_precision() == "highest"


def test_queries_keys_and_values_are_matrices_of_their_own() -> None:
    """Two query groups of two heads with two channels: rows of a group are 4 of queries, 2 of keys, 2 of values."""
    param = torch.nn.Parameter(torch.zeros(16, 6))
    gradient = matrix((16, 6))
    optimizer = megatron_muon(
        [param],
        lr=1.0,
        momentum_beta=0.0,
        use_nesterov=False,
        fp32_matmul_prec="highest",
        scale_mode="spectral",
        split_qkv=True,
        is_qkv_fn=lambda p: True,
        qkv_split_shapes=[4, 2, 2],
    )
    param.grad = gradient
    optimizer.step()
    rows = {"q": [0, 1, 2, 3, 8, 9, 10, 11], "k": [4, 5, 12, 13], "v": [6, 7, 14, 15]}
    for indices in rows.values():
        expected = orthogonalized(gradient[indices], SIMPLE * 5) * max(len(indices), 6) ** 0.5
        torch.testing.assert_close(-param.detach()[indices].double(), expected, rtol=1e-4, atol=1e-5)
