"""What all families share: a class of transformers, what it can express, and the configuration both ways.

A family file adds what differs: its feed-forward names, its own configuration fields, and what it cannot express.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.families.entries import LayerTensors, layer_entries, outer_entries
from sparsecod_megatron.hf.families.rotary import rope_parameters
from sparsecod_megatron.hf.table import Entry, NameTable
from sparsecod_megatron.hf.transforms import same
from sparsecod_megatron.seams.mechanism import Module


@dataclass(frozen=True)
class Family:
    """A transformers class and how ours maps onto it.

    Args:
        architecture: the class that `AutoModelForCausalLM` builds.
        config_class: its configuration.
        features: keys of ours, among those in `choose.py`, that it has a place for.
        obstacle: why it cannot express a model of these features exactly, or None if it can.
        mlp_entries: entries of one layer beyond its norms and attention.
        fields: configuration fields beyond the shared ones.
        read: the keys of ours that `fields` wrote, from a configuration's fields.
        folds_scaling: whether the factors of LayerNorm scaling go into the norms' weights.
        code: files to copy beside the weights.
        extensible: whether mechanisms' modules can change its layers.
        layout: an entry with the names and the layout that this class has in place of Llama's.
        modules: names of modules, or parts of such names, in place of Llama's.
        spelling: names of fields in place of those that other classes share; None for what this one has not.
        older_fields: what readers before transformers 5 look for in place of `rope_parameters`.
        flat: a configuration's fields, shared ones under their names; `rope_parameters` are those of all layers.
        derived: ends of names of tensors that old files hold and transformers does not read → whether one of them holds
            what the class computes without it.
        without_placeholders: the model that `read` gave, without the parts of the class whose tensors are those that
            export puts where ours has none.
    """

    architecture: str
    config_class: type[PreTrainedConfig]
    features: frozenset[str]
    obstacle: Callable[[ModelConfig], str | None]
    mlp_entries: Callable[[LayerTensors], Iterator[Entry]]
    fields: Callable[[ModelConfig], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    folds_scaling: bool = True
    code: tuple[Path, ...] = ()
    extensible: bool = False
    layout: Callable[[Entry], Entry] = lambda entry: entry
    modules: Mapping[str, str] = field(default_factory=dict)
    spelling: Mapping[str, str | None] = field(default_factory=dict)
    # They would silently fall back to their own default.
    older_fields: Callable[[ModelConfig], dict[str, Any]] = lambda model: {"rope_theta": float(model.rotary_base)}
    flat: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    derived: Mapping[str, Callable[[Tensor], bool]] = field(default_factory=dict)
    without_placeholders: Callable[[ModelConfig, Mapping[str, Tensor]], ModelConfig] = lambda model, tensors: model

    def table(self, model: ModelConfig, modules: Mapping[str, Module] | None = None) -> NameTable:
        """The names of one model, in the order embedding, layers, final norm, output, mechanisms' own.

        Args:
            model: ours.
            modules: what `choose.exported_modules` gave.
        """
        own = [tensor for module in (modules or {}).values() for tensor in module.tensors]
        replaced = {name for module in (modules or {}).values() for name in module.replaced}
        plain = (self._entry(entry) for entry in self._entries(model) if not replaced.intersection(entry.megatron))
        entries = [Entry((tensor.megatron,), (tensor.hf,), same(tensor.shape)) for tensor in own]
        return NameTable(self.architecture, (*plain, *entries))

    def config(
        self,
        model: ModelConfig,
        *,
        seq_length: int,
        dtype: torch.dtype,
        token_ids: Mapping[str, int | None],
        modules: Mapping[str, Module] | None = None,
    ) -> PreTrainedConfig:
        """The configuration of one model.

        Args:
            model: ours, `vocab_size` set.
            seq_length: longest sequence trained on, in tokens.
            dtype: number format of the weights in the files.
            token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.
            modules: what `choose.exported_modules` gave.

        Raises:
            ConversionError: transformers refuses a value.
        """
        shared = {self.spelling.get(name, name): value for name, value in _shared_fields(model).items()}
        fields = {name: value for name, value in shared.items() if name is not None} | self.fields(model)
        if modules:
            fields["mechanisms"] = {name: module.settings for name, module in modules.items()}
        try:
            config = self.config_class(
                architectures=[self.architecture],
                dtype=dtype,
                max_position_embeddings=seq_length,
                **token_ids,
                **fields,
            )
        except StrictDataclassError as error:
            raise ConversionError(
                f"model: {self.config_class.__name__} refuses it ({' '.join(str(error).split())}); change that value"
            ) from None
        for name, value in self.older_fields(model).items():
            setattr(config, name, value)
        return config

    def named(self, name: str) -> str:
        """What the class calls a module or tensor that is `name` in a Llama."""
        return ".".join(self.modules.get(part, part) for part in name.split("."))

    def _entry(self, entry: Entry) -> Entry:
        """As the files have it."""
        entry = self.layout(entry)
        return Entry(entry.megatron, tuple(map(self.named, entry.hf)), entry.transform)

    def _entries(self, model: ModelConfig) -> Iterator[Entry]:
        vocab_size(model)  # refused by its key where it is not known yet
        before, after = outer_entries(model)
        yield from before
        for layer in range(model.num_layers):
            tensors = LayerTensors.of(model, layer)
            yield from layer_entries(tensors, norm_factor=model.scale(layer) if self.folds_scaling else 1.0)
            yield from self.mlp_entries(tensors)
        yield from after


def _shared_fields(model: ModelConfig) -> dict[str, Any]:
    return {
        "rope_parameters": rope_parameters(model),
        "vocab_size": vocab_size(model),
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


def vocab_size(model: ModelConfig) -> int:
    """Rows of the embedding.

    Raises:
        ConversionError: not known yet.
    """
    if model.vocab_size is None:
        raise ConversionError("model.vocab_size: not set; use the config.yaml that training wrote to its run directory")
    return model.vocab_size
