"""What each module keeps from its forward pass for its backward pass, in bytes, of one micro-batch on one rank.

The reference modules (CPU) are measured against in tests/unit/planning; Transformer Engine's are written down from what
its modules save. They differ in norms (torch's on CPU keeps its input and its normalised input in fp32) and in
attention (the reference keeps the whole query-key-value projection for the sake of its values).

Symbols: T tokens, n tokens of the residual stream (T / TP with sequence parallelism), e bytes per value, H hidden size.
Dropout's masks are counted for the residual branches; attention dropout and masks of documents are not.

Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models (arXiv 2205.05198), section 4.
"""

from __future__ import annotations

from sparsecod_megatron.config.flops import is_windowed
from sparsecod_megatron.planning.latents import Saved, latent_activations
from sparsecod_megatron.planning.layout import Layout

_FP32 = 4
_INDEX = 8


def layer_activations(layout: Layout, layer: int) -> Saved:
    """What layer `layer` (from 0) keeps without recompute.

    An `…_input` is normalised, and kept once for all projections that read it.
    """
    return {
        **_norms(layout, layer),
        **(latent_activations(layout, layer) if layout.model.multi_latent_attention else _attention(layout, layer)),
        **(_experts(layout, layer) if layout.model.is_moe_layer(layer) else {"mlp": _dense(layout, layer)}),
        **layout.mechanism_bytes(layer),
    }


def kept_after_recompute(layout: Layout, layer: int, saved: Saved) -> Saved:
    """What remains of `saved`, of layer `layer`, under selective recompute; the input of what is recomputed stays.

    Transformer Engine fuses the norm before a dense projection into it, and cannot recompute that one alone.
    """
    modules = set(layout.recompute.modules)
    dropped: set[str] = set()
    changed = dict(saved)
    if "core_attn" in modules:
        dropped.add("softmax")
    if "layernorm" in modules:
        for branch in ("attention", "mlp"):
            apart = layout.model.is_moe_layer(layer) if branch == "mlp" else layout.model.multi_latent_attention
            if apart or not layout.transformer_engine:
                dropped.add(f"{branch}_input")
                # A parallel layer's second norm is given its input and the first sum.
                given = 2 if branch == "mlp" and layout.model.is_parallel else 1
                stream = layout.bytes_per_value * layout.norm_tokens * layout.model.hidden_size
                changed[f"{branch}_norm"] = given * stream
    if "mlp" in modules:
        dropped.add("mlp")
    if "moe_act" in modules:
        dropped.add("expert_activation")
    if "shared_experts" in modules:
        dropped.add("shared_experts")
    if "moe" in modules:
        dropped |= {"router", "experts", "expert_activation", "shared_experts"}
    return {name: size for name, size in changed.items() if name not in dropped}


def first_activations(layout: Layout) -> Saved:
    """Before the layers: the tokens, and the embedding norm."""
    model, tokens = layout.model, layout.tokens
    saved = {"embedding": tokens * _INDEX}
    if layout.tensor > 1:
        saved["embedding"] += tokens  # mask of the vocabulary's other shards
    if model.has_embedding_norm:
        saved["embedding_norm"] = layout.stream_norm_bytes(layout.norm_tokens)
    if model.hidden_dropout:
        saved["embedding_dropout"] = layout.norm_tokens * model.hidden_size * _mask_bytes(layout)
    return saved


