"""HuggingFace directories, written by transformers itself, as our models; and every way in which one can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4MoeConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf import export_model
from sparsecod_megatron.hf.source import open_source
from tests.helpers.reference_gpt import forward
from tests.unit.hf import deepseek

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GLM = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "num_mtp_layers": 0,
}
TOKENS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
PARTIAL = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
FACTORS = {
    "embedding_multiplier": 3,
    "residual_multiplier": 0.25,
    "attention_multiplier": 0.25,
    "logits_scaling": 5.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA3 = {"sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20, **TOKENS}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5, "swiglu_limit": 0.5}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
UNCAPPED = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
NEOX = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
CONFIGS: dict[str, PreTrainedConfig] = {
    **deepseek.CONFIGS,
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "llama-3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral-window": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-window": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=0, tie_word_embeddings=True
    ),
    "qwen3": Qwen3Config(**SIZES, attention_bias=True),
    "qwen3-window": Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=0),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layer_interval=2, **TOKENS),
    "smollm3-window": SmolLM3Config(
        **SIZES, no_rope_layers=[1, 1, 0], use_sliding_window=True, sliding_window=5, layer_types=WINDOWED, **TOKENS
    ),
    "phi3": Phi3Config(**SIZES, sliding_window=5, rope_parameters=PARTIAL, **TOKENS),
    "granite": GraniteConfig(**SIZES, **FACTORS, tie_word_embeddings=True),
    "granite-biases": GraniteConfig(**SIZES, attention_bias=True, mlp_bias=True, attention_multiplier=0.5),
    "olmo2": Olmo2Config(**SIZES, attention_bias=True),
    "olmo3": Olmo3Config(**SIZES, sliding_window=5, layer_types=WINDOWED),
    "olmo3-yarn": Olmo3Config(
        **SIZES,
        sliding_window=5,
        layer_types=WINDOWED,
        rope_parameters={"full_attention": YARN, "sliding_attention": LOCAL | {"rope_theta": 500.0}},
    ),
    "gemma": GemmaConfig(**SIZES, **TOKENS),
    "gemma2": Gemma2Config(**SIZES, **UNCAPPED, sliding_window=5, **TOKENS),
    "gemma3": Gemma3TextConfig(**SIZES, **GEMMA3),
    "gemma3-biases": Gemma3TextConfig(**SIZES, **GEMMA3, attention_bias=True, tie_word_embeddings=False),
    "gemma3-scaled": Gemma3TextConfig(
        **SIZES, **GEMMA3, rope_parameters={"full_attention": LINEAR, "sliding_attention": LOCAL}
    ),
    "gemma3-window": Gemma3TextConfig(**SIZES, **GEMMA3 | {"sliding_window_pattern": 6}),
    "olmoe": OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "gpt-oss": GptOssConfig(**SIZES, **GPT_OSS),
    "gpt-oss-plain": GptOssConfig(
        **SIZES, **GPT_OSS, attention_bias=False, rope_parameters=LOCAL, layer_types=WINDOWED
    ),
    "neox": GPTNeoXConfig(**NEOX),
    "neox-one-after-the-other": GPTNeoXConfig(
        **NEOX,
        use_parallel_residual=False,
        hidden_act="gelu_fast",
        attention_bias=False,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 1.0},
    ),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2-moe": Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=24, mlp_only_layers=[0]),
    "glm4-moe": Glm4MoeConfig(**SIZES, **GLM, attention_bias=True),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True, mlp_only_layers=[0], attention_bias=True),
}


def save(config: PreTrainedConfig, folder: Path, *, bias: float = 0.1, **options: object) -> Path:
    """A random model, its norms away from 1, and biases of that size."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(bias * torch.randn_like(parameter))
            elif parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_import_and_export_give_the_same_tensors(name: str, tmp_path: Path) -> None:
    folder = save(CONFIGS[name], tmp_path / "theirs")
    source = open_source(folder)
    tensors = dict(source.tensors())
    back = export_model(
        source.model,
        tensors,
        tmp_path / "ours",
        seq_length=source.seq_length,
        dtype=torch.float32,
        tokenizer_dir=None,
    )
    expected, found = (load_file(path / "model.safetensors") for path in (folder, back))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert json.loads((back / "config.json").read_text())["architectures"] == type(
        AutoModelForCausalLM.from_config(CONFIGS[name])
    ).__name__.split(",")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_import_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    folder = save(CONFIGS[name], tmp_path / "m")
    source = open_source(folder)
    tokens = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
        found, _ = forward(source.model, dict(source.tensors()), tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


REFUSED = {
    **deepseek.REFUSED,
    "qkv_bias False": Qwen2MoeConfig(**SIZES, **EXPERTS, qkv_bias=False),
    "hidden_act 'gelu'": LlamaConfig(**SIZES, hidden_act="gelu"),
    "has no name table": GPT2Config(),
    "rope_type 'dynamic'": LlamaConfig(**SIZES, rope_parameters=YARN | {"rope_type": "dynamic"}),
    "rope_type 'longrope'": Phi3Config(**SIZES, rope_parameters=LONGROPE, **TOKENS),
    "resid_pdrop 0.1": Phi3Config(**SIZES, resid_pdrop=0.1, **TOKENS),
    "layer_types \\['full_attention', 'sliding": SmolLM3Config(
        **SIZES,
        no_rope_layers=[1, 0, 0],
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        **TOKENS,
    ),
    "hidden_act 'quick_gelu'": GPTNeoXConfig(**NEOX, hidden_act="quick_gelu"),
    "rope_type 'dynamic' has no counterpart": GPTNeoXConfig(
        **NEOX, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}
    ),
    "clip_qkv 8": OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, clip_qkv=8.0),
    "rope_parameters of sliding_attention": Olmo3Config(
        **SIZES, rope_parameters={"full_attention": LOCAL, "sliding_attention": YARN}
    ),
    "attn_logit_softcapping 50.0": Gemma2Config(**SIZES, **TOKENS),
    "final_logit_softcapping 30.0": Gemma2Config(**SIZES, **UNCAPPED | {"final_logit_softcapping": 30.0}, **TOKENS),
    "swiglu_alpha 1.5": GptOssConfig(**SIZES, **GPT_OSS, swiglu_alpha=1.5),
    "quantization_config is 'mxfp4'; dequantise": GptOssConfig(**SIZES, quantization_config={"quant_method": "mxfp4"}),
    "use_bidirectional_attention True": Gemma3TextConfig(**SIZES, **GEMMA3, use_bidirectional_attention=True),
    "rope_theta 0.5": LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 0.5}),
    "mlp_only_layers \\[1\\]": Qwen3MoeConfig(**SIZES, **EXPERTS, mlp_only_layers=[1]),
    "num_nextn_predict_layers 1|num_mtp_layers 1": Glm4MoeConfig(**SIZES, **GLM | {"num_mtp_layers": 1}),
    "rope_parameters .*0.5": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    ),
    "layer_types": Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_ours_cannot_say_is_refused_by_name(message: str, tmp_path: Path) -> None:
    REFUSED[message].save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=message) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def rewritten(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return rewritten


NORM = "model.layers.1.input_layernorm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "broken config": (lambda folder: flip(folder / "config.json", 0, 0), "config.json: transformers cannot read it"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    "flipped header length": (lambda folder: flip(folder / "model.safetensors", 6, 7), "damaged"),
    "flipped header": (lambda folder: flip(folder / "model.safetensors", 9, 5), "damaged"),
    "truncated": (lambda folder: truncate(folder / "model.safetensors"), "damaged"),
    "missing tensor": (rewrite(lambda tensors: tensors.pop(NORM)), f"lacks layer 1: {NORM}"),
    "unknown tensor": (rewrite(lambda tensors: tensors.update(extra=torch.ones(1))), "has extra"),
    "wrong shape": (rewrite(lambda tensors: tensors.update({NORM: torch.ones(31)})), rf"{NORM}: shape \[31\]"),
    "non-finite": (rewrite(lambda tensors: tensors[NORM].fill_(float("inf"))), f"{NORM} holds NaN or infinity"),
    "quantised": (rewrite(lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int8)})), "dequantise"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_directory_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    folder = save(CONFIGS["llama"], tmp_path / "m")
    damage(folder)
    with pytest.raises(ConversionError, match=message) as caught:
        dict(open_source(folder).tensors())
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save(CONFIGS["llama"], tmp_path / "m", max_shard_size="20KB")
    assert dict(open_source(folder).tensors())
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ConversionError, match=f"{shard.name}: no such file, but the index lists it"):
        open_source(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ConversionError, match="index.json: damaged"):
        open_source(folder)


