"""Rotary position embedding of the `sparsecod` architecture."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_sparsecod import SparsecodConfig

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, [batch, seq, rotated]."""


class SparsecodRotaryEmbedding(nn.Module):
    """Cosines and sines of the positions, frequencies by transformers' rules for `rope_parameters`.

    Frequencies are made when they are used: a buffer that no file holds would be lost where models load on `meta`.
    """

    def __init__(self, config: SparsecodConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, positions: Tensor, dtype: torch.dtype, kind: str = "full_attention") -> Rotation:
        """[batch, seq] → two of [batch, seq, rotated], as transformers' own models hand them to blocks.

        Args:
            positions: of the tokens.
            dtype: of the result.
            kind: of the layers, as `layer_types` names it.
        """
        base = self.config.rotary_base_local if kind == "sliding_attention" else None
        frequencies, factor = self._frequencies(positions.device, base)
        angles = positions[:, :, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (factor * angles.cos()).to(dtype), (factor * angles.sin()).to(dtype)

    def _frequencies(self, device: torch.device, base: float | None) -> tuple[Tensor, float]:
        """Those of a base of their own, which no scaling concerns, or of the configuration."""
        parameters = self.config.rope_parameters
        if base is None and parameters["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](self.config, device)
        rotated = int(self.config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        pairs = torch.arange(0, rotated, 2, dtype=torch.float, device=device)
        return (base or parameters["rope_theta"]) ** (-pairs / rotated), 1.0


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn channel i with channel i + rotated / 2, the first `rotated` ones; [batch, heads, seq, head_dim]."""
    cos, sin = (part.unsqueeze(1) for part in rotation)
    turning, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned
