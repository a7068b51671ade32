"""A narrower stream computes what the wide one does on a subspace, exactly, and the configuration says all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from sparsecod_megatron.compression.compress import Compression, compress, write_model
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.errors import CheckpointError, ConversionError
from sparsecod_megatron.models.opening import open_model
from tests.helpers.words import save_with_words
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


def places(model: PreTrainedModel) -> list[Tensor]:
    """What enters each norm of blocks and the final one over the calibration tokens, [tokens, d] in float64."""
    seen = streams(model)
    return list(seen.split(len(seen) // 5))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "qwen2_moe", "sparsecod"])
def test_with_a_rotation_for_each_place_it_is_the_model_with_its_stream_projected_there(family: str) -> None:
    """Reference: a pass of the old width written out, by singular vectors of each place's own stream."""
    model, wide = made(family), made(family)
    bases = [torch.linalg.svd(seen, full_matrices=False).Vh[:24].T.float() for seen in places(wide)]
    hidden, kept = {"at": torch.zeros(0)}, [basis @ basis.T for basis in bases]

    def embed(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        hidden["at"] = output @ kept[0]
        return hidden["at"]

    def after(place: int, _module: nn.Module, _args: Any, output: Any) -> Any:
        written = output[0] if isinstance(output, tuple) else output
        moved = (hidden["at"] + written) @ kept[place]
        written, hidden["at"] = moved - hidden["at"], moved
        return (written, *output[1:]) if isinstance(output, tuple) else written

    wide.model.embed_tokens.register_forward_hook(embed)
    for number, layer in enumerate(wide.model.layers):
        layer.self_attn.register_forward_hook(partial(after, 2 * number + 1))
        layer.mlp.register_forward_hook(partial(after, 2 * number + 2))
    result = sliced(model, "rotation=place")
    assert result.model.config.hidden_size == 24 and "basis of its own" in result.outcome.warnings[0]
    torch.testing.assert_close(logits(result.model), logits(wide), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(wide), logits(made(family)), atol=0.1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rotations_alone_leave_the_logits_and_cost_two_matrices_a_block(family: str) -> None:
    model = made(family)
    before, parameters = logits(model), model.num_parameters()
    result = sliced(model, "share=0", "rotation=place")
    torch.testing.assert_close(logits(result.model), before, rtol=1e-4, atol=1e-4)
    untied = VOCAB_SIZE * 32 if family == "llama" else 0
    assert result.num_parameters[1] == parameters + untied + 2 * 2 * 32**2
    shortcut = result.model.model.layers[1].mlp_shortcut.weight + torch.eye(32)
    torch.testing.assert_close(shortcut.T @ shortcut, torch.eye(32), rtol=0, atol=1e-5)
    assert not torch.allclose(shortcut, torch.eye(32), atol=0.1)


def test_places_of_different_subspaces_are_kept_where_one_rotation_loses_some() -> None:
    """Embeddings and attention live in one half of the stream, until the first MLP writes far more into the other."""

    def planted() -> PreTrainedModel:
        model = made("llama")
        directions = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)).double()).Q
        low, high = (half @ half.T for half in directions.split(16, dim=1))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("embed_tokens.weight", "layers.0.self_attn.o_proj.weight")):
                    weight.copy_(weight.double() @ low if "embed" in name else low @ weight.double())
                elif name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.copy_(1e3 * (high @ weight.double()) if "layers.0" in name else high @ weight.double())
        return model

    wanted = logits(planted())
    lost = {
        rotation: float((logits(sliced(planted(), "share=0.5", f"rotation={rotation}").model) - wanted).norm())
        for rotation in ("model", "place")
    }
    assert lost["place"] < 0.05 * float(wanted.norm()) < 0.5 * float(wanted.norm()) < lost["model"]


def test_a_directory_with_rotations_for_places_opens_and_generates_as_measured(tmp_path: Path) -> None:
    source = save_with_words(made("llama"), tmp_path / "source")
    result = sliced(made("llama"), "rotation=place")
    (tmp_path / "written").mkdir()
    with open_model(source) as opened:
        write_model(result, opened.tokenizer, source, tmp_path / "written")
    config = json.loads((tmp_path / "written" / "config.json").read_text())
    assert (config["model_type"], config["base"]["hidden_size"]) == ("sparsecod_compressed", 24)
    with open_model(tmp_path / "written") as opened:
        assert torch.allclose(logits(opened.model), logits(result.model), atol=1e-5)
        short, long = (
            opened.model.generate(sequences(1, 5), max_new_tokens=6, do_sample=False, use_cache=cached)
            for cached in (True, False)
        )
        assert torch.equal(short, long), "its cache says something else"
    (tmp_path / "written" / "config.json").write_text(json.dumps(config | {"structure": {"blocks": "model.stack"}}))
    with pytest.raises(CheckpointError, match="blocks that do not fit"), open_model(tmp_path / "written") as opened:
        _ = opened.model
