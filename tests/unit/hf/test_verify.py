"""The gate on real Megatron-Core models, and tables broken in every way that a gate must find and name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf import choose_family, export_model
from sparsecod_megatron.hf.families.entries import LayerTensors
from sparsecod_megatron.hf.table import Entry
from sparsecod_megatron.hf.verify import Verification, verify_directory
from tests.helpers.megatron import SMALL, BuiltModel, megatron_model
from tests.unit.hf.test_variants import CASES

DENSE = ("dense-lns", "dense-everything", "dense-gate-elementwise", "dense-mix", "dense-neox", "dense-layernorm-peri")
PASSING = [*DENSE, "moe-shared-gate", "moe-parallel-layernorm", "moe-deepseek"]


def gate(overrides: Sequence[str], folder: Path, dtype: torch.dtype, change: Callable[[Path], object]) -> Verification:
    """Export a Megatron model, change the export, and compare."""
    model = load_config(None, [*SMALL, *overrides]).model
    torch.manual_seed(0)
    with megatron_model(*overrides) as built:
        built.eval()
        tensors = dict(built.named_parameters()) | dict(built.named_buffers())
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name.endswith("expert_bias"):
                    tensor.uniform_(-0.5, 0.5)
        named = {name: tensors[name].detach().clone() for name in choose_family(model).table(model).megatron_shapes}
        export_model(model, named, folder, seq_length=16, dtype=dtype, tokenizer_dir=None)
        change(folder)
        return verify_directory(
            lambda: nullcontext(BuiltModel(built)),
            model,
            folder,
            exported_as=dtype,
            seq_length=16,
            generator=torch.Generator().manual_seed(3),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PASSING)
def test_a_right_export_passes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    verification = gate(CASES[name], tmp_path / "m", dtype, lambda folder: None)
    verification.require()
    assert (verification.random.num_tokens, verification.greedy.num_tokens) == (16, 16)
    assert verification.random.argmax_agreement == verification.greedy.argmax_agreement == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_any_width_pass(dtype: torch.dtype, tmp_path: Path) -> None:
    """torch's product of all experts at once refuses rows that are not of whole 16 bytes."""
    narrow = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=22")
    gate(narrow, tmp_path / "m", dtype, lambda folder: None).require()


BROKEN = {
    "dense-everything": [
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.v_proj",
        "self_attn.g_proj",
        "self_attn.k_norm",
        "self_attn.o_proj",
        "attention_join_norm",
        "post_attention_layernorm",
        "mlp.up_proj",
        "mlp.down_proj",
        "mlp_join_norm",
    ],
    "moe-shared-gate": ["mlp.gate", "mlp.experts.5", "mlp.shared_expert"],
    "dense-qk-norm": ["self_attn.q_norm", "mlp.gate_proj"],
}


NEOX_PARTS = {
    "input_layernorm.bias": "input_layernorm.weight or bias",
    "attention.query_key_value.weight": "attention between its projections",
    "attention.dense.bias": "attention.dense.weight or bias",
    "mlp.dense_h_to_4h.weight": "mlp.dense_h_to_4h.weight or bias",
    "post_attention_layernorm.bias": "post_attention_layernorm.weight or bias",
}


@pytest.mark.parametrize("part", NEOX_PARTS)
def test_a_broken_tensor_has_the_name_of_its_class(part: str, tmp_path: Path) -> None:
    def break_it(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        name = f"gpt_neox.layers.1.{part}"
        tensors[name] = tensors[name].roll(1, 0).clone() * 1.5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    verification = gate(CASES["dense-neox"], tmp_path / "m", torch.float32, break_it)
    told = NEOX_PARTS[part] if " between " in NEOX_PARTS[part] else f"gpt_neox.layers.1.{NEOX_PARTS[part]}"
    with pytest.raises(ConversionError, match=rf"first tensor that differs: layer 1: {told}"):
        verification.require()


@pytest.mark.parametrize(("name", "part"), [(name, part) for name in BROKEN for part in BROKEN[name]])
def test_a_broken_tensor_is_named_with_its_layer(name: str, part: str, tmp_path: Path) -> None:
    def break_it(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        broken = next(key for key in tensors if key.startswith(f"model.layers.1.{part}."))
        tensors[broken] = tensors[broken].roll(1, 0).clone() * 1.5
        save_file(tensors, path, metadata={"format": "pt"})

    verification = gate(CASES[name], tmp_path / "m", torch.float32, break_it)
    assert verification.random.first_differing_layer == 1
    with pytest.raises(ConversionError, match=rf"first tensor that differs: layer 1: model\.layers\.1\.{part}\.weight"):
        verification.require()


def test_embedding_and_output_layer_are_named(tmp_path: Path) -> None:
    for part, message in (
        ("model.embed_tokens", "the embeddings"),
        ("model.norm", "after the last layer"),
        ("lm_head", "the output layer"),
    ):

        def break_it(folder: Path, part: str = part) -> None:
            tensors = load_file(folder / "model.safetensors")
            tensors[f"{part}.weight"] = tensors[f"{part}.weight"].roll(1, 0).clone() * 1.5
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

        verification = gate((), tmp_path / part, torch.float32, break_it)
        with pytest.raises(ConversionError, match=rf"first tensor that differs: {message}: {part}\.weight"):
            verification.require()


def exchanged(entry: Entry) -> Entry:
    """Gate and up under each other's names."""
    return dataclasses.replace(entry, hf=entry.hf[::-1])


def one_way(entry: Entry) -> Entry:
    """Written in another order than it is read."""
    transform = dataclasses.replace(entry.transform, to_hf=lambda tensors: entry.transform.to_hf(tensors)[::-1])
    return dataclasses.replace(entry, transform=transform)


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (exchanged, r"first tensor that differs: layer 0: model\.layers\.0\.mlp\.gate_proj\.weight"),
        (one_way, r"decoder\.layers\.0\.mlp\.linear_fc1\.weight: what is written as model\.layers\.0\.mlp\.gate_proj"),
    ],
)
def test_a_broken_table_is_named(
    breaking: Callable[[Entry], Entry], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = choose_family(load_config(None, SMALL).model)

    def entries(tensors: LayerTensors) -> Iterator[Entry]:
        fc1, fc2 = family.mlp_entries(tensors)
        yield breaking(fc1)
        yield fc2

    broken = dataclasses.replace(family, mlp_entries=entries)
    monkeypatch.setattr("sparsecod_megatron.hf.export.choose_family", lambda model, **_: broken)
    monkeypatch.setattr("sparsecod_megatron.hf.verify.name_table", lambda model, mechanisms: broken.table(model))
    with pytest.raises(ConversionError, match=message):
        gate((), tmp_path / "m", torch.float32, lambda folder: None).require()


def test_a_rotary_embedding_of_another_base_is_told_apart_from_tensors(tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(path.read_text().replace("10000.0", "100.0"))

    verification = gate((), tmp_path / "m", torch.float32, change)
    with pytest.raises(ConversionError, match="layer 0: attention between its projections: rotary embedding"):
        verification.require()
