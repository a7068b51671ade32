from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.model_keys import TRAINING_KEYS
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf import export_model
from sparsecod_megatron.hf.families import FAMILIES, choose_family
from sparsecod_megatron.hf.families.choose import DEPENDENT_KEYS, FEATURES, SHAPE_KEYS
from sparsecod_megatron.hf.source import open_source
from tests.helpers.reference_gpt import random_tensors
from tests.unit.hf.models import LING, MODELS, NEOX, moe, tiny

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
EXPECTED = {
    "mha": "LlamaForCausalLM",
    "gqa": "LlamaForCausalLM",
    "mqa": "LlamaForCausalLM",
    "tied": "LlamaForCausalLM",
    "wide heads": "LlamaForCausalLM",
    "heads that do not divide": "MistralForCausalLM",
    "biases": "LlamaForCausalLM",
    "qkv biases": "Qwen2ForCausalLM",
    "no rotation in a layer": "SmolLM3ForCausalLM",
    "half of the channels rotate": "Phi3ForCausalLM",
    "multipliers": "GraniteForCausalLM",
    "neox": "GPTNeoXForCausalLM",
    "moe": "MixtralForCausalLM",
    "moe wide heads": "MixtralForCausalLM",
    "moe tied": "MixtralForCausalLM",
    "moe top-1": "Qwen2MoeForCausalLM",
    "moe shared": "Qwen2MoeForCausalLM",
    "moe biases": "Qwen2MoeForCausalLM",
    "moe pre-softmax": "Qwen2MoeForCausalLM",
    "moe pre-softmax wide heads": "Qwen2MoeForCausalLM",
    "moe pre-softmax shared": "Qwen2MoeForCausalLM",
    "moe ling": "Glm4MoeForCausalLM",
    "latents": "DeepseekV3ForCausalLM",
    "moe latents": "DeepseekV3ForCausalLM",
    "moe latents pre-softmax": "DeepseekV2ForCausalLM",
}


def saved_by_transformers(model: ModelConfig, folder: Path) -> dict[str, Tensor]:
    """The tensors of a random transformers model, as transformers itself writes them; what ours lacks is zero."""
    config = choose_family(model).config(model, seq_length=16, dtype=torch.float32, token_ids=NO_TOKENS)
    hf = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            absent = model.moe_shared_expert_intermediate_size is None and ".shared_expert." in name
            zero = absent or "shared_expert_gate" in name or (name.endswith("_proj.bias") and not model.qkv_bias)
            parameter.copy_(torch.zeros_like(parameter) if zero else torch.randn_like(parameter))
    hf.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_the_expected_class_is_chosen(name: str) -> None:
    assert choose_family(MODELS[name]).architecture == EXPECTED[name]


@pytest.mark.parametrize("name", MODELS)
def test_transformers_own_files_survive_the_way_to_megatron_and_back(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    table = choose_family(model).table(model)
    theirs = saved_by_transformers(model, tmp_path)
    assert {key: tuple(tensor.shape) for key, tensor in theirs.items()} == table.hf_shapes
    ours = dict(table.to_megatron(theirs))
    assert {key: tensor.shape for key, tensor in ours.items()} == {
        key: tensor.shape for key, tensor in random_tensors(model).items()
    }
    back = dict(table.to_hf(ours))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", MODELS)
def test_our_tensors_survive_the_way_to_huggingface_and_back(name: str) -> None:
    model = MODELS[name]
    table = choose_family(model).table(model)
    ours = {key: tensor.bfloat16() for key, tensor in random_tensors(model).items()}
    back = dict(table.to_megatron(dict(table.to_hf(ours))))
    assert back.keys() == ours.keys() == table.megatron_shapes.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)


GEMMA: dict[str, object] = {
    "activation": "geglu_tanh",
    "layernorm_zero_centered_gamma": True,
    "embedding_multiplier": 32**0.5,
}
WINDOW: dict[str, object] = {"sliding_window": 5, "window_attn_skip_freq": 2}
OLMO = {"norm_placement": "branch", "qk_norm": True, "qk_norm_scope": "projection"}
IDENTITY = MODELS | {
    "window": tiny(sliding_window=5),
    "qk-norm": tiny(qk_norm=True),
    "qk-norm biases": tiny(qk_norm=True, qkv_bias=True, attention_output_bias=True),
    "qk-norm experts biases": moe(qk_norm=True, qkv_bias=True, attention_output_bias=True),
    "ling biases": moe(**LING | {"qkv_bias": True}),
    "own class biases": tiny(activation="gelu", qkv_bias=True, attention_output_gate="elementwise", mlp_bias=True),
    "qk-norm window": tiny(qk_norm=True, sliding_window=5, window_attn_skip_freq=2),
    "qk-norm experts": moe(qk_norm=True, moe_first_k_dense_layers=1),
    "gated shared expert": moe(moe_shared_expert_intermediate_size=16, moe_shared_expert_gate=True),
    "ling without groups": moe(**LING | {"moe_router_num_groups": None, "moe_router_group_topk": None}),
    "own class, half of the channels rotate": moe(rotary_percent=0.5),
    "olmo2": tiny(**OLMO, qkv_bias=True, attention_output_bias=True),
    "olmo3": tiny(**OLMO, sliding_window=5, window_attn_skip_freq=2, num_query_groups=2),
    "olmoe": moe(qk_norm=True, qk_norm_scope="projection", moe_router_pre_softmax=True, num_query_groups=2),
    "gemma": tiny(**GEMMA, num_query_groups=2),
    "gemma2": tiny(**GEMMA, **WINDOW, softmax_scale=20**-0.5, norm_placement="sandwich"),
    "gemma3": tiny(**GEMMA, **WINDOW, norm_placement="sandwich", qk_norm=True, rotary_base_local=100),
    "own class zero-centred": moe(**GEMMA, layernorm_scaling=True, qk_norm=True),
    "neox one after the other": tiny(**NEOX | {"norm_placement": "pre", "activation": "gelu_tanh"}),
    "neox all channels rotate": tiny(**NEOX | {"rotary_percent": 1.0, "activation": "relu2"}, hidden_dropout=0.1),
    "own class parallel": moe(**NEOX | {"mlp_bias": False}, num_query_groups=2, embedding_norm=True),
    "own class norms behind branches": tiny(norm_placement="branch", layernorm_scaling=True, num_query_groups=2),
    "own class multipliers": moe(softmax_scale=0.2, embedding_multiplier=2.0, logits_scaling=3.0, no_rope_freq=[0, 1]),
    "own class": moe(norm_placement="peri", layernorm_scaling=True, moe_shared_expert_intermediate_size=28),
}


@pytest.mark.parametrize("name", IDENTITY)
def test_import_of_an_export_is_the_model(name: str, tmp_path: Path) -> None:
    model = IDENTITY[name]
    shapes = choose_family(model).table(model).megatron_shapes
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    export_model(model, tensors, tmp_path / "m", seq_length=16, dtype=torch.float32, tokenizer_dir=None)
    source = open_source(tmp_path / "m")
    channels = None if model.multi_latent_attention else model.head_dim
    derived: dict[str, object] = {"num_query_groups": model.query_groups, "kv_channels": channels}
    derived["embedding_norm"] = model.has_embedding_norm
    if model.is_moe:
        derived["moe_ffn_hidden_size"] = model.expert_ffn_hidden_size
    # Nothing has that width where all layers are mixtures.
    unused = {"ffn_hidden_size"} if model.is_moe and not model.moe_first_k_dense_layers else set()
    unused |= set() if model.is_moe else {"moe_ffn_hidden_size"}
    for key in (SHAPE_KEYS | FEATURES.keys()) - unused:
        expected = derived.get(key, getattr(model, key))
        neutral = FEATURES.get(key, ())
        found = getattr(source.model, key)
        assert found == expected or {found, expected} <= {*neutral}, key
    back = dict(source.tensors())
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    "part", ["self_attn.k_proj.bias", "mlp.shared_expert_gate.weight", "mlp.shared_expert.up_proj.weight"]
)
def test_values_that_ours_has_no_parameter_for_are_refused(part: str) -> None:
    model = MODELS["moe pre-softmax"]
    table = choose_family(model).table(model)
    theirs = dict(table.to_hf(random_tensors(model)))
    theirs[f"model.layers.1.{part}"][0] += 1
    with pytest.raises(ConversionError, match=rf"layer 1: model\.layers\.1\..*{part}"):
        dict(table.to_megatron(theirs))


