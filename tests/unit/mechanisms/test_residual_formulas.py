"""Residual paths' reads and joins against loops over tokens, written from their formulas alone.

And their own backward passes against autograd's of a plain composition.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.mechanisms.residual.manifold_hyper_connections_sparsecod import sinkhorn
from sparsecod_megatron.mechanisms.residual.streams_sparsecod import projected
from tests.helpers.residual import EPS, HIDDEN, LAYERS, drawn, path_of, random_module


def rms(x: Tensor) -> Tensor:
    return x / math.sqrt(float((x * x).mean()) + EPS)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def each_token(compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of one token's vectors, token by token."""
    rows = [compute(*vectors) for vectors in zip(*(tensor.flatten(0, 1) for tensor in tensors), strict=True)]
    return torch.stack(rows).unflatten(0, tensors[0].shape[:2])


def attention_read(values: dict[str, Tensor], state: Tensor) -> Tensor:
    sources = list(state.split(HIDDEN))[:4]
    scores = [float(values["query"] @ (values["key_gain"] * rms(source))) for source in sources]
    weights = [math.exp(score - max(scores)) for score in scores]
    return sum(weight / sum(weights) * source for weight, source in zip(weights, sources, strict=True))  # type: ignore[return-value]


def hyper_read(values: dict[str, Tensor], state: Tensor) -> Tensor:
    read = torch.zeros(HIDDEN)
    for stream, x in enumerate(state.split(HIDDEN)):
        read += (values["static"][stream] + values["scale"] * math.tanh(float(rms(x) @ values["dynamic"]))) * x
    return read


def hyper_join(values: dict[str, Tensor], branch: Tensor, state: Tensor) -> Tensor:
    streams, n = list(state.split(HIDDEN)), 3
    moved = [[math.tanh(float(rms(x) @ row)) for row in values["dynamic"]] for x in streams]
    joined = []
    for to in range(n):
        x = (values["static_write"][to] + values["scales"][1] * moved[to][n]) * branch
        for source in range(n):
            x = x + (values["static_mixing"][source, to] + values["scales"][0] * moved[source][to]) * streams[source]
        joined.append(x)
    return torch.cat(joined)


def manifold_read(values: dict[str, Tensor], state: Tensor) -> Tensor:
    gates = values["scale"] * (values["weight"] @ rms(state)) + values["bias"]
    return sum(sigmoid(float(gate)) * x for gate, x in zip(gates, state.split(HIDDEN), strict=True))  # type: ignore[return-value]


def manifold_join(values: dict[str, Tensor], branch: Tensor, state: Tensor, *, mixing: str) -> Tensor:
    n, streams = 3, list(state.split(HIDDEN))
    projected = values["weight"] @ rms(state)
    write = values["scales"][0] * projected[:n] + values["write_bias"]
    logits = values["scales"][1] * projected[n:] + values["mixing_bias"]
    if mixing == "sinkhorn":
        matrix = logits.exp().reshape(n, n)
        for _ in range(20):
            matrix = matrix / matrix.sum(1, keepdim=True)
            matrix = matrix / matrix.sum(0, keepdim=True)
    else:
        shares = logits.exp() / logits.exp().sum()
        matrix = torch.zeros(n, n)
        for share, order in zip(shares, itertools.permutations(range(n)), strict=True):
            for to, source in enumerate(order):
                matrix[to, source] += share
    parts = [
        sum(matrix[to, source] * streams[source] for source in range(n)) + 2 * sigmoid(float(write[to])) * branch
        for to in range(n)
    ]
    return torch.cat(parts)


def gates_read(values: dict[str, Tensor], state: Tensor) -> Tensor:
    streams = state.split(HIDDEN)
    scores = torch.stack([values["query"] @ rms(x) / math.sqrt(HIDDEN) for x in streams])
    return (scores.softmax(0)[:, None] * torch.stack(streams)).sum(0)


def gates_join(values: dict[str, Tensor], branch: Tensor, state: Tensor) -> Tensor:
    joined = []
    for stream, x in enumerate(state.split(HIDDEN)):
        gate = sigmoid(float(values["query"] @ rms(x) / math.sqrt(HIDDEN) + values["bias"][stream]))
        joined.append((1 - gate) * x + gate * branch)
    return torch.cat(joined)


def siamese_read(values: dict[str, Tensor], state: Tensor) -> Tensor:
    post, pre = state.split(HIDDEN)
    return post + values["weight"] * rms(pre)


def siamese_join(values: dict[str, Tensor], branch: Tensor, state: Tensor) -> Tensor:
    """Of layer 1, whose branches count √4 in the post-norm stream."""
    post, pre = state.split(HIDDEN)
    return torch.cat((values["weight"] * rms(post + branch / 2), pre + branch))


def keel_join(values: dict[str, Tensor], branch: Tensor, state: Tensor) -> Tensor:
    return values["weight"] * rms(2 * LAYERS * state + branch)


def delta_join(values: dict[str, Tensor], branch: Tensor, state: Tensor) -> Tensor:
    direction = branch / branch.norm()
    beta = 2 * sigmoid(float(values["gate"] @ rms(state) + values["gate_bias"]))
    value = 4 * sigmoid(float(values["value"] @ state + values["value_bias"]))
    return state + beta * (value - direction @ state) * direction


