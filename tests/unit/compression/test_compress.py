"""Each method on each layout of weights, against formulas written out here."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from sparsecod_megatron.compression.changes import eligible
from sparsecod_megatron.compression.compress import compress, restore, sidecar_of, write_model
from sparsecod_megatron.compression.modelopt import quiet_modelopt
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.errors import CheckpointError, ConversionError
from tests.helpers.decoders import tiny_decoder
from tests.helpers.words import save_with_words
from tests.unit.compression.models import MODELS, sequences, tiny

pytest.importorskip("modelopt", reason="needs nvidia-modelopt (the extra `modelopt`)")
SKIPPED = ("gate.weight", "shared_expert_gate.weight")


def e4m3(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(dim=(-2, -1), keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def int8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(dim=-1, keepdim=True) / 127
    return (weight / scale).round() * scale


FORMULAS = {"fp8": e4m3, "int8": int8}


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(sequences(seed=9)).logits


@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_what_the_formula_says(name: str, method: str) -> None:
    model = tiny(name)
    before, old_logits = copy.deepcopy(model.state_dict()), logits(model)
    result = compress(model, find_method(method), sequences(), batch_size=4)
    rows = {row.name: row for row in result.matrices}
    assert rows.keys() == dict(eligible(model)).keys()
    for parameter, new in result.model.state_dict().items():
        old = before[parameter]
        if parameter not in rows or parameter.endswith(SKIPPED):
            assert torch.equal(new, old), parameter
            assert parameter not in rows or (not rows[parameter].compressed and rows[parameter].reason)
            continue
        expected = FORMULAS[method](old)
        assert torch.allclose(new, expected, atol=1e-6), parameter
        assert rows[parameter].compressed and rows[parameter].reason == ""
        assert rows[parameter].zeros == pytest.approx(float((expected == 0).float().mean()))
        assert rows[parameter].relative_error == pytest.approx(float((expected - old).norm() / old.norm()), rel=1e-3)
    assert not torch.allclose(logits(result.scored), old_logits, atol=1e-3)
    assert any("routers" in warning for warning in result.warnings) == (name != "llama")
    unreached = [warning for warning in result.warnings if "no calibration token reached" in warning]
    assert bool(unreached) == (name == "sparsecod")


@pytest.mark.parametrize(("name", "method"), [("llama", "fp8"), ("llama", "int8"), ("sparsecod", "int8")])
def test_engines_get_the_same_weights_and_ranges_fit_their_model_alone(name: str, method: str, tmp_path: Path) -> None:
    source = save_with_words(tiny(name), tmp_path / "source")
    result = compress(tiny(name), find_method(method), sequences(), batch_size=4)
    folder = tmp_path / "written"
    folder.mkdir()
    write_model(result, AutoTokenizer.from_pretrained(source), source, folder)
    assert (folder / "engine").exists() == (name != "sparsecod")
    if name == "sparsecod":
        return
    files = load_file(folder / "engine" / "model.safetensors")
    row = "model.layers.1.mlp.down_proj"
    assert files[f"{row}.weight"].dtype == {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[method]
    scale = files[f"{row}.weight_scale"].reshape(-1, 1)
    weight = result.model.get_parameter(f"{row}.weight")
    assert torch.allclose(files[f"{row}.weight"].float() * scale, weight, atol=1e-6)
    sidecar = sidecar_of(folder)
    assert sidecar is not None
    with pytest.raises(CheckpointError, match="input ranges do not fit"):
        restore(tiny("llama", num_hidden_layers=1), sidecar)
    sidecar.write_text('{"method": "magnitude"}')
    with pytest.raises(
        CheckpointError, match="not what `sparsecod compress` writes: magnitude does not write this file"
    ):
        restore(tiny("llama"), sidecar)


@pytest.mark.parametrize("method", [*FORMULAS, "sparsegpt"])
def test_a_model_in_training_mode_is_calibrated_and_scored_without_dropout(method: str) -> None:
    results = []
    for training in (False, True):
        model = tiny("llama", attention_dropout=0.5).train(training)
        results.append(compress(model, find_method(method), sequences(), batch_size=4))
    evaluated, trained = results
    assert torch.equal(logits(trained.scored), logits(evaluated.scored))
    for name, weight in evaluated.model.state_dict().items():
        assert torch.equal(trained.model.state_dict()[name], weight), name


def test_an_expert_without_tokens_takes_the_widest_range_of_its_fellows() -> None:
    with quiet_modelopt():
        from modelopt.torch.quantization.nn import TensorQuantizer

        from sparsecod_megatron.compression.rounding import _share_ranges
    ranges = {0: 1.0, 1: 3.0, 2: None, 3: 2.0}
    quantizers = {f"layers.0.experts.{expert}.up.input_quantizer": TensorQuantizer() for expert in ranges}
    for quantizer, amax in zip(quantizers.values(), ranges.values(), strict=True):
        if amax is not None:
            quantizer.amax = torch.tensor(amax)
    assert _share_ranges(quantizers) == ["layers.0.experts.2.up"]
    assert [float(quantizer.amax) for quantizer in quantizers.values()] == [1, 3, 3, 2]


@pytest.mark.parametrize(
    ("family", "method", "reason"),
    [
        ("bloom", "int8", "cannot take BloomForCausalLM"),
        ("mamba", "int8", "mixer.dt_proj: the model uses this layer's weight without calling the layer"),
    ],
)
def test_a_model_that_a_method_cannot_take_is_one_line(family: str, method: str, reason: str) -> None:
    tokens = torch.randint(3, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConversionError, match=reason) as caught:
        compress(tiny_decoder(family), find_method(method), tokens, batch_size=2)
    assert "\n" not in str(caught.value)
