"""Every variant of the model family through its export, against the forward pass of the definitions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsecod_megatron.config import ModelConfig, load_config
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf import choose_family, compare_logits, export_model
from sparsecod_megatron.hf.modeling_sparsecod import CACHE
from tests.helpers.megatron import SMALL
from tests.helpers.reference_gpt import forward
from tests.helpers.variants import DENSE, MOE, MOE_SHAPE

TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
CASES = {f"dense-{name}": overrides for name, overrides in DENSE.items()} | {
    f"moe-{name}": (*MOE_SHAPE, *overrides) for name, overrides in MOE.items() if name != "capacity"
}
STOCK = {
    "dense-pre": "LlamaForCausalLM",
    "dense-lns": "LlamaForCausalLM",
    "dense-qk-norm": "Qwen3ForCausalLM",
    "dense-qkv-bias": "Qwen2ForCausalLM",
    "dense-biases": "LlamaForCausalLM",
    "dense-window-skip": "SmolLM3ForCausalLM",
    "dense-no-rope": "SmolLM3ForCausalLM",
    "dense-multipliers": "GraniteForCausalLM",
    "dense-rope-partial": "Phi3ForCausalLM",
    "dense-latents": "DeepseekV3ForCausalLM",
    "dense-latents-of-keys": "DeepseekV3ForCausalLM",
    "dense-latents-llama3": "DeepseekV3ForCausalLM",
    "moe-latents": "DeepseekV3ForCausalLM",
    "dense-neox": "GPTNeoXForCausalLM",
    "dense-olmo": "Olmo2ForCausalLM",
    "dense-gemma": "Gemma3ForCausalLM",
    "dense-mqa": "LlamaForCausalLM",
    "dense-mha": "LlamaForCausalLM",
    "dense-wide-heads": "LlamaForCausalLM",
    "dense-tied": "LlamaForCausalLM",
    "dense-rope-linear": "LlamaForCausalLM",
    "dense-rope-llama3": "LlamaForCausalLM",
    "dense-rope-yarn": "LlamaForCausalLM",
    "dense-window": "MistralForCausalLM",
    "moe-post-softmax": "MixtralForCausalLM",
    "moe-pre-softmax": "Qwen2MoeForCausalLM",
    "moe-top-1": "Qwen2MoeForCausalLM",
    "moe-shared": "Qwen2MoeForCausalLM",
    "moe-shared-gate": "Qwen2MoeForCausalLM",
    "moe-gpt-oss": "GptOssForCausalLM",
    "moe-first-dense": "Qwen2MoeForCausalLM",
    "moe-fp64-router": "MixtralForCausalLM",
    "moe-ling": "Glm4MoeForCausalLM",
}


def variant(name: str) -> ModelConfig:
    return load_config(None, [*SMALL, *CASES[name]]).model


def random_weights(model: ModelConfig) -> dict[str, Tensor]:
    """Every Megatron tensor of the model's table, matrices of unit gain, norms around 1."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, shape in choose_family(model).table(model).megatron_shapes.items():
        noise = torch.randn(shape, generator=generator)
        gain = 1.0 if "embedding" in name else shape[-1] ** -0.5
        tensors[name] = noise * gain if len(shape) > 1 else 0.3 * noise + ("norm" in name)
    return tensors


