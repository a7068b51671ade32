from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf import ParityReport, compare_logits, export_model
from sparsecod_megatron.hf.families import choose_family
from sparsecod_megatron.hf.families.entries import LayerTensors
from tests.helpers.reference_gpt import forward, random_tensors
from tests.unit.hf.models import MODELS, tiny

REPO_ROOT = Path(__file__).parents[3]
STORIES = REPO_ROOT.parent / "shared" / "data" / "models" / "stories260K_hf"
TOKENS = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(1))


def export(model: ModelConfig, tensors: dict[str, Tensor], output: Path, dtype: torch.dtype = torch.float32) -> Path:
    return export_model(model, tensors, output, seq_length=16, dtype=dtype, tokenizer_dir=None)


def compare(model: ModelConfig, tensors: dict[str, Tensor], folder: Path) -> ParityReport:
    return compare_logits(
        lambda tokens: forward(model, tensors, tokens)[0],
        folder,
        tokens=TOKENS,
        reference_hidden_states=forward(model, tensors, TOKENS)[1],
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_export_computes_what_the_definitions_say(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    tensors = random_tensors(model, seed=3)
    report = compare(model, tensors, export(model, tensors, tmp_path / "m"))
    report.require()
    assert (report.argmax_agreement, report.first_differing_layer, report.num_tokens) == (1.0, None, 26)
    assert 0 <= report.mean_difference <= report.max_difference <= 1e-5


def test_a_bf16_export_equals_the_rounded_weights(tmp_path: Path) -> None:
    model = MODELS["moe pre-softmax shared"]
    tensors = random_tensors(model)
    folder = export(model, tensors, tmp_path / "m", torch.bfloat16)
    rounded = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    compare(model, rounded, folder).require()
    assert not compare(model, tensors, folder).passed


@pytest.mark.parametrize("name", ["gqa", "moe", "moe pre-softmax shared"])
def test_any_single_broken_tensor_is_found_in_its_layer(name: str, tmp_path: Path) -> None:
    """Every kind of tensor of layer 1 in turn: its rows moved by one."""
    model = MODELS[name]
    tensors = random_tensors(model)
    folder = export(model, tensors, tmp_path / "m")
    good = load_file(folder / "model.safetensors")
    experts = {f"experts.{expert}." for expert in range(1, 5)}
    names = [n for n in good if "layers.1." in n and good[n].any() and not any(e in n for e in experts)]
    assert len(names) >= 9
    for broken in names:
        save_file(
            good | {broken: good[broken].roll(1, 0).clone()}, folder / "model.safetensors", metadata={"format": "pt"}
        )
        report = compare(model, tensors, folder)
        assert (report.passed, report.first_differing_layer) == (False, 1), broken
        with pytest.raises(ConversionError, match="first layer that differs: 1"):
            report.require()


def test_a_table_with_two_names_exchanged_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["gqa"]
    tensors = random_tensors(model)
    family = choose_family(model)

    def exchanged(tensors: LayerTensors) -> object:
        fc1, fc2 = family.mlp_entries(tensors)
        yield dataclasses.replace(fc1, hf=fc1.hf[::-1])
        yield fc2

    broken = dataclasses.replace(family, mlp_entries=exchanged)
    monkeypatch.setattr("sparsecod_megatron.hf.export.choose_family", lambda model, **_: broken)
    report = compare(model, tensors, export(model, tensors, tmp_path / "m"))
    with pytest.raises(ConversionError, match=r"max \|Δlogit\| .*first layer that differs: 0"):
        report.require()


def test_the_worst_position_is_where_the_difference_is(tmp_path: Path) -> None:
    model = tiny()
    tensors = random_tensors(model)
    folder = export(model, tensors, tmp_path / "m")

    def shifted(tokens: Tensor, by: float) -> Tensor:
        logits = forward(model, tensors, tokens)[0]
        logits[1, 7, 42] += by
        return logits

    report = compare_logits(partial(shifted, by=0.5), folder, tokens=TOKENS)
    assert report.worst_position == (1, 7, 42)
    assert report.max_difference == pytest.approx(0.5, abs=1e-4)
    assert report.first_differing_layer is None
    nan = compare_logits(partial(shifted, by=float("nan")), folder, tokens=TOKENS)
    assert (nan.passed, nan.worst_position) == (False, (1, 7, 42))


def test_missing_left_over_and_misshapen_weights_are_refused(tmp_path: Path) -> None:
    model = tiny()
    tensors = random_tensors(model)
    folder = export(model, tensors, tmp_path / "m")
    good = load_file(folder / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    cases = {
        "missing keys": {name: tensor for name, tensor in good.items() if name != norm},
        "unexpected keys": good | {"model.layers.1.self_attn.q_proj.bias": torch.zeros(32)},
    }
    for problem, changed in cases.items():
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConversionError, match=rf"LlamaForCausalLM reports 1 {problem} \(model\.layers\.1"):
            compare(model, tensors, folder)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    model = tiny()
    folder = export(model, random_tensors(model), tmp_path / "m")
    with pytest.raises(ConversionError, match=r"logits have shape \[2, 13, 61\]"):
        compare_logits(lambda tokens: torch.zeros(2, 13, 60), folder, tokens=TOKENS)


@pytest.mark.skipif(not STORIES.is_dir(), reason="no shared/data/models/stories260K_hf beside the repository")
def test_a_pretrained_model_keeps_its_logits_under_megatron_names() -> None:
    theirs = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    config = json.loads((STORIES / "config.json").read_text())
    model = ModelConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        vocab_size=config["vocab_size"],
        layernorm_epsilon=config["rms_norm_eps"],
        untie_embeddings_and_output_weights=not config["tie_word_embeddings"],
    )
    table = choose_family(model).table(model)
    weights = dict(theirs.state_dict())
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    ours = dict(table.to_megatron(weights))
    tokens = torch.randint(0, config["vocab_size"], (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(tokens).logits - forward(model, ours, tokens)[0]).abs().max() < 1e-4