def test_biases_that_are_all_zero_are_left_out(tmp_path: Path) -> None:
    folder = save(CONFIGS["qwen2-moe"], tmp_path / "m", bias=0)
    assert not open_source(folder).model.qkv_bias
    rewrite(lambda tensors: tensors["model.layers.2.self_attn.k_proj.bias"].fill_(0.1))(folder)
    source = open_source(folder)
    assert source.model.qkv_bias
    assert any(bool(tensor.any()) for name, tensor in source.tensors() if name.endswith("linear_qkv.bias"))


def theirs_and_ours(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of transformers' own reading of a directory, and of what we read, by the definitions."""
    source = open_source(folder)
    tokens = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    return expected, forward(source.model, dict(source.tensors()), tokens)[0]


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(
    ("family", "embedding", "output"),
    [
        ("llama-tied", "model.embed_tokens", "lm_head"),
        ("neox-one-after-the-other", "gpt_neox.embed_in", "embed_out"),
    ],
)
def test_an_output_layer_beside_tied_embeddings_is_used_unless_it_is_the_embeddings(
    same: bool, family: str, embedding: str, output: str, tmp_path: Path
) -> None:
    folder = save(CONFIGS[family], tmp_path / "m")
    embeddings = load_file(folder / "model.safetensors")[f"{embedding}.weight"]
    head = embeddings.clone() if same else embeddings.roll(1, 0).contiguous()
    rewrite(lambda tensors: tensors.update({f"{output}.weight": head}))(folder)
    assert open_source(folder).model.untie_embeddings_and_output_weights is not same
    expected, found = theirs_and_ours(folder)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_the_single_file_is_read_before_an_index_as_by_transformers(tmp_path: Path) -> None:
    folder = save(CONFIGS["llama"], tmp_path / "m", max_shard_size="20KB")
    newer = save(CONFIGS["llama"], tmp_path / "newer")
    rewrite(lambda tensors: tensors["lm_head.weight"].mul_(2))(newer)
    (newer / "model.safetensors").rename(folder / "model.safetensors")
    expected, found = theirs_and_ours(folder)
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-5)


