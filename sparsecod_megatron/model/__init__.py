"""Megatron-Core GPT models from a configuration: reference modules on CPU, Transformer Engine's on CUDA."""

from sparsecod_megatron.model.build import build_model, unwrap
from sparsecod_megatron.model.transformer_config import transformer_config

__all__ = ["build_model", "transformer_config", "unwrap"]
