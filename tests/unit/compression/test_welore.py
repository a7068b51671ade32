"""Ranks by one threshold: against every threshold there is, a planted spectrum, and singular values of real outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecod_megatron.compression.compress import Compression, compress
from sparsecod_megatron.compression.experts import separate_experts
from sparsecod_megatron.compression.methods.low_rank import FactoredLinear
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.errors import ConversionError
from tests.unit.compression.models import sequences, tiny
from tests.unit.compression.test_contract import gpt2, logits


def welore(model: PreTrainedModel, *settings: str) -> Compression:
    return compress(model, find_method("welore", settings), sequences(16), batch_size=4)


def linear_layers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights `[out, in]` of the layers that the method takes."""
    output = model.get_output_embeddings()
    linears = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and each is not output}
    return {name: linear.weight.detach().double() for name, linear in linears.items()}


def relative_values(weight: Tensor) -> Tensor:
    values = torch.linalg.svdvals(weight)
    return values / values[0]


def stored_at(threshold: float, weights: dict[str, Tensor]) -> int:
    """Weights that are left if singular values of at most this share of the largest go."""
    total = 0
    for weight in weights.values():
        rank = max(1, int((relative_values(weight) > threshold).sum()))
        total += min(rank * sum(weight.shape), weight.numel())
    return total


@pytest.mark.parametrize("saved", [0.05, 0.2, 0.6])
def test_the_threshold_is_the_least_that_saves_what_was_asked(saved: float) -> None:
    weights = linear_layers(tiny("llama"))
    result = welore(tiny("llama"), f"saved={saved}")
    total, stored = sum(weight.numel() for weight in weights.values()), sum(row.stored for row in result.matrices)
    assert total - stored == result.num_parameters[0] - result.num_parameters[1] >= saved * total
    candidates = torch.cat([relative_values(weight) for weight in weights.values()]).tolist()
    counts = [stored_at(candidate, weights) for candidate in candidates]
    assert stored == max(count for count in counts if total - count >= saved * total)
    assert any(row.compressed for row in result.matrices)
    left = {row.reason for row in result.matrices if not row.compressed}
    assert left <= {"at the threshold two thin matrices would store as many weights or more"}


