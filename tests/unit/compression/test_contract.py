"""What holds of every registered method: its directory computes what was measured, its report says what is in it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from sparsecod_megatron.compression.changes import eligible
from sparsecod_megatron.compression.compress import Compression, compress, sidecar_of, write_model
from sparsecod_megatron.compression.method import Material, Method, Needs, Outcome
from sparsecod_megatron.compression.registry import METHODS, find_method, method_class
from sparsecod_megatron.errors import CheckpointError, ConfigError, ConversionError
from sparsecod_megatron.models.opening import open_model
from tests.helpers.words import save_with_words
from tests.unit.compression.models import MODELS, sequences, tiny

SETTINGS = {"low_rank": ["share=0.4"], "neurons": ["share=0.5"], "sparse_expansion": ["clusters=3"]}
"""Of methods whose own defaults are refused, or take nothing from models as small as these."""
REFUSED = {("slicegpt", "gpt2"), ("sparse_expansion", "mixtral"), ("sparse_expansion", "sparsecod")}
"""Models that a method cannot take, as its own test checks."""
OWN_CLASS = {"low_rank", "welore", "sparse_expansion"}
WITHOUT_MODELOPT = importlib.util.find_spec("modelopt") is None


def gpt2() -> PreTrainedModel:
    """Layers that store their weights `[in, out]`, with biases."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def model_of(family: str) -> PreTrainedModel:
    return gpt2() if family == "gpt2" else tiny(family)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(sequences(seed=9)).logits


def compressed(method: str, family: str) -> Compression:
    if method_needs_modelopt(method) and WITHOUT_MODELOPT:
        pytest.skip("needs nvidia-modelopt (the extra `modelopt`)")
    others = [scaled(model_of(family))] if method_class(method).needs.several_models else []
    chosen = find_method(method, SETTINGS.get(method, []))
    return compress(model_of(family), chosen, sequences(), batch_size=4, others=others)


@torch.no_grad()
def scaled(model: PreTrainedModel) -> PreTrainedModel:
    """Another model of the same architecture with the same zeros."""
    for weight in model.parameters():
        if weight.ndim > 1:
            weight *= 1.5
    return model


def method_needs_modelopt(method: str) -> bool:
    try:
        return method_class(method).needs.modelopt
    except ConfigError:  # says that it is not installed
        return True


def cases() -> list[tuple[str, str]]:
    """Layouts of weights: plain, fused experts, our own class, and transposed layers where ModelOpt is not asked."""
    own = [(method, "gpt2") for method in METHODS if not method_needs_modelopt(method)]
    every = [(method, family) for method in METHODS for family in MODELS] + own
    return [case for case in every if case not in REFUSED]


@pytest.mark.parametrize(("method", "family"), cases())
def test_the_directory_is_what_was_measured_and_reported(method: str, family: str, tmp_path: Path) -> None:
    source = save_with_words(model_of(family), tmp_path / "source")
    result = compressed(method, family)
    assert result.method.name == method
    measured, stored_parameters = logits(result.scored), result.model.num_parameters()
    assert not torch.allclose(measured, logits(model_of(family)), atol=1e-3)
    folder = tmp_path / "written"
    folder.mkdir()
    with open_model(source) as opened:
        write_model(result, opened.tokenizer, source, folder)
    with open_model(folder) as opened:
        assert opened.tokenizer("w3 w5")["input_ids"] == [4, 6]
        assert torch.allclose(logits(opened.model), measured, atol=1e-5)
        assert opened.model.num_parameters() == stored_parameters == result.num_parameters[1]
    check_report(result, dict(eligible(model_of(family))), folder)
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    assert (model_type == "sparsecod_compressed") == (method in OWN_CLASS)
    sidecar = sidecar_of(folder)
    assert (sidecar and sidecar.name) == METHODS[method].sidecar


def check_report(result: Compression, before: dict[str, Tensor], folder: Path) -> None:
    """A row for each matrix; counts and errors recomputed from the directory's weights alone."""
    with open_model(folder, restored=False) as opened:
        after = dict(opened.model.named_parameters())
    assert [row.name for row in result.matrices] == list(before)
    for row in result.matrices:
        inside = row.name.removesuffix(".weight") + "."
        weights = [after[row.name]] if row.name in after else [after[name] for name in after if name.startswith(inside)]
        weights = [weight for weight in weights if weight.ndim > 1]
        assert row.shape == before[row.name].shape
        assert row.stored == sum(weight.numel() for weight in weights), row.name
        assert row.zeros == pytest.approx(sum(int((weight == 0).sum()) for weight in weights) / row.stored), row.name
        assert bool(row.reason) == (not row.compressed)
        assert bool(row.unmeasured) == (row.relative_error is None)
        if row.name in after and after[row.name].shape == row.shape:
            change = (after[row.name] - before[row.name]).norm() / before[row.name].norm()
            assert row.relative_error == pytest.approx(float(change), rel=1e-3, abs=1e-7)
            assert row.compressed or change == 0