def last_activations(layout: Layout) -> Saved:
    """Behind the layers: final norm, the output layer's input, and the softmax that the cross entropy keeps in fp32."""
    model = layout.model
    assert model.vocab_size is not None, "the vocabulary size comes from the tokenizer first"
    stream = layout.norm_tokens * model.hidden_size
    return {
        "final_norm": layout.stream_norm_bytes(layout.norm_tokens) if model.final_norm else 0,
        "output_input": layout.bytes_per_value * stream,
        "logits": layout.tokens * (model.vocab_size // layout.tensor * _FP32 + 1 + _INDEX),
    }


def _mask_bytes(layout: Layout) -> int:
    """Bytes of one value's dropout mask; torch on CPU keeps the factor itself."""
    return 1 if layout.transformer_engine else layout.bytes_per_value


def _norms(layout: Layout, layer: int) -> Saved:
    model, tokens = layout.model, layout.norm_tokens
    norm = layout.stream_norm_bytes(tokens)
    stream = tokens * model.hidden_size
    moe = model.is_moe_layer(layer)
    saved = {
        "attention_norm": norm,
        "attention_input": stream * _projection_input(layout, layer),
        "mlp_norm": norm,
        # The router needs it as it is.
        "mlp_input": stream * (layout.bytes_per_value if moe else _projection_input(layout, layer)),
    }
    if model.has_branch_norm and model.has_input_norm(layer):
        saved["post_norms"] = 2 * norm
    if model.hidden_dropout:
        saved["dropout"] = 2 * stream * _mask_bytes(layout)
    return saved


def _attention(layout: Layout, layer: int) -> Saved:
    """Rotated queries and keys, values, output, log-sum-exp (fp32): flash attention keeps no scores."""
    model, tokens, value = layout.model, layout.tokens, layout.bytes_per_value
    heads, groups, width = model.num_attention_heads, model.query_groups, model.head_dim
    query, key = (tokens * count * width // layout.tensor for count in (heads, groups))
    softmax = tokens * heads // layout.tensor * _FP32
    output = query * value
    qkv = (query + 2 * key) * value if layout.transformer_engine else _reference_qkv(layout, layer, query, key)
    saved = {"qkv": qkv, "softmax": softmax, "attention_output": output}
    if model.norms_projections:
        # What fp32 makes of its input, or the copy that grouped queries are; and what the weight multiplies.
        wide = query + key if value != _FP32 else 0 if heads == groups else query
        saved["qk_norm"] = (query + key + wide + 2 * tokens) * _FP32
    elif model.qk_norm:
        vectors = tokens * (heads + groups) // layout.tensor
        saved["qk_norm"] = layout.norm_bytes(vectors, width)
        if not layout.transformer_engine and value == _FP32:
            # Views of the projection, which is kept already; grouped queries are copied.
            saved["qk_norm"] -= (key + (query if heads == groups else 0)) * value
    if model.attention_output_gate == "elementwise":
        saved["attention_gate"] = query * (_FP32 + value)
    elif layout.in_fp8(layer):
        saved["attention_gate"] = query  # the output projection's input in FP8, beside attention's own output
    return saved


def _reference_qkv(layout: Layout, layer: int, query: int, key: int) -> int:
    """Bytes of the reference's rotated queries and keys, values, angles and mask.

    Values are a view of the whole projection, gate included; context parallelism gathers keys and values again.
    """
    model, value = layout.model, layout.bytes_per_value
    length = layout.config.data.seq_length
    angles = 4 * (length // layout.context) * (model.head_dim // 2) * value
    if layout.context > 1:
        gathered = 2 * key * layout.context * value
        return query * value + gathered + angles + (length // layout.context) * length * value
    gate = query if model.attention_output_gate == "elementwise" else 0
    mask = 0
    if model.sliding_window is not None and model.sliding_window < length and is_windowed(model, layer):
        mask = length**2 * value
    return (query + key) * value + (query + 2 * key + gate) * value + angles + mask


def _dense(layout: Layout, layer: int) -> int:
    """The dense MLP without its input."""
    width = layout.model.ffn_hidden_size // layout.tensor
    return layout.tokens * width * (_before_output(layout, layer) + _projection_input(layout, layer))


def _before_output(layout: Layout, layer: int) -> int:
    """Bytes per channel that the activation function keeps, beside what the output projection keeps anyway."""
    # Unfused GEGLU: both projections, the activated gate, and a copy of the other one.
    geglu = 2 if layout.transformer_engine else 4
    kept = {"swiglu": 2, "geglu": geglu, "geglu_tanh": geglu, "clamped_swiglu": 6, "relu": 0}
    values = kept.get(layout.model.activation, 1)
    if layout.model.activation == "relu" and layout.in_fp8(layer):
        values = 1  # its own output, which the projection keeps in FP8
    return values * layout.bytes_per_value


def _projection_input(layout: Layout, layer: int) -> int:
    """Bytes per value of what a projection keeps of its input."""
    return 1 if layout.in_fp8(layer) else layout.bytes_per_value


def _experts(layout: Layout, layer: int) -> Saved:
    """Experts get n · top-k rows (if the load is even), gathered over their tensor-parallel ranks.

    Each keeps its rows, the activation's own, the product with the router's probability where that is not fused, and
    the output projection's input.
    """
    model, value, tokens = layout.model, layout.bytes_per_value, layout.norm_tokens
    rows, experts, chosen = layout.expert_rows(layer), model.num_moe_experts or 0, model.topk(layer)
    width = model.expert_ffn_hidden_size // layout.parallel.expert_tensor_size
    before, projected = _before_output(layout, layer), _projection_input(layout, layer)
    fused = model.activation == "swiglu" and layout.transformer_engine
    weighted = 0 if fused else rows * width * value
    saved = {
        # Logits and scores in fp32, the mask of choices, and the indices of top-k and of the permutation.
        "router": tokens * (experts * (3 * _FP32 + 1) + chosen * (3 * _INDEX + _FP32) + _FP32),
        "experts": rows * (model.hidden_size * projected + _FP32) + rows * width * before,
        "expert_activation": rows * width * projected + weighted,
    }
    shared = model.moe_shared_expert_intermediate_size
    if shared is not None:
        saved["shared_experts"] = layout.tokens * (shared // layout.tensor) * (before + projected)
        if model.moe_shared_expert_gate:
            saved["shared_experts"] += tokens * (model.hidden_size + 1) * value
    return saved
