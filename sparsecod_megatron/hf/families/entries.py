"""Entries of the name tables: embeddings, norms and attention as all families call them, and pieces of MLPs."""

from __future__ import annotations

from collections.abc import Iterator

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.table import Entry
from sparsecod_megatron.hf.transforms import folded, gate_up, query_key_value, same, scaled

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""What most classes call the three matrices of a gated MLP."""


def outer_entries(model: ModelConfig, vocab_size: int) -> tuple[list[Entry], list[Entry]]:
    """What comes before the layers, and what comes after them."""
    vocabulary, norm = same((vocab_size, model.hidden_size)), same((model.hidden_size,))
    before = [Entry(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), vocabulary)]
    if model.has_embedding_norm:
        before.append(Entry(("embedding_norm.weight",), ("model.embedding_norm.weight",), norm))
    after = []
    if model.final_norm:
        after.append(Entry(("decoder.final_layernorm.weight",), ("model.norm.weight",), norm))
    if model.untie_embeddings_and_output_weights:
        after.append(Entry(("output_layer.weight",), ("lm_head.weight",), vocabulary))
    return before, after


def layer_entries(model: ModelConfig, layer: int, *, norm_factor: float) -> Iterator[Entry]:
    """Norms and attention of layer `layer` (from 0).

    Args:
        model: ours.
        layer: its index.
        norm_factor: on the weights of the norms before the branches.
    """
    ours, theirs = layer_names(layer)
    hidden, width = model.hidden_size, model.num_attention_heads * model.head_dim
    norm, join = folded((hidden,), norm_factor), same((hidden,))
    post = model.is_post_norm(layer)
    has_join_norm = post or model.norm_placement in ("peri", "sandwich")
    if not post:
        yield Entry((f"{ours}.input_layernorm.weight",), (f"{theirs}.input_layernorm.weight",), norm)
    yield from _projection_entries(model, f"{ours}.self_attention", f"{theirs}.self_attn")
    yield Entry(
        (f"{ours}.self_attention.linear_proj.weight",), (f"{theirs}.self_attn.o_proj.weight",), same((hidden, width))
    )
    if has_join_norm:
        yield Entry((f"{ours}.self_attn_bda.norm.weight",), (f"{theirs}.attention_join_norm.weight",), join)
        yield Entry((f"{ours}.mlp_bda.norm.weight",), (f"{theirs}.mlp_join_norm.weight",), join)
    if not post:
        yield Entry((f"{ours}.pre_mlp_layernorm.weight",), (f"{theirs}.post_attention_layernorm.weight",), norm)


def _projection_entries(model: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    gated = model.attention_output_gate == "elementwise"
    parts = "qkvg" if gated else "qkv"
    fused = query_key_value(
        model.num_attention_heads, model.query_groups, model.head_dim, model.hidden_size, gated=gated
    )
    yield Entry((f"{ours}.linear_qkv.weight",), tuple(f"{theirs}.{part}_proj.weight" for part in parts), fused)
    if model.qk_norm:
        for part in "qk":
            norm = same((model.head_dim,))
            yield Entry((f"{ours}.{part}_layernorm.weight",), (f"{theirs}.{part}_norm.weight",), norm)


def layer_names(layer: int) -> tuple[str, str]:
    """Prefixes of a layer's tensors in Megatron and in HuggingFace files, without the last dot."""
    return f"decoder.layers.{layer}", f"model.layers.{layer}"


def mlp_entries(
    megatron: str,
    hf: str,
    *,
    ffn: int,
    hidden: int,
    hf_names: tuple[str, str, str] = PROJECTIONS,
    is_gated: bool = True,
    down_factor: float = 1.0,
) -> Iterator[Entry]:
    """One MLP: dense, one expert, or shared expert.

    Args:
        megatron: module that holds `linear_fc1` and `linear_fc2`.
        hf: module that holds the projections.
        ffn: inner width.
        hidden: model width.
        hf_names: names of the gate, up and down projections.
        is_gated: whether there is a gate projection.
        down_factor: power of two folded into the down projection.
    """
    gate, up, down = (f"{hf}.{name}.weight" for name in hf_names)
    into = ((gate, up), gate_up(ffn, hidden)) if is_gated else ((up,), same((ffn, hidden)))
    yield Entry((f"{megatron}.linear_fc1.weight",), *into)
    yield Entry((f"{megatron}.linear_fc2.weight",), (down,), scaled((hidden, ffn), down_factor))


def dense_entries(model: ModelConfig, layer: int) -> Iterator[Entry]:
    """The MLP of a layer without experts."""
    ours, theirs = (f"{prefix}.mlp" for prefix in layer_names(layer))
    return mlp_entries(ours, theirs, ffn=model.ffn_hidden_size, hidden=model.hidden_size, is_gated=model.is_gated)


def routed_entries(
    model: ModelConfig, ours: str, theirs: str, *, hf_names: tuple[str, str, str] = PROJECTIONS
) -> Iterator[Entry]:
    """The router's weight and all routed experts.

    Args:
        model: ours.
        ours: prefix of the layer's MLP in Megatron.
        theirs: prefix of the layer's MLP in HuggingFace files.
        hf_names: names of an expert's projections.
    """
    experts, hidden = model.num_moe_experts or 0, model.hidden_size
    yield Entry((f"{ours}.router.weight",), (f"{theirs}.gate.weight",), same((experts, hidden)))
    for expert in range(experts):
        yield from mlp_entries(
            f"{ours}.experts.local_experts.{expert}",
            f"{theirs}.experts.{expert}",
            ffn=model.expert_ffn_hidden_size,
            hidden=hidden,
            hf_names=hf_names,
            is_gated=model.is_gated,
        )
