"""A GPT forward pass written down from the definitions, on tensors under Megatron-Core's names.

It shares nothing with the code under test: rows of the fused matrices are picked by index, the rotation is a complex
multiplication, heads are visited one by one. It covers every variant of the model family and can be differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sparsecod_megatron.config import ModelConfig
from tests.helpers.reference_latent import latent_heads, latent_tensors, without_latents
from tests.helpers.reference_mlp import dense, linear, mixture


def random_tensors(model: ModelConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """Every parameter of a Megatron GPTModel (local spec), random, norms included."""
    generator = torch.Generator().manual_seed(seed)
    hidden, heads, head_dim, groups = model.hidden_size, model.num_attention_heads, model.head_dim, model.query_groups

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    def norm(size: int = hidden) -> Tensor:
        return 1 + 0.3 * torch.randn(size, generator=generator)

    def stream_norm(at: str) -> dict[str, Tensor]:
        bias = {f"{at}.bias": norm() - 1} if model.normalization == "LayerNorm" else {}
        return {f"{at}.weight": norm()} | bias

    tensors = {"embedding.word_embeddings.weight": matrix(model.vocab_size or 0, hidden) * math.sqrt(hidden)}
    for layer in range(model.num_layers):
        at = f"decoder.layers.{layer}"
        tensors |= stream_norm(f"{at}.input_layernorm")
        if model.multi_latent_attention:
            tensors |= latent_tensors(model, f"{at}.self_attention", matrix, norm)
        else:
            tensors[f"{at}.self_attention.linear_qkv.weight"] = matrix((heads + 2 * groups) * head_dim, hidden)
            tensors[f"{at}.self_attention.linear_proj.weight"] = matrix(hidden, heads * head_dim)
        biases = {"qkv": model.qkv_bias, "proj": model.attention_output_bias}
        for part in (part for part, there in biases.items() if there):
            rows = len(tensors[f"{at}.self_attention.linear_{part}.weight"])
            tensors[f"{at}.self_attention.linear_{part}.bias"] = norm(rows) - 1
        if model.qk_norm:
            tensors |= {f"{at}.self_attention.{part}_layernorm.weight": norm(head_dim) for part in "qk"}
        tensors |= stream_norm(f"{at}.pre_mlp_layernorm")
        mlps = {f"{at}.mlp": model.ffn_hidden_size}
        if model.num_moe_experts is not None and model.is_moe_layer(layer):
            tensors[f"{at}.mlp.router.weight"] = matrix(model.num_moe_experts, hidden)
            if model.moe_router_enable_expert_bias:
                tensors[f"{at}.mlp.router.expert_bias"] = torch.randn(model.num_moe_experts, generator=generator)
            mlps = {
                f"{at}.mlp.experts.local_experts.{expert}": model.expert_ffn_hidden_size
                for expert in range(model.num_moe_experts)
            }
            if model.moe_shared_expert_intermediate_size is not None:
                mlps[f"{at}.mlp.shared_experts"] = model.moe_shared_expert_intermediate_size
        for name, width in mlps.items():
            inner = 2 * width if model.activation in ("swiglu", "geglu", "geglu_tanh") else width
            tensors[f"{name}.linear_fc1.weight"] = matrix(inner, hidden)
            tensors[f"{name}.linear_fc2.weight"] = matrix(hidden, width)
            if model.mlp_bias:
                tensors[f"{name}.linear_fc1.bias"], tensors[f"{name}.linear_fc2.bias"] = norm(inner) - 1, norm() - 1
    tensors |= stream_norm("decoder.final_layernorm")
    if model.untie_embeddings_and_output_weights:
        tensors["output_layer.weight"] = matrix(model.vocab_size or 0, hidden)
    return tensors


def forward(
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    *,
    document_ids: Tensor | None = None,
    router_inputs: dict[int, Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Logits `[batch, seq, vocab]` and each block's output `[batch, seq, hidden]`.

    Args:
        model: the variant.
        weights: under the names of a GPTModel of one process.
        tokens: `[batch, seq]`.
        document_ids: `[batch, seq]`, equal where attention is allowed; None allows it everywhere.
        router_inputs: receives what each layer's router reads, `[batch, seq, hidden]`.
    """
    tied = "embedding.word_embeddings.weight"
    x, blocks, first_values = weights[tied][tokens], list[Tensor](), dict[int, Tensor]()
    x = model.embedding_multiplier * x
    if model.has_embedding_norm:
        x = _norm(x, weights, "embedding_norm", model)
    for layer in range(model.num_layers):
        at = f"decoder.layers.{layer}"
        attention = partial(_attention, model, weights, layer, first_values, document_ids=document_ids)
        mlp = partial(_mlp, model, weights, layer, router_inputs)
        if model.norm_placement == "parallel":
            scale = 1 / math.sqrt(layer + 1) if model.layernorm_scaling else 1.0
            first, second = (_norm(x, weights, f"{at}.{name}_layernorm", model) for name in ("input", "pre_mlp"))
            x = x + attention(scale * first) + mlp(scale * second)
        else:
            x = _sublayer(model, weights, layer, x, attention, f"{at}.input_layernorm", f"{at}.self_attn_bda")
            x = _sublayer(model, weights, layer, x, mlp, f"{at}.pre_mlp_layernorm", f"{at}.mlp_bda")
        blocks.append(x)
    output = weights["output_layer.weight" if model.untie_embeddings_and_output_weights else tied]
    if model.final_norm:
        x = _norm(x, weights, "decoder.final_layernorm", model)
    return x @ output.T / model.logits_scaling, blocks


