"""What multi-latent attention keeps of a micro-batch for its backward pass on one rank, and what its ranks gather.

Heads are made of latents in the layer, so queries, keys and values are kept as ordinary attention keeps them, beside
latents that are small: what it saves is the cache of a model that generates, not the memory of training.
"""

from __future__ import annotations

from sparsecod_megatron.planning.layout import Layout

Saved = dict[str, int]
"""Bytes by module."""

_FP32 = 4


def latent_activations(layout: Layout, layer: int) -> Saved:
    """Latents and their norms; queries, keys, values, output, log-sum-exp (fp32); in bytes, of layer `layer` (from 0).

    Torch's flash attention takes heads of one width, so that the reference keeps what is filled up with zeros.
    """
    model, value, length = layout.model, layout.bytes_per_value, layout.config.data.seq_length
    projected = 1 if layout.in_fp8(layer) else value
    ranks = [rank for rank in (model.q_lora_rank, model.kv_lora_rank) if rank is not None]
    rows, vectors = layout.norm_tokens, layout.tokens * model.num_attention_heads // layout.tensor
    # The shared key's channels are kept with the latent that they stand beside.
    latents = sum(layout.norm_bytes(rows, rank) + rows * rank * projected for rank in ranks)
    if layout.transformer_engine or value == _FP32:
        latents += rows * model.qk_pos_emb_head_dim * value
    keys, values = vectors * model.score_channels * value, vectors * model.value_channels * value
    saved = {"latents": latents, "softmax": vectors * _FP32, "attention_output": values}
    if layout.transformer_engine:
        saved["qkv"] = 2 * keys + values
        if layout.in_fp8(layer):
            saved["attention_output"] += vectors * model.value_channels
        return saved
    widest = vectors * max(model.score_channels, model.value_channels) * value
    own = length // layout.context
    angles = 4 * own * model.qk_pos_emb_head_dim * value
    mask = own * length * value if layout.context > 1 else 0
    saved["qkv"] = widest * (1 + 2 * layout.context) + angles + mask
    if model.score_channels > model.value_channels:  # what is cut off has been copied
        saved["attention_output"] += widest
    return saved


def gathered_channels(layout: Layout) -> int:
    """Channels of a token that tensor-parallel ranks gather before heads are made of them."""
    model = layout.model
    queries = model.hidden_size if model.q_lora_rank is None else model.q_lora_rank
    return queries + model.kv_lora_rank + model.qk_pos_emb_head_dim