def test_matrices_lose_by_their_own_spectra_and_a_planted_rank_is_found_exactly() -> None:
    """Half of the matrices have rank 5 with equal singular values; they alone are factorised, and nothing is lost."""
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            left, right = (torch.linalg.qr(torch.randn(size, 5)).Q for size in (48, 32))
            layer.mlp.up_proj.weight.copy_(left @ right.T)
    before = logits(model)
    saving = 2 * (48 * 32 - 5 * (48 + 32)) / sum(weight.numel() for weight in linear_layers(model).values())
    result = welore(model, f"saved={saving - 1e-6}")
    assert {row.kind for row in result.matrices if row.compressed} == {"model.layers.*.mlp.up_proj"}
    assert all(row.stored == 5 * (32 + 48) for row in result.matrices if row.compressed)
    assert torch.allclose(logits(result.model), before, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_by_outputs_the_error_is_that_of_the_singular_values_left_out(family: str) -> None:
    """Singular values of XWᵀ itself, X the layer's inputs in the dense model; W's own SVD is further away."""
    dense = gpt2() if family == "gpt2" else tiny(family)
    seen: dict[str, Tensor] = {}

    def see(name: str, given: Tensor) -> None:
        seen[name] = torch.cat([seen[name], given.flatten(0, -2)]) if name in seen else given.flatten(0, -2)

    for name, module in dense.named_modules():
        if name.split(".")[-1] in ("q_proj", "down_proj", "c_fc", "c_attn"):
            module.register_forward_pre_hook(lambda _m, args, name=name: see(name, args[0].double()))
    with torch.no_grad():
        dense(sequences(16))
    result = welore(gpt2() if family == "gpt2" else tiny(family), "by=outputs", "saved=0.4")
    checked = 0
    for row in result.matrices:
        name = row.name.removesuffix(".weight")
        factored = result.model.get_submodule(name)
        if name not in seen or not row.compressed:
            continue
        assert isinstance(factored, FactoredLinear)
        weight = dense.get_parameter(row.name).detach().double()
        weight, rank = weight.T if family == "gpt2" else weight, factored.first.out_features
        outputs = seen[name] @ weight.T
        values = torch.linalg.svdvals(outputs)
        expected = float(values[rank:].norm() / values.norm())
        left, scale, right = torch.linalg.svd(weight, full_matrices=False)
        plain = (left[:, :rank] * scale[:rank]) @ right[:rank]
        found = float((seen[name] @ factored.weight.detach().double().T - outputs).norm() / outputs.norm())
        assert found == pytest.approx(expected, rel=1e-3) and row.output_error == pytest.approx(expected, rel=1e-3)
        assert found < float((seen[name] @ plain.T - outputs).norm() / outputs.norm())
        checked += 1
    assert checked >= 2


def test_a_product_in_the_stock_class_computes_the_same_and_says_what_factors_would_save() -> None:
    factored, dense = (welore(tiny("llama"), "saved=0.3", f"store={store}") for store in ("factors", "dense"))
    assert torch.allclose(logits(factored.model), logits(dense.model), atol=1e-4)
    assert type(dense.model).__name__ == "LlamaForCausalLM" and dense.outcome.structure is None
    assert dense.num_parameters[0] == dense.num_parameters[1]
    total = sum(row.num_weights for row in factored.matrices)
    share = 1 - sum(row.stored for row in factored.matrices) / total
    assert dense.warnings[-1] == f"store=dense writes products; factors would store {share:.2%} of these weights less"


def test_layers_that_are_not_named_stay_and_a_share_out_of_reach_is_one_line() -> None:
    result = welore(tiny("llama"), "layers=*.mlp.*", "by=outputs")
    assert {row.reason for row in result.matrices if ".self_attn." in row.name} == {"not among layers=*.mlp.*"}
    with pytest.raises(ConversionError, match=r"rank 1 everywhere saves 9\d\.\d\d%; lower saved=0.99"):
        welore(tiny("llama"), "saved=0.99")


def test_experts_in_one_tensor_become_products_by_the_same_threshold() -> None:
    """Every expert its own rank; against the SVD of each at the threshold that the ranks of the other matrices tell."""
    result, dense = welore(tiny("mixtral"), "saved=0.3", "store=dense"), tiny("mixtral")
    assert type(result.model).__name__ == "MixtralForCausalLM" and result.outcome.structure is None
    pieces = {}
    for row in result.matrices:
        old, new = (model.get_parameter(row.name).detach() for model in (dense, result.model))
        if row.name.endswith("gate.weight"):
            continue
        matrices = (each.view(-1, *each.shape[-2:]).double() for each in (old, new))
        for index, (before, after) in enumerate(zip(*matrices, strict=True)):
            pieces[row.name, index] = (before, after)
    dropped, kept, saved = 0.0, 1.0, 0
    for before, after in pieces.values():
        relative, rank = relative_values(before), int(torch.linalg.matrix_rank(after, rtol=1e-5))
        if rank < min(before.shape):
            left, scale, right = torch.linalg.svd(before, full_matrices=False)
            assert torch.allclose(after, (left[:, :rank] * scale[:rank]) @ right[:rank], atol=1e-4)
            dropped, kept = max(dropped, float(relative[rank])), min(kept, float(relative[rank - 1]))
            saved += before.numel() - rank * sum(before.shape)
    assert dropped < kept and sum("experts" in name for name, _ in pieces) == 20
    total = sum(before.numel() for before, _ in pieces.values())
    assert saved >= 0.3 * total
    share = f"{saved / total:.2%}"
    assert result.warnings[-1] == f"store=dense writes products; factors would store {share} of these weights less"
    left = {row.reason for row in welore(tiny("mixtral"), "saved=0.1").matrices if "experts" in row.name}
    assert left == {"experts in one tensor, which has no place for factors; store=dense writes their products"}


def test_experts_lose_by_their_own_outputs() -> None:
    dense, seen = tiny("mixtral"), dict[int, Tensor]()
    with separate_experts(dense), torch.no_grad():
        experts = dense.model.layers[0].mlp.experts
        for index, entry in enumerate(experts.entries):
            entry.register_forward_pre_hook(lambda _m, args, index=index: seen.update({index: args[0].double()}))
        dense(sequences(16))
    result, dense = welore(tiny("mixtral"), "saved=0.4", "store=dense", "by=outputs"), tiny("mixtral")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    change = size = 0.0
    for index, weight in enumerate(dense.get_parameter(name).detach().double()):
        new = result.model.get_parameter(name).detach()[index].double()
        # The last expert is reached by no token, and takes the inputs of all.
        inputs = seen[index] if index in seen else torch.cat([seen[one] for one in sorted(seen)])
        values, rank = torch.linalg.svdvals(inputs @ weight.T), int(torch.linalg.matrix_rank(new, rtol=1e-5))
        lost = float((inputs @ (new - weight).T).square().sum())
        if rank < 32:
            assert lost == pytest.approx(float(values[rank:].square().sum()), rel=1e-3)
        change, size = change + lost, size + float(values.square().sum())
    error = {row.name: row.output_error for row in result.matrices}[name]
    assert change > 0 and error == pytest.approx((change / size) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("by", ["weights", "outputs"])
def test_bf16_has_the_ranks_of_float32_and_nearly_its_products(by: str) -> None:
    rounded = tiny("llama").to(torch.bfloat16)
    exact = welore(tiny("llama").to(torch.bfloat16).float(), f"by={by}", "saved=0.3")
    found = welore(rounded, f"by={by}", "saved=0.3")
    assert {weight.dtype for weight in found.model.parameters()} == {torch.bfloat16}
    if by == "weights":  # inputs differ in bf16
        assert found.outcome.structure == exact.outcome.structure
    wanted = logits(exact.model)
    assert (logits(found.model).float() - wanted).norm() < 0.1 * wanted.norm()
