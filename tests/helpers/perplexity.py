"""Perplexity in one call, where a test needs no single windows."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from sparsecod_megatron.evaluation.perplexity import PerplexityResult, score_windows, summary


def perplexity(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    seq_length: int,
    stride: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    num_bytes: int | None = None,
) -> PerplexityResult:
    """`summary` of `score_windows`."""
    windows = score_windows(model, tokens, seq_length=seq_length, stride=stride, batch_size=batch_size)
    return summary(windows, seed=seed, num_bytes=num_bytes)
