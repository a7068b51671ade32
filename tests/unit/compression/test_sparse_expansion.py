"""Copies for clusters: one is SparseGPT, two tell planted inputs apart, and every token takes the copy made for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecod_megatron.compression.compress import Compression, compress, write_model
from sparsecod_megatron.compression.expansion import ExpertLinear
from sparsecod_megatron.compression.neuron_distance import neuron_distance, spaced
from sparsecod_megatron.compression.patterns import parse_pattern
from sparsecod_megatron.compression.reconstruct import sweep
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.errors import CheckpointError, ConfigError, ConversionError
from sparsecod_megatron.models.opening import open_model
from tests.helpers.words import save_with_words
from tests.unit.compression.models import sequences, tiny
from tests.unit.compression.test_contract import logits, model_of

GATE, UP, DOWN = (f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down"))


def expanded(model: PreTrainedModel, *settings: str, batch_size: int = 4) -> Compression:
    return compress(model, find_method("sparse_expansion", settings), sequences(16), batch_size=batch_size)


def inputs_of(model: PreTrainedModel, parameter: str) -> Tensor:
    """What enters a layer over the calibration tokens, [tokens, in]."""
    seen: list[Tensor] = []
    layer = model.get_submodule(parameter.removesuffix(".weight"))
    hook = layer.register_forward_hook(lambda _module, args, _output: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(sequences(16))
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize(("family", "pattern"), [("llama", "0.5"), ("llama", "2:4"), ("gpt2", "0.5")])
def test_one_cluster_is_sparsegpt_to_the_last_bit(family: str, pattern: str) -> None:
    result = expanded(model_of(family), "clusters=1", f"pattern={pattern}")
    plain = compress(model_of(family), find_method("sparsegpt", [f"pattern={pattern}"]), sequences(16), batch_size=4)
    for ours, theirs in zip(result.matrices, plain.matrices, strict=True):
        module = result.model.get_submodule(ours.name.removesuffix(".weight"))
        weight, wanted = module.get_parameter("weight"), plain.model.get_parameter(ours.name)
        if isinstance(module, ExpertLinear):
            weight = weight[0].T if family == "gpt2" else weight[0]
        assert torch.equal(weight, wanted), ours.name
        assert ours.zeros == theirs.zeros and ours.output_error == pytest.approx(theirs.output_error, rel=1e-5)
    assert torch.allclose(logits(result.model), logits(plain.model), atol=1e-5)


def two_kinds_of_tokens() -> PreTrainedModel:
    """A Llama whose first feed-forward layer sees tokens in one half of the channels, or in the other."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        weight = model.model.embed_tokens.weight
        weight[::2, 16:] = 0
        weight[1::2, :16] = 0
        weight[::2, 0], weight[1::2, 16] = 2.0, 2.0  # so far apart that no other two clusters are better
    return model


def test_two_clusters_lose_nothing_where_one_must() -> None:
    dense = two_kinds_of_tokens()
    before = nn.functional.linear(inputs_of(dense, UP), dense.get_parameter(UP))
    errors = []
    for clusters in (1, 2):
        result = expanded(two_kinds_of_tokens(), f"clusters={clusters}", "shrinkage=0", "damping=1e-6")
        rows = {row.name: row.output_error for row in result.matrices}
        after = result.model.get_submodule(UP.removesuffix(".weight"))(inputs_of(dense, UP))
        found = float((after - before).detach().norm() / before.detach().norm())
        assert found == pytest.approx(rows[UP], abs=1e-3)
        errors.append(found)
    assert errors[0] > 0.1 and errors[1] < 1e-3


def four_kinds_of_tokens() -> PreTrainedModel:
    """As before, in quarters of the channels."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        weight = model.model.embed_tokens.weight
        for kind in range(4):
            own = weight[kind::4, 8 * kind : 8 * kind + 8].clone()
            weight[kind::4] = 0
            weight[kind::4, 8 * kind : 8 * kind + 8] = own
            weight[kind::4, 8 * kind] = 3.0
    return model


def test_neurons_of_a_mixture_stay_nearer_with_every_cluster() -> None:
    """Their W₁ is scipy's, falls from one cluster to two to four, and is gone where each kind has its own copy."""
    dense, found = four_kinds_of_tokens(), []
    inputs = inputs_of(dense, UP)
    before = (inputs @ dense.get_parameter(UP).T).detach()
    for clusters in (1, 2, 4):
        result = expanded(four_kinds_of_tokens(), f"clusters={clusters}", "shrinkage=0", "damping=1e-6", "pattern=0.75")
        after = result.model.get_submodule(UP.removesuffix(".weight"))(inputs).detach()
        expected = [
            scipy.stats.wasserstein_distance(old, new) / np.std(old)
            for old, new in zip(before.T.double().numpy(), after.T.double().numpy(), strict=True)
        ]
        reported = {row.name: row.neuron_distance for row in result.matrices}
        assert reported[UP] == pytest.approx(np.mean(expected), rel=1e-4, abs=1e-6)
        assert reported["model.layers.0.self_attn.q_proj.weight"] is None
        found.append(reported[UP])
    assert found[0] > 1.3 * found[1] and found[1] > 10 * found[2] and found[2] < 1e-3, found


def test_distances_of_neurons_have_a_scale_and_a_sample() -> None:
    """In standard deviations; a neuron that says nothing has none; long samples are thinned evenly, ends included."""
    outputs = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    assert neuron_distance(outputs, outputs[torch.randperm(500)]) == 0
    assert neuron_distance(7 * outputs, 7 * outputs + 7 * outputs.std(0, correction=0)) == pytest.approx(1, rel=1e-5)
    mute = torch.cat([outputs, torch.ones(500, 1)], 1)
    assert neuron_distance(mute, 2 * mute) == pytest.approx(neuron_distance(outputs, 2 * outputs))
    assert neuron_distance(torch.ones(4, 2), torch.zeros(4, 2)) is None
    rows = spaced(torch.arange(10_000.0)[:, None])[:, 0]
    assert len(rows) == 2048 and (rows[0], rows[-1]) == (0, 9999) and rows.diff().max() <= 5 <= rows.diff().min() + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_takes_the_copy_that_its_cluster_was_pruned_for(dtype: torch.dtype) -> None:
    """Labels of the finished model on the calibration inputs give the statistics by which it was pruned."""
    dense = tiny("llama").to(dtype)
    result = expanded(tiny("llama").to(dtype), "clusters=3", "shrinkage=0.2", "pattern=2:4")
    for name in (GATE, UP, DOWN):
        module, rows = result.model.get_submodule(name.removesuffix(".weight")), inputs_of(dense, name).float()
        assert isinstance(module, ExpertLinear)
        weight = dense.get_parameter(name).detach().float()
        distances = module.directions.float() @ rows.T + module.offsets.float()[:, None]
        labels, whole, change = distances.argmax(0), rows.T @ rows, torch.tensor(0.0)
        for cluster in range(3):
            own = rows[labels == cluster]
            assert len(own) >= 0.25 * rows.shape[1]
            hessian = 0.8 * own.T @ own + 0.2 * len(own) / len(rows) * whole
            hessian = hessian / hessian.diagonal().mean()
            wanted, mask = sweep(weight, hessian, parse_pattern("2:4", None), damping=0.01)
            copy = module.weight[cluster].float()
            assert ((copy != 0) == mask).float().mean() > (0.999 if dtype == torch.float32 else 0.99)
            assert (copy - wanted).norm() < (1e-3 if dtype == torch.float32 else 0.05) * wanted.norm()
            change += (own @ (copy - weight).T).square().sum()
        error = float((change / (rows @ weight.T).square().sum()).sqrt())
        assert {row.name: row.output_error for row in result.matrices}[name] == pytest.approx(error, rel=0.02)


def test_the_batch_size_changes_nothing_and_few_tokens_are_named() -> None:
    one, many = (expanded(tiny("llama"), "clusters=12", batch_size=size) for size in (3, 16))
    for name, weight in one.model.named_parameters():
        other = many.model.get_parameter(name)
        assert ((weight == 0) == (other == 0)).float().mean() > 0.999
        assert torch.allclose(weight, other, atol=1e-3)
    warning = "clusters had fewer inputs than a quarter of their width, and were pruned by those of all clusters"
    assert warning in one.warnings[-1]


def test_the_rest_is_left_where_that_is_asked() -> None:
    result, dense = expanded(tiny("llama"), "clusters=2", "rest=dense", "layers=*.up_proj"), tiny("llama")
    kinds = {row.kind: row for row in result.matrices}
    assert {kind for kind, row in kinds.items() if row.compressed} == {"model.layers.*.mlp.up_proj"}
    assert {row.reason for row in result.matrices if not row.compressed} == {"rest=dense leaves what is not expanded"}
    assert torch.equal(result.model.get_parameter(GATE), dense.get_parameter(GATE))
    share = 48 * 32 / sum(row.num_weights for row in result.matrices if ".layers.0." in row.name) / 2
    assert result.warnings[-1].startswith(f"rest=dense: a token meets {share:.2%} zeros")


def test_what_cannot_be_expanded_is_refused(tmp_path: Path) -> None:
    for family, settings in (("mixtral", []), ("llama", ["layers=*.self_attn.*"]), ("llama", ["pattern=5:7"])):
        with pytest.raises(ConversionError, match="has no feed-forward layer among layers="):
            expanded(tiny(family), *settings)
    with pytest.raises(ConfigError, match="--method sparse_expansion: clusters: 0 is below 1"):
        find_method("sparse_expansion", ["clusters=0"])
    with pytest.raises(ConfigError, match="pattern 2: give the share of weights to drop"):
        find_method("sparse_expansion", ["pattern=2"])
    source, folder = save_with_words(tiny("llama"), tmp_path / "source"), tmp_path / "expanded"
    folder.mkdir()
    with open_model(source) as opened:
        write_model(expanded(opened.model, "clusters=2"), opened.tokenizer, source, folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("mlp.up_proj", "mlp.sideways_proj"))
    refusal = "config.json: clusters that do not fit CompressedLlamaForCausalLM"
    with pytest.raises(CheckpointError, match=refusal), open_model(folder) as opened:
        _ = opened.model
