"""Second step: Transformer Engine's kernels against PyTorch's formulas, in bf16, then its products in FP8.

The archive's library was cut to one architecture and has run on no card before: what fails here is left out of every
later step (`steps.KERNELS_NEEDED`). Without a card the same checks run on plain PyTorch modules of the same signatures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.gpu_bring_up.bench import Bench, Finding, Skipped
from tools.gpu_bring_up.sizes import sizes

RECIPES = ("delayed", "tensorwise", "blockwise")
TOLERANCE, ATTENTION_TOLERANCE, FP8_TOLERANCE = 1e-2, 2e-2, 8e-2
"""Limits of ‖found − expected‖ / ‖expected‖. bf16 keeps 8 bits of a number and e4m3 4, and products average many."""
EPS = 1e-5
HEADS, GROUPS, LENGTH, BATCH = 8, 2, 256, 2


def run(bench: Bench) -> None:
    """Every kernel by itself."""
    torch.manual_seed(0)
    hidden = sizes(bench.cuda).hidden
    checks: dict[str, Callable[[Any, str, int], float]] = {
        "RMSNorm": _rms_norm,
        "Linear": _linear,
        "LayerNormLinear": _norm_linear,
        "GroupedLinear": _grouped_linear,
        "DotProductAttention, causal": lambda kernels, device, hidden: _attention(kernels, device, hidden, None),
        "DotProductAttention, window": lambda kernels, device, hidden: _attention(kernels, device, hidden, 63),
        "fused rope": _rope,
        "FusedAdam": _adam,
        "multi_tensor_l2norm": _l2norm,
        "Linear, fused weight gradient": _fused_weight_gradient,
    }
    for name, function in checks.items():
        with bench.check(name) as found:
            error = function(_kernels(bench), bench.device, hidden)
            _within(found, error, ATTENTION_TOLERANCE if "Attention" in name else TOLERANCE)
    for recipe in RECIPES:
        with bench.check(f"Linear in FP8, {recipe}") as found:
            _within(found, _fp8_linear(_kernels(bench), bench.device, hidden, recipe), FP8_TOLERANCE)
            assert found.values["error"] > 1e-3, "as exact as bf16, so FP8 was not in use"


def _kernels(bench: Bench) -> Any:
    if not bench.cuda:
        from tools.gpu_bring_up import plain_kernels

        return plain_kernels
    if not bench.transformer_engine:
        raise Skipped("Transformer Engine does not import")
    from tools.gpu_bring_up import engine_kernels

    return engine_kernels


def _within(found: Finding, error: float, tolerance: float) -> None:
    found.values["error"] = error
    found.figure = f"relative error {error:.1e}, at most {tolerance:g}"
    assert error < tolerance, found.figure  # NaN is not


def _error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Largest ‖found − expected‖ / ‖expected‖; NaN where one is."""
    exact = [(found.detach().double(), expected.detach().double()) for found, expected in pairs]
    errors = [float((found - expected).norm() / expected.norm()) for found, expected in exact]
    return max(errors, key=lambda error: float("inf") if error != error else error)


def _random(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _compare(
    module: Callable[[Tensor], Tensor], reference: Callable[..., Tensor], x: Tensor, weights: dict[str, Tensor]
) -> float:
    """Output and gradients of a module and of a formula in fp32 with the same weights."""
    x = x.detach().requires_grad_()
    output = module(x)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    exact = {name: weight.detach().float().requires_grad_() for name, weight in weights.items()}
    exact_x = x.detach().float().requires_grad_()
    expected = reference(exact_x, *exact.values())
    expected.backward(gradient.float())
    pairs = [(output, expected), (x.grad, exact_x.grad)]
    pairs += [(weights[name].grad, exact[name].grad) for name in weights]
    return _error(pairs)  # type: ignore[arg-type]


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def _rms_norm(kernels: Any, device: str, hidden: int) -> float:
    norm = kernels.rms_norm(hidden, eps=EPS, device=device)
    return _compare(norm, _normed, _random(LENGTH, hidden, device=device), {"weight": norm.weight})


def _linear(kernels: Any, device: str, hidden: int) -> float:
    linear = kernels.linear(hidden, 2 * hidden, device=device)
    return _compare(linear, F.linear, _random(LENGTH, hidden, device=device), {"weight": linear.weight})


def _norm_linear(kernels: Any, device: str, hidden: int) -> float:
    linear = kernels.norm_linear(hidden, 2 * hidden, eps=EPS, device=device)
    weights = {"norm": linear.layer_norm_weight, "weight": linear.weight}
    x = _random(LENGTH, hidden, device=device)
    return _compare(linear, lambda x, norm, weight: F.linear(_normed(x, norm), weight), x, weights)


def _grouped_linear(kernels: Any, device: str, hidden: int) -> float:
    """Groups of unequal size, one of them empty, as routers make them."""
    sizes_of = [LENGTH // 2, 0, LENGTH // 4, LENGTH // 4]
    linear = kernels.grouped_linear(len(sizes_of), hidden, hidden, device=device)
    weights = {f"weight{index}": getattr(linear, f"weight{index}") for index in (0, 2, 3)}

    def reference(x: Tensor, *of_groups: Tensor) -> Tensor:
        parts = x.split([size for size in sizes_of if size])
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, of_groups, strict=True)])

    return _compare(lambda x: linear(x, sizes_of), reference, _random(LENGTH, hidden, device=device), weights)