def dense_join(values: dict[str, Tensor], branch: Tensor, state: Tensor) -> Tensor:
    """Behind layer 1, dilation 2: its own output, 2, and the embedding, 0."""
    stream, embedding, first, second, third = state.split(HIDDEN)
    output = stream + branch
    average = values["weights"][0] * embedding + values["weights"][1] * output
    return torch.cat((average, embedding, first, output, third))


SINKHORN, PERMUTATIONS = {"streams": 3}, {"streams": 3, "mixing": "permutations"}
READS = [
    ("attention_residuals", {"block_layers": 1}, attention_read),
    ("hyper_connections", {"streams": 3}, hyper_read),
    ("manifold_hyper_connections", SINKHORN, manifold_read),
    ("multi_gate", {"streams": 3}, gates_read),
    ("siamese_norm", {}, siamese_read),
]
JOINS = [
    ("hyper_connections", {"streams": 3}, 2, hyper_join),
    ("manifold_hyper_connections", SINKHORN, 2, lambda *given: manifold_join(*given, mixing="sinkhorn")),
    ("manifold_hyper_connections", PERMUTATIONS, 2, lambda *given: manifold_join(*given, mixing="permutations")),
    ("multi_gate", {"streams": 3}, 2, gates_join),
    ("siamese_norm", {}, 2, siamese_join),
    ("keel", {}, 2, keel_join),
    ("delta", {}, 2, delta_join),
    ("dense_average", {"dilation": 2}, 3, dense_join),
    ("scaled", {"learn": "channel", "skip": 0.5}, 2, lambda values, f, x: 0.5 * x + values["factor"] * f),
]


@pytest.mark.parametrize(("name", "settings", "naive"), READS)
def test_reads_equal_a_loop_over_tokens(name: str, settings: dict[str, Any], naive: Any) -> None:
    path = path_of(name, **settings)
    read, values = random_module(path.read(5))
    state = drawn((4, 2, path.columns * HIDDEN), 1)
    torch.testing.assert_close(read(state), each_token(lambda x: naive(values, x), state), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "settings", "sublayer", "naive"), JOINS)
def test_joins_equal_a_loop_over_tokens(name: str, settings: dict[str, Any], sublayer: int, naive: Any) -> None:
    path = path_of(name, **settings)
    join, values = random_module(path.join(sublayer))
    branch, state = drawn((4, 2, HIDDEN), 2), drawn((4, 2, path.columns * HIDDEN), 1)
    expected = each_token(lambda f, x: naive(values, f, x), branch, state)
    torch.testing.assert_close(join(branch, state), expected, rtol=1e-5, atol=1e-5)


def plain_sinkhorn(logits: Tensor) -> Tensor:
    for _ in range(5):
        logits = logits - logits.logsumexp(dim=-1, keepdim=True)
        logits = logits - logits.logsumexp(dim=-2, keepdim=True)
    return logits.exp()


BACKWARD: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "projected": (
        lambda x, weight: projected(x, weight, 0.1),
        lambda x, weight: x @ weight.T * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1),
        ((2, 3, 6), (4, 6)),
    ),
    "sinkhorn": (lambda logits: sinkhorn(logits, 5), plain_sinkhorn, ((2, 3, 4, 4),)),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_passes_are_autograds(name: str) -> None:
    """In fp64: values and gradients of a plain composition, and finite differences."""
    own, plain, shapes = BACKWARD[name]
    inputs = [drawn(shape, seed).double().requires_grad_() for seed, shape in enumerate(shapes)]
    found, expected = own(*inputs), plain(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    given = drawn(tuple(expected.shape), 9).double()
    gradients = (torch.autograd.grad(result, inputs, given) for result in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(own, inputs)


def test_sinkhorn_of_logits_that_fp32_cannot_exponentiate() -> None:
    """A column that every row shuns, and rows that differ by more than fp32 has: columns sum to one, gradients stay."""
    logits = torch.tensor([[0.0, -300.0, 5.0], [200.0, -90.0, 0.0], [0.0, -500.0, -400.0]])[None, None].requires_grad_()
    matrix = sinkhorn(logits, 20)
    torch.testing.assert_close(matrix.sum(dim=-2), torch.ones(1, 1, 3))
    matrix.square().sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("name", ["hyper_connections", "manifold_hyper_connections"])
def test_a_read_and_a_join_keep_the_state_once(name: str) -> None:
    """In bf16: the state, the branch, and numbers that are few beside them; no copy in fp32."""
    hidden = 512
    path = path_of(name, hidden=hidden, streams=4)
    read, join = (part.to(torch.bfloat16) for part in (path.read(2), path.join(2)))
    state = drawn((4, 2, 4 * hidden), 1).bfloat16().requires_grad_()
    weights = {parameter.untyped_storage().data_ptr() for parameter in (*read.parameters(), *join.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = join(read(state), state)
    assert result.shape == state.shape and sum(kept.values()) < 1.25 * (state.nbytes + state.nbytes // 4)
