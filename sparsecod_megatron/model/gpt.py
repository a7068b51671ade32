"""GPTModel with what its spec has no place for, between the embeddings and the layers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from sparsecod_megatron.model.streams import Expansion
from sparsecod_megatron.seams.residual import ResidualPath


class PreparedGPTModel(GPTModel):
    """h_0 = expand(norm(factor · embedding(tokens))), norm and expansion if there; the rest is the parent's.

    Args:
        factor: on the embeddings.
        embedding_norm: spec or class of the norm.
        path: the residual path.
        **arguments: GPTModel's.

    Source: Kim et al., Peri-LN (arXiv 2502.02732), initial embedding normalisation.
    """

    def __init__(
        self,
        *,
        factor: float,
        embedding_norm: ModuleSpec | type | None,
        path: ResidualPath | None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.embedding_factor = factor
        config = self.config
        if self.pre_process and embedding_norm is not None:
            self.embedding_norm = build_module(
                embedding_norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
        if self.pre_process and path is not None:
            self.expansion = Expansion(config, path)

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The parent's tuple: the decoder's input, [S_local, B, columns · H] or None later, and rotary angles."""
        decoder_input, *others = super()._preprocess(*args, **kwargs)
        if decoder_input is not None:
            if self.embedding_factor != 1:
                decoder_input = decoder_input * _rounded(self.embedding_factor, decoder_input.dtype)
            for name in ("embedding_norm", "expansion"):
                decoder_input = getattr(self, name, _unchanged)(decoder_input)
        return (decoder_input, *others)


@functools.cache
def _rounded(factor: float, dtype: torch.dtype) -> float:
    """As the embeddings are, which Gemma's were trained with; a number, so that no step copies it to the device."""
    return float(torch.tensor(factor, dtype=dtype))


def _unchanged(x: Any) -> Any:
    return x