def test_every_key_of_the_configuration_is_accounted_for() -> None:
    sets = (SHAPE_KEYS, TRAINING_KEYS, FEATURES, DEPENDENT_KEYS)
    assert sorted(field.name for field in fields(ModelConfig)) == sorted(itertools.chain(*sets))


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "relu2"},
        {"norm_placement": "post"},
        {"final_norm": False},
        {"attention_output_gate": "elementwise"},
        {"embedding_norm": True},
    ],
)
def test_features_beyond_the_stock_classes_are_named(change: dict[str, object]) -> None:
    ((key, value),) = change.items()
    assert choose_family(tiny(**change)).architecture == "SparsecodForCausalLM"
    with pytest.raises(ConversionError, match=rf"LlamaForCausalLM: model\.{key}={str(value).lower()};"):
        choose_family(tiny(**change), families=FAMILIES[:-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "RMSNorm"}, "normalization=RMSNorm"),
        ({"norm_placement": "post"}, "norm_placement=post"),
        ({"activation": "geglu"}, "activation=geglu"),
        ({"mlp_bias": False}, "mlp_bias=false"),
        ({"num_query_groups": 2}, "num_query_groups=2, not num_attention_heads"),
        ({"kv_channels": 16}, "kv_channels=16, not hidden_size"),
        ({"attention_output_bias": False}, "qkv_bias=true with another"),
    ],
)
def test_what_neox_has_no_place_for_is_exported_as_our_own(changes: dict[str, object], message: str) -> None:
    model = tiny(**NEOX | changes)
    assert choose_family(model).architecture == "SparsecodForCausalLM"
    with pytest.raises(ConversionError, match=f"GPTNeoXForCausalLM: model.{message}"):
        choose_family(model, families=FAMILIES[:-1])


def test_a_feature_the_families_have_not_heard_of_is_refused() -> None:
    @dataclass
    class NewerConfig(ModelConfig):
        attention_sinks: str = "none"

    newer = NewerConfig(vocab_size=61)
    assert choose_family(newer).architecture == "LlamaForCausalLM"
    with pytest.raises(ConversionError, match="model.attention_sinks: learned"):
        choose_family(replace(newer, attention_sinks="learned"))


def test_what_stands_in_the_way_of_each_candidate_is_told() -> None:
    llama, mixtral = FAMILIES[0], next(each for each in FAMILIES if each.architecture == "MixtralForCausalLM")
    model = moe(moe_shared_expert_intermediate_size=28)
    with pytest.raises(ConversionError, match=r"Llama.*num_moe_experts=5; Mixtral.*shared_expert_intermediate_size=28"):
        choose_family(model, families=(llama, mixtral))


def test_a_configuration_without_vocabulary_is_refused() -> None:
    with pytest.raises(ConversionError, match="model.vocab_size: not set"):
        choose_family(ModelConfig()).table(ModelConfig())


def test_values_transformers_refuses_are_one_line() -> None:
    model = tiny(init_method_std=2.0)
    with pytest.raises(ConversionError, match="LlamaConfig refuses it.*initializer_range") as caught:
        choose_family(model).config(model, seq_length=16, dtype=torch.float32, token_ids=NO_TOKENS)
    assert "\n" not in str(caught.value)
