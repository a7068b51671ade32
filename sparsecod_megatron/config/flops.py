"""Floating-point operations of the model per token, by the conventions in use: for throughput, and for planning."""

from __future__ import annotations

from sparsecod_megatron.config.model_schema import ModelConfig
from sparsecod_megatron.config.parameters import ParameterTable

CONVENTIONS = ("full", "causal", "windowed")
BACKWARD_FACTOR = 3
"""Forward and backward pass together, in forward passes: each product has two products as its gradients."""


def flops_per_token(table: ParameterTable, seq_length: int, *, convention: str = "full") -> float:
    """Forward and backward operations of one token, a multiplication and an addition being two.

    6 for each weight that multiplies it (look-ups and norms are free, the output layer is not; a routed token meets its
    top-k experts only), and 6 · heads · (channels of a key + those of a value) for each key that its queries meet, in
    each layer. The conventions differ in the keys that a query meets on average, of S positions:

    - `full`: S, although half of them are masked. The number in metrics.jsonl, and in most papers.
    - `causal`: S / 2, what a kernel that skips masked blocks computes.
    - `windowed`: the same, but in layers with a sliding window of w < S keys, w − w² / 2S.

    Args:
        table: of the model's parameters, vocabulary included.
        seq_length: tokens of a sequence; masks between documents are not counted.
        convention: one of these.

    Source: Chowdhery et al., PaLM (arXiv 2204.02311), appendix B.
    """
    model, layers = table.model, range(table.model.num_layers)
    matrices = sum(kind.multiplied for layer in layers for kind in table.layer(layer))
    matrices += sum(kind.multiplied for kind in table.last(shares_embedding=False))
    keys = sum(keys_per_query(model, layer, seq_length, convention=convention) for layer in layers)
    channels = model.score_channels + model.value_channels
    return BACKWARD_FACTOR * (2.0 * matrices + 2.0 * model.num_attention_heads * channels * keys)


def keys_per_query(model: ModelConfig, layer: int, seq_length: int, *, convention: str) -> float:
    """Keys that a query of layer `layer` (from 0) meets on average, by a convention of `flops_per_token`."""
    assert convention in CONVENTIONS, convention
    if convention == "full":
        return seq_length
    window = min(model.sliding_window or seq_length, seq_length)
    if convention == "causal" or not is_windowed(model, layer):
        window = seq_length
    return window - window**2 / (2 * seq_length)


def is_windowed(model: ModelConfig, layer: int) -> bool:
    """Whether the layer has a window: every `window_attn_skip_freq`-th, counted from 1, has none."""
    if model.sliding_window is None:
        return False
    return model.window_attn_skip_freq is None or (layer + 1) % model.window_attn_skip_freq != 0
