"""The sets of kernels: products and experts against Megatron-Core's own, and the switch between the sets."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecod_megatron.backend import choice, onednn, select_backend
from tests.helpers.training import small_trainer, trainer_batches
from tests.unit.backend.test_speed import assert_same

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is for machines without CUDA")
select_backend()

from megatron.core.transformer.moe import moe_utils  # noqa: E402

from sparsecod_megatron.backend.cpu import (  # noqa: E402
    apply_redirections,
    compiled,
    experts,
    linear,
    permutation,
    products,
    speed,
)

ALL = choice.Choice.parse("output,input_gradient,weight_gradient,experts,bf16_rows")
LARGE = ("model.hidden_size=64", "model.ffn_hidden_size=192", "data.seq_length=128", "optimizer.clip_grad=0.5")
TIED = ("model.untie_embeddings_and_output_weights=false",)
EXPERTS = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=96", "model.moe_aux_loss_coeff=0.01")
RELU_EXPERTS = (*EXPERTS, "model.activation=relu2")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture(params=[pytest.param(True, marks=needs_onednn), False], ids=["onednn", "mkl"])
def by_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Both libraries, whatever the machine would choose; oneDNN for products of any size."""
    monkeypatch.setattr(onednn, "MIN_PRODUCTS", 1)
    with using(ALL if request.param else choice.Choice()):
        yield request.param


@contextlib.contextmanager
def using(chosen: choice.Choice) -> Iterator[None]:
    """Multiply by it within the block."""
    before = choice.in_use()
    choice.use(chosen)
    try:
        yield
    finally:
        choice.use(before)


@pytest.fixture
def restored_kernels() -> Iterator[None]:
    """The default set again afterwards."""
    yield
    apply_redirections("fast")


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(6, 5, 3), (products.TOKEN_THRESHOLD, 40, 24)])
def test_linear_equals_float64(by_onednn: bool, tokens: int, rows: int, columns: int) -> None:
    x, weight, bias = torch.randn(tokens // 2, 2, columns), torch.randn(rows, columns), torch.randn(rows)
    got = assert_same_in_double(lambda x, w, b: linear.linear(x, w, b, False, False, False), F.linear, x, weight, bias)
    assert not got._is_view()


def assert_same_in_double(ours, theirs, *inputs: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Equal output and gradients, the reference in float64; returns ours."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    output, expected = ours(*leaves), theirs(*exact)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    got = torch.autograd.grad((output * weights).sum(), leaves)
    want = torch.autograd.grad((expected * weights).sum(), exact)
    for a, b in zip((output, *got), (expected, *want), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))
    return output


@pytest.mark.parametrize("tokens", [8, products.TOKEN_THRESHOLD])
def test_a_gradient_with_gaps_never_reaches_the_reference_loop(
    by_onednn: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    product = onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda x, weight: given.append(weight) or product(x, weight))
    x, grad = torch.randn(tokens, 24), torch.randn(tokens, 80)[:, :40]
    got = products.weight_gradient(grad, x, by_onednn)
    torch.testing.assert_close(got.double(), grad.double().t() @ x.double(), rtol=1e-5, atol=1e-4)
    products.weight_gradient(grad.contiguous(), x, by_onednn)
    assert len(given) >= by_onednn, "dense operands still go to oneDNN"
    assert all(weight.is_contiguous() or weight.t().is_contiguous() for weight in given)


@pytest.mark.parametrize("tokens", [8, products.TOKEN_THRESHOLD])
@pytest.mark.parametrize(("rows", "columns"), [(5, 3), (3, 5)])
def test_weight_gradient_accumulates(by_onednn: bool, tokens: int, rows: int, columns: int) -> None:
    weight = torch.nn.Parameter(torch.randn(rows, columns))
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(rows, columns), False  # type: ignore[attr-defined]
    x, grad = torch.randn(tokens, columns), torch.randn(tokens, rows)
    for _ in range(2):
        linear.linear(x, weight, None, True, False, False).backward(grad)
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    expected = 1 + 2 * grad.double().t() @ x.double()
    torch.testing.assert_close(weight.main_grad.double(), expected, rtol=1e-5, atol=1e-4)  # type: ignore[attr-defined]


def test_hooks_on_saved_tensors_see_no_garbage(by_onednn: bool) -> None:
    """They hand a backward pass copies of the weights, without the marks that the data-parallel wrapper reads."""
    weight = torch.nn.Parameter(torch.randn(5, 3))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(5, 3), False  # type: ignore[attr-defined]
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        output = linear.linear(torch.ones(4, 3), weight, None, True, False, False)
    output.sum().backward()
    assert weight.grad is None and torch.equal(weight.main_grad, torch.full((5, 3), 4.0))  # type: ignore[attr-defined]


FORMULAS: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    experts.SwiGLU: lambda entered: F.silu(entered.chunk(2, -1)[0]) * entered.chunk(2, -1)[1],
    experts.ReLU: F.relu,
    experts.SquaredReLU: lambda entered: F.relu(entered) ** 2,
}