def _sublayer(
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    layer: int,
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    before: str,
    join: str,
) -> Tensor:
    """The table of docs/MODEL.md, one line a placement."""
    scale = 1 / math.sqrt(layer + 1) if model.layernorm_scaling else 1.0
    post_layers = math.floor(model.mix_post_fraction * model.num_layers)
    kind = model.norm_placement
    if kind == "mix":
        kind = "post" if layer < post_layers else "pre"
    if kind == "post":
        return _norm(x + branch(x), weights, f"{join}.norm", model)
    if kind == "branch":
        return x + scale * _norm(branch(x), weights, f"{join}.norm", model)
    normed = _norm(x, weights, before, model)
    if kind == "pre":
        return x + model.residual_multiplier * branch(scale * normed)
    return x + scale * _norm(branch(normed), weights, f"{join}.norm", model)


def _mlp(
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    layer: int,
    router_inputs: dict[int, Tensor] | None,
    x: Tensor,
) -> Tensor:
    at = f"decoder.layers.{layer}.mlp"
    if not model.is_moe_layer(layer):
        return dense(model, weights, at, x)
    if router_inputs is not None:
        router_inputs[layer] = x
    return mixture(model, weights, at, x, layer=layer)


def _norm(x: Tensor, weights: Mapping[str, Tensor], at: str, model: ModelConfig) -> Tensor:
    """Of the residual stream, of the kind that the model has."""
    if model.normalization == "RMSNorm":
        return _rms_norm(x, weights[f"{at}.weight"], model)
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + model.layernorm_epsilon).sqrt()
    return centred / deviation * weights[f"{at}.weight"] + weights[f"{at}.bias"]


def _rms_norm(x: Tensor, weight: Tensor, model: ModelConfig) -> Tensor:
    weight = 1 + weight if model.layernorm_zero_centered_gamma else weight
    return weight * x / (x.square().mean(-1, keepdim=True) + model.layernorm_epsilon).sqrt()


def _rotation(model: ModelConfig, layer: int, positions: Tensor) -> Tensor:
    """Complex factors `[..., rotated channels / 2]`; the frequencies are transformers'."""
    if model.rotary_base_local is not None and not _sees_everything(model, layer):
        local = {"rope_scaling": "none", "rotary_base": model.rotary_base_local, "rotary_base_local": None}
        return _rotation(replace(model, **local), layer, positions)
    scaling = {"rope_theta": float(model.rotary_base), "rope_type": "default"}
    if model.rope_scaling != "none":
        scaling |= {"rope_type": model.rope_scaling, "factor": model.rope_scaling_factor}
    if model.rope_scaling in ("llama3", "yarn"):
        scaling["truncate"] = model.yarn_correction_range_round_to_int
        scaling["original_max_position_embeddings"] = model.rope_original_max_position_embeddings
    if model.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if model.rotary_percent < 1:
        scaling["partial_rotary_factor"] = model.rotary_percent
    half = round(model.head_dim * model.rotary_percent) // 2
    if model.rope_scaling == "none":
        frequencies, factor = model.rotary_base ** (-torch.arange(half) / half), 1.0
    else:
        original = model.rope_original_max_position_embeddings
        config = LlamaConfig(
            hidden_size=model.num_attention_heads * model.head_dim,
            num_attention_heads=model.num_attention_heads,
            max_position_embeddings=int(original * model.rope_scaling_factor),
            rope_parameters=scaling,
        )
        frequencies, factor = ROPE_INIT_FUNCTIONS[model.rope_scaling](config, torch.device("cpu"))
    angles = positions[..., None] * frequencies
    return torch.polar(torch.full_like(angles, factor), angles)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """`[batch, seq, head_dim]`, channel i and i + half as one complex number; the others stay."""
    half = rotation.shape[-1]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * rotation
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)


def _sees_everything(model: ModelConfig, layer: int) -> bool:
    """Whether a model with a window has none in this layer."""
    return model.window_attn_skip_freq is not None and (layer + 1) % model.window_attn_skip_freq == 0


def _mask(model: ModelConfig, layer: int, length: int, document_ids: Tensor | None) -> Tensor:
    """Whether query `[batch or 1, seq, 1]` sees key `[batch or 1, 1, seq]`."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    seen = (distance >= 0)[None]
    if model.sliding_window is not None and not _sees_everything(model, layer):
        seen = seen & (distance < model.sliding_window)
    if document_ids is not None:
        seen = seen & (document_ids[:, :, None] == document_ids[:, None, :])
    return seen


def _attention(
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    layer: int,
    first_values: dict[int, Tensor],
    x: Tensor,
    *,
    document_ids: Tensor | None,
) -> Tensor:
    at, size = f"decoder.layers.{layer}.self_attention", model.head_dim
    hidden_keys = torch.where(_mask(model, layer, x.shape[1], document_ids), 0.0, float("-inf"))
    if model.multi_latent_attention:
        rotation = _rotation(without_latents(model), layer, torch.arange(x.shape[1]))
        heads = latent_heads(model, weights, at, x, rotation / rotation.abs(), hidden_keys)
        return linear(weights, f"{at}.linear_proj", heads)
    per_group = model.num_attention_heads // model.query_groups
    elementwise = model.attention_output_gate == "elementwise"
    projected = linear(weights, f"{at}.linear_qkv", x)
    slots = per_group * (2 if elementwise else 1) + 2
    rotates = not (model.no_rope_freq and model.no_rope_freq[layer])
    rotation = _rotation(model, layer, torch.arange(x.shape[1]) * rotates)
    rotation = rotation if rotates else rotation / rotation.abs()  # nor do they grow, which YaRN's do
    factor = model.softmax_scale or 1 / math.sqrt(size)
    outputs = []

    def slot(index: int) -> Tensor:
        return projected[..., index * size : (index + 1) * size]

    for head in range(model.num_attention_heads):
        first, within = head // per_group * slots, head % per_group
        query, key, value = slot(first + within), slot(first + slots - 2), slot(first + slots - 1)
        first_value = first_values.setdefault(first, value)  # of the first layer
        if (factors := weights.get(f"{at}.value_mix.weight")) is not None:
            value = factors[0] * value + factors[1] * first_value
        if model.qk_norm_scope == "projection":
            query = _whole_norm(model, weights[f"{at}.q_layernorm.weight"], query, slot, head)
            key = _whole_norm(model, weights[f"{at}.k_layernorm.weight"], key, slot, head // per_group, keys=True)
        elif model.qk_norm:
            query = _rms_norm(query, weights[f"{at}.q_layernorm.weight"], model)
            key = _rms_norm(key, weights[f"{at}.k_layernorm.weight"], model)
        scores = _rotate(query, rotation) @ _rotate(key, rotation).transpose(1, 2) * factor
        scores = scores + hidden_keys
        if (sinks := weights.get(f"{at}.core_attention.softmax_offset")) is not None:
            highest = torch.maximum(scores.amax(-1, keepdim=True), sinks[head])
            exponentials = (scores - highest).exp()
            output = exponentials @ value / (exponentials.sum(-1, keepdim=True) + (sinks[head] - highest).exp())
        else:
            output = scores.softmax(-1) @ value
        if elementwise:
            output = output * torch.sigmoid(slot(first + per_group + within))
        if (gates := weights.get(f"{at}.linear_gate.weight")) is not None:
            output = output * torch.sigmoid(x @ gates[head])[..., None]
        outputs.append(output)
    return linear(weights, f"{at}.linear_proj", torch.cat(outputs, dim=-1))


def _whole_norm(
    model: ModelConfig,
    weight: Tensor,
    x: Tensor,
    slot: Callable[[int], Tensor],
    index: int,
    *,
    keys: bool = False,
) -> Tensor:
    """One head's channels over the root mean square of those of all heads, which `slot` gives by place in a group."""
    per_group, size = model.num_attention_heads // model.query_groups, model.head_dim
    slots = per_group * (2 if model.attention_output_gate == "elementwise" else 1) + 2
    places = [slots - 2] if keys else range(per_group)
    squares = [slot(group * slots + place).square() for group in range(model.query_groups) for place in places]
    mean = torch.cat(squares, dim=-1).mean(-1, keepdim=True)
    return weight[index * size : (index + 1) * size] * x / (mean + model.layernorm_epsilon).sqrt()


def assert_same_gradients(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], ours: torch.Tensor, theirs: torch.Tensor
) -> None:
    """Gradients of the mean square of logits, by the model and by weights of the same names; none is all zero."""
    for logits in (ours, theirs):
        logits.square().mean().backward()
    for name, weight in model.named_parameters():
        expected = weights[name].grad
        assert expected is not None and bool(expected.any()), name
        torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: n + text)
