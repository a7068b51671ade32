"""Variance and RMS of the residual stream and of what each sub-layer adds to it, for every layer.

Definitions, for a tensor x [tokens, channels]:

    *_var    mean over tokens of the unbiased variance over channels
    *_rms    sqrt(mean over tokens and channels of x²)
    *_ratio  variance of the branch over variance of the residual stream it is added to

Two moments give both: with q = Σ_c x² and s = Σ_c x of a token, its variance is (q − s²/d) / (d − 1). Its rounding
error is that of fp32 relative to the mean square, which for a residual stream is nearly the variance.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from sparsecod_megatron.metrics.accumulator import LayerAccumulator
from sparsecod_megatron.metrics.group import Statistics
from sparsecod_megatron.metrics.hooks import PLACES, observing


class VarianceGroup:
    """out_var, attn_var, mlp_var, out_rms, attn_rms, mlp_rms, attn_ratio, mlp_ratio.

    Args:
        models: the GPTModel chunks of this rank, without wrappers.
    """

    names: tuple[str, ...] = tuple(f"{place}_{moment}" for place in PLACES for moment in ("var", "mean_square"))
    maxima: tuple[str, ...] = ()

    def __init__(self, models: Sequence[GPTModel]) -> None:
        self.models = list(models)

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """Observe every training forward pass inside the block. Local."""

        @torch.no_grad()
        def observe(layer: int, place: str, x: Tensor) -> None:
            channels = x.shape[-1]
            tokens = x.numel() // channels
            variance, squares = variance_sums(x)
            names = (f"{place}_var", f"{place}_mean_square")
            sums.add_many(layer, names, torch.stack((variance, squares / channels)), tokens)

        with observing(self.models, observe):
            yield

    def statistics(self, means: dict[str, float]) -> Statistics:
        """One layer's statistics."""
        variances: Statistics = {f"{place}_var": means[f"{place}_var"] for place in ("out", "attn", "mlp")}
        rms = {f"{place}_rms": math.sqrt(means[f"{place}_mean_square"]) for place in ("out", "attn", "mlp")}
        ratios = {f"{place}_ratio": means[f"{place}_var"] / means[f"{place}_in_var"] for place in ("attn", "mlp")}
        return variances | rms | ratios


def variance_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ over tokens of the unbiased variance over channels, Σ of x²), both shape [], in fp32 or better.

    Args:
        x: [..., channels], any float type.
    """
    channels = x.shape[-1]
    flat = x.reshape(-1, channels).to(torch.promote_types(x.dtype, torch.float32))
    squares = torch.dot(flat.view(-1), flat.view(-1))
    token_sums = flat.sum(dim=-1)
    return (squares - torch.dot(token_sums, token_sums) / channels) / (channels - 1), squares
