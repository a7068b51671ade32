"""GPTModel with a norm on its embeddings, for which Megatron-Core's spec has no place."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec, build_module


class EmbeddingNormGPTModel(GPTModel):
    """h_0 = norm(embedding(tokens)); the rest is the parent's.

    Args:
        embedding_norm: spec or class of the norm.
        **arguments: GPTModel's.

    Source: Kim et al., Peri-LN (arXiv 2502.02732), initial embedding normalisation.
    """

    def __init__(self, *, embedding_norm: ModuleSpec | type, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.pre_process:
            self.embedding_norm = build_module(
                embedding_norm,
                config=self.config,
                hidden_size=self.config.hidden_size,
                eps=self.config.layernorm_epsilon,
            )

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The parent's tuple: the decoder's input, [S_local, B, H] or None on a later stage, and rotary angles."""
        decoder_input, *others = super()._preprocess(*args, **kwargs)
        return (decoder_input if decoder_input is None else self.embedding_norm(decoder_input), *others)