def test_all_of_a_listed_shard_is_read(tmp_path: Path) -> None:
    """transformers loads what lies in a shard, whether the index lists it or not."""
    folder = save(CONFIGS["llama"], tmp_path / "m", max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    save_file(load_file(shard) | {"extra": torch.ones(1)}, shard, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="has extra"):
        dict(open_source(folder).tensors())
    save_file(load_file(shard) | {NORM: torch.ones(32)}, shard, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=f"both hold {NORM}"):
        open_source(folder)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = save(CONFIGS["llama"], tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConversionError, match="adapter_config.json: transformers adds this adapter"):
        open_source(folder)


def test_stored_rotary_frequencies_must_be_the_configurations(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for base, refused in ((10000.0, False), (500.0, True)):
        folder = save(CONFIGS["llama"], tmp_path / f"{base:g}")
        frequencies = (base ** -(torch.arange(4) / 4)).bfloat16()
        rewrite(lambda tensors, held=frequencies: tensors.update({name: held}))(folder)
        if refused:
            with pytest.raises(ConversionError, match=rf"{name} holds other frequencies than rope_theta 10000"):
                open_source(folder)
        else:
            assert name not in open_source(folder).files


@pytest.mark.parametrize("legacy", [{"type": "linear"}, {"type": "linear", "rope_type": "linear"}])
def test_rotary_scaling_under_its_older_name(legacy: dict[str, str], tmp_path: Path) -> None:
    folder = save(CONFIGS["llama"], tmp_path / "m")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | {"rope_theta": 500.0, "rope_scaling": legacy | {"factor": 4.0}}))
    model = open_source(folder).model
    assert (model.rope_scaling, model.rope_scaling_factor, model.rotary_base) == ("linear", 4.0, 500)
    expected, found = theirs_and_ours(folder)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
