"""A narrower stream computes what the wide one does on a subspace, exactly, and the configuration says all of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from sparsecod_megatron.compression.compress import Compression, compress
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.errors import ConfigError, ConversionError
from tests.unit.compression.models import SIZES, VOCAB_SIZE, sequences, tiny
from tests.unit.compression.test_contract import gpt2, logits

EPSILON = 0.1
"""So large that a wrong one shows."""
WRITERS = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight", "down_proj")


def qwen3() -> PreTrainedModel:
    torch.manual_seed(1)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 16, "rms_norm_eps": EPSILON})).eval()


def made(family: str) -> PreTrainedModel:
    """A model whose vectors are all different, with a large ε."""
    model = qwen3() if family == "qwen3" else tiny(family)
    generator = torch.Generator().manual_seed(2)
    model.config.rms_norm_eps = EPSILON
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and not name.endswith("expert_bias"):
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
            elif family == "qwen3":
                weight.normal_(std=0.25, generator=generator)
    for module in model.modules():
        for attribute in ("variance_epsilon", "eps"):
            if hasattr(module, attribute):
                setattr(module, attribute, EPSILON)
    return model


def sliced(model: PreTrainedModel, *settings: str, tokens: Tensor | None = None) -> Compression:
    tokens = sequences() if tokens is None else tokens
    return compress(model, find_method("slicegpt", settings), tokens, batch_size=4)


def streams(model: PreTrainedModel) -> Tensor:
    """What enters the norms of blocks and the final one over the calibration tokens, [norms · tokens, d]."""
    seen: list[Tensor] = []
    norms = [module for name, module in model.named_modules() if name.endswith(("layernorm", "model.norm"))]
    assert len(norms) == 5
    hooks = [
        norm.register_forward_hook(lambda _norm, args, _output: seen.append(args[0].flatten(0, 1))) for norm in norms
    ]
    with torch.no_grad():
        model(sequences())
    for hook in hooks:
        hook.remove()
    return torch.cat(seen).double()


@torch.no_grad()
def confine(model: PreTrainedModel, projector: Tensor) -> None:
    """Project all that writes to the stream: embeddings from the right, outputs from the left."""
    if model.lm_head.weight is model.model.embed_tokens.weight:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for name, weight in model.named_parameters():
        if name.endswith(WRITERS):
            weight.copy_(weight.double() @ projector if "embed" in name else projector @ weight.double())


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "qwen2_moe", "sparsecod"])
def test_it_is_the_model_with_projected_streams(family: str) -> None:
    """Reference: singular vectors of the streams themselves, and a model of the old width."""
    model, wide = made(family), made(family)
    directions = torch.linalg.svd(streams(wide), full_matrices=False).Vh[:24]
    confine(wide, directions.T @ directions)
    result = sliced(model)
    config = result.model.config
    assert (config.hidden_size, config.head_dim) == (24, 16 if family == "qwen3" else 8)
    assert config.rms_norm_eps == pytest.approx(EPSILON * 32 / 24) and config.tie_word_embeddings is False
    assert torch.allclose(model.model.norm.weight, torch.tensor((32 / 24) ** 0.5))
    torch.testing.assert_close(logits(result.model), logits(wide), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(wide), logits(made(family)), atol=0.1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_rotation_alone_leaves_the_logits(family: str) -> None:
    before, weights = logits(made(family)), []
    for seed in (5, 6):
        result = sliced(made(family), "share=0", tokens=sequences(seed=seed))
        torch.testing.assert_close(logits(result.model), before, rtol=1e-4, atol=1e-4)
        assert (result.model.model.layers[1].post_attention_layernorm.weight == 1).all()
        weights.append(result.model.model.layers[0].mlp.up_proj.weight)
    assert not torch.allclose(*weights, atol=0.1)


def test_a_planted_subspace_is_found() -> None:
    model = made("llama")
    directions = torch.linalg.qr(torch.randn(32, 16, dtype=torch.float64)).Q
    confine(model, directions @ directions.T)
    before = logits(model)
    result = sliced(model, "share=0.5")
    assert model.config.hidden_size == 16
    torch.testing.assert_close(logits(result.model), before, rtol=1e-4, atol=1e-4)


def test_it_has_the_parameters_of_its_widths() -> None:
    result = sliced(made("llama"))
    width, queries, keys, inner = 24, 32, 16, 48
    layer = width * (2 * queries + 2 * keys + 3 * inner + 2)
    assert result.num_parameters[1] == 2 * VOCAB_SIZE * width + 2 * layer + width  # embeddings untied
    head, linear = result.model.lm_head, result.model.model.layers[0].self_attn.o_proj
    assert (head.in_features, linear.in_features, linear.out_features) == (width, queries, width)
    assert all(row.compressed for row in result.matrices)


def test_bf16_is_near_enough() -> None:
    result = sliced(made("llama").to(torch.bfloat16))
    assert {weight.dtype for weight in result.model.parameters()} == {torch.bfloat16}
    exact = logits(sliced(made("llama")).model)
    assert (logits(result.model).float() - exact).norm() < 0.1 * exact.norm()


def gemma() -> PreTrainedModel:
    torch.manual_seed(1)
    return GemmaForCausalLM(GemmaConfig(**SIZES | {"head_dim": 8})).eval()


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (gpt2, [], r"transformer\.wpe\.weight: --method slicegpt does not know what this does"),
        (gemma, [], "GemmaForCausalLM cut to the kept directions gives other logits"),
        (lambda: tiny("llama"), ["share=0.05"], "share=0.05 with multiple=8 cuts none of 32 coordinates"),
    ],
)
def test_other_models_are_refused(make: Callable[[], PreTrainedModel], settings: list[str], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        sliced(make(), *settings)


def test_a_rotation_for_each_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="rotation=place, a rotation for each place .* is not built; leave it out"):
        find_method("slicegpt", ["rotation=place"])
