"""Matrices that are computed from factors, against formulas written out, closed forms and planted truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.mechanisms.weights.factors.factors import PLACES, random_places
from tests.helpers.megatron import SMALL, megatron_model, run_forward
from tests.helpers.reference_gpt import forward
from tests.helpers.training import collected_steps, small_trainer

select_backend()

SETTINGS = {
    "sltrain": "mechanisms.sltrain={rank: 4, alpha: 6, density: 0.2}",
    "monarch": "mechanisms.monarch.blocks=2",
    "factorized": "mechanisms.sparse_ift={form: factorized, sparsity: 0.5}",
    "doped": "mechanisms.sparse_ift={form: doped, sparsity: 0.75}",
}
QKV = ParameterKind("qkv", (64, 32), r"self_attention\.linear_qkv\.weight", dimension=0, split="tensor")
MODEL = load_config(None, [*SMALL]).model
KINDS = (
    QKV,
    ParameterKind("mlp_input", (96, 32), r"mlp\.linear_fc1\.weight", dimension=0, stacked=2, split="tensor"),
    ParameterKind("attention_output", (32, 64), r"self_attention\.linear_proj\.weight", dimension=1, split="tensor"),
    ParameterKind("mlp_output", (32, 48), r"mlp\.linear_fc2\.weight", dimension=1, split="tensor"),
)


@cache
def mechanism_of(setting: str) -> Any:
    (found,) = load_config(None, [*SMALL, setting], mechanisms=MECHANISMS).mechanisms.values()
    return found


def drawn(mechanism: Any, kind: ParameterKind, std: float = 1.0) -> dict[str, Tensor]:
    """Random factors of a whole matrix, with their places."""
    generator = torch.Generator().manual_seed(5)
    parts = {}
    for factor in mechanism.factors(kind):
        parts[factor.name] = mechanism.drawn(kind, factor, std, generator)
        if factor.axis is not None:
            parts[factor.name + PLACES] = random_places(factor, generator)
    return parts


def dense(parts: Mapping[str, Tensor], name: str, shape: tuple[int, int], *, by_row: bool) -> Tensor:
    """A sparse factor written out, number by number."""
    numbers, places = parts[name], parts[name + PLACES].long()
    rows, columns = torch.meshgrid(*map(torch.arange, numbers.shape), indexing="ij")
    where = (rows, places) if by_row else (places, columns)
    return torch.zeros(shape).index_put(where, numbers)


def written_out(name: str, kind_shape: tuple[int, int], parts: Mapping[str, Tensor], *, by_row: bool) -> Tensor:
    """W by its definition."""
    rows, columns = kind_shape
    if name == "monarch":
        return permuted_blocks(parts["outer"], parts["inner"], blocks=2)
    if name == "factorized":
        inner = round(2 * rows * columns / (rows + columns))
        out = dense(parts, "sparse_out", (rows, inner), by_row=True)
        return out @ dense(parts, "sparse_in", (inner, columns), by_row=by_row)
    scale = 6 / 4 if name == "sltrain" else 1.0
    low_rank = scale * parts["low_rank_out"] @ parts["low_rank_in"]
    return low_rank + dense(parts, "sparse", kind_shape, by_row=by_row)


def permuted_blocks(outer: Tensor, inner: Tensor, *, blocks: int) -> Tensor:
    """Permutation · block-diagonal · permutation · block-diagonal, each a matrix."""
    second = torch.block_diag(*(outer[block::blocks] for block in range(blocks)))
    first = torch.block_diag(*inner.chunk(blocks))
    middle, out = torch.arange(len(first)), torch.arange(len(second))
    between = torch.eye(len(first), dtype=outer.dtype)[middle.view(-1, blocks).T.flatten()]
    return torch.eye(len(second), dtype=outer.dtype)[out.view(blocks, -1).T.flatten()] @ second @ between @ first


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_and_gradients_of_the_factors(name: str) -> None:
    """Those of an independent model whose matrices are written out, by autograd."""
    plain = "megatron.gradient_accumulation_fusion=false"  # keeps the norms' gradients in `.grad`
    overrides = (SETTINGS[name], "model.init_method_std=0.2", plain)
    config = load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    shapes = {kind.name: kind for kind in ParameterTable(config.model).plain_layer(0)}
    places = {"self_attention.linear_qkv": "qkv", "self_attention.linear_proj": "attention_output"}
    places |= {"mlp.linear_fc1": "mlp_input", "mlp.linear_fc2": "mlp_output"}
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(3))
    with megatron_model(*overrides) as model:
        leaves = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
        stored: dict[str, Tensor] = leaves | {key: buffer for key, buffer in model.named_buffers() if PLACES in key}
        weights = {key: weight for key, weight in leaves.items() if key.endswith("weight")}
        for layer in range(3):
            for place, kind in places.items():
                at = f"decoder.layers.{layer}.{place}."
                parts = {key.removeprefix(at): tensor for key, tensor in stored.items() if key.startswith(at)}
                row = shapes[kind]
                weights[f"{at}weight"] = written_out(name, row.shape, parts, by_row=row.dimension == 0)  # type: ignore[arg-type]
        ours, (theirs, _) = run_forward(model, tokens), forward(config.model, weights, tokens)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-5)
        with torch.no_grad():
            torch.testing.assert_close(run_forward(model, tokens), ours, rtol=1e-6, atol=1e-6)
        for logits in (ours, theirs):
            logits.square().mean().backward()
        assert len(leaves) > 3 * 8
        for key, weight in model.named_parameters():
            expected = leaves[key].grad
            assert expected is not None and bool(expected.any()), key
            torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-5, msg=lambda text, k=key: k + text)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_rank_makes_its_part_of_the_matrix(name: str) -> None:
    """From its cut of each factor: of each of the matrices that are stacked in it."""
    for kind in KINDS:
        assert_parts_of_ranks(name, mechanism_of(SETTINGS[name]), kind)


def assert_parts_of_ranks(name: str, mechanism: Any, kind: ParameterKind) -> None:
    parts = drawn(mechanism, kind)
    whole = mechanism.composed(kind, parts)
    by_row = kind.dimension == 0
    torch.testing.assert_close(whole, written_out(name, kind.shape, parts, by_row=by_row))  # type: ignore[arg-type]
    rows = {row.name.removeprefix(f"{kind.name}_"): row for row in mechanism.made_of(kind, MODEL, 0)}
    assert sum(row.multiplied for row in rows.values()) == kind.multiplied
    for rank in (0, 1):

        def cut(tensor: Tensor, row: ParameterKind, rank: int = rank) -> Tensor:
            if row.dimension is None:
                return tensor
            pieces = tensor.chunk(row.stacked, dim=row.dimension)
            return torch.cat([piece.chunk(2, dim=row.dimension)[rank] for piece in pieces], dim=row.dimension)

        own = {part: cut(tensor, rows[part.removesuffix(PLACES)]) for part, tensor in parts.items()}
        torch.testing.assert_close(mechanism.composed(kind, own), cut(whole, kind))


def fitted(teacher: Tensor, parts: dict[str, Tensor], *, mechanism: Any, steps: int = 300) -> float:
    """Relative error ‖W − teacher‖² / ‖teacher‖² after Adam on the factors."""
    leaves = [tensor.requires_grad_() for name, tensor in parts.items() if PLACES not in name]
    optimizer = torch.optim.Adam(leaves, lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        error = (mechanism.composed(QKV, parts) - teacher).square().sum() / teacher.square().sum()
        error.backward()
        optimizer.step()
        schedule.step()
    return float(error)


def test_a_planted_low_rank_and_sparse_teacher() -> None:
    """Found by low rank plus sparse; low rank alone cannot have what S adds, whichever rank-4 matrix it takes."""
    mechanism = mechanism_of(SETTINGS["sltrain"])
    planted = drawn(mechanism, QKV)
    planted["low_rank_out"] = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    planted["low_rank_in"] = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    planted["sparse"] = 4 * torch.randn(planted["sparse"].shape, generator=torch.Generator().manual_seed(3))
    teacher = mechanism.composed(QKV, planted)
    student = {name: tensor.clone() for name, tensor in drawn(mechanism, QKV).items()}
    assert fitted(teacher, student, mechanism=mechanism) < 1e-2**2
    floor = float(torch.linalg.svdvals(teacher)[4:].square().sum() / teacher.square().sum())
    assert floor > 0.5 * float(planted["sparse"].square().sum() / teacher.square().sum()) > 0.1


def test_a_fourier_transform_is_a_monarch_matrix() -> None:
    """After the digits of its inputs are reversed."""
    base, size = 4, 16
    mechanism = mechanism_of("mechanisms.monarch.blocks=4")
    kind = ParameterKind("mlp_input", (size, size), "", dimension=0)
    digit = torch.arange(base)
    unit = torch.exp(torch.tensor(-2j * math.pi / size, dtype=torch.complex128))
    s, kappa = torch.meshgrid(digit, digit, indexing="ij")
    outer = (unit ** (base * s * kappa)).repeat_interleave(base, dim=0)
    k, lam, pi = torch.meshgrid(digit, digit, digit, indexing="ij")
    inner = (unit ** (lam * (base * pi + k))).flatten(0, 1)
    transform = torch.fft.fft(torch.eye(size, dtype=torch.complex128))
    reversed_digits = torch.arange(size).view(base, base).T.flatten()
    found = mechanism.composed(kind, {"outer": outer, "inner": inner})
    torch.testing.assert_close(found, transform[:, reversed_digits])


def test_blocks_of_a_monarch_matrix_have_their_rank() -> None:
    """So the best approximation by singular values, block by block, is the matrix itself; a dense one is none."""
    mechanism = mechanism_of("mechanisms.monarch.blocks=2")
    kind = ParameterKind("attention_output", (32, 64), "", dimension=1)
    monarch, errors = mechanism.composed(kind, drawn(mechanism, kind)), []
    for matrix in (monarch, torch.randn(32, 64, generator=torch.Generator().manual_seed(4))):
        blocks = [part for rows in (matrix[0::2], matrix[1::2]) for part in rows.chunk(2, dim=1)]
        tails = [torch.linalg.svdvals(block)[8:].square().sum() for block in blocks]
        errors.append(float(sum(tails) / matrix.square().sum()) ** 0.5)
    assert errors[0] < 1e-6 and errors[1] > 0.3
    count = sum(math.prod(row.shape) for row in mechanism.made_of(kind, MODEL, 0))
    assert count == 16 * (32 + 64)


def test_exports_compute_matrices_in_fp32_as_their_reference_does() -> None:
    """From factors in bf16, whose product in bf16 would be another; what is not a factor is left alone."""
    config = load_config(None, [*SMALL, SETTINGS["sltrain"]], mechanisms=MECHANISMS)
    mechanism, at = config.mechanisms["sltrain"], "decoder.layers.0.self_attention.linear_qkv."
    parts = {name: part if PLACES in name else part.bfloat16() for name, part in drawn(mechanism, QKV).items()}
    parts["low_rank_out"] = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    norm = torch.ones(32)
    stored = {"decoder.final_layernorm.weight": norm, **{at + name: part for name, part in parts.items()}}
    plain = dict(mechanism.plain_tensors(config.model, stored))
    whole = {name: part if PLACES in name else part.float() for name, part in parts.items()}
    assert plain.keys() == {"decoder.final_layernorm.weight", f"{at}weight"}
    assert plain["decoder.final_layernorm.weight"] is norm
    torch.testing.assert_close(plain[f"{at}weight"], written_out("sltrain", (64, 32), whole, by_row=True))


@pytest.mark.parametrize("form", ["factorized", "doped"])
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_as_many_numbers_as_a_dense_matrix(form: str, sparsity: float) -> None:
    mechanism = mechanism_of(f"mechanisms.sparse_ift={{form: {form}, sparsity: {sparsity}, kinds: [qkv]}}")
    for kind in ParameterTable(load_config(None, ["model.preset=dense-1B"], mechanisms=MECHANISMS).model).plain_layer(
        0
    ):
        if mechanism.has_factors(kind):
            numbers = sum(row.total for row in mechanism.made_of(kind, MODEL, 0))
            assert numbers == pytest.approx(kind.total, rel=0.01)


@pytest.mark.parametrize("name", ["monarch", "factorized", "doped"])
def test_fresh_matrices_have_the_deviation_of_plain_ones(name: str) -> None:
    mechanism = mechanism_of(SETTINGS[name])
    for kind in KINDS:
        wide = ParameterKind(kind.name, (8 * kind.shape[0], 8 * kind.shape[1]), "", dimension=kind.dimension)
        assert float(mechanism.composed(wide, drawn(mechanism, wide, std=0.3)).std()) == pytest.approx(0.3, rel=0.03)


def test_the_share_of_the_sparse_part() -> None:
    """‖S‖² over ‖S‖² + ‖scale · B A‖², from matrices written out, before the step, and counted once."""
    with small_trainer(SETTINGS["sltrain"]) as trainer:
        model = trainer.models[0].module
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = []
        for layer in model.decoder.layers:
            parts = [0.0, 0.0]
            for linear in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj, layer.mlp.linear_fc1):
                parts[0] += float(linear.sparse.square().sum())
                parts[1] += float((1.5 * linear.low_rank_out @ linear.low_rank_in).square().sum())
            parts[0] += float(layer.mlp.linear_fc2.sparse.square().sum())
            parts[1] += float(
                (1.5 * layer.mlp.linear_fc2.low_rank_out @ layer.mlp.linear_fc2.low_rank_in).square().sum()
            )
            expected.append(parts[0] / sum(parts))
        group = trainer.config.mechanisms["sltrain"].statistics([model], None)
        (layers,) = collected_steps(trainer, [group], steps=1)
    assert [layer["sparse_share"] for layer in layers] == pytest.approx(expected, rel=1e-5)
