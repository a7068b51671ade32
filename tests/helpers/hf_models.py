"""Small HuggingFace directories of the shape of `tests/helpers/megatron.py`'s model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def write_llama(directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random Llama of three layers, with weights large enough that layers differ; of Mixtral's class with experts.

    Args:
        directory: to make.
        seed: of its weights.
        **changes: fields of its configuration.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

    fields: dict[str, Any] = {
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 16,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        **changes,
    }
    torch.manual_seed(seed)
    config = MixtralConfig if "num_local_experts" in changes else LlamaConfig
    AutoModelForCausalLM.from_config(config(**fields)).save_pretrained(directory)
    return directory
