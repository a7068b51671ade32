"""What all families share: embeddings, attention, norms and the configuration fields for them.

A family file adds what differs: its feed-forward names, its own configuration fields, and what it cannot express.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.table import Entry, NameTable
from sparsecod_megatron.hf.transforms import gate_up, query_key_value, same, scaled


@dataclass(frozen=True)
class Family:
    """A stock transformers class and how ours maps onto it.

    Args:
        architecture: the class that `AutoModelForCausalLM` builds.
        config_class: its configuration.
        obstacle: why it cannot express a model exactly, or None if it can.
        layer_entries: entries of one layer beyond the norms, `linear_qkv` and `linear_proj`.
        fields: configuration fields beyond the shared ones.
    """

    architecture: str
    config_class: type[PreTrainedConfig]
    obstacle: Callable[[ModelConfig], str | None]
    layer_entries: Callable[[ModelConfig, int], Iterator[Entry]]
    fields: Callable[[ModelConfig], dict[str, Any]]

    def table(self, model: ModelConfig) -> NameTable:
        """The names of one model, in the order embedding, layers, final norm, output."""
        return NameTable(self.architecture, tuple(self._entries(model)))

    def config(
        self, model: ModelConfig, *, seq_length: int, dtype: torch.dtype, token_ids: Mapping[str, int | None]
    ) -> PreTrainedConfig:
        """The configuration of one model.

        Args:
            model: ours, `vocab_size` set.
            seq_length: longest sequence trained on, in tokens.
            dtype: of the weights in the files.
            token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.

        Raises:
            ConversionError: transformers refuses a value.
        """
        fields = _shared_fields(model) | self.fields(model)
        try:
            config = self.config_class(
                architectures=[self.architecture],
                dtype=dtype,
                max_position_embeddings=seq_length,
                rope_parameters={"rope_type": "default", "rope_theta": float(model.rotary_base)},
                **token_ids,
                **fields,
            )
        except StrictDataclassError as error:
            raise ConversionError(
                f"model: {self.config_class.__name__} refuses it ({' '.join(str(error).split())}); change that value"
            ) from None
        # Readers older than transformers 5 know only this place, and would silently fall back to their own default.
        config.rope_theta = float(model.rotary_base)
        return config

    def _entries(self, model: ModelConfig) -> Iterator[Entry]:
        vocabulary = same((_vocab_size(model), model.hidden_size))
        yield Entry(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), vocabulary)
        for layer in range(model.num_layers):
            yield from _attention_entries(model, layer)
            yield from self.layer_entries(model, layer)
        yield Entry(("decoder.final_layernorm.weight",), ("model.norm.weight",), same((model.hidden_size,)))
        if model.untie_embeddings_and_output_weights:
            yield Entry(("output_layer.weight",), ("lm_head.weight",), vocabulary)


def layer_names(layer: int) -> tuple[str, str]:
    """Prefixes of a layer's tensors in Megatron and in HuggingFace files, without the last dot."""
    return f"decoder.layers.{layer}", f"model.layers.{layer}"


def gated_mlp_entries(
    megatron: str, hf: str, *, ffn: int, hidden: int, hf_names: tuple[str, str, str], down_factor: float = 1.0
) -> Iterator[Entry]:
    """A SwiGLU MLP: dense, one expert, or shared expert.

    Args:
        megatron: module that holds `linear_fc1` and `linear_fc2`.
        hf: module that holds the three projections.
        ffn: inner width.
        hidden: model width.
        hf_names: names of the gate, up and down projections.
        down_factor: power of two folded into the down projection.
    """
    gate, up, down = (f"{hf}.{name}.weight" for name in hf_names)
    yield Entry((f"{megatron}.linear_fc1.weight",), (gate, up), gate_up(ffn, hidden))
    yield Entry((f"{megatron}.linear_fc2.weight",), (down,), scaled((hidden, ffn), down_factor))


def _attention_entries(model: ModelConfig, layer: int) -> Iterator[Entry]:
    ours, theirs = layer_names(layer)
    hidden, norm = model.hidden_size, same((model.hidden_size,))
    qkv = query_key_value(model.num_attention_heads, model.query_groups, model.head_dim, hidden)
    projection = same((hidden, model.num_attention_heads * model.head_dim))
    attention = f"{theirs}.self_attn"
    yield Entry((f"{ours}.input_layernorm.weight",), (f"{theirs}.input_layernorm.weight",), norm)
    yield Entry(
        (f"{ours}.self_attention.linear_qkv.weight",), tuple(f"{attention}.{part}_proj.weight" for part in "qkv"), qkv
    )
    yield Entry((f"{ours}.self_attention.linear_proj.weight",), (f"{attention}.o_proj.weight",), projection)
    yield Entry((f"{ours}.pre_mlp_layernorm.weight",), (f"{theirs}.post_attention_layernorm.weight",), norm)


def _shared_fields(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": _vocab_size(model),
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_hidden_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
    }


def _vocab_size(model: ModelConfig) -> int:
    if model.vocab_size is None:
        raise ConversionError("model.vocab_size: not set; use the config.yaml that training wrote to its run directory")
    return model.vocab_size
