"""Floating-point operations of the model per token, for throughput in TFLOP/s."""

from __future__ import annotations

from sparsecod_megatron.config import ModelConfig


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Forward and backward operations of one token: 6 a weight it meets, and 12·L·d_attention·S for full attention.

    Embedding look-ups are free, the output layer is not; a routed token meets its top-k experts only. The attention
    term follows the common convention of counting the whole S × S matrix although half of it is masked.

    Args:
        model: its shape, vocabulary included.
        seq_length: tokens of a sequence.

    Source: Chowdhery et al., PaLM (arXiv 2204.02311), appendix B.
    """
    assert model.vocab_size is not None
    attention_width = model.num_attention_heads * model.head_dim
    kv_width = model.query_groups * model.head_dim
    weights = model.hidden_size * (2 * attention_width + 2 * kv_width)
    if model.is_moe:
        expert_width = model.moe_router_topk * model.expert_ffn_hidden_size + (
            model.moe_shared_expert_intermediate_size or 0
        )
        weights += 3 * model.hidden_size * expert_width + model.hidden_size * (model.num_moe_experts or 0)
    else:
        weights += 3 * model.hidden_size * model.ffn_hidden_size
    matrix = 6.0 * (model.num_layers * weights + model.hidden_size * model.vocab_size)
    return matrix + 12.0 * model.num_layers * attention_width * seq_length