def test_a_class_of_ours_survives_being_saved_again(tmp_path: Path) -> None:
    source = save_with_words(tiny("llama"), tmp_path / "source")
    folders = [tmp_path / name for name in ("written", "again")]
    folders[0].mkdir()
    with open_model(source) as opened:
        write_model(compressed("low_rank", "llama"), opened.tokenizer, source, folders[0])
    with open_model(folders[0]) as opened:
        opened.model.save_pretrained(folders[1])
        opened.tokenizer.save_pretrained(folders[1])
        first = logits(opened.model)
    thinner = tmp_path / "thinner"
    thinner.mkdir()
    with open_model(folders[1]) as opened:
        assert torch.equal(logits(opened.model), first)
        twice = compress(opened.model, find_method("low_rank", ["rank=2"]), sequences(), batch_size=4)
        write_model(twice, opened.tokenizer, folders[1], thinner)
        second = logits(twice.model)
    with open_model(thinner) as opened:
        assert type(opened.model).__name__ == "CompressedLlamaForCausalLM"
        assert torch.allclose(logits(opened.model), second, atol=1e-5) and not torch.allclose(second, first, atol=1e-3)
    content = json.loads((folders[1] / "config.json").read_text())
    damage: list[tuple[dict[str, Any], str]] = [
        ({"method": "sorcery"}, "method 'sorcery' is unknown here"),
        ({"method": "magnitude"}, "magnitude exchanges no modules"),
        ({"structure": {"ranks": {"model.layers.7.mlp.up_proj": 3}}}, "ranks that do not fit"),
        ({"base": {"hidden_size": 3}}, "`base` is not a model's configuration"),
    ]
    for changes, message in damage:
        (folders[1] / "config.json").write_text(json.dumps(content | changes))
        with pytest.raises(CheckpointError, match=message), open_model(folders[1]) as opened:
            _ = opened.model


class Probe(Method):
    """Puts a gradient in the place of its matrix, sets a norm, and halves the width of the MLPs."""

    name = "probe"
    needs = Needs(gradients=True)

    def compress(self, material: Material) -> Outcome:
        assert material.sequences is None and not material.model.training
        name = "model.layers.0.mlp.up_proj.weight"
        weight = material.model.get_parameter(name)
        material.model(sequences()).logits.square().mean().backward()
        assert weight.grad is not None
        material.changes.put(name, weight.grad)
        material.changes.put("model.norm.weight", torch.ones(32))
        for layer in material.model.model.layers:  # a stock class of another shape: half as many neurons
            for kind in ("gate", "up", "down"):
                part = getattr(layer.mlp, f"{kind}_proj").weight
                where = f"model.layers.{layer.self_attn.layer_idx}.mlp.{kind}_proj.weight"
                material.changes.put(where, part[:, :24] if kind == "down" else part[:24])
        material.model.config.intermediate_size = 24
        return Outcome(warnings=["a probe"])


def test_gradients_and_other_shapes_of_a_stock_class_fit_the_contract(tmp_path: Path) -> None:
    source = save_with_words(tiny("llama"), tmp_path / "source")
    result = compress(tiny("llama"), Probe(None), sequences(), batch_size=4)
    rows = {row.name: row for row in result.matrices}
    narrowed = rows["model.layers.1.mlp.down_proj.weight"]
    assert narrowed.shape == (32, 48) and narrowed.stored == 32 * 24 and narrowed.relative_error is None
    assert narrowed.unmeasured == "its shape was [32, 48] and is [32, 24]"
    assert rows["model.layers.0.self_attn.q_proj.weight"].reason == "this method leaves it"
    assert result.warnings[-1] == "a probe" and "the error of 6 matrices is not measured" in result.warnings[-2]
    assert result.num_parameters[0] - result.num_parameters[1] == 2 * 3 * 24 * 32
    measured = logits(result.scored)
    (tmp_path / "written").mkdir()
    with open_model(source) as opened:
        write_model(result, opened.tokenizer, source, tmp_path / "written")
    with open_model(tmp_path / "written") as opened:
        assert type(opened.model).__name__ == "LlamaForCausalLM"
        assert torch.allclose(logits(opened.model), measured, atol=1e-6)


def test_non_finite_weights_are_refused() -> None:
    class Broken(Probe):
        def compress(self, material: Material) -> Outcome:
            material.changes.put("model.layers.1.mlp.up_proj.weight", torch.full((48, 32), float("nan")))
            return Outcome()

    with pytest.raises(ConversionError, match=r"layers\.1\.mlp\.up_proj\.weight: the method made non-finite weights"):
        compress(tiny("llama"), Broken(None), sequences(), batch_size=4)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("magnitude", ["pattern=1.5"], "pattern 1.5: give the share of weights to drop"),
        ("magnitude", ["pattern=4:4"], "pattern 4:4: n of every m weights stay"),
        ("magnitude", ["pattern=2:4", "per=row"], "per=row: n:m is by neighbours already"),
        ("magnitude", ["per=column"], "--method magnitude: per: 'column' is not one of matrix, row"),
        ("magnitude", ["sparsity=0.5"], "unknown key 'sparsity'"),
        ("magnitude", ["half"], "not of the form"),
        ("low_rank", [], "give one of rank=N and share=S"),
        ("low_rank", ["rank=0"], "--method low_rank: rank: 0 is below 1; raise it"),
        ("low_rank", ["share=1"], "--method low_rank: share: 1.0 is not below 1.0; lower it"),
    ],
)
def test_settings_are_refused_in_one_line(method: str, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        find_method(method, settings)
    assert "\n" not in str(caught.value)