def export(model: ModelConfig, tensors: dict[str, Tensor], folder: Path, **changes: object) -> Path:
    arguments = {"seq_length": 64, "dtype": torch.float32, "tokenizer_dir": None} | changes
    return export_model(model, tensors, folder, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_the_export_computes_the_variant(name: str, tmp_path: Path) -> None:
    model = variant(name)
    assert choose_family(model).architecture == STOCK.get(name, "SparsecodForCausalLM")
    tensors = random_weights(model)
    logits, blocks = forward(model, tensors, TOKENS)
    folder = export(model, tensors, tmp_path / "m")
    report = compare_logits(lambda tokens: logits, folder, tokens=TOKENS, reference_hidden_states=blocks)
    report.require()
    assert (report.argmax_agreement, report.first_differing_layer) == (1.0, None)


@pytest.mark.parametrize("name", CASES)
def test_both_directions_of_the_table_invert_each_other(name: str) -> None:
    model = variant(name)
    table = choose_family(model).table(model)
    ours = random_weights(model)
    back = dict(table.to_megatron(dict(table.to_hf(ours))))
    assert back.keys() == ours.keys()
    for key in ours:
        if model.layernorm_scaling:  # a factor that is folded is rounded
            torch.testing.assert_close(back[key], ours[key], rtol=3e-7, atol=0)
        else:
            assert torch.equal(back[key], ours[key]), key


@pytest.mark.parametrize("name", ["dense-window", "dense-everything", "moe-deepseek"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generating_with_a_cache_continues_as_without(name: str, attention: str, tmp_path: Path) -> None:
    """Greedy text beyond the window, from prompts of different lengths, against whole forward passes."""
    model = variant(name)
    folder = export(model, random_weights(model), tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    prompts = TOKENS[:, :7]
    padding = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    generated = loaded.generate(
        prompts, attention_mask=padding, max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0
    )
    for row, first in ((0, 3), (1, 0)):
        tokens = prompts[row : row + 1, first:]
        for _ in range(9):
            logits = loaded(tokens, use_cache=False).logits
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(generated[row, first:], tokens[0])


def test_no_argument_is_ignored(tmp_path: Path) -> None:
    """Both names of the cache, the count that transformers' Trainer divides by; what is unknown is refused."""
    model = variant("moe-deepseek")
    loaded = AutoModelForCausalLM.from_pretrained(export(model, random_weights(model), tmp_path / "m")).eval()
    with torch.no_grad():
        expected = loaded(TOKENS, labels=TOKENS)
        for name in ("cache", "past_key_values"):
            given = {name: loaded(TOKENS[:, :12], use_cache=True)[CACHE]}
            torch.testing.assert_close(loaded(TOKENS[:, 12:], **given).logits, expected.logits[:, 12:])
        labels = TOKENS.shape[0] * (TOKENS.shape[1] - 1)
        loss = loaded(TOKENS, labels=TOKENS, num_items_in_batch=3 * labels).loss
        torch.testing.assert_close(loss, expected.loss / 3)
        assert torch.equal(loaded(TOKENS, return_dict=False)[0], expected.logits)
        with pytest.raises(TypeError, match="sparsecod models have no argument encoder_outputs"):
            loaded(TOKENS, encoder_outputs=TOKENS, output_attentions=False)


def test_hidden_states_and_loss_are_transformers(tmp_path: Path) -> None:
    model = variant("dense-everything")
    tensors = random_weights(model)
    logits, blocks = forward(model, tensors, TOKENS)
    loaded = AutoModelForCausalLM.from_pretrained(export(model, tensors, tmp_path / "m")).eval()
    output = loaded(TOKENS, labels=TOKENS, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
    assert len(output.hidden_states) == model.num_layers + 1
    for found, block in zip(output.hidden_states[1:-1], blocks, strict=False):
        torch.testing.assert_close(found, block, rtol=1e-4, atol=1e-4)


def test_the_export_loads_without_this_package(tmp_path: Path) -> None:
    model = variant("moe-deepseek")
    tensors = random_weights(model)
    folder = export(model, tensors, tmp_path / "m")
    torch.save((TOKENS, forward(model, tensors, TOKENS)[0]), tmp_path / "expected.pt")
    program = """
import sys
sys.modules["sparsecod_megatron"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
tokens, expected = torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert (model(tokens).logits - expected).abs().max() < 2e-5
"""
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "expected.pt")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr


def test_dropping_tokens_is_refused_by_name() -> None:
    model = load_config(None, [*SMALL, *MOE_SHAPE, *MOE["capacity"]]).model
    with pytest.raises(ConversionError, match=r"moe_expert_capacity_factor: 0\.75 drops tokens"):
        choose_family(model)


def test_scaling_is_folded_exactly_where_it_is_a_power_of_two(tmp_path: Path) -> None:
    model = load_config(None, [*SMALL, "model.layernorm_scaling=true", "model.num_layers=4"]).model
    tensors = random_weights(model)
    theirs = dict(choose_family(model).table(model).to_hf(tensors))
    name = "model.layers.{}.input_layernorm.weight"
    for layer, factor in ((0, 1.0), (3, 0.5)):
        expected = factor * tensors[f"decoder.layers.{layer}.input_layernorm.weight"]
        assert torch.equal(theirs[name.format(layer)], expected)