def _attention(kernels: Any, device: str, hidden: int, left: int | None) -> float:
    """Grouped queries; with `left`, a query meets that many keys before its own."""
    head = hidden // HEADS
    attention = kernels.attention(HEADS, head, groups=GROUPS, left=left)
    shapes = ((LENGTH, BATCH, HEADS, head), (LENGTH, BATCH, GROUPS, head), (LENGTH, BATCH, GROUPS, head))
    tensors = [_random(*shape, device=device).requires_grad_() for shape in shapes]
    output = attention(*tensors)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in exact)
    key, value = (tensor.repeat_interleave(HEADS // GROUPS, dim=1) for tensor in (key, value))
    distance = torch.arange(LENGTH, device=device)[:, None] - torch.arange(LENGTH, device=device)
    hidden_keys = (distance < 0) | (distance > (LENGTH if left is None else left))
    scores = (query @ key.transpose(2, 3) / head**0.5).masked_fill(hidden_keys, float("-inf"))
    expected = (scores.softmax(-1) @ value).permute(2, 0, 1, 3).reshape(LENGTH, BATCH, -1)
    expected.backward(gradient.float())
    pairs = [(tensor.grad, of_exact.grad) for tensor, of_exact in zip(tensors, exact, strict=True)]
    return _error([(output, expected), *pairs])  # type: ignore[list-item]


def _rope(kernels: Any, device: str, hidden: int) -> float:
    head = hidden // HEADS
    rates = 1e4 ** -(torch.arange(0, head, 2, device=device) / head)
    angles = (torch.arange(LENGTH, device=device)[:, None] * rates).repeat(1, 2)[:, None, None]

    def reference(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()

    x = _random(LENGTH, BATCH, HEADS, head, device=device)
    return _compare(lambda x: kernels.rope(x, angles), reference, x, {})


def _adam(kernels: Any, device: str, hidden: int) -> float:
    """Three steps in fp32 from the same weights with the same gradients."""
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    start = torch.randn(hidden, hidden, device=device)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    for_ours, for_theirs = kernels.adam([ours], **options), torch.optim.AdamW([theirs], **options)
    for _ in range(3):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        for_ours.step()
        for_theirs.step()
    return _error([(ours - start, theirs - start)])


def _l2norm(kernels: Any, device: str, hidden: int) -> float:
    tensors = [torch.randn(size, device=device) for size in (hidden, 7 * hidden, 3)]
    return _error([(kernels.l2norm(tensors).reshape(()), torch.cat(tensors).norm())])


def _fused_weight_gradient(kernels: Any, device: str, hidden: int) -> float:
    """Two backward passes add up in `main_grad`, fp32, as micro-batches do in Megatron-Core's buffer."""
    linear = kernels.linear(hidden, hidden, device=device, fuse_weight_gradient=True)
    linear.weight.main_grad = torch.zeros(hidden, hidden, device=device)
    expected = torch.zeros(hidden, hidden, device=device)
    for _ in range(2):
        x, gradient = (_random(LENGTH, hidden, device=device) for _ in range(2))
        linear(x.requires_grad_()).backward(gradient)
        expected += gradient.float().T @ x.detach().float()
    return _error([(linear.weight.main_grad, expected)])


def _fp8_linear(kernels: Any, device: str, hidden: int, recipe: str) -> float:
    """Twice, because `delayed` takes the scales of one pass from the maxima of those before."""
    linear = kernels.linear(hidden, hidden, device=device)

    def in_fp8(x: Tensor) -> Tensor:
        with kernels.in_fp8(recipe):
            return linear(x)

    weights = {"weight": linear.weight}
    _compare(in_fp8, F.linear, _random(LENGTH, hidden, device=device), weights)
    linear.weight.grad = None
    return _compare(in_fp8, F.linear, _random(LENGTH, hidden, device=device), weights)
