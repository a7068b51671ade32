"""Pruning against a pruned copy of the model, weights back bit for bit, and curves whose answer is known."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.scores.registry import find_scores
from sparsecod_megatron.analysis.sparsity.cuts import MagnitudeCuts, WandaCuts
from sparsecod_megatron.analysis.sparsity.essential import GRID, find_essential, knee
from sparsecod_megatron.analysis.sparsity.pruning import PruningCurve, pruned
from sparsecod_megatron.analysis.sparsity.weights import Weights, matrix_rows
from sparsecod_megatron.errors import ConfigError, ConversionError
from sparsecod_megatron.hf.blocks import find_layers
from sparsecod_megatron.hf.matrices import find_matrices
from tests.unit.analysis.sparsity.tiny import own_sample, sample, tiny_model


def losses_of(model: PreTrainedModel, context: Context) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=context.windows[:, :-1], use_cache=False).logits
    labels = context.windows[:, 1:]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1).double()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_losses_are_those_of_a_pruned_copy(family: str) -> None:
    model = tiny_model(family)
    context = sample(model)
    matrices = find_matrices(context.model, context.layers)
    bits = {name: parameter.clone() for name, parameter in model.named_parameters()}
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    curve = PruningCurve(context, matrices, MagnitudeCuts(matrices))
    for sparsity in (0.0, 0.3, 0.8):
        clone = copy.deepcopy(model)
        targets = find_matrices(clone, find_layers(clone))
        flat = torch.cat([matrix.weight.flatten().abs() for matrix in targets]).sort().values
        count = int(sparsity * len(flat))
        with torch.no_grad():
            for matrix in targets:
                matrix.weight[matrix.weight.abs() <= (flat[count - 1] if count else -1)] = 0
        torch.testing.assert_close(curve.losses(sparsity), losses_of(clone, context), rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, bits[name]) and parameter.data_ptr() == addresses[name]


def test_weights_are_back_after_a_pass_that_fails() -> None:
    model = tiny_model("llama")
    context = sample(model)
    matrices = find_matrices(context.model, context.layers)
    bits = [matrix.weight.clone() for matrix in matrices]

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    (cut,) = MagnitudeCuts(matrices).shares([0.5])
    with pytest.raises(KeyboardInterrupt), pruned(matrices, cut):
        matrices[3].module.register_forward_pre_hook(fail)
        model(input_ids=context.windows[:, :-1])
    assert all(torch.equal(matrix.weight, before) for matrix, before in zip(matrices, bits, strict=True))


def test_no_pruned_copy_outlives_its_module() -> None:
    model = tiny_model("llama")
    context = sample(model)
    matrices = find_matrices(context.model, context.layers)
    addresses = [matrix.weight.data_ptr() for matrix in matrices]
    (cut,) = MagnitudeCuts(matrices).shares([0.5])
    with pruned(matrices, cut):
        model(input_ids=context.windows[:, :-1])
        assert [matrix.weight.data_ptr() for matrix in matrices] == addresses


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wanda_cuts_each_row_by_its_inputs(family: str) -> None:
    """Against a loop over the rows of a copy, by inputs that other hooks saw; GPT-2 stores its matrices transposed."""
    model = tiny_model(family)
    context = sample(model)
    matrices = find_matrices(context.model, context.layers)
    inputs: dict[torch.nn.Module, list[Tensor]] = {matrix.module: [] for matrix in matrices}
    handles = [m.register_forward_pre_hook(lambda m, args: inputs[m].append(args[0].flatten(0, -2))) for m in inputs]
    losses_of(model, context)
    for handle in handles:
        handle.remove()
    curve = PruningCurve(context, matrices, WandaCuts.of(context, matrices))
    for sparsity, pattern in ((0.4, None), (0.5, (2, 4))):
        clone = copy.deepcopy(model)
        for matrix, target in zip(matrices, find_matrices(clone, find_layers(clone)), strict=True):
            norms = torch.cat(inputs[matrix.module]).norm(dim=0)
            rows = target.weight.data.T if matrix.transposed else target.weight.data
            for row in rows:
                groups = [range(len(row))] if pattern is None else np.arange(len(row)).reshape(-1, 4).tolist()
                for group in groups:
                    by_score = sorted(group, key=lambda column: float(abs(row[column]) * norms[column]))
                    row[by_score[: int(sparsity * len(group))]] = 0
        found = curve.losses(sparsity) if pattern is None else curve.pattern_losses(*pattern)
        torch.testing.assert_close(found, losses_of(clone, context), rtol=1e-5, atol=1e-6)


def test_the_curve_by_wanda_has_names_of_its_own() -> None:
    result = Weights("wanda", [(2, 4), (1, 4)]).run(sample(tiny_model("llama")))
    assert {"essential_sparsity_wanda", "pruning_knee_wanda"} < set(result.values)
    assert "half_pruned_loss" not in result.per_sequence and "weights_pruning" not in result.tables
    assert [row["pattern"] for row in result.tables["weights_patterns_wanda"]] == ["2:4", "1:4"]


def test_what_the_curve_cannot_cut_is_refused() -> None:
    fused = sample(tiny_model("qwen2_moe"))
    with pytest.raises(ConversionError, match=r"--curve-score wanda: layer 0 holds its experts in one tensor"):
        Weights("wanda").run(fused)
    with pytest.raises(ConfigError, match=r"--curve-pattern 3:7: layer 0's .* which 7 does not divide"):
        Weights(patterns=[(3, 7)]).run(sample(tiny_model("llama")))
    for names, options, message in (
        (["causal"], {"curve_score": "wanda"}, "only weights has a curve"),
        (["weights"], {"curve_score": "obs"}, "give one of magnitude, wanda"),
        (["weights"], {"curve_patterns": ["4:2"]}, "not n:m with n below m"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_scores(names, **options)  # type: ignore[arg-type]


class Planted:
    """A curve that is given as a function."""

    def __init__(self, increase: dict[float, float] | None = None, at: float = 0.6) -> None:
        self._at = at
        self._bumps = increase or {}
        self._asked: dict[float, Tensor] = {}

    @property
    def sparsities(self) -> list[float]:
        return sorted(self._asked)

    def losses(self, sparsity: float) -> Tensor:
        rise = self._bumps.get(sparsity, 0.02 * max(0.0, sparsity - self._at) / 0.05)
        self._asked[sparsity] = torch.tensor([2.0, 4.0], dtype=torch.float64) * (1 + rise)
        return self._asked[sparsity]


@pytest.mark.parametrize("at", [0.12, 0.6, 0.8])
def test_essential_sparsity_of_a_known_curve(at: float) -> None:
    found = find_essential(Planted(at=at), seed=0).sparsity
    assert found.value == pytest.approx(at + 0.025, abs=1e-3)
    assert found.low == pytest.approx(found.high, abs=1e-6)  # every sequence has the same curve


def test_the_largest_sparsity_counts_after_a_bump() -> None:
    assert find_essential(Planted({0.3: 0.05}), seed=0).sparsity.value == pytest.approx(0.625, abs=1e-3)


def test_knee_is_where_the_curve_turns() -> None:
    rise = [max(0.0, sparsity - 0.7) for sparsity in GRID]
    assert knee(GRID, rise) == pytest.approx(0.7)


def test_planted_zeros_are_not_essential() -> None:
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    matrices = find_matrices(model, find_layers(model))
    with torch.no_grad():
        for matrix in matrices:
            matrix.weight[torch.rand(matrix.weight.shape, generator=generator) < 0.5] = 0
    context = own_sample(model)
    zeros = np.mean([float((matrix.weight == 0).float().mean()) for matrix in matrices])
    result = Weights().run(context)
    assert result.values["exact_zero"] == pytest.approx(zeros, abs=0.02)
    assert 0.49 < result.values["essential_sparsity"]["value"] < 0.75
    points = {row["sparsity"]: row["loss_increase"] for row in result.tables["weights_pruning"]}
    assert points[0.45] == 0


def test_fixed_threshold_follows_the_norm_and_the_relative_one_does_not() -> None:
    models = [tiny_model("llama"), tiny_model("llama")]
    with torch.no_grad():
        for matrix in find_matrices(models[1], find_layers(models[1])):
            matrix.weight.mul_(0.1)
    rows = [matrix_rows(find_matrices(model, find_layers(model)), 0.02) for model in models]
    for large, small in zip(*rows, strict=True):
        assert small["std_over_init"] == pytest.approx(0.1 * large["std_over_init"], rel=1e-5)
        assert small["below_init_1e-02"] > large["below_init_1e-02"]
        for name in ("below_own_1e-02", "hoyer", "gini"):
            assert small[name] == pytest.approx(large[name], abs=2e-3)