@settings(max_examples=20)
@given(counts=st.lists(st.integers(0, 70), min_size=1, max_size=5).filter(any), activation=st.sampled_from([*FORMULAS]))
def test_experts_equal_a_loop_and_do_not_read_their_neighbours(counts: list[int], activation: Any) -> None:
    hidden, inner = 6, 4
    sizes = [((1 + (activation is experts.SwiGLU)) * inner, hidden), (hidden, inner)] * len(counts)
    x, probabilities = torch.randn(sum(counts), hidden), torch.rand(sum(counts))

    def loop(x: torch.Tensor, probabilities: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        parts = zip(x.split(counts), probabilities.split(counts), weights[::2], weights[1::2], strict=True)
        return torch.cat([p[:, None] * FORMULAS[activation](part @ w1.t()) @ w2.t() for part, p, w1, w2 in parts])

    def ours(x: torch.Tensor, probabilities: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return experts.FusedExperts.apply(x, probabilities, counts, activation, None, *weights)

    for chosen in (ALL if torch.backends.mkldnn.is_available() else None, choice.Choice()):
        if chosen is not None:
            with using(chosen):
                assert_same_in_double(ours, loop, x, probabilities, *(torch.randn(size) for size in sizes))


def test_expert_shapes_come_back() -> None:
    sizes = [products.repeated_size(rows) for rows in range(1, 4097)]
    assert len(set(sizes)) < 100
    assert all(0 <= size - rows < max(16, rows / 8) for rows, size in enumerate(sizes, start=1))


@pytest.mark.parametrize("shape", [(5, 2, 8), (3, 16)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = 3 * torch.randn(shape), torch.randn(shape[-1])
    assert_same(lambda x, w: speed.rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), x, weight)


def trained(*overrides: str, kernels: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of three steps, and the weights after them."""
    from sparsecod_megatron.train.step import train_step

    select_backend(cpu_kernels=kernels)
    with small_trainer(*LARGE, *overrides) as trainer:
        data = trainer_batches(trainer)
        results = [train_step(trainer, data) for _ in range(3)]
        weights = {name: value.detach().clone() for name, value in trainer.models[0].named_parameters()}
    return [number for result in results for number in (result.loss, result.grad_norm)], weights


@pytest.mark.parametrize("overrides", [TIED, EXPERTS, RELU_EXPERTS], ids=["tied", "experts", "relu_experts"])
def test_sets_train_alike_and_the_same_set_exactly_so(
    by_onednn: bool, overrides: tuple[str, ...], restored_kernels: None
) -> None:
    plain, plain_weights = trained(*overrides, kernels="plain")
    fast, fast_weights = trained(*overrides, kernels="fast")
    assert fast[:2] == pytest.approx(plain[:2], rel=1e-5)
    # Adam's first steps divide by what may be rounding.
    assert fast == pytest.approx(plain, rel=1e-4)
    assert fast_weights.keys() == plain_weights.keys()
    again, weights_again = trained(*overrides, kernels="fast")
    assert again == fast
    assert all(torch.equal(weights_again[name], value) for name, value in fast_weights.items())


@pytest.mark.parametrize("activation", ["swiglu", "relu", "relu2"])
def test_hooks_see_what_an_experts_layers_get(activation: str, restored_kernels: None) -> None:
    """Observers do not switch the fused experts off, and see what Megatron-Core's loop shows them; others do."""
    from sparsecod_megatron.train.step import train_step

    def seen(kernels: str, *, output: bool) -> tuple[list[torch.Tensor], int]:
        select_backend(cpu_kernels=kernels)
        inputs: list[torch.Tensor] = []
        fused = 0
        with small_trainer(*LARGE, *EXPERTS, f"model.activation={activation}") as trainer:
            for layer in trainer.models[0].module.decoder.layers:
                for expert in layer.mlp.experts.local_experts:
                    for module in (expert.linear_fc1, expert.linear_fc2):
                        if output:
                            module.register_forward_hook(lambda module, args, result: inputs.append(args[0].detach()))
                        else:
                            module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
            apply = experts.FusedExperts.apply
            with pytest.MonkeyPatch.context() as patch:
                calls: list[int] = []
                patch.setattr(experts.FusedExperts, "apply", lambda *args: calls.append(1) or apply(*args))
                train_step(trainer, trainer_batches(trainer))
                fused = len(calls)
        return [tensor.clone() for tensor in inputs], fused

    with using(choice.Choice()):
        loop, none = seen("plain", output=False)
        ours, calls = seen("fast", output=False)
        others, aside = seen("fast", output=True)
    assert none == aside == 0 < calls
    assert len(loop) == len(ours) == len(others) == 2 * 4 * 3 * 2  # layers of experts × layers × micro-batches
    for theirs, observed, called in zip(loop, ours, others, strict=True):
        torch.testing.assert_close(observed, theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(called, theirs, rtol=1e-4, atol=1e-5)


def test_compiled_formulas_equal_the_eager_ones() -> None:
    x, weight = torch.randn(3, 2, 16), torch.randn(16)
    angles = torch.rand(3, 1, 1, 8).repeat(1, 1, 1, 2)
    target = torch.randint(16, (3, 2))

    def plain(logits: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(logits, -1) - logits.gather(-1, target[..., None])[..., 0]

    with torch.compiler.set_stance("force_eager"):
        assert_same(lambda x, w: compiled.rms_norm(x, w, 1e-5), lambda x, w: speed.rms_norm(x, w, 1e-5), x, weight)
        assert_same(lambda x: compiled.swiglu(x, None), lambda x: speed.swiglu(x, None), x)
        for width in (16, 20):
            heads = torch.randn(3, 2, 4, width)
            assert_same(lambda t: compiled.apply_rotary(t, angles), lambda t: speed.apply_rotary(t, angles), heads)
        assert_same(lambda logits: compiled._cross_entropy(logits, target), plain, x)


@pytest.mark.skipif(not compiled.has_compiler(), reason="no C++ compiler")
def test_a_formula_compiles() -> None:
    x = torch.randn(3, 2, 16)
    assert_same(lambda x: compiled.swiglu(x, None), lambda x: speed.swiglu(x, None), x)


def test_without_a_compiler_compiled_is_fast(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, restored_kernels: None
) -> None:
    fast = apply_redirections("fast")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with caplog.at_level(logging.WARNING, logger="sparsecod"):
        assert apply_redirections("compiled") == fast
    assert len(caplog.records) == 1 and "g++" in caplog.text


def test_no_choice_leaves_the_set_in_use(restored_kernels: None) -> None:
    plain = apply_redirections("plain")
    select_backend()
    assert apply_redirections() == plain != apply_redirections("fast")


def permuted(functions: tuple[Callable[..., Any], ...], tokens: torch.Tensor, routing: torch.Tensor) -> list[Any]:
    """Tokens [T, H] to their experts and back, and all gradients."""
    permute, unpermute = functions
    leaf, probabilities = tokens.clone().requires_grad_(), torch.rand(routing.shape).requires_grad_()
    rows, weights, indices = permute(leaf, routing, probs=probabilities, num_out_tokens=int(routing.sum()))
    back = unpermute(rows * weights[:, None].to(rows.dtype), indices, tokens.shape, routing_map=routing)
    grads = torch.autograd.grad((back * torch.linspace(-1, 1, back.numel()).view_as(back)).sum(), (leaf, probabilities))
    return [rows, weights, indices, back, *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permutation_is_upstreams_to_the_bit(dtype: torch.dtype) -> None:
    """Also for tokens that no expert takes, and experts that take none."""
    tokens, routing = torch.randn(9, 4).to(dtype), torch.rand(9, 5) < 0.5
    routing[3], routing[:, 2], routing[5] = False, False, True
    torch.manual_seed(0)
    ours = permuted((permutation.permute, permutation.unpermute), tokens, routing)
    torch.manual_seed(0)
    upstream = permuted((moe_utils.permute, moe_utils.unpermute), tokens, routing)
    for got, expected in zip(ours, upstream, strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
